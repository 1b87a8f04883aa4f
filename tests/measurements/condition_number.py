"""The picture that explains the basis: the condition number of the inputs against the steps to a fixed loss.

Softmax regression, 48 inputs, 10 classes, labels drawn from a model of the same form, 256 rows a step, float32. The
inputs are independent normals, stretched so that their covariance has condition number κ, along the axes or along a
random rotation of them. Stretch and rotation only rename the weights: the loss at the start and the best loss are the
same for every κ, and so is every step of Newton's method but for rounding.

For each κ a method gets the fewest steps, of a grid in factors of √2, in which it closes 90 % of the gap between the
start and the best loss (held-out rows, exact class probabilities). Every number of steps has its own learning rate,
falling linearly to zero, on a grid in factors of 2 that goes on until the best has a worse one on both sides. Nothing
else is tuned; every method but Newton's has momentum 0.9 in Nesterov's form, and none has weight decay. Run it with
`make condition-number`; takes about five minutes on one free core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophia_integrations import GaussNewtonBartlett, SophiaG, param_groups

INPUTS, CLASSES, ROWS = 48, 10, 256
POOL, HELD_OUT = 65_536, 4_096
CLOSED = 0.9
STEPS = [round(8 * 2 ** (i / 2)) for i in range(23)]
EXPONENTS = range(7)
Build = Callable[[nn.Module, float], torch.optim.Optimizer]
FIGURE = Path(__file__).parents[2] / "recipes" / "condition-number.png"


class SignDescent(torch.optim.Optimizer):
    """θ ← θ − lr · sign(m'), m' the momentum that Sophia follows here (β₁ 0.9, Nesterov)."""

    def __init__(self, params, lr: float, beta1: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta1"])
                p.sub_(group["lr"] * m.lerp(p.grad, 1 - group["beta1"]).sign())


class Newton(torch.optim.Optimizer):
    """θ ← θ − lr · H⁻¹ g in float64, H the exact Hessian of this step's rows."""

    def __init__(self, model: nn.Linear, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        model.register_forward_hook(self._remember)

    def _remember(self, _: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        self._rows, self._p = inputs[0].double(), logits.detach().double().softmax(1)

    @torch.no_grad()
    def step(self) -> None:
        weight, x, p = self.param_groups[0]["params"][0], self._rows, self._p
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :] + 1 / CLASSES  # softmax ignores a common shift
        hessian = torch.einsum("ncd,ni,nj->cidj", curvature, x, x).reshape(weight.numel(), -1) / len(x)
        step = torch.linalg.solve_ex(hessian, weight.grad.double().flatten())[0].view_as(weight)  # a run may diverge
        weight.sub_(self.param_groups[0]["lr"] * step.float())


def sophia(basis: str | None, rho: float | str) -> Build:
    """The same options in both coordinates, which are those of `param_groups(model, basis="eigen")` but for ρ."""
    same = dict(betas=(0.9, 0.9), rho=rho, eps=1e-12, nesterov=True, bias_correction=True)

    def build(model: nn.Module, lr: float) -> SophiaG:
        estimator = GaussNewtonBartlett(model, units=4)
        return SophiaG(param_groups(model, basis=basis, **same), lr=lr, weight_decay=0, estimator=estimator)

    return build


DRAWN: dict[str, Build] = {
    "gradient descent": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True),
    "sign descent": lambda model, lr: SignDescent(model.parameters(), lr=lr),
    "AdamW": lambda model, lr: torch.optim.NAdam(model.parameters(), lr=lr, betas=(0.9, 0.98), momentum_decay=1e4),
    "Sophia": sophia(None, "auto"),
    "Sophia, eigenbasis": sophia("eigen", "auto"),
    "Newton": Newton,
}
ONLY_WITH_MORE: dict[str, Build] = {
    "Sophia, ρ = 0.3": sophia(None, 0.3),
    "Sophia, eigenbasis, ρ = 0.3": sophia("eigen", 0.3),
    "sign descent, eigenbasis": sophia("eigen", 0.0),
}
"""NAdam with a constant momentum is Adam with Nesterov. Sophia has ρ = "auto" where nothing is said; with ρ = 0 it is
sign descent."""

METHODS = DRAWN | ONLY_WITH_MORE

COLOURS = {
    "gradient descent": "#8b949e",
    "sign descent": "#b07aa1",
    "AdamW": "#d9822b",
    "Sophia": "#4c8fd6",
    "Sophia, eigenbasis": "#d1495b",
    "Newton": "#8b949e",
}
TEXT = "#7d8590"
"""Readable on white and on black."""


class Problem:
    """Rows, labels and the held-out loss for one condition number.

    Args:
        condition: of the inputs' covariance.
        rotated: whether the stretched axes are rotated.
    """

    def __init__(self, condition: float, rotated: bool, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        teacher = torch.randn(CLASSES, INPUTS, generator=draw) * 3 / math.sqrt(INPUTS)
        rotation = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=draw))[0]
        stretch = torch.diag(condition ** torch.linspace(0.25, -0.25, INPUTS))
        change = stretch @ rotation.T if rotated else stretch
        normals = torch.randn(POOL + HELD_OUT, INPUTS, generator=draw)
        log_p = (normals @ teacher.T).log_softmax(1)
        self.rows = normals[:POOL] @ change
        self.labels = torch.multinomial(log_p[:POOL].exp(), 1, generator=draw)[:, 0]
        self._held_out, self._p = normals[POOL:] @ change, log_p[POOL:].exp()
        self.best = -(self._p * log_p[POOL:]).sum(1).mean().item()

    def gap(self, model: nn.Module) -> float:
        """How far the held-out loss is above the best, as a share of where it starts; infinite if it is not finite."""
        with torch.no_grad():
            loss = -(self._p * model(self._held_out).log_softmax(1)).sum(1).mean().item()
        return (loss - self.best) / (math.log(CLASSES) - self.best) if math.isfinite(loss) else math.inf


