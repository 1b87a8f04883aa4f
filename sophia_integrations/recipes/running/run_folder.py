"""The run folder: where a run keeps everything, and whether a recipe may go on in it.

    recipe.yaml  data.json  metrics.jsonl  tokenizer/  checkpoint-N/ or checkpoints/  tensorboard/  model/  summary.json
    loss.png

``summary.json`` is written last: a folder that has it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...cache import write_aside
from ...errors import UserError, one_line
from ..reading.yaml_text import parse, to_yaml

try:
    import fcntl
except ImportError:  # Windows: no lock, two runs in one folder are the user's to avoid
    fcntl = None  # type: ignore[assignment]

RECIPE = "recipe.yaml"
_SIGNS_OF_A_FULL_DISK = (
    "No space left", "File too large", "StorageFull",  # safetensors
    "PytorchStreamWriter", "iostream error", "inline_container",  # torch.save
)  # fmt: skip


class RunFolder:
    """Names the files of one run folder and answers what state it is in; `setting` is the key that chose it."""

    def __init__(self, path: Path, setting: str = "run_dir") -> None:
        self.path, self.setting = path, setting
        self.recipe = path / RECIPE
        self.data = path / "data.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.tokenizer = path / "tokenizer"
        self.model = path / "model"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    @property
    def complete(self) -> bool:
        """Whether a run ended here."""
        return self.summary.is_file() and self.recipe.is_file()

    @property
    def begun(self) -> bool:
        """Whether there is anything to lose: a logged loss or a checkpoint, whole or not."""
        logged = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return self.complete or logged or any(self.path.glob("*checkpoint-*")) or any(self.checkpoints.glob("*.ckpt"))

    def read_summary(self) -> dict[str, Any]:
        """The summary of a complete run; raises `UserError` when it is damaged."""
        try:
            return json.loads(self.summary.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{self.summary} is damaged; delete it and run again to write it anew") from None

    def require_same(self, settings: dict[str, Any]) -> None:
        """Raises `UserError`, naming the differing keys, when this folder belongs to another recipe."""
        if not self.recipe.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file, not a folder; choose another with {self.setting}=PATH")
            if self.path.is_dir() and set(os.listdir(self.path)) - {".lock"}:
                raise UserError(
                    f"{self.path} is not empty and no run folder (no {RECIPE} in it); choose another with "
                    f"{self.setting}=PATH"
                )
            return
        if not self.begun:
            return
        here = parse(self.recipe.read_text(encoding="utf-8"), lambda line, column: f"{self.recipe}:{line}:{column}")
        if here.problems or not isinstance(here.value, dict):
            raise UserError(f"{self.recipe} is damaged; choose another folder with {self.setting}=PATH, or use --fresh")
        changes = differences(here.value, settings)
        if changes:
            raise UserError(
                f"{self.path} holds a run of another recipe: {'; '.join(changes)}. Use --fresh to start in a new "
                f"numbered folder, or {self.setting}=PATH to choose one"
            )

    def prepare(self) -> None:
        """Makes the folder and proves that it can be written; raises `UserError` when it cannot."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"\0" * 65536)
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be written ({error.strerror}); make room or choose another "
                f"with {self.setting}=PATH"
            ) from None

    def claim(self, settings: dict[str, Any]) -> None:
        """Stores the resolved recipe; what a run left that never logged or saved anything is cleared away."""
        self.require_same(settings)
        if not self.begun:
            self.data.unlink(missing_ok=True)
            shutil.rmtree(self.tokenizer, ignore_errors=True)
            text = "# The resolved recipe of this run. To resume it, or to see how it ended:\n"
            text += f"#   sophia train {self.recipe}\n"
            write_text(self.recipe, text + to_yaml(settings))

    def require_same_data(self, text: str) -> None:
        """Stores `text` (counts and digest) or compares it: raises `UserError` when the data changed meanwhile."""
        if not self.data.is_file():
            return write_text(self.data, text)
        try:
            before = json.loads(self.data.read_text(encoding="utf-8"))["digest"]
        except (ValueError, KeyError):
            raise UserError(f"{self.data} is damaged; use --fresh to start in a new numbered folder") from None
        if before != json.loads(text)["digest"]:
            raise UserError(
                f"the text or the tokenizer changed since the run in {self.path} began, so it cannot go on "
                "exactly; restore the files, or use --fresh to start anew"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; raises `UserError` when another process trains in it."""
        with open(self.path / ".lock", "w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise UserError(f"another process is training in {self.path}; wait for it or use --fresh") from None
            yield

    @contextlib.contextmanager
    def full_disk_as_sentence(self) -> Iterator[None]:
        """Around the training: turns a library's error about a file that cannot be written into a `UserError`."""
        try:
            yield
        except Exception as error:
            if not is_about_the_disk(error):
                raise
            reason = one_line(error) if isinstance(error, OSError) else "No space left on device?"
            raise UserError(
                f"{self.path} could not be written in training ({reason}); make room and run the same command again: "
                "it goes on from the last whole checkpoint"
            ) from None


def is_held(lock: Path) -> bool:
    """Whether a process has locked the file `lock` of its run folder."""
    if fcntl is None or not lock.is_file():
        return False
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def is_about_the_disk(error: BaseException) -> bool:
    """Whether an error of a library means that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    return any(sign in str(error) for sign in _SIGNS_OF_A_FULL_DISK)


def choose_folder(run_dir: str | None, file: Path, *, fresh: bool) -> Path:
    """The folder of this run: `run_dir`, else the folder of a resolved recipe, else ``runs/<name>``.

    With `fresh`, the first of ``name``, ``name-2``, ``name-3``, … that does not exist.
    """
    if run_dir is not None:
        path = Path(run_dir).expanduser()
    elif file.name == RECIPE and (file.parent / ".lock").is_file():
        path = file.parent
    else:
        path = Path("runs") / file.stem
    return free_name(path) if fresh else path


def free_name(path: Path) -> Path:
    """`path`, or the first of ``path-2``, ``path-3``, … that does not exist."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Each differing key of two nested mappings, as ``training.max_steps (there 600, asked 50)``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            found += differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
        return found
    if old == new and isinstance(old, bool) == isinstance(new, bool):
        return []
    shown = ["nothing" if value is None else json.dumps(value, ensure_ascii=False) for value in (old, new)]
    return [f"{at} (there {shown[0]}, asked {shown[1]})"]


def write_text(path: Path, text: str) -> None:
    """Replaces a small text file as a whole."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def replace_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Lets `fill` make a folder beside `target`, which then takes its place: never half of one under the name."""
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    fill(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
