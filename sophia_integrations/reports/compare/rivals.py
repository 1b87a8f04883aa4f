"""The optimizers that a recipe can be compared with by name, and what each changes in it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError, nearest
from ..places import Settings, at, is_lightning, set_optim_args, value_of
from .dials import OURS, dials_of, load, rounded

_OWN = "sophia_integrations.reports.compare.optimizers"
_CALLBACK = "sophia_integrations.lightning.SophiaCallback"
_ONCE = 1_000_000_000
"""A Hessian interval of which only the first estimate is made: sign momentum does without."""


@dataclass(frozen=True)
class Rival:
    """One optimizer.

    Attributes:
        optim: its name in TrainingArguments; those that transformers does not know are added in a comparison's runs.
        rate: where its learning rates are tried first, in multiples of AdamW's.
        words: its ``optim_args``.
        class_path: its class in a Lightning recipe, with `arguments`.
        groups: what `CausalLM` is told of its parameter groups; None for one rule for all.
        own_betas: whether AdamW's β in the recipe are not for it.
        package: of the extra ``compare`` that it needs.
        about: in a sentence, what it is here.
    """

    optim: str
    rate: float
    about: str
    class_path: str
    words: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] | None = None
    own_betas: bool = False
    package: str | None = None

    @property
    def estimates(self) -> bool:
        """Whether it has a Hessian pass."""
        return self.optim.startswith("sophia")


_EXTRA = "pytorch_optimizer"
_SIGN = {"rho": 0.0, "hessian_interval": _ONCE}
_SOPHIA = "sophia_integrations.SophiaG"
RIVALS: dict[str, Rival] = {
    "adamw": Rival("adamw_torch_fused", 1.0, "torch's AdamW, fused", "torch.optim.AdamW", arguments={"fused": True}),
    "lion": Rival(
        OURS + "lion", 0.25, "Lion on all parameters", "pytorch_optimizer.Lion", own_betas=True, package=_EXTRA
    ),
    "adahessian": Rival(
        OURS + "adahessian",
        16.0,
        "AdaHessian on all parameters; each backward pass keeps its graph",
        "",
        own_betas=True,
        package=_EXTRA,
    ),
    "soap": Rival(OURS + "soap", 1.0, "SOAP on matrices, AdamW on the rest", f"{_OWN}.Soap", groups={}, package=_EXTRA),
    "muon": Rival(
        OURS + "muon",
        1.0,
        "torch's Muon on matrices, AdamW on the rest",
        f"{_OWN}.Muon",
        arguments={"momentum": 0.95},
        groups={},
    ),
    "sign": Rival(
        "sophia",
        0.25,
        "sign momentum: the paper's Sophia with rho 0",
        _SOPHIA,
        words=_SIGN,
        arguments=_SIGN,
        own_betas=True,
    ),
    "sophia": Rival("sophia", 0.25, "the paper's Sophia", _SOPHIA, own_betas=True),
    "sophia_eigen": Rival("sophia_eigen", 1.0, "Sophia in the eigenbasis", _SOPHIA, groups={"basis": "eigen"}),
}


@dataclass(frozen=True)
class Side:
    """One optimizer of a comparison: its name and the recipe that it trains by."""

    name: str
    settings: Settings
    about: str = ""


def sides_of(recipe: str, against: Sequence[str]) -> list[Side]:
    """The recipe's own side, then one for each of `against`, which are names of `RIVALS` or recipes.

    Raises:
        UserError: a name that is none, a missing package, an optimizer that cannot train this recipe, or a recipe that
            trains something else.
    """
    own = load(recipe)
    own = dials_of(own).prepare(own)
    sides = [Side(Path(recipe).stem, own, "the recipe as it is")]
    for word in against:
        if word in RIVALS:
            side = Side(word, changed(own, word), RIVALS[word].about)
        elif Path(word).suffix in (".yaml", ".yml") or "/" in word:
            other = load(word)
            side = Side(Path(word).stem, dials_of(other).prepare(other), f"the recipe {word}")
            _require_same_task(own, side.settings, word)
        else:
            near = nearest(word, RIVALS, cutoff=0.4)
            hint = f"did you mean {near}? " if near else ""
            raise UserError(f"--against {word}: {hint}Known: {', '.join(RIVALS)}, or the file of a recipe")
        number = sum(other.name.partition("#")[0] == side.name for other in sides) + 1
        sides.append(side if number == 1 else Side(f"{side.name}#{number}", side.settings, side.about))
    return sides


def changed(settings: Settings, name: str) -> Settings:
    """The recipe with another optimizer; its rate is the same multiple of AdamW's as its own."""
    rival = RIVALS[name]
    if rival.package and importlib.util.find_spec(rival.package) is None:
        raise UserError(
            f"--against {name} needs {rival.package.replace('_', '-')}, not installed here: "
            "pip install 'sophia-integrations[compare]'"
        )
    rate = rounded(dials_of(settings).get(settings, "rate") * rival.rate / _rate_of(settings))
    new = copy.deepcopy(settings)
    if is_lightning(settings):
        _change_lightning(new, name, rival)
    else:
        _change_hf(new["training"], rival)
    return dials_of(new).set(new, "rate", rate)


