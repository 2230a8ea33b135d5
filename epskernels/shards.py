"""Samples on disk in chunks of seeds: what `epskernels sample --out DIRECTORY` writes, continues, and many processes share.

    run.json              the settings: all that decides the bits
    seeds.npy             uint64 (N,), in order
    samples-000012.npy    float32 (n, *shape), of seeds[12*batch : 13*batch]; the last chunk may be shorter

A file appears whole or not at all, so what is there need not be made again. Chunks are the same whoever makes them: a model's
bits may depend on the batch's size, hence the batch is a setting, and the number of processes is none.
"""

import json
import os
import pathlib
import socket

import numpy as np

FORMAT = 1
SETTINGS = "expected the settings of a run"


class Shards:
    """The chunks in a directory: `settings`, `seeds`, and for each of `names` the arrays of `len(shards)` chunks.

    Raises FileNotFoundError where nothing was begun, ValueError for another format, or where it is damaged.
    """

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.settings = read_object(self.directory / "run.json", SETTINGS)
        if self.settings.get("format") != FORMAT:
            raise ValueError(f"{directory}: expected format {FORMAT}, got {self.settings.get('format')!r}")
        path = self.directory / "seeds.npy"
        try:
            self.seeds = np.load(path)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged, and would be made again if it were not there: {error}") from None
        self.names, self.batch = tuple(self.settings["names"]), self.settings["batch"]

    def __len__(self):
        return -(-len(self.seeds) // self.batch)

    def seeds_of(self, chunk):
        return self.seeds[chunk * self.batch : (chunk + 1) * self.batch]

    def path(self, name, chunk):
        return self.directory / f"{name}-{chunk:06d}.npy"

    def write(self, name, chunk, array):
        """Raises ValueError for another shape or dtype than the chunk has."""
        self._check(name, chunk, array)
        write_whole(self.path(name, chunk), lambda file: np.save(file, array))

    def read(self, name, chunk):
        """Read from the file as it is used, not before. Raises FileNotFoundError, ValueError where it is damaged."""
        try:
            array = np.load(self.path(name, chunk), mmap_mode="r")
        except EOFError as error:
            raise ValueError(f"{self.path(name, chunk)}: {error}") from None
        self._check(name, chunk, array)
        return array

    def _check(self, name, chunk, array):
        expected = (len(self.seeds_of(chunk)), *self.settings["shape"])
        if name not in self.names or array.shape != expected or array.dtype != np.float32:
            path = self.path(name, chunk)
            raise ValueError(f"{path}: expected float32 {expected} for {self.names}, got {array.dtype} {array.shape}")

    def chunks(self, name="samples"):
        """(seeds, samples) of every chunk in turn. Raises as `read`."""
        for chunk in range(len(self)):
            yield self.seeds_of(chunk), self.read(name, chunk)

    def load(self, name="samples"):
        """All samples in one array (N, *shape), in the order of the seeds."""
        return np.concatenate([samples for _, samples in self.chunks(name)])

    def missing(self):
        """([(name, chunk) that are not there], [paths of the damaged among them])."""
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

    def clean(self):
        """Removes what interrupted writes left."""
        for path in self.directory.glob("*.tmp"):
            path.unlink(missing_ok=True)


def begin(directory, settings, seeds):
    """The directory's Shards: new, or begun before with the same settings, a dict of what JSON can say, and seeds.

    Raises ValueError, saying what has changed, for other settings; where the directory holds something else.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({"format": FORMAT, **settings}))
    path = directory / "run.json"
    if path.exists():
        compare(read_object(path, SETTINGS), settings, directory)
    elif found := [other.name for other in directory.iterdir() if other.suffix != ".tmp"]:
        raise ValueError(f"{directory}: expected run.json or an empty directory, found {min(found)}")
    else:
        write_whole(path, lambda file: file.write(json.dumps(settings, indent=1).encode() + b"\n"))
    if not (directory / "seeds.npy").exists():  # after run.json, which says what they are
        write_whole(directory / "seeds.npy", lambda file: np.save(file, np.array(seeds, dtype=np.uint64)))
    run = Shards(directory)
    if not np.array_equal(run.seeds, np.array(seeds, dtype=np.uint64)):
        raise ValueError(f"{directory}: seeds.npy holds other seeds than run.json says")
    return run


def compare(old, new, where):
    """Raises ValueError where the settings are not the same."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed := [key for key in changed if key != "tables"] or changed:  # digests, of settings that are said already
        said = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueError(f"{where}: begun with other settings, and its samples would not go together: {said}")


def read_object(path, expected):
    """The JSON object that a file holds. Raises ValueError that says what was expected of it."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{expected} in {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{expected} in {path}, got {type(found).__name__}")
    return found


def write_whole(path, write):
    """Whole or not at all, whatever interrupts, the power included. A link is written through."""
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
