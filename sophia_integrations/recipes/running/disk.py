"""A disk that is or becomes too full, told before training or in one sentence after."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from ...errors import UserError

_SIGNS = (
    "No space left", "File too large", "StorageFull",  # safetensors
    "PytorchStreamWriter", "iostream error", "inline_container",  # torch.save
)  # fmt: skip
_FULL = 1_000_000  # bytes: with less, a disk counts as full


def require_room(path: Path, needed: int, setting: str = "run_dir") -> int:
    """The free bytes of the disk of `path`; raises `UserError` when they are less than `needed` for checkpoints."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"{path}: the run needs about {needed / 1e9:.2f} GB for its checkpoints and the disk has "
            f"{free / 1e9:.2f} GB free; make room or choose another folder with {setting}=PATH"
        )
    return free


def disk_trouble(error: BaseException) -> bool:
    """Whether an error of a library means that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    return any(sign in str(error) for sign in _SIGNS)


def unwritable(path: Path, error: BaseException) -> UserError:
    """What to raise when `disk_trouble` ends the training in `path`."""
    full = not isinstance(error, OSError) and shutil.disk_usage(path).free < _FULL
    return UserError(
        f"{path} could not be written in training ({'No space left on device' if full else reason(error)}); make room "
        "and run the same command again: it goes on from the last whole checkpoint"
    )


def reason(error: BaseException) -> str:
    """An error's own words, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())
