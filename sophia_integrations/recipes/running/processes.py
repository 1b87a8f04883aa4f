"""The processes of one run: rank 0 goes first and speaks, the others wait for it, and all stop at the same step."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
_FAILED = "failed"
_WAIT = 0.1  # seconds between two looks whether the others are done
_FAREWELL = 5.0  # seconds that rank 0 waits for the others at the end
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOST = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Connection refused")
_PREPARING, _AGREEING = timedelta(seconds=300), timedelta(days=7)


class Elsewhere(UserError):
    """Another process of the run has failed and said why; this one ends without a word."""

    def __init__(self) -> None:
        super().__init__("")


class Processes:
    """This process's place among those that torchrun, ``accelerate launch`` or ``--nproc`` started.

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
        """What `work`, done by rank 0 alone, returns (something JSON can hold); the others wait for it.

        Raises:
            Elsewhere: in the other processes, when it failed in rank 0.
        """
        if self.count == 1:
            return work()
        key = f"turn-{self._turns}"
        self._turns += 1
        if not self.main:
            return self._answer(key)
        try:
            with _alone():
                value = work()
        except BaseException:
            self._store.set(key, json.dumps({_FAILED: True}))
            raise
        self._store.set(key, json.dumps({"value": value}))
        return value

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by rank 0 and then, with its files and cache entries there, by the others."""
        if self.main:
            done: list[T] = []
            self.first(lambda: done.append(work()))
            return done[0]
        self.first(lambda: None)
        with _alone():
            return work()

    def agree(self, number: int) -> int:
        """The largest `number` of all processes; each must call it at the same point.

        Goes over the CPU, so that no process waits for its GPU.  Raises `Elsewhere` when another one has failed.
        """
        if self.count == 1:
            return number
        import torch
        import torch.distributed as dist

        with self.quiet_if_another_failed():
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=_AGREEING)
            tensor = torch.tensor(number)
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    @contextlib.contextmanager
    def quiet_if_another_failed(self) -> Iterator[None]:
        """Marks a failure in here for the other processes; one that is only their echo becomes `Elsewhere`."""
        if self.count == 1:
            yield
            return
        try:
            yield
        except Elsewhere:
            raise
        except Exception as error:
            if self._first_to_fail() != self.rank:
                raise Elsewhere from None
            if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST):
                raise UserError(
                    "another process of this run has ended without a word (killed, or out of memory?); run the same "
                    "command again to go on from the last whole checkpoint"
                ) from None
            raise

    def leave(self, *, failed: bool) -> None:
        """Ends the connection, after which nothing here may be called.

        Rank 0 may keep the store that the others still ask, so it goes last.
        """
        import torch.distributed as dist

        if dist.is_initialized() and (not failed or dist.get_backend() == "gloo"):  # NCCL may wait for who failed
            dist.destroy_process_group()
        self._group = None
        gc.collect()  # DDP, in a cycle, still holds the group, whose threads would abort an interpreter that exits
        until = time.monotonic() + _FAREWELL
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left-{self.rank}", "")
            others = [f"left-{rank}" for rank in range(self.count)]
            while self.main and not self._store.check(others) and time.monotonic() < until:
                time.sleep(_WAIT)

    def _first_to_fail(self) -> int:
        try:
            return int(self._store.compare_set(_FAILED, "", str(self.rank)))
        except RuntimeError:  # the store ended with the process that kept it
            return 0

    def _answer(self, key: str) -> Any:
        try:
            while not self._store.check([key]):
                if self._store.check([_FAILED]):
                    raise Elsewhere
                time.sleep(_WAIT)
            answer = json.loads(self._store.get(key))
        except RuntimeError:  # the store ended with the process that kept it
            raise Elsewhere from None
        if _FAILED in answer:
            raise Elsewhere
        return answer["value"]


def _connect(rank: int, count: int) -> Any:
    from torch.distributed import PrefixStore, rendezvous

    try:
        store, *_ = next(rendezvous("env://", rank=rank, world_size=count, timeout=_PREPARING))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"WORLD_SIZE is {count}, but the {count} processes cannot be connected ({reason}); start them with "
            f"sophia train RECIPE --nproc {count}, torchrun or accelerate launch"
        ) from None
    return PrefixStore("sophia", store)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hides the other processes from libraries that would wait for them."""
    hidden = {name: os.environ.pop(name) for name in _ENVIRONMENT if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
