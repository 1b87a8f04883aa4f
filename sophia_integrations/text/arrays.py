"""Arrays of numbers in the cache: made once, written aside, and made again when an entry is damaged."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .cache import cache_dir, store


def cached_stream(
    name: str, kind: np.dtype, pieces: Callable[[], Iterable[np.ndarray]], what: str, say: Callable[[str], object]
) -> np.ndarray:
    """One long array, mapped from the cache; made piece by piece, without holding it in memory, when it is not there.

    Where the cache cannot be written, the array is in memory.

    Args:
        name: of the entry, ending in ``.npy``.
        kind: of the numbers.
        pieces: makes the parts, one after the other; called again when writing fails.
        what: is being done, for the reader.
        say: receives the lines for the reader.
    """
    found = _read(name, lambda path: np.load(path, mmap_mode="r"), say)
    if found is not None:
        return found
    say(f"{what} …")
    if store(name, lambda aside: _write_pieces(aside, kind, pieces()), say):
        return np.load(cache_dir() / name, mmap_mode="r")
    return np.concatenate([np.zeros(0, kind), *pieces()])


def cached_arrays(
    name: str, make: Callable[[], dict[str, np.ndarray]], what: str, say: Callable[[str], object]
) -> dict[str, np.ndarray]:
    """Some arrays in memory, from the cache entry `name` (ending in ``.npz``) or from `make`."""
    found = _read(name, _load_all, say)
    if found is None:
        say(f"{what} …")
        found = made = make()
        store(name, lambda aside: _write_all(aside, made), say)
    return found


def _read(name: str, load: Callable[[Path], object], say: Callable[[str], object]):
    path = cache_dir() / name
    if not path.is_file():
        return None
    try:
        return load(path)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
        say(f"Cache: {path} is damaged; making it again.")
    return None


def _load_all(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file, np.load(file) as arrays:
        return dict(arrays)


def _write_all(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _write_pieces(path: Path, kind: np.dtype, pieces: Iterable[np.ndarray]) -> None:
    """A ``.npy`` file whose length is known only at its end: numpy leaves room in the header for it."""
    with open(path, "wb") as file:
        _write_header(file, kind, 0)
        begin, length = file.tell(), 0
        for piece in pieces:
            piece.astype(kind, copy=False).tofile(file)
            length += len(piece)
        file.seek(0)
        _write_header(file, kind, length)
        if file.tell() != begin:
            raise OSError(errno.EIO, "numpy left no room in the header")


def _write_header(file: BinaryIO, kind: np.dtype, length: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
