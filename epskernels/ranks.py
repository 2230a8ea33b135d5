"""The processes that torchrun started, this one among them: RANK, WORLD_SIZE and LOCAL_RANK of the environment.

They talk through torchrun's store: at the beginning, so that all work on one list, and at the end, for the summary. There is no
process group, so no thread of one that may still hold a tensor while the interpreter ends.
"""

import contextlib
import datetime
import os
import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Ranks"]

_Value = TypeVar("_Value")
_PIECE = 2**22  # the store takes values of 8 MiB at most


class Ranks:
    """`rank` of `size`; a context manager. A process alone needs no torch.distributed.

    Raises ValueError that names the environment's variable.
    """

    def __init__(self) -> None:
        rank, size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
        if (rank is None) != (size is None):
            missing, given = ("RANK", "WORLD_SIZE") if rank is None else ("WORLD_SIZE", "RANK")
            raise ValueError(f"{missing}: expected beside {given}, since torchrun sets both, got none")
        self.rank, self.size, self._local = rank or 0, size or 1, _from_environment("LOCAL_RANK", 0)
        if self.rank >= self.size:
            raise ValueError(f"RANK: expected below WORLD_SIZE, {self.size}, got {self.rank}")
        self._store: Any = None
        self._talks = 0

    def device(self, name: str) -> torch.device:
        """This process's device: "cuda" is GPU number LOCAL_RANK. Raises ValueError for a numbered GPU, which all would share."""
        device = torch.device(name)
        if self.size > 1 and device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"expected cuda, without a number, for {self.size} processes, got {name!r}")
            device = torch.device("cuda", self.rank if self._local is None else self._local)
        return device

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            _from_environment("MASTER_PORT", 1)  # which torch would call an invalid literal for int()
            timeout = datetime.timedelta(minutes=30)  # for the others to begin
            store, *_ = next(dist.rendezvous("env://", self.rank, self.size, timeout=timeout))
            # torchrun keeps its store when it starts the processes again: an earlier attempt's words are still in it.
            self._store = dist.PrefixStore(f"epskernels/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """None leaves before rank 0 has come to its end, and rank 0, in which the store may be, leaves last."""
        if self.size == 1:
            return
        if kind is not None:
            with contextlib.suppress(RuntimeError):  # the store may be gone: what is raised already says more
                self._store.set("failed", str(self.rank))
        elif self.rank == 0:
            self._say("done", None)
            for rank in range(1, self.size):
                self._hear(f"left by {rank}")
        else:
            self._hear("done")
            self._say(f"left by {self.rank}", None)

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """make() of rank 0, on every rank; also its exception."""
        self._talks += 1
        topic = f"first {self._talks}"
        value: Any = None
        error: Exception | None = None
        if self.rank > 0:
            value, error = self._hear(topic)
        else:
            try:
                value = make()
            except Exception as raised:
                error = raised
            if self.size > 1:
                self._say(topic, (value, error))
        if error is not None:
            raise error
        return value

    def gather(self, value: _Value) -> list[_Value] | None:
        """The values of all ranks, in order, on rank 0, which waits for the last of them; None on the others."""
        self._talks += 1
        if self.rank > 0:
            self._say(f"gather {self._talks} {self.rank}", value)
            return None
        return [value] + [self._hear(f"gather {self._talks} {rank}") for rank in range(1, self.size)]

    def _say(self, topic: str, value: object) -> None:
        data = pickle.dumps(value)
        pieces = [data[first : first + _PIECE] for first in range(0, len(data), _PIECE)]
        for i, piece in enumerate(pieces):
            self._store.set(f"{topic} {i}", piece)
        self._store.set(topic, str(len(pieces)))

    def _hear(self, topic: str) -> Any:
        """What was said, once it is; RuntimeError where a rank has failed without having said it."""
        failed = False
        while not self._store.check([topic]):  # rather than store.wait, which Ctrl-C does not end
            if failed:
                raise RuntimeError(f"rank {self._store.get('failed').decode()} has failed, and the others end with it")
            time.sleep(0.05)
            failed = self._store.check(["failed"])
        return pickle.loads(b"".join(self._store.get(f"{topic} {i}") for i in range(int(self._store.get(topic)))))


def _from_environment(name: str, low: int) -> int | None:
    """A whole number, or None where the variable is not set or empty."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit() and int(text) >= low):
        raise ValueError(f"{name}: expected a whole number of at least {low}, got {text!r}")
    return int(text) if text else None
