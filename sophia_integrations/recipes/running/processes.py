"""The processes of one run: rank 0 prepares, speaks and writes, and all stop after the same step."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ...errors import UserError, one_line

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
_FAILED = "failed"
_LOST = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Connection refused")
_FAREWELL = 3  # seconds
_PATIENCE = timedelta(days=7)  # a step, or an evaluation, may take long


class Processes:
    """This process's place among those that torchrun or ``accelerate launch`` started.

    Attributes:
        rank: 0 is the one that prepares, prints and writes.
        count: 1 without a launcher; nothing here does anything then.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ.get("RANK") or 0) if self.count > 1 else 0
        self._turns = 0
        self._store: Any = _connect(self.rank, self.count) if self.count > 1 else None
        self._group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that prepares, prints and writes."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """What `work`, done by rank 0 alone, returns (something JSON can hold); the others wait for it, however long.

        Where it fails in rank 0, the others end without a word.
        """
        if self.count == 1:
            return work()
        key = f"turn-{self._turns}"
        self._turns += 1
        if self.main:
            value = work()
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):
            if self._store.check([_FAILED]):
                _end_without_a_word()
            time.sleep(0.1)
        return json.loads(self._store.get(key))

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by rank 0 and then, with its files and cache entries there, by the others."""
        if self.main:
            done: list[T] = []
            self.first(lambda: done.append(work()))
            return done[0]
        self.first(lambda: None)
        return work()

    def agree(self, number: int = 0) -> int:
        """The largest `number` of all processes; each must call it at the same point, and waits there for the others.

        Goes over the CPU, so that no process waits for its GPU.
        """
        if self.count == 1:
            return number
        import torch
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def require_same_number(self, began: int, folder: Path) -> None:
        """Raises `UserError` when the run in `folder` trains with `began` processes and this is another number."""
        if began != self.count:
            others = "one process" if began == 1 else f"{began} processes"
            raise UserError(
                f"the run in {folder} trains with {others}, and this is {self.count}: its batches would be others. Go "
                f"on with --nproc {began}, or use --fresh to start anew"
            )

    @contextlib.contextmanager
    def speaking_once(self) -> Iterator[None]:
        """Around all of a run: of a failure in several processes only the first is told."""
        if self.count == 1:
            yield
            return
        failed = True
        try:
            yield
            failed = False
        except KeyboardInterrupt:
            raise KeyboardInterrupt if self.main else SystemExit(130) from None
        except Exception as error:
            if self._first_to_fail() != self.rank:
                _end_without_a_word()
            if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST):
                raise UserError(
                    "another process of this run has ended without a word (killed, or out of memory?); run the same "
                    "command again to go on from the last whole checkpoint"
                ) from None
            raise
        finally:
            self._leave(failed)

    def _first_to_fail(self) -> int:
        try:
            return int(self._store.compare_set(_FAILED, "", str(self.rank)))
        except RuntimeError:  # the store ended with the process that kept it
            return 0

    def _leave(self, failed: bool) -> None:
        import torch.distributed as dist

        if dist.is_initialized() and (not failed or dist.get_backend() == "gloo"):  # NCCL may wait for who failed
            dist.destroy_process_group()
        self._group = None
        gc.collect()  # DDP, in a cycle, still holds the group, whose threads would abort an interpreter that exits


def _end_without_a_word() -> NoReturn:
    """Later than the process that speaks: a launcher ends all as soon as one has ended."""
    time.sleep(_FAREWELL)
    raise SystemExit(2) from None


def _connect(rank: int, count: int) -> Any:
    from torch.distributed import PrefixStore, rendezvous

    try:
        store, *_ = next(rendezvous("env://", rank=rank, world_size=count, timeout=timedelta(minutes=5)))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is {count}, but the {count} processes cannot be connected ({one_line(error)}); start them "
            "with torchrun or accelerate launch"
        ) from None
    return PrefixStore("sophia", store)
