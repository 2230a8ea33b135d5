"""Seeds of the command line, such as 0-63,100: ranges that stay ranges, however many seeds they hold."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Seeds", "parse", "spelled"]

_BLOCK = 2**16


class Seeds:
    """The integers of some ranges, in their order. seeds[i] is an int, seeds[i:j] an array uint64 (n,), np.array(seeds) all."""

    def __init__(self, ranges: Sequence[range]):
        self.ranges, self._length = tuple(ranges), sum(each.stop - each.start for each in ranges)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.ranges)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> NDArray[np.uint64]: ...
    def __getitem__(self, index: int | slice) -> int | NDArray[np.uint64]:
        if not isinstance(index, slice):
            return int(self[index : index + 1 or None][0])
        first, last, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"seeds: expected a slice of step 1, got {step}")
        parts = [np.empty(0, np.uint64)]
        for each in self.ranges:
            if part := each[max(first, 0) : max(last, 0)]:
                parts.append(np.uint64(part.start) + np.arange(len(part), dtype=np.uint64))
            first, last = first - len(each), last - len(each)
        return np.concatenate(parts)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.uint64, copy=False)

    def digest(self) -> str:
        """SHA-256 of their list as JSON, without making it."""
        digest = hashlib.sha256()
        for first in range(0, len(self), _BLOCK):
            digest.update((", " if first else "[").encode())
            digest.update(", ".join(map(str, self[first : first + _BLOCK].tolist())).encode())
        digest.update(b"]")
        return digest.hexdigest()


def parse(text: str) -> Seeds:
    """The Seeds of text such as "0-63" or "1,2,5-9". Raises ValueError that says what was expected."""
    ranges = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise ValueError(f"expected seeds such as 0-63 or 1,2,5-9, got {text!r}")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise ValueError(f"expected a range of seeds from low to high, got {part.strip()}")
        if last >= 2**64:
            raise ValueError(f"expected seeds below 2^64, got {part.strip()}")
        ranges.append(range(first, last + 1))
    if (total := sum(each.stop - each.start for each in ranges)) >= 2**63:
        raise ValueError(f"expected fewer than 2^63 seeds, got {total}")
    return Seeds(ranges)


def spelled(seeds: Iterable[int], most: int = 8) -> str:
    """Integers as ranges, such as "0-3, 7": the first `most` of these, then "..."."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    said = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    return ", ".join([*said, "..."] if len(ranges) > most else said)
