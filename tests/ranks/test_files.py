"""Files: whole or not at all, of one process among many; errors that name them; what killed processes left."""

import errno
import os
import socket
import subprocess
import sys
import zipfile

import pytest

from epskernels import files

TEXT = b"all of it"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("links", [True, False], ids=["links", "a file system without links"])
def test_a_new_file_is_made_once(links, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "run.json"
    assert files.write_new(path, lambda file: file.write(TEXT)) is True
    assert files.write_new(path, lambda file: file.write(b"another")) is False
    assert path.read_bytes() == TEXT and names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("write", [files.write_whole, files.write_new])
@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device: '{}'"),
        (OSError("3456 requested and 0 written"), "{}: 3456 requested and 0 written"),  # numpy's
    ],
    ids=["of the system", "of numpy"],
)
def test_a_write_that_fails_names_the_path(write, error, expected, tmp_path):
    def fails(file):
        file.write(TEXT)
        raise error

    with pytest.raises(OSError) as raised:
        write(tmp_path / "samples.npz", fails)
    assert str(raised.value) == expected.format(tmp_path / "samples.npz") and not names(tmp_path)
    assert raised.value.errno == error.errno


def test_what_a_parser_raises_names_the_file(tmp_path):
    path = tmp_path / "some.npy"
    for error in (SyntaxError("invalid"), zipfile.BadZipFile("no zip"), AttributeError("x"), MemoryError("64 TiB"),
                  OSError("cannot identify image"), OSError(errno.EINVAL, "Invalid argument")):  # fmt: skip
        with (
            pytest.raises(ValueError, match=f"^expected an array in {path}: .+"),
            files.reading(path, "expected an array"),
        ):
            raise error
    with (
        pytest.raises(ValueError, match=f"expected an array in {path}: 'format' is missing"),
        files.reading(path, "expected an array"),
    ):
        {}["format"]
    with (
        pytest.raises(ValueError, match=f"expected an array in {path}: EOFError"),
        files.reading(path, "expected an array"),
    ):
        raise EOFError
    with pytest.raises(FileNotFoundError, match=str(path)), files.reading(path, "expected an array"):
        path.read_bytes()
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"), files.reading(path, "expected an array"):
        raise OSError(errno.EIO, "Input/output error")  # as read raises it, without a name


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", "\\xff", "[" * 100_000], ids=["empty", "cut", "list", "number", "no JSON", "deep"]
)
def test_what_is_no_object_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"^expected settings in {tmp_path}/a.json: "):
        files.read_object(tmp_path / "a.json", "expected settings")


def test_a_write_removes_what_killed_processes_left_of_the_file(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / f"lambda.json.{socket.gethostname()}.{process.pid}.tmp"
    for clean in (False, True):
        left.write_bytes(b"half")
        files.write_whole(tmp_path / "lambda.json", lambda file: file.write(TEXT), clean=clean)
        assert left.exists() is not clean
    assert names(tmp_path) == ["lambda.json"]


def test_check_writable(tmp_path):
    """It leaves nothing but the folder, and removes what killed processes left of this file alone."""
    path = tmp_path / "new" / "out.npz"
    files.check_writable(path)
    assert not names(tmp_path / "new")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = socket.gethostname()
    for name in (f"out.npz.{host}.{process.pid}", f"other.npz.{host}.{process.pid}", f"out.npz.{host}.{os.getppid()}"):
        (tmp_path / "new" / f"{name}.tmp").write_bytes(b"half")
    files.check_writable(path)
    assert names(tmp_path / "new") == sorted(
        [f"other.npz.{host}.{process.pid}.tmp", f"out.npz.{host}.{os.getppid()}.tmp"]
    )
    path.touch()
    for wrong, said in ((tmp_path, tmp_path), (tmp_path / ("x" * 250), "x" * 250), (path / "below", path)):
        with pytest.raises(OSError, match=str(said)):
            files.check_writable(wrong)
