"""Samples in a directory, which `epskernels sample --out DIRECTORY` writes, continues, and many processes share.

    run.json              the settings: all that decides the bits
    seeds.npy             uint64 (N,), in order
    samples-000012.npy    float32 (n, *shape), of seeds[12*batch : 13*batch]; the last chunk may be shorter

or, where the settings say images: png, run.json and a PNG for each seed, such as 000012.png: grey or RGB of 8 bits, as
`images.to_bytes` rounds them. Other tools read such a folder: nothing else in it looks like an image. With several names each
has a folder of its own.

A file appears whole or not at all, so what is there need not be made again. After an array stand 32 bytes, which numpy does not
read, and in a PNG a line of text, which no viewer shows: a SHA-256 of the settings, of the name and seeds, and of all that is
there, which tells a file that is damaged, or of another place, from the one that was written. Chunks are the same whoever makes
them: a model's bits may depend on the batch's size, hence the batch is a setting, and the number of processes is none.
"""

import functools
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

__all__ = ["FORMATS", "Pngs", "Shards", "begin", "opened"]

FORMATS = (1, 2)  # 1: without digests; such a directory is read, and gone on with, as it is
SETTINGS = "expected the settings of a run"
_NAME = re.compile(r"run\.json|seeds\.npy|(?P<name>.+)-[0-9]{6,}\.npy")
_PNG_NAME = re.compile(r"run\.json|[0-9]{6,}\.png")
_TEXT = "epskernels"  # the keyword of a PNG's text