def _change_hf(training: dict[str, Any], rival: Rival) -> None:
    training["optim"] = rival.optim
    training.pop("optim_args", None)
    if rival.words:
        set_optim_args(training, **rival.words)
    if rival.own_betas:
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            training.pop(key, None)


def _change_lightning(settings: Settings, name: str, rival: Rival) -> None:
    if not rival.class_path:
        raise UserError(
            f"--against {name}: it needs every backward pass to keep its graph, which Lightning's automatic "
            "optimization does not do; compare an hf recipe with it"
        )
    arguments = settings["model"]["init_args"]
    optimizer = arguments["optimizer"]
    before = optimizer.get("init_args") or {}
    adamw = dict((arguments.get("groups") or {}).get("adamw") or {})
    if optimizer["class_path"].endswith("AdamW") and "betas" in before:
        adamw.setdefault("betas", before["betas"])
    kept = {key: before[key] for key in ("lr", "weight_decay") if key in before}
    arguments["optimizer"] = {"class_path": rival.class_path, "init_args": {**kept, **rival.arguments}}
    if name == "adamw" and "betas" in adamw:
        arguments["optimizer"]["init_args"]["betas"] = adamw["betas"]
    arguments.pop("groups", None)
    if rival.groups is not None:
        arguments["groups"] = {**rival.groups, **({"adamw": adamw} if adamw else {})}
    trainer = settings["trainer"]
    callbacks = [c for c in trainer.get("callbacks") or [] if not str(c.get("class_path")).endswith("SophiaCallback")]
    trainer["callbacks"] = callbacks + ([{"class_path": _CALLBACK}] if rival.estimates else [])


def _rate_of(settings: Settings) -> float:
    """The multiple of AdamW's learning rate that the recipe's own optimizer takes."""
    if is_lightning(settings):
        optim = str(at(settings, ("model", "init_args", "optimizer", "class_path"))).rpartition(".")[2].lower()
    else:
        optim = str(settings["training"].get("optim", "adamw"))
    if optim.startswith("sophia"):
        return 1.0 if optim == "sophia_eigen" or value_of(settings, "basis") == "eigen" else RIVALS["sophia"].rate
    return next((rival.rate for rival in RIVALS.values() if rival.optim == optim), 1.0)


def _require_same_task(own: Settings, other: Settings, word: str) -> None:
    keys: tuple[tuple[str, ...], ...] = (("framework",), ("task",), ("tokenizer",), ("data",), ("model",))
    if is_lightning(own):
        keys = (("framework",), ("data",), ("model", "init_args", "config"), ("model", "init_args", "pretrained"))
    for key in keys:
        if at(own, key) != at(other, key):
            raise UserError(
                f"--against {word}: its {'.'.join(key)} is not the recipe's: losses compare only for the same model on "
                "the same text; change nothing but the optimizer and its settings"
            )
    lengths = [dials_of(one).length(one) for one in (own, other)]
    if lengths[0] != lengths[1]:
        shown = [f"{epochs:g} epochs" if steps is None else f"{steps} steps" for steps, epochs in lengths]
        raise UserError(f"--against {word}: it trains {shown[1]}, and the recipe {shown[0]}; make them equal")
