"""The measurement scripts in miniature: what the README's figures say, at sizes that take seconds."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "measurements"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def picture():
    return script("condition_number")


@pytest.mark.parametrize("rotated", [False, True])
def test_newton_does_not_see_the_condition_number(picture, rotated):
    for condition in (1.0, 1e6):
        gap, _ = picture.best_rate(picture.Problem(condition, rotated), "Newton", 0, 16)
        assert gap <= 1 - picture.CLOSED


def test_across_the_coordinates_the_eigenbasis_closes_the_gap_where_adamw_does_not(picture):
    problem = picture.Problem(1e5, rotated=True)
    eigenbasis, _ = picture.best_rate(problem, "Sophia, eigenbasis", -2, 256)
    adamw, _ = picture.best_rate(problem, "AdamW", -4, 256)
    assert eigenbasis <= 1 - picture.CLOSED < adamw


def test_the_search_finds_the_fewest_steps(picture, monkeypatch):
    gaps = {4: 0.5, 8: 0.3, 16: 0.09, 32: 0.01}
    monkeypatch.setattr(picture, "STEPS", list(gaps))
    monkeypatch.setattr(picture, "train", lambda problem, method, lr, steps: gaps[steps] + abs(lr - 0.5))
    for start in range(4):
        index, exponent, gap = picture.fewest_steps(None, "any", start, -1)
        assert (picture.STEPS[index], exponent, gap) == (16, -1, 0.09)


def test_an_arm_trains_and_leaves_a_line(tmp_path, monkeypatch, capsys):
    arms = script("arms")
    model = dict(n_layer=1, n_embd=16, n_positions=16, vocab_size=300)
    monkeypatch.setitem(arms.SIZES, "tiny", (model, dict(batch_size=4)))
    monkeypatch.setattr(arms, "evaluate", lambda model, module: 5.0)
    out = tmp_path / "arms.jsonl"
    names = ["eigen:lr=4e-3", "adamw:lr=1e-3,e.lr=2e-3", "nadamw:lr=1e-3", "eigen-squares:lr=1e-3", "sign:lr=1e-3"]
    monkeypatch.setattr("sys.argv", ["arms.py", *names, "--size", "tiny", "--steps", "3", "--out", str(out)])
    arms.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["arm"] for line in lines] == names
    assert lines[0]["curve"][-1]["rho"] > 0 and "win_rate" not in lines[1]["curve"][-1]
    assert lines[4]["curve"][-1]["rho"] == 0
    assert capsys.readouterr().out.count("3 steps") == len(names)


def test_the_arithmetic_of_the_basis_counts_its_products():
    cost = script("basis_cost")
    square, cut = (cost.arithmetic(cost.layouts(cap)["attn.c_proj"]) for cap in (768, 384))
    assert square["products"] == 3 * 2 * (2 * 768**3)  # into the basis, out of it, and the factors, each of two sides
    assert cut["products"] == square["products"] / 2
    assert cut["refresh"] < square["refresh"] / 3


def test_which_package_writes_functions_and_a_recipe(tmp_path, monkeypatch, capsys):
    package = script("which_package")
    monkeypatch.setattr("sys.argv", ["which_package.py", "--out", str(tmp_path / "out")])
    package.main()
    rows = [json.loads(line) for line in (tmp_path / "out/functions.jsonl").read_text().splitlines()]
    assert len({row["label"] for row in rows}) == package.PACKAGES
    assert all(len(row["text"].splitlines()) in package.LINES for row in rows)
    assert f"{len(rows)} functions" in capsys.readouterr().out


def test_the_last_speeches_are_held_out():
    prose = script("english_prose")
    speeches = [f"line {i}\n".encode() for i in range(1000)]
    train, held = prose.split(b"".join(speeches) + prose.NOVEL + b" Call me")
    assert train.endswith(prose.NOVEL + b" Call me") and held.endswith(b"line 999\n") and held.startswith(b"line ")
    assert len(train) + len(held) == len(b"".join(speeches) + prose.NOVEL + b" Call me")
    assert 0.04 < len(held) / len(b"".join(speeches)) <= 0.05


def test_another_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "other.xz").write_bytes(b"other")
    monkeypatch.setattr("sys.argv", ["english_prose.py", str(tmp_path / "other.xz"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="another text"):
        script("english_prose").main()
    assert not (tmp_path / "out").exists()
