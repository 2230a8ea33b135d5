"""The memory that a launch may touch: every access inside a tensor that was given, aligned, and no race between threads.

A race: a thread reads or writes what another thread of the launch writes, and no barrier orders them. Warps' requests and the
32-byte sectors that they move are counted.
"""

import ctypes
import dataclasses

import numpy as np

from .ptx_arithmetic import UNSIGNED, PtxError

WARP, SECTOR = 32, 32
WORD = {**UNSIGNED, 16: np.complex128}  # what moves so many bytes at once
READ, WRITTEN = 1, 2
MANY = -1  # in place of a reader


@dataclasses.dataclass
class Span:
    """A tensor: a byte address, its shape and strides in bytes, down to the bytes of an element. One that is read, or written."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    element: int
    written: bool = False

    @property
    def end(self):
        return self.address + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1


class Region:
    """A range of memory that holds some tensors: which bytes are theirs, and which thread has touched what.

    What is noted is noted for units of `grain` bytes, the smallest element that lies there.
    """

    def __init__(self, spans):
        self.base = min(span.address for span in spans) & -16
        self.end = max(span.end for span in spans)
        self.names = ", ".join(dict.fromkeys(span.name for span in spans))
        self.grain = min(span.element for span in spans)
        if any(value % self.grain for span in spans for value in (span.address, *span.strides[:-1])):
            self.grain = 1
        self.bytes = np.frombuffer(
            (ctypes.c_ubyte * (-(-(self.end - self.base) // 16) * 16)).from_address(self.base), np.uint8
        )
        self.words = {size: self.bytes.view(kind) for size, kind in WORD.items()}
        theirs = np.zeros(len(self.bytes), np.uint8)
        for span in spans:
            at = np.lib.stride_tricks.as_strided(theirs[span.address - self.base :], span.shape, span.strides)
            at |= WRITTEN if span.written else READ
        self.theirs = theirs[:: self.grain]
        written = (self.theirs & WRITTEN).any()
        self.writer, self.reader = (np.zeros(len(self.theirs), np.int32) if written else None for _ in range(2))

    def touch(self, offsets, size, threads, writes):
        """Notes these accesses; threads: numbers from 1 on."""
        units = (offsets // self.grain)[:, None] + np.arange(max(size // self.grain, 1))
        if not ((self.theirs[units] & (WRITTEN if writes else READ)) != 0).all():
            self._refuse(offsets, self.theirs[units] & (WRITTEN if writes else READ), writes)
        if self.writer is None:
            return
        mine = threads[:, None]
        writer, reader = self.writer[units], self.reader[units]
        others = [(owner != 0) & (owner != mine) & (owner != _settled(mine)) for owner in (writer, reader)]
        race = others[0]
        if writes:
            race = race | others[1]
            self.writer[units] = mine
            race |= self.writer[units] != mine  # another thread's, at once
        else:
            readers = np.where(others[1], MANY, mine)
            self.reader[units] = readers
            self.reader[units[self.reader[units] != readers]] = MANY
        if race.any():
            which = int(np.flatnonzero(race.any(1))[0])
            raise PtxError(
                f"{self.names}: a race: thread {threads[which] - 1} {'writes' if writes else 'reads'} byte "
                f"{int(offsets[which])}, which another thread {'touches' if writes else 'writes'}"
            )

    def _refuse(self, offsets, flags, writes):
        which = int(np.flatnonzero(~(flags != 0).all(1))[0])
        raise PtxError(
            f"{self.names}: byte {int(offsets[which])} is {'written' if writes else 'read'}, which is no tensor's"
        )


def _settled(owner):
    """In place of a thread: one of its warp, before a barrier of the warp."""
    return -2 - (owner - 1) // WARP


class Memory:
    """The tensors of a launch, those whose ranges overlap in one region."""

    def __init__(self, spans, counts=None):
        self.regions, together = [], []
        for span in sorted((span for span in spans if 0 not in span.shape), key=lambda span: span.address):
            if together and span.address >= max(other.end for other in together):
                self.regions.append(Region(together))
                together = []
            together.append(span)
        if together:
            self.regions.append(Region(together))
        self.bases = np.array([region.base for region in self.regions], np.uint64)
        self.counts = counts  # {(what, names of a region's tensors): how many}, or None

    def _places(self, addresses, size, threads, writes):
        """(region, which of the accesses, their offsets)"""
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"an access of {size} bytes at an address that they do not divide")
        where = np.searchsorted(self.bases, addresses, "right") - 1
        first = int(where[0]) if len(self.regions) else -1
        if (where == first).all():
            parts = [(first, slice(None))]
        else:
            parts = [(int(i), np.flatnonzero(where == i)) for i in np.unique(where)]
        for i, which in parts:
            if i < 0:
                raise PtxError(f"an address below every tensor is {'written' if writes else 'read'}")
            region = self.regions[i]
            offsets = (addresses[which] - np.uint64(region.base)).astype(np.int64)
            if (offsets + size > region.end - region.base).any():
                raise PtxError(
                    f"an address beyond every tensor is {'written' if writes else 'read'}: after {region.names}"
                )
            region.touch(offsets, size, threads[which], writes)
            if self.counts is not None:
                self._count(region, offsets, size, threads[which])
            yield region, which, offsets

    def _count(self, region, offsets, size, threads):
        """Warps' requests, the sectors that each needs, and the bytes that threads ask for."""
        warps = (threads.astype(np.int64) - 1) // WARP
        sectors = np.unique(warps << 40 | (offsets + region.base % SECTOR) // SECTOR)
        self.counts["requests", region.names] += len(np.unique(warps))
        self.counts["sectors", region.names] += len(sectors)
        self.counts["bytes", region.names] += size * len(threads)

    def load(self, addresses, size, threads):
        """Words of `size` bytes, one for each address."""
        result = np.empty(len(addresses), WORD[size])
        for region, which, offsets in self._places(addresses, size, threads, False):
            result[which] = region.words[size][offsets // size]
        return result

    def store(self, addresses, words, threads):
        size = words.dtype.itemsize
        for region, which, offsets in self._places(addresses, size, threads, True):
            region.words[size][offsets // size] = words[which]


class Shared(Memory):
    """The shared memory of several blocks, in which nothing is written yet: random bits. An address is block*size + offset."""

    def __init__(self, blocks, size, rng):
        self.size = -(-size // 16) * 16
        self.buffer = np.frombuffer(rng.bytes(self.size * blocks + 16), np.uint8).copy()
        self.start = -(-self.buffer.ctypes.data // 16) * 16
        spans = [
            Span("shared memory", self.start, (self.size * blocks,), (1,), 1, written) for written in (False, True)
        ]
        super().__init__(spans)

    def addresses(self, offsets, blocks):
        if (offsets >= self.size).any():
            raise PtxError("an address beyond the shared memory")
        return np.uint64(self.start) + blocks.astype(np.uint64) * np.uint64(self.size) + offsets.astype(np.uint64)

    def barrier(self, blocks):
        """Of these blocks: who touched what is settled."""
        for region in self.regions:
            for notes in (region.writer, region.reader):
                notes[: len(notes) // self.size * self.size].reshape(-1, self.size)[blocks] = 0

    def warp_barrier(self, threads):
        """Of the warps of these threads, of which each is there: settled among a warp's own."""
        for region in self.regions:
            for notes in (region.writer, region.reader):
                among = np.isin(notes, threads)
                notes[among] = _settled(notes[among])
