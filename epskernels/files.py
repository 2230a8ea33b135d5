"""Files that appear whole or not at all, and files that may be damaged: one way to write, one to read.

reading            whatever a parser raises is one ValueError, which names the file
argument           what the system raises for a file that an argument names, names the argument too
write_whole        under another name, NAME.HOST.PID.tmp, synchronised, then renamed
write_new          the same for a file that must not be there yet, of any number of processes that try
check_writable     before the work, by beginning to
remove_leftovers   the temporary files of processes that were killed
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import socket
from collections.abc import Callable, Iterator
from typing import IO, Any

from .typing import FilePath

__all__ = ["argument", "check_writable", "read_object", "reading", "remove_leftovers", "write_new", "write_whole"]

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextlib.contextmanager
def reading(path: FilePath, expected: str) -> Iterator[None]:
    """Around the parsing of a file: whatever that raises is a ValueError "`expected` in `path`: why".

    numpy, zipfile and Pillow raise nearly anything for a damaged file, such as SyntaxError, AttributeError, MemoryError, or an
    OSError without a number. An OSError of the system, such as FileNotFoundError, stays one, and names the file.
    """
    try:
        yield
    except Exception as error:
        # EINVAL comes of a damaged file: its parser sought a place before the file's beginning.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise _named(error, path) from error
        said = str(error).split(". ")[0]  # numpy goes on to how one may load it unsafely
        if isinstance(error, KeyError):
            said = f"{said} is missing"
        raise ValueError(f"{expected} in {path}: {said or type(error).__name__}") from error


@contextlib.contextmanager
def argument(name: str, expected: str) -> Iterator[None]:
    """Around the reading of the file that an argument names. expected: what the file is, for the error where there is none."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: expected {expected}, and there is no {error.filename}") from None
    except OSError as error:
        raise type(error)(f"{name}: {error}") from None


def read_object(path: FilePath, expected: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError that says what was expected of it, OSError."""
    with reading(path, expected):
        found = json.loads(pathlib.Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"got {type(found).__name__}")
        return found


def write_whole(path: FilePath, write: Callable[[IO[bytes]], object], *, clean: bool = True) -> None:
    """write(file), whole or not at all, whatever interrupts, the power included. A link is written through.

    clean: also remove what killed processes left of this file, for which its folder is listed.
    Raises OSError that names the path, such as for a full disk.
    """
    path = pathlib.Path(path).resolve()
    with _written(path, write) as temporary:
        os.replace(temporary, path)
        if clean:
            remove_leftovers(path.parent, lambda name: name == path.name)


def write_new(path: FilePath, write: Callable[[IO[bytes]], object]) -> bool:
    """As `write_whole`; but where the path is there already nothing is written. Returns whether this call has made it.

    Of any number of processes that try at once, one makes it.
    """
    path = pathlib.Path(path).resolve()
    with _written(path, write) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:  # a file system without links: it is there at once, and whole a moment later
                with open(path, "xb") as file:
                    write(file)
            except FileExistsError:
                return False
        return True


@contextlib.contextmanager
def _written(path: pathlib.Path, write: Callable[[IO[bytes]], object]) -> Iterator[pathlib.Path]:
    """A temporary file beside the path, written and on the disk; gone at the end."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _named(error: OSError, path: FilePath) -> OSError:
    """The error, of the path: what write and read raise names none, and a temporary file's name tells nobody anything."""
    if error.errno is None:
        return OSError(f"{path}: {error}")
    return OSError(error.errno, error.strerror, str(path))


def check_writable(path: FilePath) -> None:
    """Raises OSError where `write_whole` would: it begins to. Makes the folder, and removes what killed processes left of it."""
    path = pathlib.Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _written(path, lambda file: None):
        remove_leftovers(path.parent, lambda name: name == path.name)


def remove_leftovers(directory: FilePath, is_ours: Callable[[str], object]) -> None:
    """Removes temporary files that processes of this host began for the files whose name `is_ours`, and were killed over."""
    ours = re.compile(rf"(.+)\.{re.escape(socket.gethostname())}\.([0-9]{{1,9}})\.tmp")
    for path in pathlib.Path(directory).iterdir():
        found = ours.fullmatch(path.name)
        if found and is_ours(found[1]) and path.is_file() and not _alive(int(found[2])):
            with contextlib.suppress(OSError):  # another's, or another has removed it: no reason to fail
                path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True