def train(problem: Problem, method: str, lr: float, steps: int) -> float:
    """The gap that `steps` steps leave, with the learning rate falling linearly to zero."""
    model = nn.Linear(INPUTS, CLASSES, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = METHODS[method](model, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        first = step * ROWS % POOL
        F.cross_entropy(model(problem.rows[first : first + ROWS]), problem.labels[first : first + ROWS]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return problem.gap(model)


def best_rate(problem: Problem, method: str, exponent: int, steps: int) -> tuple[float, int]:
    """The smallest gap over learning rates 2ᵉ and its e, from `exponent` downhill until both neighbours are worse."""
    gaps: dict[int, float] = {}

    def gap(e: int) -> float:
        if e not in gaps:
            gaps[e] = train(problem, method, 2.0**e, steps)
        return gaps[e]

    while (better := min((exponent, exponent - 1, exponent + 1), key=gap)) != exponent:
        exponent = better
    return gap(exponent), exponent


def fewest_steps(problem: Problem, method: str, index: int, exponent: int) -> tuple[int, int, float]:
    """The first of STEPS that closes the gap, from STEPS[index] up or down, or the last if none does.

    Returns:
        Its index, the exponent of its learning rate, and its gap.
    """
    gap, exponent = best_rate(problem, method, exponent, STEPS[index])
    direction = -1 if gap <= 1 - CLOSED else 1
    while 0 <= index + direction < len(STEPS):
        next_gap, next_exponent = best_rate(problem, method, exponent, STEPS[index + direction])
        closed = next_gap <= 1 - CLOSED
        if direction == -1 and not closed:
            break
        index, exponent, gap = index + direction, next_exponent, next_gap
        if direction == 1 and closed:
            break
    return index, exponent, gap


def measure(method: str, rotated: bool, seed: int) -> list[dict]:
    """A method's fewest steps over the condition numbers, each search starting where the last one ended."""
    index, exponent, points = 0, -5, []
    for power in EXPONENTS:
        index, exponent, gap = fewest_steps(Problem(10.0**power, rotated, seed), method, index, exponent)
        reached = gap <= 1 - CLOSED
        points.append(
            {"condition": 10**power, "reached": reached, "steps": STEPS[index], "lr": 2.0**exponent, "gap": gap}
        )
    return points


def row(name: str, points: list[dict]) -> str:
    cells = [f"{'' if point['reached'] else '> '}{point['steps']:,}" for point in points]
    return f"| {name} | {' | '.join(cells)} |"


def draw(lines: dict[bool, dict[str, list[dict]]], target: Path) -> None:
    """One panel for rotated inputs and one for unrotated ones; a triangle is a loss not reached."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {True: "correlated inputs (rotated)", False: "the same inputs along the axes"}
    for axes, (rotated, methods) in zip(panels, lines.items(), strict=True):
        ends = {}
        for method in DRAWN:
            points, colour, bold = methods[method], COLOURS[method], method == "Sophia, eigenbasis"
            width, style = 2.8 if bold else 1.6, ":" if method == "Newton" else "-"
            x, y = [p["condition"] for p in points], [p["steps"] for p in points]
            reached = sum(p["reached"] for p in points)
            axes.plot(x[: reached + 1], y[: reached + 1], style, color=colour, linewidth=width, zorder=3 if bold else 2)
            if reached < len(points):
                axes.plot(x[reached], y[reached], "^", color=colour, markersize=7, clip_on=False)
            ends[method] = y[min(reached, len(y) - 1)]
        for method, height in spread(ends).items():
            axes.annotate(method, (10.0 ** EXPONENTS[-1], height), (5, 0), textcoords="offset points", va="center",
                          color=COLOURS[method], fontsize=8.5, annotation_clip=False,
                          fontweight="bold" if method == "Sophia, eigenbasis" else "normal")  # fmt: skip
        if not all(point["reached"] for method in DRAWN for point in methods[method]):
            axes.annotate(f"▲ not in {STEPS[-1]:,} steps", (0.62, 0.935), xycoords="axes fraction", ha="right",
                          va="center", color=TEXT, fontsize=8.5)  # fmt: skip
        axes.set_title(titles[rotated], loc="left", fontsize=10, color=TEXT)
        axes.set_xlabel("condition number of the inputs", color=TEXT)
        axes.set(xscale="log", yscale="log", xlim=(1, 10.0 ** EXPONENTS[-1]), ylim=(STEPS[0] * 0.9, STEPS[-1] * 2))
        axes.set_xticks([10.0**e for e in EXPONENTS[::2]])
        axes.set_yticks([10, 100, 1000, 10_000])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(colors=TEXT, length=0)
        axes.grid(True, color=TEXT, alpha=0.25, linewidth=0.7)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("optimizer steps to the loss", color=TEXT)
    figure.savefig(target, transparent=True)


def spread(heights: dict[str, float], apart: float = 1.42) -> dict[str, float]:
    """The heights of labels, moved up and down on a logarithmic axis until each is `apart` times the one below."""
    names = sorted(heights, key=heights.get)
    logs = [math.log(heights[name]) for name in names]
    for _ in range(1000):
        for i in range(len(logs) - 1):
            overlap = math.log(apart) - (logs[i + 1] - logs[i])
            if overlap > 1e-9:
                logs[i], logs[i + 1] = logs[i] - overlap / 2, logs[i + 1] + overlap / 2
    return {name: math.exp(value) for name, value in zip(names, logs, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the problem and the labels drawn")
    parser.add_argument("--more", action="store_true", help="also the lines of the table that are not drawn")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--out", type=Path, help="also write steps, learning rates and gaps as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: dict[bool, dict[str, list[dict]]] = {}
    for rotated in (True, False):
        print(f"\nSteps to the loss, inputs {'rotated' if rotated else 'along the axes'}:\n")
        print(f"| condition number | {' | '.join(f'10^{e}' for e in EXPONENTS)} |")
        print(f"|---|{'---|' * len(EXPONENTS)}")
        for method in METHODS if options.more else DRAWN:
            lines.setdefault(rotated, {})[method] = measure(method, rotated, options.seed)
            print(row(method, lines[rotated][method]), flush=True)
    draw(lines, options.figure)
    print(f"\n{options.figure}; torch {torch.__version__}, seed {options.seed}")
    if options.out:
        names = {True: "rotated", False: "along the axes"}
        options.out.write_text(json.dumps({names[rotated]: methods for rotated, methods in lines.items()}, indent=1))


if __name__ == "__main__":
    main()
