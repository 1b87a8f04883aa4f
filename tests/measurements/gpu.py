"""Everything that needs a GPU, in one call that ends within 8 minutes: is it right there, and how fast?

    python tests/measurements/gpu.py [--device cuda] [--out gpu.json] [--seconds 470] [--only step,pass]

For a machine with one NVIDIA GPU and no network, with torch 2.11 or newer, triton, transformers, accelerate, lightning
and pytest. Every part (`gpu_step.py`, `gpu_training.py`) runs in a process of its own with a time limit, so that none
spoils another; the JSON is written after each of them, the table at the end. Exit status 1 where a part failed. With
`--device cpu` everything but the CUDA-only figures runs in miniature. Run it with `make gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMITS = {
    "machine": 40,
    "tests": 110,
    "step": 80,
    "graph": 40,
    "pass": 80,
    "trainer": 60,
    "lightning": 60,
    "compile": 70,
    "eigen": 200,
}
"""Seconds that a part may take; all of them together take less, and the last gets what is left."""

MARK = "figures: "
"""Before each JSON line of a part: libraries print as well."""

LEAST = 15
"""Seconds without which a part is not begun."""


def run_part(name: str, device: str, seconds: float) -> dict:
    """The figures of one part, or what went wrong."""
    command = [sys.executable, __file__, "--part", name, "--device", device, "--seconds", f"{seconds:.0f}"]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return {"seconds": seconds, "figures": figures_in(output), "failed": f"no end after {seconds:.0f} s"}
    result = {"seconds": time.monotonic() - started, "figures": figures_in(done.stdout)}
    if done.returncode:
        result["failed"] = (done.stderr or done.stdout)[-4000:]
    return result


def figures_in(output: str) -> dict:
    """What a part has printed so far."""
    figures = {}
    for line in output.splitlines():
        if line.startswith(MARK):
            figures.update(json.loads(line.removeprefix(MARK)))
    return figures


def table(results: dict[str, dict]) -> str:
    rows = []
    for part, result in results.items():
        state = "FAILED" if "failed" in result else "done"
        rows.append((part, state, f"{result['seconds']:.0f} s"))
        rows += [("", name, shown(value)) for name, value in result["figures"].items()]
        if "failed" in result:
            rows.append(("", "last words", result["failed"].strip().splitlines()[-1][:200]))
    return "\n".join(f"{part:<10} {name:<60} {value}" for part, name, value in rows)


def shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=470, help="for everything together")
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, separated by commas")
    parser.add_argument("--part", help="these parts alone, in this process and without a table")
    options = parser.parse_args()
    if options.part:
        import gpu_step
        import gpu_training

        for part in options.part.split(","):
            home = gpu_step if hasattr(gpu_step, f"part_{part}") else gpu_training
            getattr(home, f"part_{part}")(gpu_step.Bench(options.device, options.seconds, MARK))
        return
    wanted = options.only.split(",")
    if unknown := [part for part in wanted if part not in LIMITS]:
        sys.exit(f"no part {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    end, results = time.monotonic() + options.seconds, {}
    for part in wanted:
        seconds = min(LIMITS[part], end - time.monotonic())
        if seconds < LEAST:
            results[part] = {"seconds": 0.0, "figures": {}, "failed": "no time was left"}
        else:
            results[part] = run_part(part, options.device, seconds)
        options.out.write_text(json.dumps(results, indent=1))
        print(f"{part}: {results[part]['seconds']:.0f} s{', FAILED' if 'failed' in results[part] else ''}", flush=True)
    print(table(results), flush=True)
    sys.exit(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    main()