class _Run:
    """What both kinds of directories share: `settings`, `seeds`, `names`, and len(run) chunks of `batch` seeds.

    A chunk is one or more files, `paths`. Raises FileNotFoundError where nothing was begun, ValueError for another format.
    """

    def __init__(self, directory: FilePath):
        self.directory = pathlib.Path(directory)
        self.settings = _settings(self.directory)
        self.seeds: NDArray[np.uint64] = np.empty(0, np.uint64)
        with reading(self.directory / "run.json", SETTINGS):
            self.names = tuple(str(name) for name in self.settings["names"])
            self.batch = int(self.settings["batch"])
            if self.batch < 1:
                raise ValueError(f"batch: expected at least 1, got {self.batch}")

    def __len__(self) -> int:
        return -(-len(self.seeds) // self.batch)

    def seeds_of(self, chunk: int) -> NDArray[np.uint64]:
        """The seeds of a chunk's samples."""
        return self.seeds[chunk * self.batch : (chunk + 1) * self.batch]

    def paths(self, name: str, chunk: int) -> list[pathlib.Path]:
        """The chunk's files."""
        raise NotImplementedError

    def write(self, name: str, chunk: int, array: np.ndarray) -> None:
        """Raises ValueError for another shape or dtype than the chunk has."""
        raise NotImplementedError

    def _part(self, name: str, chunk: int, i: int) -> np.ndarray:
        """What the file paths(name, chunk)[i] holds. Raises FileNotFoundError, ValueError where it is not what was written."""
        raise NotImplementedError

    def read(self, name: str, chunk: int) -> np.ndarray:
        """The chunk's array. Raises FileNotFoundError, ValueError where it is not the one that was written."""
        return np.concatenate([self._part(name, chunk, i) for i in range(len(self.paths(name, chunk)))])

    def chunks(self, name: str = "samples") -> Iterator[tuple[NDArray[np.uint64], np.ndarray]]:
        """(seeds, samples) of every chunk in turn. Raises as `read`."""
        for chunk in range(len(self)):
            yield self.seeds_of(chunk), self.read(name, chunk)

    def load(self, name: str = "samples") -> np.ndarray:
        """All samples in one array, in the order of the seeds."""
        first = self.read(name, 0)
        samples = np.empty((len(self.seeds), *first.shape[1:]), first.dtype)
        for chunk in range(len(self)):
            samples[chunk * self.batch : (chunk + 1) * self.batch] = first if chunk == 0 else self.read(name, chunk)
        return samples

    def missing(self) -> tuple[list[tuple[str, int]], list[pathlib.Path]]:
        """([(name, chunk) that are not there], [paths of the damaged files among them]): all files are read."""
        missing, damaged = [], []
        for chunk in range(len(self)):
            for name in self.names:
                for i, path in enumerate(self.paths(name, chunk)):
                    try:
                        self._part(name, chunk, i)
                        continue
                    except FileNotFoundError:
                        pass
                    except ValueError:
                        damaged.append(path)
                    missing.append((name, chunk))
                    break
        return missing, damaged

    def compare(self, settings: Mapping[str, Any], where: object) -> None:
        """Raises ValueError, saying what has changed, where a run of these settings is not this one."""
        _compare(self.settings, settings, where)

    def check_writable(self) -> None:
        """Raises OSError where the run's files cannot be written: it begins to."""
        raise NotImplementedError

    def clean(self) -> None:
        """Removes what this host's processes left of this run's files when they were killed."""
        raise NotImplementedError


class Shards(_Run):
    """The chunks in a directory, each an array in one file.

    Raises FileNotFoundError where nothing was begun, ValueError for another format, or where it is damaged.
    """

    def __init__(self, directory: FilePath):
        super().__init__(directory)
        if self.settings.get("images"):
            raise ValueError(f"{self.directory}: expected samples, it holds {self.settings['images']} images")
        with reading(self.directory / "run.json", SETTINGS):
            self.shape = tuple(int(size) for size in self.settings["shape"])
        try:
            self.seeds = _load(self.directory / "seeds.npy", self.settings)
        except ValueError as error:
            raise ValueError(f"{error}; it is made again where it is not there") from error
        if self.seeds.dtype != np.uint64 or self.seeds.ndim != 1:
            found = f"{self.seeds.dtype} {self.seeds.shape}"
            raise ValueError(f"expected uint64 (N,) in {self.directory / 'seeds.npy'}, got {found}")

    def path(self, name: str, chunk: int) -> pathlib.Path:
        """The chunk's file."""
        return self.directory / f"{name}-{chunk:06d}.npy"

    def paths(self, name: str, chunk: int) -> list[pathlib.Path]:
        """The chunk's file alone."""
        return [self.path(name, chunk)]

    def write(self, name: str, chunk: int, array: np.ndarray) -> None:
        """Writes float32 (n, *shape). Raises ValueError for another shape or dtype than the chunk has."""
        self._check(name, chunk, array)
        _save(self.path(name, chunk), array, self.settings, self.seeds_of(chunk))

    def _part(self, name: str, chunk: int, i: int) -> np.ndarray:
        array = _load(self.path(name, chunk), self.settings, self.seeds_of(chunk))
        self._check(name, chunk, array)
        return array

    def read(self, name: str, chunk: int) -> NDArray[np.float32]:
        """The chunk's array. Raises FileNotFoundError, ValueError where it is not the one that was written."""
        return self._part(name, chunk, 0)

    def _check(self, name: str, chunk: int, array: np.ndarray) -> None:
        expected = (len(self.seeds_of(chunk)), *self.shape)
        if name not in self.names or array.shape != expected or array.dtype != np.float32:
            path = self.path(name, chunk)
            raise ValueError(f"{path}: expected float32 {expected} for {self.names}, got {array.dtype} {array.shape}")

    def check_writable(self) -> None:
        """Raises OSError where the run's files cannot be written: it begins to."""
        check_writable(self.path(max(self.names, key=len), len(self)))

    def clean(self) -> None:
        """Removes what this host's processes left of this run's files when they were killed."""

        def is_ours(name: str) -> bool:
            found = _NAME.fullmatch(name)
            return found is not None and found["name"] in (None, *self.names)

        remove_leftovers(self.directory, is_ours)


class Pngs(_Run):
    """A PNG for each seed, of its number in at least six digits, as many for all.

    seeds: as the run was begun with; the folder holds their digest alone. Raises FileNotFoundError, ValueError as `Shards`.
    """

    def __init__(self, directory: FilePath, seeds: ArrayLike):
        super().__init__(directory)
        if self.settings.get("images") != "png":
            raise ValueError(f"{self.directory}: expected PNG images, it holds samples")
        self.seeds = np.asarray(seeds, dtype=np.uint64)
        self.digits = max(6, len(str(self.seeds.max(initial=0))))

    def folder(self, name: str) -> pathlib.Path:
        """Where the images of a name are: in the directory itself, where it is the only one."""
        return self.directory / name if len(self.names) > 1 else self.directory

    def paths(self, name: str, chunk: int) -> list[pathlib.Path]:
        """The chunk's images."""
        return [self.folder(name) / f"{seed:0{self.digits}d}.png" for seed in self.seeds_of(chunk).tolist()]

    def write(self, name: str, chunk: int, array: np.ndarray) -> None:
        """Writes uint8 (n, H, W, 1 or 3). Raises ValueError for another shape or dtype."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        seeds = self.seeds_of(chunk)
        good = array.dtype == np.uint8 and array.ndim == 4 and len(array) == len(seeds) and array.shape[3] in (1, 3)
        if name not in self.names or not good:
            expected = f"uint8 ({len(seeds)}, H, W, 1 or 3) for {self.names}"
            raise ValueError(f"{self.folder(name)}: expected {expected}, got {array.dtype} {array.shape}")
        for i, path in enumerate(self.paths(name, chunk)):
            text = PngInfo()
            text.add_text(_TEXT, self._digest(name, chunk, i, array[i]))
            image = Image.fromarray(array[i, :, :, 0] if array.shape[3] == 1 else array[i])
            write_whole(path, functools.partial(image.save, format="PNG", pnginfo=text), clean=False, sync=False)

    def _part(self, name: str, chunk: int, i: int) -> np.ndarray:
        from PIL import Image

        path = self.paths(name, chunk)[i]
        with reading(path, "expected an image, as it was written,"), Image.open(path) as image:
            pixels, text = np.atleast_3d(np.asarray(image)), image.info.get(_TEXT)
            if text != self._digest(name, chunk, i, pixels):
                raise ValueError("its digest does not fit: it was changed, or is another seed's or another run's")
        return pixels[None]

    def _digest(self, name: str, chunk: int, i: int, pixels: np.ndarray) -> str:
        content = json.dumps(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
        return _digest(name, self.settings, self.seeds_of(chunk)[i : i + 1], content).hex()

    def check_writable(self) -> None:
        """Raises OSError where the run's files cannot be written: it begins to."""
        for name in self.names:
            check_writable(self.folder(name) / f"{'0' * self.digits}.png")

    def clean(self) -> None:
        """Removes what this host's processes left of this run's files when they were killed."""
        for folder in {self.directory, *map(self.folder, self.names)}:
            remove_leftovers(folder, _PNG_NAME.fullmatch)


def opened(directory: FilePath, seeds: ArrayLike) -> Shards | Pngs:
    """The directory's Shards or Pngs, by its settings. seeds: as it was begun with. Raises as they do."""
    return Pngs(directory, seeds) if _settings(pathlib.Path(directory)).get("images") else Shards(directory)


def begin(directory: FilePath, settings: Mapping[str, Any], seeds: ArrayLike) -> Shards | Pngs:
    """The directory's Shards or, where the settings say images: png, Pngs: new, or begun before with the same settings and seeds.

    settings: a dict of what JSON can say. Of processes that begin at once with other settings, one does. Raises ValueError,
    saying what has changed, for other settings; where the directory holds something else.
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
    if not begun.get("images") and not (directory / "seeds.npy").exists():
        _save(directory / "seeds.npy", wanted, begun)
    run = opened(directory, wanted)
    if not np.array_equal(run.seeds, wanted):
        raise ValueError(f"{directory}: seeds.npy holds other seeds than run.json says")
    run.check_writable()
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
        raise ValueError(f"{where}: begun with other settings, and its samples would not go together: {said}")


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
