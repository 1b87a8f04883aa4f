"""The protocol: what can be changed, and what is said of what cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sophia_integrations.errors import UserError
from sophia_integrations.reports.compare.protocol import read_protocol, to_yaml


def written(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def test_a_name_a_budget_and_seeds_over_the_defaults():
    protocol = read_protocol("fit", 9, [3, 4])
    assert (protocol.judge, protocol.seeds, protocol.tuning.rates) == ("fit", (3, 4), 4)
    assert protocol.shares(reference=False) == protocol.horizons == (0.5, 0.625, 0.75, 1.0)
    half = read_protocol("half")
    assert (half.shares(reference=True), half.shares(reference=False)) == ((1.0,), (0.5,))
    assert read_protocol(budget=0).tuning.rates == 0


def test_a_file_changes_what_it_names_and_the_protocol_kept_can_be_given_back(tmp_path):
    mine = written(tmp_path, "compare: {judge: half, tuning: {knob: beta1, finalists: 2}}")
    protocol = read_protocol(mine)
    assert (protocol.judge, protocol.tuning.knob, protocol.tuning.rates) == ("half", "beta1", 6)
    assert read_protocol(written(tmp_path, to_yaml(protocol))) == protocol


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("compare: {tuning: {finalist: 2}}", r"compare\.tuning\.finalist: unknown key, did you mean 'finalists'\?"),
        ("compare: {judge: best}", r"compare\.judge: input should be 'same', 'half' or 'fit', found 'best'"),
        ("compare: {tuning: {horizon: 2}}", r"compare\.tuning\.horizon: .* less than or equal to 1, found 2"),
        ("compare: {seeds: [0, 1000]}", "1000 is also among the seeds that confirm"),
        ("compare: {seeds: [1, 1]}", "a seed is given twice"),
        ("compare: {horizons: [0.5, 0.6, 0.7, 0.8]}", r"1\.0 among them"),
        ("compare: {tuning: 3}", r"compare\.tuning: expected keys"),
        ("judge: fit", "a protocol is a section 'compare:'"),
        ("compare: {", "cannot be read as YAML"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(text, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        read_protocol(written(tmp_path, text))


def test_several_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        read_protocol(written(tmp_path, "compare: {judge: best, seeds: []}"))
    assert len(str(error.value).splitlines()) == 2


def test_no_such_protocol():
    with pytest.raises(UserError, match="--protocol fast: expected same, half, fit or a YAML file"):
        read_protocol("fast")


def test_a_budget_that_is_too_small_says_what_it_must_be(tmp_path):
    with pytest.raises(UserError, match=re.escape("a budget of 3 runs is too small")) as error:
        read_protocol(budget=3)
    assert "3 learning rates at 0.25 of the horizon + 1 finalist take 4" in str(error.value)
    mine = written(tmp_path, "compare: {tuning: {finalists: 3, knob: weight_decay}}")
    with pytest.raises(UserError, match="a budget of 7 runs is too small") as error:
        read_protocol(mine, budget=7)
    assert "3 learning rates at 0.25 of the horizon + 3 finalists + 2 of weight_decay take 8" in str(error.value)
    assert read_protocol(mine, budget=8).tuning.rates == 3


@pytest.mark.parametrize("judge", ["same", "half", "fit"])
def test_a_small_budget_goes_to_learning_rates_as_the_file_that_says_so(judge, tmp_path):
    text = f"compare: {{judge: {judge}, tuning: {{budget: 5, finalists: 1, knob: none}}}}"
    assert read_protocol(judge, budget=5) == read_protocol(written(tmp_path, text))
    for budget in (4, 5, 6, 7):
        tuning = read_protocol(judge, budget).tuning
        assert (tuning.rates, tuning.finalists, tuning.knob) == (budget - 1, 1, "none")
    whole = read_protocol(judge, budget=8).tuning
    assert (whole.rates, whole.finalists, whole.knob) == (3, 3, "weight_decay")


def test_a_file_decides_what_it_names_of_a_small_budget(tmp_path):
    tuning = read_protocol(written(tmp_path, "compare: {tuning: {budget: 6, finalists: 2}}")).tuning
    assert (tuning.rates, tuning.finalists, tuning.knob) == (4, 2, "none")
