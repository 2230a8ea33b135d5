"""Samples in a directory: chunk by chunk, by any number of processes, interrupted anywhere; the same bits."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from epskernels import cli, images, shards
from epskernels.files import write_whole
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
    found = [path for path in pathlib.Path(directory).iterdir() if path.is_file()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def leftover(path, pid):
    """The temporary file of a process of this host."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{pid}.tmp")


@pytest.fixture(scope="session")
def dead():
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


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


def test_an_interrupted_run_goes_on_where_it_was(tiny, whole, dead, tmp_path, monkeypatch, capsys):
    write, directory = shards.Shards.write, tmp_path / "interrupted"

    def full_at_last(self, name, chunk, array):
        if chunk == 2:
            raise OSError("No space left on device")
        write(self, name, chunk, array)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", full_at_last)
        assert run(tiny, "--out", directory) == 1
    assert "No space left on device" in capsys.readouterr().err
    leftover(directory / "samples-000002.npy", dead).write_bytes(b"half of a file")  # as a killed process leaves it
    before = {name: stamp for name, stamp in files(directory).items() if not name.endswith(".tmp")}
    assert run(tiny, "--out", directory) == 0
    assert "2 of them before; by rank: 1" in capsys.readouterr().out
    assert files(directory).items() >= before.items() and len(before) == 4
    assert np.array_equal(shards.Shards(directory).load(), shards.Shards(whole).load())
    assert not list(directory.glob("*.tmp"))


def test_only_what_killed_processes_of_the_run_left_is_removed(tiny, whole, dead, tmp_path):
    path, elsewhere = whole / "samples-000001.npy", tmp_path / "elsewhere"
    kept = [whole / "notes.tmp", leftover(path, os.getpid()), leftover(whole / "mine.npy", dead)]
    kept += [path.with_name(f"{path.name}.another-host.{dead}.tmp"), path.with_name(f"{path.name}.tmp")]
    for each in kept:
        each.write_bytes(b"")
    leftover(path, dead + 1).mkdir()
    for name in ("run.json", "seeds.npy", "samples-000000.npy"):
        leftover(whole / name, dead).write_bytes(b"half")
    assert run(tiny, "--out", whole) == 0
    assert set(whole.glob("*.tmp")) == {*kept, leftover(path, dead + 1)}

    elsewhere.mkdir()
    leftover(elsewhere / "run.json", dead).write_bytes(b"half")  # of a process that was killed as it began
    assert run(tiny, "--out", elsewhere) == 0 and not list(elsewhere.glob("*.tmp"))


def damaged(content, kind, directory):
    header = content.index(b"\n")
    flipped = bytearray(content)
    flipped[header + 9] ^= 16
    return {
        "cut": content[:-1],
        "emptied": b"",
        "no array": b"x" * len(content),
        "a flipped bit": bytes(flipped),
        "zeros": content[: header + 1] + bytes(len(content) - header - 1),
        "all zeros": bytes(len(content)),
        "another seed's chunk": (directory / "samples-000000.npy").read_bytes(),
        "an open bracket": content.replace(b"(3,", b"(((", 1),
        "a zip file": b"PK\3\4" + content[4:],
        "another version": content[:6] + b"\t" + content[7:],
        "a huge shape": content.replace(b"(3, 1, 8, 8), }        ", b"(999999999999, 1, 8, 8)}", 1),
    }[kind]


@pytest.mark.parametrize(
    "damage",
    ["cut", "emptied", "of another shape", "no array", "a flipped bit", "zeros", "all zeros", "another seed's chunk",
     "an open bracket", "a zip file", "another version", "a huge shape"],
)  # fmt: skip
def test_a_damaged_chunk_is_made_again(tiny, whole, damage, capsys):
    path, expected = whole / "samples-000001.npy", shards.Shards(whole).load()
    content = path.read_bytes()
    if damage == "of another shape":
        np.save(path, np.zeros((2, 1, 8, 8), np.float32))
    else:
        path.write_bytes(damaged(content, damage, whole))
    assert path.read_bytes() != content
    with pytest.raises(ValueError, match="samples-000001.npy"):
        shards.Shards(whole).load()
    assert run(tiny, "--out", whole) == 0
    captured = capsys.readouterr()
    assert f"warning: {path} is damaged" in captured.err and "2 of them before" in captured.out
    assert path.read_bytes() == content and np.array_equal(shards.Shards(whole).load(), expected)


