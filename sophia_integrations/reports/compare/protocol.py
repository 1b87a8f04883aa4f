"""The protocol of a comparison: a YAML section, ``compare:``, over the defaults of ``protocol.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import UserError, nearest

DEFAULTS = Path(__file__).with_name("protocol.yaml")
JUDGES = ("same", "half", "fit")
KNOB_VALUES = 2
"""New runs of the last knob: its value divided and multiplied by a factor; the value itself was a finalist."""
_FEWEST_RATES = 3
_SMALL = 8
"""A budget below it cannot pay three rates, three finalists and a knob: `_SMALL_TUNING` is then the default."""
_SMALL_TUNING = {"finalists": 1, "knob": "none"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tuning(_Section):
    """How each optimizer's runs are spent before the seeds that count; see ``protocol.yaml`` for the words."""

    budget: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    horizon: Annotated[float, Field(gt=0, le=1)]
    rate_factor: Annotated[float, Field(gt=1)]
    finalists: Annotated[int, Field(ge=1)]
    knob: Literal["weight_decay", "beta1", "none"]
    knob_factor: Annotated[float, Field(gt=1)]
    extensions: Annotated[int, Field(ge=0)]

    @property
    def knob_runs(self) -> int:
        """Of the budget."""
        return 0 if self.knob == "none" else KNOB_VALUES

    @property
    def rates(self) -> int:
        """Learning rates that the budget pays for; 0 without tuning."""
        return self.budget - self.finalists - self.knob_runs if self.budget else 0


class Protocol(_Section):
    """A checked protocol."""

    judge: Literal["same", "half", "fit"]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    horizons: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=4)]
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    bootstrap: Annotated[int, Field(ge=100)]
    tuning: Tuning

    def shares(self, reference: bool) -> tuple[float, ...]:
        """The horizons at which a side is judged, as shares of the recipe's steps."""
        if self.judge == "fit":
            return self.horizons
        return (0.5,) if self.judge == "half" and not reference else (1.0,)


def read_protocol(
    protocol: str | None = None, budget: int | None = None, seeds: Sequence[int] | None = None
) -> Protocol:
    """The defaults, laid over by the file or the way to judge that `protocol` names, then by the other arguments.

    A budget from 4 to 7 has one finalist and no knob, so all of it but one run goes to learning rates, unless the file
    says otherwise.

    Raises:
        UserError: no such file or word, or what it says cannot be: a sentence for every key.
    """
    values = _load(DEFAULTS)
    source, tuning = "the protocol", {}
    if protocol in JUDGES:
        values["judge"] = protocol
    elif protocol is not None:
        if not Path(protocol).is_file():
            raise UserError(f"--protocol {protocol}: expected {', '.join(JUDGES)} or a YAML file with compare: in it")
        source, given = protocol, _load(Path(protocol))
        tuning = given.pop("tuning", {})
        if not isinstance(tuning, dict):
            raise UserError(f"{protocol}: compare.tuning: expected keys such as budget: 10")
        values = {**values, **given, "tuning": values["tuning"]}
    if budget is not None:
        tuning["budget"] = budget
    wanted = tuning.get("budget")
    small = _SMALL_TUNING if isinstance(wanted, int) and 0 < wanted < _SMALL else {}
    values["tuning"] = {**values["tuning"], **small, **tuning}
    if seeds is not None:
        values["seeds"] = list(seeds)
    try:
        checked = Protocol.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {_sentence(item)}" for item in error.errors())) from None
    _require_sense(checked)
    return checked


def to_yaml(protocol: Protocol) -> str:
    """The protocol as a file that `read_protocol` takes."""
    values = protocol.model_dump(mode="json")
    return "# The protocol of this comparison; change it and give it back with --protocol FILE.\n" + yaml.safe_dump(
        {"compare": values}, sort_keys=False, default_flow_style=None
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        whole = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    section = whole.get("compare") if isinstance(whole, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{file}: a protocol is a section 'compare:' with keys such as judge: fit")
    return section


def _sentence(item: Any) -> str:
    where = [str(part) for part in item["loc"]]
    key = ".".join(["compare", *where])
    if item["type"] == "extra_forbidden":
        model: type[BaseModel] = Tuning if where[0] == "tuning" and len(where) > 1 else Protocol
        near = nearest(where[-1], model.model_fields, cutoff=0.5)
        return f"{key}: unknown key" + (f", did you mean {near!r}?" if near else "")
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, found {item['input']!r}"


def _require_sense(protocol: Protocol) -> None:
    tuning = protocol.tuning
    if len(set(protocol.seeds)) < len(protocol.seeds):
        raise UserError(f"compare.seeds: a seed is given twice in {list(protocol.seeds)}")
    if len(set(protocol.horizons)) < len(protocol.horizons) or 1.0 not in protocol.horizons:
        raise UserError("compare.horizons: give at least four different shares of the recipe's steps, 1.0 among them")
    if not tuning.budget:
        return
    if tuning.seed in protocol.seeds:
        raise UserError(
            f"compare.tuning.seed: {tuning.seed} is also among the seeds that confirm; what tuned cannot confirm"
        )
    fewest = max(_FEWEST_RATES, tuning.finalists)
    if tuning.rates < fewest:
        knob = f" + {tuning.knob_runs} of {tuning.knob}" if tuning.knob_runs else ""
        finalists = f"{tuning.finalists} finalist{'s' if tuning.finalists > 1 else ''}"
        raise UserError(
            f"a budget of {tuning.budget} runs is too small: {fewest} learning rates at {tuning.horizon:g} of the "
            f"horizon + {finalists}{knob} take {fewest + tuning.finalists + tuning.knob_runs} of each "
            "optimizer; give --budget that many, or 0 to take every recipe as it is"
        )
