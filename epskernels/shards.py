"""Samples on disk in chunks of seeds: what `epskernels sample --out DIRECTORY` writes, continues, and many processes share.

    run.json              the settings: all that decides the bits
    seeds.npy             uint64 (N,), in order
    samples-000012.npy    float32 (n, *shape), of seeds[12*batch : 13*batch]; the last chunk may be shorter

A file appears whole or not at all, so what is there need not be made again. After the array stand 32 bytes, which numpy does not
read: a SHA-256 of the settings, of the chunk's name and seeds, and of all before it, which tells a chunk that is damaged, or of
another place, from the one that was written. Chunks are the same whoever makes them: a model's bits may depend on the batch's
size, hence the batch is a setting, and the number of processes is none.
"""

import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .files import check_writable, read_object, reading, remove_leftovers, write_new, write_whole
from .typing import FilePath

__all__ = ["FORMATS", "Shards", "begin"]

FORMATS = (1, 2)  # 1: without digests; such a directory is read, and gone on with, as it is
SETTINGS = "expected the settings of a run"
_NAME = re.compile(r"run\.json|seeds\.npy|(?P<name>.+)-[0-9]{6,}\.npy")


class Shards:
    """The chunks in a directory: `settings`, `seeds`, and for each of `names` the arrays of `len(shards)` chunks.

    Raises FileNotFoundError where nothing was begun, ValueError for another format, or where it is damaged.
    """

    def __init__(self, directory: FilePath):
        self.directory = pathlib.Path(directory)
        self.settings = _settings(self.directory)
        with reading(self.directory / "run.json", SETTINGS):
            self.names = tuple(str(name) for name in self.settings["names"])
            self.batch, self.shape = int(self.settings["batch"]), tuple(int(size) for size in self.settings["shape"])
            if self.batch < 1:
                raise ValueError(f"batch: expected at least 1, got {self.batch}")
        try:
            self.seeds = _load(self.directory / "seeds.npy", self.settings)
        except ValueError as error:
            raise ValueError(f"{error}; it is made again where it is not there") from error
        if self.seeds.dtype != np.uint64 or self.seeds.ndim != 1:
            found = f"{self.seeds.dtype} {self.seeds.shape}"
            raise ValueError(f"expected uint64 (N,) in {self.directory / 'seeds.npy'}, got {found}")

    def __len__(self) -> int:
        return -(-len(self.seeds) // self.batch)

    def seeds_of(self, chunk: int) -> NDArray[np.uint64]:
        """The seeds of a chunk's samples."""
        return self.seeds[chunk * self.batch : (chunk + 1) * self.batch]

    def path(self, name: str, chunk: int) -> pathlib.Path:
        """The chunk's file."""
        return self.directory / f"{name}-{chunk:06d}.npy"

    def write(self, name: str, chunk: int, array: np.ndarray) -> None:
        """Raises ValueError for another shape or dtype than the chunk has."""
        self._check(name, chunk, array)
        _save(self.path(name, chunk), array, self.settings, self.seeds_of(chunk))

    def read(self, name: str, chunk: int) -> NDArray[np.float32]:
        """The chunk's array. Raises FileNotFoundError, ValueError where it is not the one that was written."""
        array = _load(self.path(name, chunk), self.settings, self.seeds_of(chunk))
        self._check(name, chunk, array)
        return array

    def _check(self, name: str, chunk: int, array: np.ndarray) -> None:
        expected = (len(self.seeds_of(chunk)), *self.shape)
        if name not in self.names or array.shape != expected or array.dtype != np.float32:
            path = self.path(name, chunk)
            raise ValueError(f"{path}: expected float32 {expected} for {self.names}, got {array.dtype} {array.shape}")

    def compare(self, settings: Mapping[str, Any], where: object) -> None:
        """Raises ValueError, saying what has changed, where a run of these settings is not this one."""
        _compare(self.settings, settings, where)

    def chunks(self, name: str = "samples") -> Iterator[tuple[NDArray[np.uint64], NDArray[np.float32]]]:
        """(seeds, samples) of every chunk in turn. Raises as `read`."""
        for chunk in range(len(self)):
            yield self.seeds_of(chunk), self.read(name, chunk)

    def load(self, name: str = "samples") -> NDArray[np.float32]:
        """All samples in one array (N, *shape), in the order of the seeds."""
        samples = np.empty((len(self.seeds), *self.shape), np.float32)
        for chunk in range(len(self)):
            samples[chunk * self.batch : (chunk + 1) * self.batch] = self.read(name, chunk)
        return samples

    def missing(self) -> tuple[list[tuple[str, int]], list[pathlib.Path]]:
        """([(name, chunk) that are not there], [paths of the damaged among them]): all chunks are read."""
        missing, damaged = [], []
        for chunk in range(len(self)):
            for name in self.names:
                try:
                    self.read(name, chunk)
                except FileNotFoundError:
                    missing.append((name, chunk))
                except ValueError:
                    missing.append((name, chunk))
                    damaged.append(self.path(name, chunk))
        return missing, damaged

    def clean(self) -> None:
        """Removes what this host's processes left of this run's files when they were killed."""

        def is_ours(name: str) -> bool:
            found = _NAME.fullmatch(name)
            return found is not None and found["name"] in (None, *self.names)

        remove_leftovers(self.directory, is_ours)


def begin(directory: FilePath, settings: Mapping[str, Any], seeds: ArrayLike) -> Shards:
    """The directory's Shards: new, or begun before with the same settings, a dict of what JSON can say, and seeds.

    Of processes that begin at once with other settings, one does. Raises ValueError, saying what has changed, for other
    settings; where the directory holds something else.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "run.json"
    if not path.exists():
        found = [other.name for other in directory.iterdir() if not re.fullmatch(r"run\.json(\..+\.tmp)?", other.name)]
        if found and not path.exists():  # run.json comes first, also where another process begins at this moment
            raise ValueError(f"{directory}: expected run.json or an empty directory, found {min(found)}")
        text = json.dumps({"format": FORMATS[-1], **settings}, indent=1) + "\n"
        write_new(path, lambda file: file.write(text.encode()))
    begun, wanted = _settings(directory), np.asarray(seeds, dtype=np.uint64)
    _compare(begun, settings, directory)
    if not (directory / "seeds.npy").exists():
        _save(directory / "seeds.npy", wanted, begun)
    run = Shards(directory)
    if not np.array_equal(run.seeds, wanted):
        raise ValueError(f"{directory}: seeds.npy holds other seeds than run.json says")
    check_writable(run.path(max(run.names, key=len), len(run)))
    return run


def _settings(directory: pathlib.Path) -> dict[str, Any]:
    settings = read_object(directory / "run.json", SETTINGS)
    if settings.get("format") not in FORMATS:
        raise ValueError(f"{directory}: expected format {FORMATS[-1]}, got {settings.get('format')!r}")
    return settings


def _compare(begun: Mapping[str, Any], settings: Mapping[str, Any], where: object) -> None:
    old, new = ({k: v for k, v in json.loads(json.dumps(each)).items() if k != "format"} for each in (begun, settings))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed := [key for key in changed if key != "tables"] or changed:  # digests, of settings that are said already
        said = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        said = re.sub("([0-9a-f]{8})[0-9a-f]{56}", r"\1...", said)  # of digests, the beginnings
        raise ValueError(
            f"{where}: begun with other settings, and its samples would not go together: {said}; take another directory, or "
            "delete this one"
        )


def _save(path: pathlib.Path, array: np.ndarray, settings: Mapping[str, Any], seeds: ArrayLike = ()) -> None:
    file = io.BytesIO()
    np.save(file, array)
    content = file.getvalue()
    digest = _digest(path.name, settings, seeds, content)
    write_whole(path, lambda file: file.write(content + digest), clean=False)  # one of many: `clean` is for all of them


def _load(path: pathlib.Path, settings: Mapping[str, Any], seeds: ArrayLike = ()) -> np.ndarray:
    with reading(path, "expected an array, as it was written,"):
        content = path.read_bytes()
        end = len(content) - len(_digest(path.name, settings, seeds, b""))
        if content[end:] != _digest(path.name, settings, seeds, content[:end]):
            raise ValueError("its digest does not fit: it was changed, or is another chunk's or another run's")
        return np.load(io.BytesIO(content[:end]))


def _digest(name: str, settings: Mapping[str, Any], seeds: ArrayLike, content: bytes) -> bytes:
    if settings["format"] == 1:
        return b""
    about = json.dumps([settings, name, np.asarray(seeds, np.uint64).tolist()], sort_keys=True)
    return hashlib.sha256(about.encode() + content).digest()