def test_swapped_chunks_and_those_of_another_run_are_made_again(tiny, whole, tmp_path, capsys):
    one, two = (whole / f"samples-00000{i}.npy" for i in (0, 1))
    contents = [one.read_bytes(), two.read_bytes()]
    one.write_bytes(contents[1]), two.write_bytes(contents[0])
    assert run(tiny, "--out", whole) == 0 and "1 of them before" in capsys.readouterr().out
    assert [one.read_bytes(), two.read_bytes()] == contents
    assert run(tiny, "--lambda", "1.02", "--out", tmp_path / "other") == 0
    one.write_bytes((tmp_path / "other" / one.name).read_bytes())  # the same seeds, another lambda
    assert run(tiny, "--out", whole) == 0 and one.read_bytes() == contents[0]


def test_numpy_reads_a_chunk(whole):
    for mode in (None, "r"):
        assert np.array_equal(
            np.load(whole / "samples-000001.npy", mmap_mode=mode), shards.Shards(whole).read("samples", 1)
        )


def test_a_directory_without_digests_is_gone_on_with(tiny, whole, capsys):
    """As version 1 wrote it."""
    expected = shards.Shards(whole).load()
    settings = (whole / "run.json").read_text()
    (whole / "run.json").write_text(settings.replace('"format": 2', '"format": 1'))
    for path in whole.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-32])
    (whole / "samples-000002.npy").unlink()
    before = files(whole)
    assert run(tiny, "--out", whole) == 0 and "2 of them before" in capsys.readouterr().out
    assert files(whole).items() >= before.items() and np.array_equal(shards.Shards(whole).load(), expected)
    assert len((whole / "samples-000002.npy").read_bytes()) == 128 + 2 * 64 * 4


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
    with pytest.raises(ValueError, match="expected format 2, got 99"):
        shards.Shards(tmp_path)


@pytest.mark.parametrize("seeds", [np.array([3, 4]), np.array([[3, 4]], np.uint64)], ids=["int64", "two dimensions"])
def test_seeds_that_are_none(seeds, tmp_path):
    """Of format 1, which has no digest to tell that the file was changed."""
    shards.begin(tmp_path, {"names": ["samples"], "batch": 2, "shape": [1]}, [3, 4])
    settings = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(settings.replace('"format": 2', '"format": 1'))
    np.save(tmp_path / "seeds.npy", seeds)
    with pytest.raises(ValueError, match=r"expected uint64 \(N,\) in .*seeds.npy, got"):
        shards.Shards(tmp_path)


def test_a_write_that_fails_leaves_nothing(whole):
    read = shards.Shards(whole)
    before = files(whole)
    for array in (np.zeros((3, 1, 8, 8)), np.zeros((2, 1, 8, 8), np.float32)):
        with pytest.raises(ValueError, match=r"samples-000000.npy: expected float32 \(3, 1, 8, 8\)"):
            read.write("samples", 0, array)
    with pytest.raises(TypeError):
        write_whole(read.path("samples", 0), lambda file: file.write("text"))
    assert files(whole) == before


# ---- many processes ----


@pytest.fixture
def environment(monkeypatch):
    """Sets what torchrun sets."""

    def set_environment(**values):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_ranks(environment):
    environment()
    alone = Ranks()
    assert (alone.rank, alone.size, alone.device("cpu")) == (0, 1, torch.device("cpu"))
    with alone:
        assert alone.gather(3) == [3] and alone.from_first(lambda: 4) == 4
        with pytest.raises(OSError, match="full"):
            alone.from_first(lambda: (_ for _ in ()).throw(OSError("full")))
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (5, 8)
    assert ranks.device("cuda") == torch.device("cuda:1") and ranks.device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="expected cuda, without a number, for 8 processes"):
        ranks.device("cuda:0")
    environment(RANK="", WORLD_SIZE=" ")
    assert (Ranks().rank, Ranks().size) == (0, 1)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"RANK": "1"}, "WORLD_SIZE: expected beside RANK, since torchrun sets both, got none"),
        ({"WORLD_SIZE": "2"}, "RANK: expected beside WORLD_SIZE, since torchrun sets both, got none"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: expected a whole number of at least 0, got 'x'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: expected a whole number of at least 0, got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number of at least 1, got '0'"),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, "WORLD_SIZE: expected a whole number of at least 1, got '1.5'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected below WORLD_SIZE, 2, got 2"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
            "LOCAL_RANK: expected a whole number of at least 0, got 'x'",
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_strange_environment_is_one_line(values, message, tiny, environment, tmp_path, capsys):
    environment(**values)
    assert run(tiny, "--out", tmp_path / "samples") == 2
    assert capsys.readouterr().err == f"epskernels sample: {message}\n" and not (tmp_path / "samples").exists()


def test_a_strange_port_is_one_line(tiny, environment, tmp_path, capsys):
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="x")
    assert run(tiny, "--out", tmp_path / "samples") == 1
    assert capsys.readouterr().err == "epskernels sample: MASTER_PORT: expected a whole number of at least 1, got 'x'\n"


