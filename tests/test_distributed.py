"""Samples in a directory: chunk by chunk, by any number of processes, interrupted anywhere; the same bits."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from epskernels import cli, shards
from epskernels.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def build_model(directory, seed=0):
    torch.manual_seed(seed)
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(directory / "unet")  # fmt: skip
    DDPMScheduler().save_pretrained(directory / "scheduler")
    return str(directory)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("tiny"))


def run(tiny, *arguments, steps=3, seeds="0-6,20"):
    command = ["--model", tiny, "--steps", str(steps), "--seeds", seeds, "--batch", "3", "--lambda", "1.01", "--quiet"]
    return cli.main(["sample", *command, *[str(argument) for argument in arguments]])


def files(directory):
    """What tells a file that was written again from one that was left alone."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in pathlib.Path(directory).iterdir()}


@pytest.fixture
def whole(tiny, tmp_path, capsys):
    """A finished directory of three chunks."""
    directory = tmp_path / "whole"
    assert run(tiny, "--out", directory) == 0
    capsys.readouterr()
    return directory


def hashes(printed):
    return dict(re.findall(r"sha256 of the (baseline|samples) ([0-9a-f]{64})", printed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_directory_holds_what_one_run_in_memory_makes(tiny, dtype, tmp_path, capsys):
    options = ("--compare", "--dtype", dtype)
    assert run(tiny, *options, "--out", tmp_path / "memory.npz", "--out", tmp_path / "memory.png") == 0
    in_memory = hashes(capsys.readouterr().out)
    outs = [tmp_path / name for name in ("chunks", "chunks.npz", "chunks.png")]
    assert run(tiny, *options, *[part for path in outs for part in ("--out", path)]) == 0
    printed = capsys.readouterr().out
    assert hashes(printed) == in_memory and len(in_memory) == 2
    assert "6 chunks of up to 3 seeds" in printed and "0 of them before; by rank: 6" in printed
    expected, assembled = (np.load(tmp_path / f"{name}.npz") for name in ("memory", "chunks"))
    assert Image.open(tmp_path / "chunks.png").tobytes() == Image.open(tmp_path / "memory.png").tobytes()

    read = shards.Shards(outs[0])
    assert read.seeds.tolist() == expected["seeds"].tolist() == [0, 1, 2, 3, 4, 5, 6, 20] and len(read) == 3
    for name in ("baseline", "samples"):
        assert np.array_equal(read.load(name), expected[name]) and np.array_equal(assembled[name], expected[name])
    assert [(len(seeds), samples.shape) for seeds, samples in read.chunks()] == [
        (3, (3, 1, 8, 8)), (3, (3, 1, 8, 8)), (2, (2, 1, 8, 8)),
    ]  # fmt: skip
    assert not list(outs[0].glob("*.tmp"))


def test_a_finished_run_is_left_alone(tiny, whole, capsys):
    before = files(whole)
    assert run(tiny, "--out", whole) == 0
    assert files(whole) == before
    assert "3 of them before; by rank: 0" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_where_it_was(tiny, whole, tmp_path, monkeypatch, capsys):
    write, directory = shards.Shards.write, tmp_path / "interrupted"

    def full_at_last(self, name, chunk, array):
        if chunk == 2:
            raise OSError("No space left on device")
        write(self, name, chunk, array)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", full_at_last)
        assert run(tiny, "--out", directory) == 1
    assert "No space left on device" in capsys.readouterr().err
    (directory / "samples-000002.npy.there.77.tmp").write_bytes(b"half of a file")  # as a killed process leaves it
    before = {name: stamp for name, stamp in files(directory).items() if not name.endswith(".tmp")}
    assert run(tiny, "--out", directory) == 0
    assert "2 of them before; by rank: 1" in capsys.readouterr().out
    assert files(directory).items() >= before.items() and len(before) == 4
    assert np.array_equal(shards.Shards(directory).load(), shards.Shards(whole).load())
    assert not list(directory.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "emptied", "of another shape", "no array"])
def test_a_damaged_chunk_is_made_again(tiny, whole, damage, capsys):
    path, expected = whole / "samples-000001.npy", shards.Shards(whole).load()
    content = path.read_bytes()
    if damage == "of another shape":
        np.save(path, np.zeros((2, 1, 8, 8), np.float32))
    else:
        path.write_bytes({"cut": content[:-1], "emptied": b"", "no array": b"x" * len(content)}[damage])
    with pytest.raises(ValueError, match="samples-000001.npy|mmap|magic|pickle"):
        shards.Shards(whole).load()
    assert run(tiny, "--out", whole) == 0
    captured = capsys.readouterr()
    assert f"warning: {path} is damaged" in captured.err and "2 of them before" in captured.out
    assert path.read_bytes() == content and np.array_equal(shards.Shards(whole).load(), expected)


CHANGED = {
    "steps": (["--steps", "4"], "steps was 3, is 4"),
    "lambda": (["--lambda", "1.02"], r"scaling was '.*1\.01.*', is '.*1\.02"),
    "seeds": (["--seeds", "0-7"], "seeds was '8 from 0 to 20"),
    "the order of seeds": (["--seeds", "0,2,1,3-6,20"], "seeds was '8 from 0 to 20"),
    "batch": (["--batch", "4"], "batch was 3, is 4"),
    "sampler": (["--sampler", "ddim"], "sampler was 'ddpm', is 'ddim'"),
    "variance": (["--variance", "fixed_large"], "variance was None, is 'fixed_large'"),
    "dtype": (["--dtype", "bfloat16"], "dtype was 'float32', is 'bfloat16'"),
    "compare": (["--compare"], r"names was \['samples'\], is \['baseline', 'samples'\]"),
    "threads": (["--threads", "2"], "device was 'cpu, .*, 1 threads', is 'cpu, .*, 2 threads'"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_settings_are_refused(tiny, whole, change, capsys):
    arguments, message = CHANGED[change]
    before = files(whole)
    assert run(tiny, *arguments, "--out", whole) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.search(f"--out: {whole}: begun with other settings.*: .*{message}", captured.err)
    assert files(whole) == before and torch.get_num_threads() == 1


def test_another_model_is_refused_and_the_same_elsewhere_is_not(tiny, whole, tmp_path, capsys):
    assert run(build_model(tmp_path / "same"), "--out", whole) == 0
    assert run(build_model(tmp_path / "other", seed=1), "--out", whole) == 2
    assert re.search("begun with other settings.*: model was '", capsys.readouterr().err)


def test_the_backend_is_no_setting(tiny, whole):
    (whole / "samples-000000.npy").unlink()
    expected = shards.Shards(whole).read("samples", 1)
    assert run(tiny, "--backend", "reference", "--out", whole) == 0
    assert np.array_equal(shards.Shards(whole).read("samples", 1), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "a", "--out", "b"], "--out: expected one directory, got 2"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
    ids=["two directories", "threads"],
)
def test_bad_usage(tiny, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(tiny, *arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_directory_of_other_things_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert run(tiny, "--out", tmp_path / "..", "--out", tmp_path) == 2
    assert run(tiny, "--out", tmp_path) == 2
    assert "expected run.json or an empty directory, found notes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="expected format 1, got 99"):
        shards.Shards(tmp_path)


def test_a_write_that_fails_leaves_nothing(whole):
    read = shards.Shards(whole)
    before = files(whole)
    for array in (np.zeros((3, 1, 8, 8)), np.zeros((2, 1, 8, 8), np.float32)):
        with pytest.raises(ValueError, match=r"samples-000000.npy: expected float32 \(3, 1, 8, 8\)"):
            read.write("samples", 0, array)
    with pytest.raises(TypeError):
        shards.write_whole(read.path("samples", 0), lambda file: file.write("text"))
    assert files(whole) == before


# ---- many processes ----


def test_ranks(monkeypatch):
    alone = Ranks("cpu")
    assert (alone.rank, alone.size, alone.device) == (0, 1, torch.device("cpu"))
    with alone:
        assert alone.gather(3) == [3] and alone.from_first(lambda: 4) == 4
        with pytest.raises(OSError, match="full"):
            alone.from_first(lambda: (_ for _ in ()).throw(OSError("full")))
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Ranks("cuda").device == torch.device("cuda:1") and Ranks("cpu").rank == 5
    with pytest.raises(ValueError, match="expected cuda, without a number, for 8 processes"):
        Ranks("cuda:0")


def test_many_processes_need_a_directory(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tiny, "--out", tmp_path / "samples.npz") == 2
    assert "--out: expected a directory (no suffix), which 2 processes can write to" in capsys.readouterr().err


def launch(processes, tiny, directory):
    """A second or two of work, in 30 chunks, by torchrun, or by python alone."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "epskernels"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else ["epskernels"]), "sample", "--quiet"]
    command += ["--model", tiny, "--steps", "8", "--seeds", "0-88", "--batch", "3", "--out", str(directory)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid):
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return sorted(found)


def kill_midway(process, pick):
    """SIGKILL for one of its processes once some chunks are there."""
    directory = pathlib.Path(process.args[-1])
    deadline = time.monotonic() + 100
    while len(list(directory.glob("samples-*.npy"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.kill(pick(process.pid), signal.SIGKILL)
    assert process.wait(timeout=100) != 0
    process.communicate()


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory, one_thread):
    """As one process makes it, uninterrupted."""
    directory = tmp_path_factory.mktemp("expected") / "run"
    arguments = ["--model", tiny, "--steps", "8", "--seeds", "0-88", "--batch", "3", "--quiet"]
    assert cli.main(["sample", *arguments, "--out", str(directory)]) == 0
    return shards.Shards(directory).load()


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="finds torchrun's processes in /proc")
@pytest.mark.parametrize("first, then", [(1, 2), (2, 3)])
def test_killed_and_resumed_by_another_number_of_processes(tiny, expected, first, then, tmp_path):
    directory = tmp_path / "run"
    kill_midway(launch(first, tiny, directory), (lambda pid: pid) if first == 1 else (lambda pid: children(pid)[-1]))
    run = shards.Shards(directory)
    missing, damaged = run.missing()
    assert 0 < len(missing) < len(run) == 30 and not damaged
    there = {name: stamp for name, stamp in files(directory).items() if not name.endswith(".tmp")}

    resumed = launch(then, tiny, directory)
    out, err = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, err
    assert files(directory).items() >= there.items()
    made = [int(count) for count in re.search(r"by rank: ([\d ]+)\n", out)[1].split()]
    assert f"{30 - len(missing)} of them before" in out and sum(made) == len(missing)
    assert len(made) == then and max(made) - min(made) <= 1
    assert np.array_equal(run.load(), expected) and np.array_equal(run.seeds, np.arange(89))
    assert not list(directory.glob("*.tmp"))


def test_other_settings_end_all_processes(tiny, whole):
    before = files(whole)
    process = launch(2, tiny, whole)
    out, err = process.communicate(timeout=100)
    assert process.returncode != 0 and out == "" and "steps was 3, is 8" in err
    assert files(whole) == before