def together(environment, size, work):
    """work(ranks) in a thread for each rank: what it returns, or raises, by rank, and when each has left the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    all_ranks = []
    for rank in range(size):
        environment(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        all_ranks.append(Ranks())
    found, left = [None] * size, [0.0] * size

    def of(ranks):
        try:
            with ranks:
                found[ranks.rank] = work(ranks)
        except Exception as error:
            found[ranks.rank] = error
        left[ranks.rank] = time.monotonic()

    threads = [threading.Thread(target=of, args=[ranks]) for ranks in all_ranks]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    return found, left


def test_ranks_talk_through_the_store(environment):
    """Also of more than the store takes at once, and none leaves before rank 0 has come to its end."""
    large, written = list(range(3_000_000)), []

    def work(ranks):
        same = ranks.from_first(lambda: large) == large and ranks.from_first(lambda: ranks.rank) == 0
        counts = ranks.gather(10 * ranks.rank)
        if ranks.rank == 0:
            time.sleep(0.5)  # it writes
            written.append(time.monotonic())
        return same, counts

    found, left = together(environment, 3, work)
    assert found == [(True, [0, 10, 20]), (True, None), (True, None)]
    assert min(left) > written[0]


def test_an_earlier_attempt_s_words_are_not_heard(environment, monkeypatch):
    """torchrun keeps its store when it starts the processes again, and the failure that was told in it."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    heard = []
    for attempt in ("0", "1"):
        environment(RANK="1", WORLD_SIZE="2", MASTER_PORT="1")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with pytest.raises(KeyboardInterrupt), Ranks() as ranks:
            heard.append(ranks._store.check(["failed"]))
            raise KeyboardInterrupt  # leaves, and says that it has failed
    assert heard == [False, False] and store.num_keys() == 2


def test_the_first_ranks_error_is_everyones(environment):
    def work(ranks):
        return ranks.from_first(lambda: (_ for _ in ()).throw(ValueError("other settings")))

    found, _ = together(environment, 3, work)
    assert [str(error) for error in found] == ["other settings"] * 3


def test_a_rank_that_fails_ends_the_others(environment):
    def work(ranks):
        if ranks.rank == 1:
            raise OSError("full")
        return ranks.gather(0)

    (first, second), _ = together(environment, 2, work)
    assert isinstance(first, RuntimeError) and "rank 1 has failed" in str(first) and str(second) == "full"


def test_many_processes_need_a_directory(tiny, environment, tmp_path, capsys):
    environment(RANK="0", WORLD_SIZE="2")
    assert run(tiny, "--out", tmp_path / "samples.npz") == 2
    assert "--out: expected a directory (no suffix), which 2 processes can write to" in capsys.readouterr().err


def launch(processes, tiny, directory):
    """A second or two of work, in 30 chunks, by torchrun, or by python alone."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "epskernels"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else ["epskernels"]), "sample", "--quiet"]
    command += ["--model", tiny, "--steps", "8", "--seeds", "0-88", "--batch", "3", "--uint8", "--out", str(directory)]
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
@pytest.mark.deep
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
    pngs = sorted((directory / "samples").iterdir())
    assert [path.name for path in pngs] == [f"{seed:06d}.png" for seed in range(89)]
    assert np.array_equal([np.asarray(Image.open(path)) for path in pngs], images.to_bytes(expected)[..., 0])
    assert not list(directory.glob("*.tmp"))


@pytest.mark.deep
def test_other_settings_end_all_processes(tiny, whole):
    before = files(whole)
    process = launch(2, tiny, whole)
    out, err = process.communicate(timeout=100)
    assert process.returncode != 0 and out == "" and "steps was 3, is 8" in err
    assert files(whole) == before
