"""The command line: what it writes, what it prints, how it refuses."""

import errno
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

import epskernels
from epskernels import build, cli, corrections, exposure, features, images, models, quality, samplers, scaling, schedule
from epskernels.cli import common


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Directories of small untrained models: without classes (learned variance), and with."""

    def build(name, in_channels=1, **config):
        directory = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8, in_channels=in_channels, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **config,
        )  # fmt: skip
        network.save_pretrained(directory / "unet")
        DDPMScheduler().save_pretrained(directory / "scheduler")
        return str(directory)

    return {
        "plain": build("plain", out_channels=2),
        "classes": build("classes", out_channels=1, num_class_embeds=4),
        "one": build("one", out_channels=1),
        "two": build("two", in_channels=2, out_channels=2),
    }


def run(*arguments):
    return cli.main(["sample", "--quiet", *arguments])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "edm_euler", "edm_heun", "dpmpp_2m", "dpmpp_2s", "lcm"])
def test_writes_samples_and_grid(tiny, sampler, tmp_path, capsys):
    npz, png = tmp_path / "new" / "samples.npz", tmp_path / "grid.png"
    arguments = ["--model", tiny["plain"], "--sampler", sampler, "--steps", "4", "--seeds", "0-4,9", "--batch", "4"]
    assert run(*arguments, "--lambda", "1.01", "--compare", "--out", str(npz), "--out", str(png)) == 0
    saved = np.load(npz)
    assert saved["seeds"].tolist() == [0, 1, 2, 3, 4, 9]
    assert saved["samples"].shape == saved["baseline"].shape == (6, 1, 8, 8)
    assert not np.array_equal(saved["samples"], saved["baseline"])
    picture, upscaled = np.asarray(Image.open(png)), np.ones((12, 12))
    for left, name in ((16, "baseline"), (16 + 3 * 98 - 2 + 16, "samples")):
        for i, image in enumerate(images.to_bytes(saved[name])[..., 0]):
            above, beside = len(picture) - 16 - 2 * 98 + 2 + i // 3 * 98, left + i % 3 * 98
            assert np.array_equal(picture[above : above + 96, beside : beside + 96], np.kron(image, upscaled))
    printed = capsys.readouterr().out
    assert re.search(r"time in the model \d+\.\d+ s, in the step and the loop around it \d+\.\d+ s", printed)
    assert len(re.findall(r"sha256 of the (?:initial noise|baseline|samples) [0-9a-f]{64}", printed)) == 3


@pytest.mark.parametrize("suffix", ["png", "npz"])
def test_an_interrupted_write_leaves_the_file_as_it_was(suffix, tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"samples.{suffix}"
    arguments = ["--model", tiny["plain"], "--steps", "2", "--out", str(path)]
    assert run(*arguments, "--seeds", "0") == 0
    before = path.read_bytes()

    def interrupted(_):
        if (
            len(list(tmp_path.iterdir())) == 2 and fsyncs.append(0) is None and len(fsyncs) == 2
        ):  # not of the check before
            raise KeyboardInterrupt

    fsyncs = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        capsys.readouterr()
        assert run(*arguments, "--seeds", "1") == 130
    assert capsys.readouterr() == ("", "epskernels sample: interrupted\n")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert run(*arguments, "--seeds", "1") == 0 and path.read_bytes() != before


def test_channels_that_no_png_has_are_refused_before_sampling(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.sample, "sample", None)
    assert run("--model", tiny["two"], "--seeds", "0", "--out", str(tmp_path / "new" / "grid.png")) == 2
    assert "--out: samples: expected images (1, 1 or 3, H, W), got (1, 2, 8, 8)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "file, contents, message",
    [
        ("seeds.npy", b"", "expected an array, as it was written, in {}/seeds.npy: its digest does not fit"),
        ("seeds.npy", np.arange(5, dtype=np.uint64), "seeds.npy: its digest does not fit: it was changed"),
        ("run.json", b"[]", "expected the settings of a run in {}/run.json: got list"),
        ("run.json", b"{", "expected the settings of a run in {}/run.json: "),
    ],
)
def test_a_damaged_directory_is_refused(file, contents, message, tiny, tmp_path, capsys):
    arguments = ["--model", tiny["plain"], "--steps", "2", "--seeds", "0-2", "--out", str(tmp_path / "samples")]
    assert run(*arguments) == 0
    path = tmp_path / "samples" / file
    np.save(path, contents) if isinstance(contents, np.ndarray) else path.write_bytes(contents)
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path / "samples") in error and len(error.splitlines()) == 1
    path.unlink()
    assert (run(*arguments) == 0) == (file == "seeds.npy")


def test_backends_print_the_same_hashes(tiny, capsys):
    printed = []
    for backend in ("cpu", "reference"):
        arguments = ["--model", tiny["plain"], "--steps", "3", "--seeds", "0-2", "--dtype", "bfloat16"]
        assert run(*arguments, "--backend", backend) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if "sha256" in line])
    assert printed[0] == printed[1] and len(printed[0]) == 2


def test_guidance_with_classes(tiny, tmp_path):
    outputs = []
    for guidance in ("1", "4"):
        path = tmp_path / f"{guidance}.npz"
        arguments = ["--model", tiny["classes"], "--steps", "3", "--seeds", "0", "--class", "2", "--out", str(path)]
        assert run(*arguments, "--guidance", guidance) == 0
        outputs.append(np.load(path)["samples"])
    assert not np.array_equal(*outputs)


@pytest.mark.parametrize(
    "setting",
    [["--lambda-linear", "0.0025", "1.0"], ["--published", "ADM", "CIFAR-10", "20", "linear"],
     ["--published", "EDM", "CIFAR-10", "21"], ["--lambda", "0.9985"], ["--lambda", "1.02,1.01,1"],
     ["--lambda", "EDM/CIFAR-10/21"], ["--lambda", "[1.02, 1.01, 1]"], ["--lambda", '{"b": 1.01}']],
    ids=["linear", "published linear", "published EDM", "below one", "numbers", "a name", "a JSON list", "a JSON object"],
)  # fmt: skip
def test_scalings(tiny, setting):
    assert run("--model", tiny["plain"], "--steps", "3", "--seeds", "0", *setting) == 0


def test_one_grammar_for_lambda(tiny, tmp_path, capsys):
    """Each spelling gives the samples of the others."""
    scaling.linear(0.0025, 1.0, origin="cleanest").save(tmp_path / "lambda.json", sampler="ddim")
    numbers = ",".join(str(1 + 0.0025 * i) for i in reversed(range(3)))
    spellings = [
        ["--lambda", "ADM/CIFAR-10/20/linear"], ["--published", "ADM", "CIFAR-10", "20", "linear"],
        ["--lambda-linear", "0.0025", "1"], ["--lambda", '{"k": 0.0025, "b": 1, "origin": "cleanest"}'],
        ["--lambda", ' {"kind": "linear", "k": 0.0025, "b": 1, "origin": "cleanest"}'], ["--lambda", numbers],
        ["--lambda", str(tmp_path / "lambda.json")], ["--scaling", str(tmp_path / "lambda.json")],
    ]  # fmt: skip
    hashes, warned = set(), []
    for spelling in spellings:
        assert run("--model", tiny["one"], "--steps", "3", "--seeds", "0", *spelling) == 0
        captured = capsys.readouterr()
        hashes |= set(re.findall("samples ([0-9a-f]{64})", captured.out))
        warned.append("lambda.json was fitted for sampler ddim, here ddpm: lambda need not transfer" in captured.err)
    assert len(hashes) == 1 and warned == [False] * 6 + [True] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lambda", "0.9,x"], "--lambda: expected .*got '0.9,x'"),
        (["--lambda", ""], "--lambda: expected .*got ''"),
        (["--lambda", "1,nan,1", "--steps", "3"], "--lambda: expected .*finite.*nan"),
        (["--lambda", "1,1", "--steps", "3"], "expected one value for each of 3 steps, got 2"),
        (["--lambda", "{"], "--lambda: expected JSON, got '{'"),
        (["--lambda", '{"k": 1}'], "--lambda: expected the keys k, b"),
        (
            ["--lambda", "ADM/MNIST/20"],
            "--lambda: no published setting ADM/MNIST/20/uniform; dataset of ADM: .*CIFAR-10",
        ),
        (["--lambda", "/nonexistent.json"], "--lambda: expected a file.*/nonexistent.json"),
        (["--scaling", "/nonexistent"], "--scaling: .*/nonexistent"),
        (
            ["--correction", "/nonexistent.json"],
            "--correction: expected a file saved by .*there is no /nonexistent.json",
        ),
        (["--scaling", "/"], "--scaling: .*'/'"),
        (["--published", "ADM", "MNIST", "20"], "--published: no published setting.*CIFAR-10"),
        (["--lambda-linear", "nan", "1"], "--lambda-linear: .*nan"),
        (["--seeds", "5-3,7"], "--seeds: expected a range of seeds from low to high, got 5-3"),
        (["--seeds", "1-2-3"], "--seeds: expected seeds such as"),
        (["--seeds", "5-"], "--seeds: expected seeds such as"),
        (["--seeds", "0-18446744073709551615"], "--seeds: expected fewer than .* seeds"),
        (["--seeds", "0-99999999999"], "--seeds: 100000000000 samples need .* GiB of memory, and there are"),
        (
            ["--seeds", "0-99999999999", "--out", "/tmp/none/samples"],
            "--out: /tmp/none/samples needs .* GiB, and .* are free",
        ),
        (["--out", f"/tmp/{'x' * 250}.npz"], "--out: .* cannot be written: .*File name too long"),
        (["--out", f"/tmp/{'x' * 256}"], "--out: .*File name too long"),
        (["--steps", "0"], "--steps, --batch: expected at least 1"),
        (["--steps", "2000"], "--steps: expected at most T = 1000"),
        (["--sampler", "nope"], "invalid choice: 'nope'"),
        (["--seeds", "a-b"], "expected seeds such as"),
        (["--seeds", "18446744073709551616"], r"expected seeds below 2\^64"),
        (["--lambda", "0"], "lambda: expected a value above 0"),
        (["--lambda", "1.1", "--lambda-linear", "0", "1"], "not allowed with argument"),
        (["--published", "ADM"], "--published: expected SYSTEM DATASET STEPS"),
        (["--published", "ADM", "MNIST", "20"], "no published setting.*CIFAR-10"),
        (["--out", "x.jpg"], "--out: expected a .png or .npz file"),
        (["--compare"], "--compare: expected a scaling"),
        (["--eta", "1"], "--eta: not an option of --sampler ddpm"),
        (["--guidance", "2"], "guidance and class need a network with classes"),
        (["--device", "nope"], "--device: 'nope' cannot be used"),
        (["--device", f"cuda:{torch.cuda.device_count()}"], "--device: 'cuda:.' cannot be used"),
        (["--device", "meta"], "--device: 'meta' cannot be used"),
        (["--model", "/nonexistent"], "--model: expected unet/config.json"),
        (["--out", "/dev/null/a.png"], "--out: /dev/null/a.png cannot be written: "),
        (["--out", "/dev/null/a"], "--out: .*Not a directory: '/dev/null/a'"),
        ([], "required: COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_status_2(tiny, arguments, message, capsys):
    command = ["sample", "--quiet", "--model", tiny["plain"], "--seeds", "0", *arguments] if arguments else []
    try:
        status = cli.main(command)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert re.search(message, captured.err.strip().splitlines()[-1])


def test_info_names_versions_and_backends():
    result = subprocess.run([sys.executable, "-m", "epskernels", "info"], capture_output=True, text=True, check=True)
    for word in ("epskernels 0.", f"torch {torch.__version__}", "cpu capability: ", "backends:", "reference"):
        assert word in result.stdout
    assert result.stderr == ""


def test_environment_forces_the_instruction_set():
    command = [sys.executable, "-m", "epskernels", "info"]
    forced = {**os.environ, "EPSKERNELS_CPU_CAPABILITY": "generic"}
    result = subprocess.run(command, env=forced, capture_output=True, text=True, check=True)
    assert "cpu capability: generic of generic" in result.stdout


CALLS = """
import torch, epskernels
x, row = torch.ones(2, 3, 4, 4), torch.zeros(1, 24)
row[0, 3] = row[0, 4] = 1
epskernels.step(x.mT, x, row, 0)
epskernels.step(x, x, row, 0, backend="reference")
epskernels.moments(x.mT)
with epskernels.use_backend("cpu"):
    epskernels.normal([1], (3,))
with epskernels.use_backend("reference"):
    epskernels.moments(x)
"""


def debug_log(**environment):
    forced = {**os.environ, "EPSKERNELS_LOG": "debug", **environment}
    return subprocess.run([sys.executable, "-c", CALLS], env=forced, capture_output=True, text=True, check=True).stderr


def test_debug_log_says_what_ran_and_why():
    log = debug_log(EPSKERNELS_CPU_CAPABILITY="generic")
    for line in (
        "cpu kernel: loaded",
        "step on cpu runs on the CPU kernel (generic), by default; x goes through a contiguous copy\n",
        "step on cpu runs on the reference, as asked\n",
        "moments on cpu runs on the CPU kernel (generic), by default; f goes through a contiguous copy\n",
        "moments on cpu runs on the reference, by use_backend\n",
        "normal on cpu runs on the CPU kernel (generic), by use_backend\n",
    ):
        assert line in log


def test_environment_forces_the_reference():
    log = debug_log(EPSKERNELS_BACKEND="reference")
    assert "step on cpu runs on the reference, by EPSKERNELS_BACKEND; x goes through a contiguous copy\n" in log


def test_info_says_what_is_wrong_with_the_environment(monkeypatch, capsys):
    faults = ["EPSKERNELS_BACKEND: expected one of cpu, cuda, got 'x'", "EPSKERNELS_LOG: expected debug, got 'y'"]
    monkeypatch.setattr(build, "environment_faults", lambda: faults)
    monkeypatch.setenv("EPSKERNELS_LOG", "y")
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(f"wrong: {fault}\n" in printed for fault in faults) and "EPSKERNELS_LOG=y\n" in printed


def test_info_runs_in_a_strange_environment():
    strange = {"EPSKERNELS_BACKEND": "x", "EPSKERNELS_CPU_CAPABILITY": "sse9", "EPSKERNELS_LOG": "loud", "RANK": "x"}
    command = [sys.executable, "-m", "epskernels", "info"]
    result = subprocess.run(command, env={**os.environ, **strange}, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    for name in ("EPSKERNELS_BACKEND", "EPSKERNELS_CPU_CAPABILITY", "EPSKERNELS_LOG"):
        assert f"wrong: {name}: expected one of " in result.stdout and f"{name}={strange[name]}\n" in result.stdout


def test_info_requires_backends(monkeypatch, capsys):
    monkeypatch.delenv("EPSKERNELS_BACKEND", raising=False)
    assert cli.main(["info", "--require", "cpu"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setitem(build._why, "cpu", "not built")
    monkeypatch.setitem(build._why, "cuda", "no nvcc")
    assert cli.main(["info", "--require", "cpu,cuda"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "epskernels info: epskernels: cpu: not built; cuda: no nvcc\n" and "backends:" in printed.out
    assert "by default: reference for CPU tensors, " in printed.out
    monkeypatch.setenv("EPSKERNELS_FALLBACK", "error")
    assert cli.main(["info"]) == 0 and "by default: nothing for CPU tensors, " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "--require", "cpu, gpu"])
    assert stop.value.code == 2 and "--require: expected some of cpu,cuda,triton, got ' gpu'" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--help"])
    assert stop.value.code == 0 and "--lambda-linear K B" in capsys.readouterr().out


def test_seeds_are_parsed():
    seeds = cli.sample.parse_seeds("0-3, 7,9 - 10,7")
    expected = [0, 1, 2, 3, 7, 9, 10, 7]
    assert list(seeds) == expected and len(seeds) == 8 and seeds[-1] == seeds[4] == 7
    assert np.array_equal(np.array(seeds), np.array(expected, dtype=np.uint64)) and np.array(seeds).dtype == np.uint64
    for first in range(9):
        for last in range(first, 11):
            assert seeds[first:last].tolist() == expected[first:last]
    assert seeds.digest() == cli.common.json_digest(expected)


def test_ranges_of_seeds_stay_ranges():
    seeds = cli.sample.parse_seeds("7,0-99999999999,18446744073709551614-18446744073709551615")
    assert len(seeds) == 100_000_000_003 and seeds[1] == 0 and seeds[-1] == 2**64 - 1
    assert seeds[99_999_999_999:].tolist() == [99_999_999_998, 99_999_999_999, 2**64 - 2, 2**64 - 1]
    many = cli.sample.parse_seeds("3-200000")
    assert many.digest() == cli.common.json_digest(list(range(3, 200_001)))


# ---- what is done is not lost ----


class Refusing(io.StringIO):
    """A stdout that takes no more."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("directory", [False, True], ids=["in memory", "directory"])
@pytest.mark.parametrize(
    "stdout, status",
    [
        (lambda: Refusing(BrokenPipeError(errno.EPIPE, "Broken pipe")), 0),
        (lambda: Refusing(OSError(errno.ENOSPC, "No space left on device")), 1),
        (lambda: Refusing(ValueError("I/O operation on closed file")), 0),
        (lambda: None, 0),
    ],
    ids=["a pipe that nobody reads", "a full disk", "a closed file", "none"],
)
def test_a_stdout_that_fails_loses_nothing(stdout, status, directory, tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--model", tiny["one"], "--steps", "2", "--seeds", "0", "--out", str(tmp_path / "samples.npz")]
    arguments += ["--out", str(tmp_path / "samples")] if directory else []
    monkeypatch.setattr(sys, "stdout", stdout())
    assert run(*arguments) == status
    said = capsys.readouterr().err
    assert "samples" in np.load(tmp_path / "samples.npz")
    assert re.search("sha256 of the samples [0-9a-f]{64}", said) and f"wrote {tmp_path / 'samples.npz'}" in said


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.deep)])
def test_a_pipe_that_nobody_reads(tiny, tmp_path, unbuffered):
    out = tmp_path / "out.png"
    command = [sys.executable, "-m", "epskernels", "sample", "--model", tiny["one"], "--steps", "2", "--seeds", "0"]
    reads, writes = os.pipe()
    os.close(reads)
    result = subprocess.run(
        [*command, "--out", str(out)], stdout=writes, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writes)
    assert result.returncode == 0 and Image.open(out).size == (16 + 260 + 16, 16 + 2 * 21 + 96 + 16)
    assert re.search("sha256 of the samples [0-9a-f]{64}", result.stderr) and "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_stderr_that_fails_loses_nothing(tiny, tmp_path, monkeypatch, capsys):
    """The progress bar writes to it."""
    for number, stderr in enumerate((Refusing(BrokenPipeError(errno.EPIPE, "Broken pipe")), None)):
        monkeypatch.setattr(sys, "stderr", stderr)
        out = tmp_path / f"{number}.npz"
        assert cli.main(["sample", "--model", tiny["one"], "--steps", "2", "--seeds", "0", "--out", str(out)]) == 0
        assert "samples" in np.load(out) and "sha256 of the samples" in capsys.readouterr().out


def test_an_ascii_stdout(tiny, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    out = tmp_path / "émile.npz"
    assert run("--model", tiny["one"], "--steps", "2", "--seeds", "0", "--out", str(out)) == 0
    assert "samples" in np.load(out) and b"\\xe9mile.npz" in stdout.buffer.getvalue()


def test_calibrate_with_a_stdout_that_fails(tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Refusing(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    given = [
        "--model",
        tiny["plain"],
        "--steps",
        "4",
        "--data",
        data,
        "--images",
        "4",
        "--out",
        str(tmp_path / "l.json"),
    ]
    assert calibrate(*given) == 0
    assert scaling.load(tmp_path / "l.json")[1]["images"] == 4 and "R^2" in capsys.readouterr().err


def test_a_full_disk_is_said_with_the_path_and_the_rest_is_done(tiny, tmp_path, monkeypatch, capsys):
    fsync, first, second = os.fsync, tmp_path / "first.npz", tmp_path / "second.npz"

    def full(descriptor):
        if "first" in os.readlink(f"/proc/self/fd/{descriptor}") and os.fstat(descriptor).st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["--model", tiny["one"], "--steps", "2", "--seeds", "0", "--out", str(first), "--out", str(second)]
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err == f"epskernels sample: [Errno 28] No space left on device: '{first}'\n"
    assert re.search("sha256 of the samples [0-9a-f]{64}", captured.out) and f"wrote {second}" in captured.out
    assert list(tmp_path.iterdir()) == [second]


def test_what_cannot_be_imported_says_why(tiny, monkeypatch, capsys):
    def load(*_):
        raise RuntimeError(
            "Failed to import diffusers.a because of the following error (look up to see its traceback):\n"
            "Failed to import diffusers.b because of the following error (look up to see its traceback):\n"
            "No module named 'flash_attn'\n  a frame"
        )

    monkeypatch.setattr(models, "load", load)
    assert run("--seeds", "0") == 1
    error = capsys.readouterr().err
    assert error.endswith("its traceback): No module named 'flash_attn'\n") and len(error.splitlines()) == 1

    def other(*_):
        from diffusers import NoSuchThing  # noqa: F401

    monkeypatch.setattr(models, "load", other)
    assert run("--seeds", "0") == 2
    assert "cannot import name 'NoSuchThing' from 'diffusers'" in capsys.readouterr().err


# ---- samplers that were added ----


def test_a_sampler_that_was_added(tiny, monkeypatch, capsys):
    """Its options are asked of its signature, the schedule that it takes of itself."""

    def mine(path, steps, *, scaling=1.0, prediction="epsilon", clip=None, guidance=1.0, eta=0.5, **grid_options):
        assert isinstance(path, schedule.DiscreteSchedule) and set(grid_options) == {"spacing", "steps_offset"}
        seen.append(eta)
        options = {"scaling": scaling, "prediction": prediction, "clip": clip, "guidance": guidance}
        return samplers.euler_ancestral(path, steps, eta=eta, **options, **grid_options)

    def of_sigmas(path, steps, *, scaling=1.0, prediction="sample", clip=None, guidance=1.0):
        return samplers.edm_heun(path, steps, scaling=scaling, prediction=prediction, clip=clip, guidance=guidance)

    seen = []
    monkeypatch.setitem(samplers.SAMPLERS, "mine", mine)
    monkeypatch.setitem(samplers.SAMPLERS, "of_sigmas", of_sigmas)
    given = ["--model", tiny["one"], "--steps", "3", "--seeds", "0"]
    assert run(*given, "--sampler", "mine") == run(*given, "--sampler", "mine", "--eta", "0.25") == 0
    assert seen == [0.5, 0.25] and run(*given, "--sampler", "of_sigmas") == 0
    capsys.readouterr()
    assert run(*given, "--sampler", "mine", "--variance", "fixed_small") == 2
    assert "--variance: not an option of --sampler mine" in capsys.readouterr().err
    monkeypatch.setitem(samplers.SAMPLERS, "bare", lambda path, steps: samplers.euler(path, steps))
    assert run(*given, "--sampler", "bare") == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_every_sampler_of_the_command_line(tiny):
    for name in cli.common.offered_samplers():
        status = run("--model", tiny["one"], "--sampler", name, "--steps", "3", "--seeds", "0")
        assert status == (2 if name in ("consistency", "flow_euler") else 0), name
    assert (
        run("--model", tiny["one"], "--sampler", "euler_ancestral", "--eta", "0.5", "--steps", "3", "--seeds", "0") == 0
    )


def test_bundled_digits_load_as_a_diffusers_pipeline():
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(models.DIGITS)
    model = models.load()
    assert pipeline.scheduler.config.variance_type == "learned_range" and model.learned_variance
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 500])
    with torch.no_grad():
        assert torch.equal(pipeline.unet(x, t).sample, model.callable()(x, t))
    alphas = torch.from_numpy(model.schedule.abar.copy())
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), alphas, rtol=1e-4, atol=1e-7)


@pytest.fixture
def model_of(tiny, tmp_path):
    """A function of a scheduler, and of changes to its configuration, that gives the directory of a model with it."""

    def make(scheduler, of="plain", **changes):
        shutil.copytree(tiny[of], tmp_path / "model", dirs_exist_ok=True)
        path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
        scheduler.save_pretrained(path.parent)
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "model"

    return make


@pytest.mark.parametrize(
    "part, message",
    [
        (
            "unet",
            "expected a network .x, t. -> f, a UNet2DModel, in .*, got a UNet2DConditionModel; fuse such a pipeline",
        ),
        ("transformer", "expected unet/config.json in .*, the directory of a diffusers pipeline; fuse such a pipeline"),
    ],
)
def test_pipelines_that_are_conditioned_are_sent_to_their_own_search(part, message, model_of, capsys):
    directory = model_of(diffusers.DDPMScheduler())
    (directory / "unet" / "config.json").write_text(
        '{"_class_name": "UNet2DConditionModel", "cross_attention_dim": 32}'
    )
    (directory / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (directory / "unet").rename(directory / part)
    assert run("--model", str(directory), "--seeds", "0") == 2
    assert re.search(rf"model: {message}.*docs/choosing_lambda.md, 'Search in a pipeline", capsys.readouterr().err)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"])
def test_betas_are_those_of_the_scheduler(betas, zero_snr, model_of):
    named = {"trained_betas": np.geomspace(1e-4, 0.03, 50).tolist()} if betas == "trained" else {"beta_schedule": betas}
    scheduler = diffusers.DDPMScheduler(50, **named, rescale_betas_zero_snr=zero_snr)
    abar = torch.from_numpy(models.load(model_of(scheduler)).schedule.abar.copy())
    torch.testing.assert_close(abar, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    assert (abar[-1] == 0) == zero_snr


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_variance_and_last_step_are_those_of_the_scheduler(spacing, model_of):
    options = {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    for sampler, scheduler in (
        ("ddpm", diffusers.DDPMScheduler(**options, variance_type="fixed_large")),
        ("ddim", diffusers.DDIMScheduler(**options, set_alpha_to_one=False)),
    ):
        args = cli.build_parser().parse_args(["sample", "--sampler", sampler, "--steps", "7"])
        table = cli.common.make_table(args, models.load(model_of(scheduler, of="one")), scaling.constant(1.0))
        scheduler.set_timesteps(7)
        assert table["t"].tolist() == scheduler.timesteps.tolist()
        if sampler == "ddim":
            assert table["alpha_out"][-1] ** 2 == pytest.approx(scheduler.final_alpha_cumprod.item(), rel=1e-6) != 1
        else:
            beta = 1 - (table["alpha_in"] / table["alpha_out"]) ** 2
            np.testing.assert_allclose(table["c_noise"][:-1] ** 2, beta[:-1], rtol=1e-9)


@pytest.mark.parametrize(
    "scheduler, changes, message",
    [
        (diffusers.DDPMScheduler(thresholding=True), {}, "thresholding of .* has no counterpart"),
        (diffusers.DDPMScheduler(variance_type="learned"), {}, "variance that is learned other than as a range"),
        (diffusers.DDPMScheduler(), {"_class_name": "UNet2DModel"}, "expected a scheduler of diffusers .*got 'UNet2DModel'"),
        (diffusers.DDPMScheduler(), {"_class_name": None}, "expected a scheduler of diffusers .*got None"),
        (diffusers.DDPMScheduler(), {"num_train_timesteps": "many"}, "received an invalid"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), {}, "use_flow_sigmas of"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), {}, "unknown prediction type None"),
        (diffusers.EDMEulerScheduler(), {}, "expected a scheduler of betas, got EDMEulerScheduler"),
        (diffusers.CogVideoXDDIMScheduler(), {}, "noise levels of CogVideoXDDIMScheduler"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, diffusers.SchedulerMixin) else "",
)  # fmt: skip
def test_schedulers_without_a_counterpart_are_refused(scheduler, changes, message, model_of):
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        models.load(model_of(scheduler, **changes))


def test_only_a_scheduler_that_clips_says_so(model_of):
    assert models.load(model_of(diffusers.DDPMScheduler(clip_sample_range=0.9))).clip == 0.9
    assert models.load(model_of(diffusers.EulerDiscreteScheduler())).clip is None


# ---- calibrate ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (12, 1, 8, 8)).astype(np.float32))
    return str(path)


def calibrate(*arguments):
    return cli.main(["calibrate", "--quiet", *arguments])


@pytest.mark.parametrize("fit", ["array", "linear", "by_level"])
def test_calibrates_and_samples_with_it(tiny, data, fit, tmp_path, capsys):
    out, npz = tmp_path / "new" / "lambda.json", tmp_path / "samples.npz"
    settings = ["--model", tiny["plain"], "--sampler", "ddim", "--steps", "4"]
    arguments = ["--data", data, "--images", "8", "--fit", fit, "--out", str(out), "--plots", str(tmp_path / "bias")]
    assert calibrate(*settings, *arguments) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(constant|linear|quadratic): .*R\^2", printed, re.M)) == 3
    assert "norms tell how far the sampler's predictions are from training, not which lambda gives the best" in printed
    fitted, notes = scaling.load(out)
    assert (notes["sampler"], notes["steps"], notes["images"], notes["method"]) == ("ddim", 4, 8, "norms")
    if fit == "array":
        assert fitted.values(4).tolist() == [*notes["lambda_t"][:3], 1.0]
    assert all((tmp_path / name).stat().st_size for name in ("bias.json", "bias.png", "bias-lambda.png"))
    assert exposure.Exposure.load(tmp_path / "bias.json").images == 8

    assert run(*settings, "--seeds", "0-2", "--scaling", str(out), "--compare", "--out", str(npz)) == 0
    captured = capsys.readouterr()
    assert {"by_level": "noise levels"}.get(fit, fit) in captured.out and not captured.err
    saved, model = np.load(npz), models.load(tiny["plain"])
    table = samplers.ddim(model.schedule, 4, scaling=fitted, clip=model.clip)
    expected = epskernels.sample(model.callable(), table, [0, 1, 2], model.shape)
    assert np.array_equal(saved["samples"], expected.numpy()) and not np.array_equal(
        saved["samples"], saved["baseline"]
    )


# ---- corrections ----


@pytest.mark.parametrize(
    "given, expected",
    [
        ("dc:0.02", corrections.dc(0.02)),
        ("dcw:-0.1", corrections.dcw(-0.1)),
        ("dcw:-0.1,0.05", corrections.dcw(-0.1, 0.05)),
        ("frequency:0.98,1.01", corrections.frequency(0.98, 1.01)),
        ('{"kind": "dcw", "low": -0.1, "schedule": "constant"}', corrections.dcw(-0.1, schedule="constant")),
        ("saved.json", corrections.dcw([-0.1, -0.2, 0.1, 0.0])),
    ],
)
def test_samples_with_a_correction(tiny, given, expected, tmp_path, capsys, monkeypatch):
    """The samples are those of the table with that correction, beside those without."""
    monkeypatch.chdir(tmp_path)
    corrections.dcw([-0.1, -0.2, 0.1, 0.0]).save("saved.json", sampler="ddim", steps=4)
    arguments = ["--model", tiny["plain"], "--sampler", "ddim", "--steps", "4", "--seeds", "0-2", "--compare"]
    assert run(*arguments, "--correction", given, "--out", "samples.npz") == 0
    printed = capsys.readouterr()
    assert f"correction {given}" in printed.out and "need not transfer" not in printed.err
    saved, model = np.load("samples.npz"), models.load(tiny["plain"])
    grid = {**model.grid, "final": model.final}
    options = {"prediction": model.prediction, "clip": model.clip, **grid}
    for name, correction in (("samples", expected), ("baseline", None)):
        table = samplers.ddim(model.schedule, 4, correction=correction, **options)
        found = epskernels.sample(model.callable(None, 1.0), table, [0, 1, 2], model.shape)
        assert np.array_equal(saved[name], found.numpy())
    assert not np.array_equal(saved["samples"], saved["baseline"])


def test_says_that_a_correction_was_fitted_for_another_sampler(tiny, tmp_path, capsys):
    path = str(tmp_path / "correction.json")
    corrections.dcw(-0.1).save(path, sampler="ddim", steps=20)
    assert run("--model", tiny["plain"], "--steps", "3", "--seeds", "0", "--correction", path) == 0
    expected = "was fitted for sampler ddim, here ddpm; steps 20, here 3: the correction need not transfer"
    assert expected in (said := capsys.readouterr().err) and said.count("need not transfer") == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ("dcw:x", "--correction: expected dcw:LOW[,HIGH], numbers, got 'dcw:x'"),
        ("dc:0.1,0.2", "--correction: expected dc:S, numbers, got 'dc:0.1,0.2'"),
        (
            "dw:0.1",
            "--correction: expected dc:S, dcw:LOW[,HIGH], frequency:LOW[,HIGH], JSON or a .json file, got 'dw:0.1'",
        ),
        ("no.json", "--correction: expected a file saved by Correction.save, and there is no no.json"),
        ('{"kind"', "--correction: expected JSON, got '{\"kind\"'"),
        ('{"kind": "dc", "s": [0.1]}', "correction: expected 3 weights of the low band, one for each step, got 1"),
        ("frequency:0", "--correction: low: expected factors above 0, got 0"),
    ],
)
def test_bad_corrections(tiny, given, message, capsys):
    assert run("--model", tiny["plain"], "--steps", "3", "--seeds", "0", "--correction", given) == 2
    assert message in capsys.readouterr().err


def test_calibrates_fewer_steps_than_a_quadratic_has_coefficients(tiny, data, tmp_path, capsys):
    arguments = ["--model", tiny["plain"], "--data", data, "--images", "4", "--out", str(tmp_path / "lambda.json")]
    assert calibrate(*arguments, "--steps", "2") == 0
    assert re.findall(r"^(\w+): .*R\^2", capsys.readouterr().out, re.M) == ["constant", "linear"]


def test_says_that_lambda_was_fitted_for_another_sampler(tiny, tmp_path, capsys):
    scaling.constant(1.01).save(tmp_path / "lambda.json", sampler="ddim", steps=20)
    arguments = ["--model", tiny["plain"], "--sampler", "ddpm", "--steps", "3", "--seeds", "0"]
    assert run(*arguments, "--scaling", str(tmp_path / "lambda.json")) == 0
    assert (
        "was fitted for sampler ddim, here ddpm; steps 20, here 3: lambda need not transfer" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "there, here, warning",
    [
        ([], ["--direction", "scaled"], ""),  # the default, by its name
        (["--direction", "scaled", "--eta", "0"], [], ""),
        (["--direction", "unscaled"], ["--direction", "unscaled"], ""),
        ([], ["--direction", "unscaled"], "direction scaled, here unscaled"),
        (["--direction", "unscaled"], [], "direction unscaled, here scaled"),
        ([], ["--eta", "0.5"], "eta 0.0, here 0.5"),
        ([], ["--sampler", "ddpm"], "sampler ddim, here ddpm"),  # and nothing of what only one of them has
    ],
    ids=str,
)
def test_says_what_else_lambda_was_fitted_for(tiny, data, there, here, warning, tmp_path, capsys):
    """What holds is compared, whether it was said or not: in the file, where an older one has null, and here."""
    out = tmp_path / "lambda.json"
    settings = ["--model", tiny["plain"], "--sampler", "ddim", "--steps", "2"]
    assert calibrate(*settings, *there, "--data", data, "--images", "2", "--out", str(out)) == 0
    saved, notes = scaling.load(out)
    assert notes["direction"] == (there[1] if there else "scaled") and notes["spacing"] == "leading"
    older = {name: None if f"--{name}" not in there else notes[name] for name in ("eta", "direction", "variance")}
    saved.save(tmp_path / "older.json", **notes | older)
    for name in ("lambda.json", "older.json"):
        capsys.readouterr()
        assert run(*settings, *here, "--seeds", "0", "--lambda", str(tmp_path / name)) == 0
        said = f"warning: {tmp_path / name} was fitted for {warning}: lambda need not transfer\n" if warning else ""
        assert capsys.readouterr().err == said


def test_says_that_lambda_was_fitted_for_another_spacing(tiny, tmp_path, capsys):
    scaling.constant(1.01).save(tmp_path / "lambda.json", sampler="ddim", steps=2, spacing="trailing")
    arguments = ["--model", tiny["plain"], "--sampler", "ddim", "--steps", "2", "--seeds", "0"]
    assert run(*arguments, "--lambda", str(tmp_path / "lambda.json")) == 0
    assert "was fitted for spacing trailing, here leading: lambda need not transfer" in capsys.readouterr().err


def test_a_default_by_its_name_is_no_other_setting(tiny, data, tmp_path, capsys):
    """Neither of a directory that is continued, nor of a cache."""
    model = ["--model", tiny["plain"], "--sampler", "ddim", "--steps", "2"]
    search = [
        "--method",
        "search",
        "--data",
        data,
        "--images",
        "2",
        "--samples",
        "2",
        "--trials",
        "2",
        "--score",
        "builtins:len",
    ]
    for said in ([], ["--direction", "scaled", "--eta", "0"]):
        assert run(*model, *said, "--seeds", "0-2", "--out", str(tmp_path / "samples")) == 0, capsys.readouterr().err
        files = ["--cache", str(tmp_path / "cache.json"), "--out", str(tmp_path / "lambda.json")]
        assert calibrate(*model, *said, *search, *files) == 0, capsys.readouterr().err


def test_says_that_lambda_was_fitted_for_other_weights(tiny, data, tmp_path, capsys):
    out = str(tmp_path / "lambda.json")
    settings = ["--sampler", "ddim", "--steps", "2"]
    assert calibrate("--model", tiny["plain"], *settings, "--data", data, "--images", "4", "--out", out) == 0
    for name, warns in (("plain", False), ("one", True)):
        assert run("--model", tiny[name], *settings, "--seeds", "0", "--scaling", out) == 0
        assert ("was fitted for other weights: lambda need not transfer" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("file, change", [("scheduler/scheduler_config.json", {"clip_sample": False}),
                                          ("unet/config.json", {"norm_eps": 1e-3})])  # fmt: skip
def test_a_search_is_of_one_scheduler_and_network(file, change, tmp_path, capsys):
    model, digits = tmp_path / "model", str(tmp_path / "digits.npy")
    shutil.copytree(models.DIGITS, model)
    np.save(digits, np.random.default_rng(0).uniform(-1, 1, (4, 1, 28, 28)).astype(np.float32))
    arguments = ["--model", str(model), "--steps", "2", "--data", digits, "--images", "4", "--out", str(tmp_path / "l.json"),
                 "--method", "search", "--trials", "2", "--samples", "2", "--cache", str(tmp_path / "trials.json")]  # fmt: skip
    assert calibrate(*arguments) == 0
    config = json.loads((model / file).read_text())
    assert change.keys() <= config.keys()
    (model / file).write_text(json.dumps(config | change))
    assert calibrate(*arguments) == 2 and "begun with key" in capsys.readouterr().err


def test_searches_the_digits_by_trials(tmp_path, capsys):
    out, cache, digits = tmp_path / "lambda.json", tmp_path / "trials.json", str(tmp_path / "digits.npy")
    np.save(digits, np.random.default_rng(0).uniform(-1, 1, (20, 1, 28, 28)).astype(np.float32))
    arguments = ["--sampler", "ddim", "--steps", "2", "--data", digits, "--images", "20", "--out", str(out),
                 "--method", "search", "--trials", "3", "--samples", "4", "--cache", str(cache)]  # fmt: skip
    assert calibrate(*arguments) == 0
    fitted, notes = scaling.load(out)
    assert fitted.spec["kind"] == "constant" and len(notes["trials"]) == 3
    assert notes["score"] == min(score for _, _, score in notes["trials"])
    assert notes["score without scaling"] == notes["trials"][0][2] and notes["trials"][0][:2] == [0, 1]
    before = cache.read_bytes()
    assert calibrate(*arguments, "--trials", "2") == 0 and cache.read_bytes() == before  # none was made again
    assert calibrate(*arguments, "--trials", "2", "--k-bounds", "-0.01", "0.01", "--cache", str(tmp_path / "line")) == 0
    assert scaling.load(out)[0].spec["kind"] in ("linear", "constant")
    capsys.readouterr()
    assert calibrate(*arguments, "--samples", "5") == 2
    assert "begun with key" in capsys.readouterr().err


@pytest.mark.parametrize("finite", [True, False])
def test_search_shows_what_is_not_finite(finite, tmp_path, monkeypatch, capsys):
    """The first trial is that without scaling."""
    out, digits, scores = tmp_path / "lambda.json", str(tmp_path / "digits.npy"), iter([np.inf, 3.0, np.nan, 2.0])
    np.save(digits, np.random.default_rng(0).uniform(-1, 1, (4, 1, 28, 28)).astype(np.float32))
    monkeypatch.setattr(quality, "frechet", lambda *_: next(scores) if finite else np.nan)
    status = calibrate("--steps", "2", "--data", digits, "--images", "4", "--out", str(out), "--method", "search",
                       "--trials", "4", "--samples", "2")  # fmt: skip
    captured = capsys.readouterr()
    if not finite:
        assert status == 2 and not out.exists() and captured.out == ""
        assert captured.err.splitlines() == [
            "epskernels calibrate: score: expected a finite number from at least one trial, got none from 4"
        ]
        return
    assert status == 0 and "Frechet distance 2 of 2 samples, inf without" in captured.out
    notes = scaling.load(out)[1]
    assert notes["score"] == 2 and notes["score without scaling"] is None
    assert [score for *_, score in notes["trials"]] == [None, 3, None, 2]


MEASURES = """
import numpy as np
import measure_helper

wrong = "no function"


def score(samples):
    assert samples.shape == (4, 1, 8, 8) and str(samples.dtype) == "torch.float32" and samples.device.type == "cpu"
    return (samples.mean() - measure_helper.TARGET).abs()


def rows(images):
    return images.mean(3).flatten(1)


def number(value):
    return lambda samples: value


values = (float("nan"), float("inf"), -np.inf, "1", None, np.full(4, 1.0))
nan, inf, minus, text, whole, many = map(number, values)
scalar = lambda images: np.zeros(len(images))
fewer = lambda images: np.zeros((2, 3))
bad = lambda images: np.full((len(images), 2), np.nan)


def fails(samples):
    raise KeyError("no such thing")


class Measures:
    @staticmethod
    def score(samples):
        return float(samples.std())
"""


@pytest.fixture
def measures(tiny, data, tmp_path, monkeypatch):
    """A function that runs a search on the tiny model, in a folder with modules of measures."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("cli_measures.py").write_text(MEASURES)
    pathlib.Path("measure_helper.py").write_text("TARGET = 0.1\n")
    pathlib.Path("measures_broken.py").write_text("import nothing_of_this_name\n")
    pathlib.Path("measures_exits.py").write_text("import sys\n\nsys.exit(3)\n")
    pathlib.Path("measures_syntax.py").write_text("def score(\n")
    settings = [
        "--model",
        tiny["one"],
        "--sampler",
        "ddim",
        "--steps",
        "2",
        "--samples",
        "4",
        "--trials",
        "3",
        "--out",
        "found.json",
    ]
    yield lambda *arguments: calibrate(*settings, "--method", "search", *arguments)
    for name in ("cli_measures", "measure_helper"):
        sys.modules.pop(name, None)


def samples_of(tiny, candidate):
    model = models.load(tiny["one"])
    table = samplers.ddim(model.schedule, 2, scaling=candidate, clip=model.clip, **model.grid, final=model.final)
    return epskernels.sample(model.callable(), table, range(4), model.shape)


def test_searches_by_a_score_of_ones_own(measures, tiny, data, capsys):
    """Without real images; the module of the current folder; a changed module is another score."""
    path = list(sys.path)
    assert measures("--score", "cli_measures:score", "--cache", "trials.json") == 0 and sys.path == path
    found, notes = scaling.load("found.json")
    printed = capsys.readouterr()
    assert f"cli_measures:score {notes['score']:.5g} of 4 samples, " in printed.out and not printed.err
    assert (notes["measure"], notes["data"], notes["images"]) == ("cli_measures:score", None, 0)
    assert notes["score"] == pytest.approx((samples_of(tiny, found).mean() - 0.1).abs().item(), rel=1e-6)
    assert notes["score"] == min(score for *_, score in notes["trials"]) < notes["score without scaling"]
    before = pathlib.Path("trials.json").read_bytes()
    assert measures("--score", "cli_measures:score", "--cache", "trials.json") == 0
    assert pathlib.Path("trials.json").read_bytes() == before
    assert measures("--score", "cli_measures:Measures.score", "--correction", "dc", "--trials", "2") == 0
    with open("cli_measures.py", "a") as file:
        file.write("# changed\n")
    capsys.readouterr()
    assert measures("--score", "cli_measures:score", "--cache", "trials.json") == 2
    assert "begun with key" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "random-conv", "pixels", "dct", "cli_measures:rows"])
def test_searches_by_a_distance_in_features(name, measures, tiny, data, capsys):
    """The output says in which; by default the random network's, for what are no digits."""
    given = ["--features", name] if name else []
    assert measures(*given, "--data", data, "--images", "8") == 0
    printed, (found, notes) = capsys.readouterr().out, scaling.load("found.json")
    default = "features: random-conv, the default for (1, 8, 8); --features and --score take others"
    assert printed.splitlines()[0] == notes["measure"] == (f"features: {name}" if name else default)
    made = sys.modules["cli_measures"].rows if ":" in name else features.FEATURES[name or "random-conv"]
    real, got = torch.from_numpy(images.load(data, (1, 8, 8), 8)), samples_of(tiny, found)
    expected = quality.frechet(*(np.asarray(made(each), dtype=np.float64) for each in (real, got)))
    assert notes["score"] == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--score", "cli_measures"], "--score: expected MODULE:FUNCTION, such as mymodule:myfunction, got 'cli_measures'"),
        (["--score", ":score"], "--score: expected MODULE:FUNCTION, such as mymodule:myfunction, got ':score'"),
        (["--score", "cli_measures.py:score"], "--score: expected a module's name, such as cli_measures:score, without .py"),
        (["--features", "resnet"], "inception, or MODULE:FUNCTION, such as mymodule:myfunction, got 'resnet'"),
        (["--score", "no_such_module:f"], "--score: no module 'no_such_module' in "),
        (["--score", "cli_measures.part:f"], "--score: no module 'cli_measures.part' in "),
        (["--score", "measures_broken:f"], "--score: measures_broken cannot be imported: ModuleNotFoundError: No module named "
         "'nothing_of_this_name' ("),
        (["--score", "measures_exits:f"], "--score: measures_exits cannot be imported: SystemExit: 3 ("),
        (["--score", "measures_syntax:f"], "--score: measures_syntax cannot be imported: SyntaxError: "),
        (["--score", "cli_measures:other"], "--score: cli_measures has no 'other' ("),
        (["--score", "cli_measures:wrong"], "--score: expected cli_measures:wrong to be a function, got 'no function'"),
        (["--score", "cli_measures:nan"], "--score: expected cli_measures:nan to return a finite number, or inf for"),
        (["--score", "cli_measures:minus"], "of no use, got -inf"),
        (["--score", "cli_measures:text"], "--score: expected cli_measures:text to return a number, got '1'"),
        (["--score", "cli_measures:whole"], "--score: expected cli_measures:whole to return a number, got None"),
        (["--score", "cli_measures:many"], "--score: expected cli_measures:many to return a number, got float64 (4,)"),
        (["--score", "cli_measures:inf"], "--score: expected a finite number from at least one trial, got none from 3"),
        (["--score", "cli_measures:fails"], "--score: cli_measures:fails raised KeyError: 'no such thing' ("),
        (["--features", "cli_measures:scalar"], "--features: expected cli_measures:scalar to return numbers of shape (8, D) for "
         "8 images, got float64 (8,)"),
        (["--features", "cli_measures:fewer"], "for 8 images, got float64 (2, 3)"),
        (["--features", "cli_measures:text"], "for 8 images, got '1'"),
        (["--features", "cli_measures:bad"], "--features: expected finite features from cli_measures:bad, got 16 of 16 that"),
        (["--features", "dct"], "--data: expected real images"),
        (["--score", "cli_measures:score", "--plots", "bias"], "--data: expected real images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_measures_that_are_refused(arguments, message, measures, data, capsys):
    given = ["--data", data, "--images", "8"] if arguments[0] == "--features" and arguments[1] != "dct" else []
    path = list(sys.path)
    assert measures(*arguments, *given) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert sys.path == path and not pathlib.Path("found.json").exists()


def test_a_score_and_features_are_not_both(measures, capsys):
    with pytest.raises(SystemExit):
        measures("--score", "cli_measures:score", "--features", "dct")
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--images", "1"], "--images: expected at least 2"),
        (["--images", "13"], "data: expected 13 images"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--seed", str(2**63 - 999)], f"--seed: expected at most {2**63 - 1000}"),
        (["--device", "nope"], "--device: 'nope' cannot be used: "),
        (["--device", "meta"], "--device: 'meta' cannot be used: "),
        (["--device", f"cuda:{torch.cuda.device_count()}"], "' cannot be used: "),
        (["--data", "nowhere"], "data: expected mnist, a .npy"),
        (["--out", "lambda.txt"], "--out: expected a .json"),
        (["--bounds", "0.9", "1.1"], "--bounds: not an option of --method norms"),
        (
            ["--method", "search", "--fit", "linear"],
            "--fit: not an option of --method search; a search for a line takes --k-bounds",
        ),
        (["--method", "search", "--features", "digits"], "--features: digits: images: expected floats (N, 1, 28, 28)"),
        (
            ["--method", "search", "--features", "nothing"],
            "--features: expected one of digits, pixels, dct, random-conv, inception",
        ),
        (["--method", "search", "--features", "inception"], "--features: inception: "),
        (["--features", "dct"], "--features: not an option of --method norms"),
        (["--score", "json:dumps"], "--score: not an option of --method norms"),
        (["--sampler", "edm_euler", "--eta", "1"], "--eta: not an option of --sampler edm_euler"),
        (["--fit", "quadratic", "--skip", "3"], "--fit, --skip: skip: expected 0 to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_calibrate_refuses(arguments, message, tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(epskernels.calibrate, "match_norms", None)  # before the work
    given = ["--model", tiny["plain"], "--steps", "4", "--data", data, "--images", "8", "--out", "lambda.json"]
    assert calibrate(*given, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "file/lambda.json"], "--out: file/lambda.json cannot be written: "),
        (["--out", "folder.json"], "--out: folder.json cannot be written: a directory"),
        (["--plots", "file/bias"], "--plots: file/bias.json cannot be written: "),
        (["--plots", "."], "--plots: expected the stem of files' names"),
        (["--plots", "lambda"], "--plots: lambda.json is the file of --out already"),
        (["--method", "search", "--cache", "./lambda.json"], "--cache: lambda.json is the file of --out already"),
        (["--method", "search", "--cache", "folder.json"], "--cache: folder.json cannot be written: a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_written_is_said_before_the_work(arguments, message, tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for work in ("match_norms", "search"):
        monkeypatch.setattr(epskernels.calibrate, work, None)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    given = ["--model", tiny["plain"], "--steps", "4", "--data", data, "--images", "8", "--out", "lambda.json"]
    assert calibrate(*given, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"epskernels calibrate: {message}") and len(captured.err.splitlines()) == 1


def test_plots_without_matplotlib_are_refused_before_the_work(tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(epskernels.calibrate, "match_norms", None)
    given = [
        "--model",
        tiny["plain"],
        "--steps",
        "4",
        "--data",
        data,
        "--images",
        "8",
        "--out",
        str(tmp_path / "l.json"),
    ]
    assert calibrate(*given, "--plots", str(tmp_path / "bias")) == 2
    assert "--plots: plots need matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_plots_into_a_new_folder(tiny, data, tmp_path):
    given = [
        "--model",
        tiny["plain"],
        "--steps",
        "2",
        "--data",
        data,
        "--images",
        "4",
        "--out",
        str(tmp_path / "l.json"),
    ]
    assert calibrate(*given, "--plots", str(tmp_path / "new" / "bias")) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["bias-lambda.png", "bias.json", "bias.png"]


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "a number", "objects", "text"])
def test_data_that_cannot_be_read_is_refused(kind, suffix, tiny, data, tmp_path, capsys):
    path = tmp_path / f"images.{suffix}"
    contents = {"a number": np.float32(1), "objects": np.array([{}, 1], dtype=object)}.get(kind, np.load(data))
    (np.save if suffix == "npy" else np.savez)(path, contents)
    if kind in ("truncated", "empty", "text"):
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no array"}[kind])
    assert (
        calibrate("--model", tiny["plain"], "--data", str(path), "--images", "4", "--out", str(tmp_path / "l.json"))
        == 2
    )
    error = capsys.readouterr().err
    assert re.fullmatch(f"epskernels calibrate: --data: expected .* in {path}.*\\n", error) and "unsafely" not in error


def test_out_through_a_link(tiny, tmp_path, capsys):
    """The file that it leads to is written, its folder made; a loop is refused before the work."""
    (tmp_path / "out.npz").symlink_to(tmp_path / "new" / "samples.npz")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    given = ["sample", "--model", tiny["plain"], "--steps", "2", "--seeds", "0", "--out"]
    assert cli.main([*given, str(tmp_path / "out.npz")]) == 0
    assert (tmp_path / "out.npz").is_symlink() and "samples" in np.load(tmp_path / "new" / "samples.npz")
    assert cli.main([*given, str(tmp_path / "loop.npz")]) == 2
    assert "--out: " in capsys.readouterr().err


def test_a_scheduler_of_a_missing_package(tiny, monkeypatch, tmp_path, capsys):
    """diffusers has a stand-in for it; what a constructor lacks comes without a name."""
    model = shutil.copytree(tiny["plain"], tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "OfAPackage"}))
    monkeypatch.setattr(
        diffusers, "OfAPackage", type("OfAPackage", (), {"_backends": ["torch", "torchsde"]}), raising=False
    )
    given = ["sample", "--model", str(model), "--steps", "2", "--seeds", "0"]
    assert cli.main(given) == 2
    assert capsys.readouterr().err.endswith("needs torch, torchsde: pip install torch torchsde\n")

    def load(*_):
        raise ImportError("Make sure to install scipy")

    monkeypatch.setattr(models, "load", load)
    assert cli.main(given) == 2 and capsys.readouterr().err == "epskernels sample: Make sure to install scipy\n"


def test_zero_terminal_snr_takes_a_lambda(tiny, tmp_path, capsys, caplog):
    """lambda is 1 in the first step, which the log says; --fit constant is taken by --scaling."""
    model, out = shutil.copytree(tiny["plain"], tmp_path / "model"), tmp_path / "lambda.json"
    config = diffusers.DDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    config.save_pretrained(model / "scheduler")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32))
    given = ["--model", str(model), "--sampler", "ddim", "--steps", "4"]
    fit = ["--data", str(tmp_path / "data.npy"), "--images", "4", "--fit", "constant", "--out", str(out)]
    assert calibrate(*given, *fit) == 0
    scaling._say.cache_clear()
    for scaled in (["--scaling", str(out)], ["--lambda", "1.005"], ["--lambda-linear", "0.001", "1.005"]):
        assert cli.main(["sample", *given, "--seeds", "0-1", *scaled]) == 0
    assert "lambda is 1 in step 0: x is noise alone there" in caplog.text


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(mode, tiny, tmp_path, capsys):
    """Pillow would cut them off at 255."""
    pixels = np.full((8, 8), 300, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", format="PNG" if mode == "I;16" else "TIFF")
    given = ["--model", tiny["plain"], "--images", "2", "--out", str(tmp_path / "l.json"), "--data", str(tmp_path)]
    assert calibrate(*given) == 2
    assert f"data: expected 8 bits a channel in {tmp_path / 'a.png'}, got mode {mode};" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"no image")
    assert calibrate(*given) == 2
    assert f"epskernels calibrate: --data: expected an image in {tmp_path / 'a.png'}: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"trials": [{"k": 0, "score": 1}]}', '{"trials": [0]}'])
def test_a_damaged_cache_is_refused(text, tmp_path, capsys):
    digits, cache = str(tmp_path / "digits.npy"), tmp_path / "trials.json"
    np.save(digits, np.random.default_rng(0).uniform(-1, 1, (4, 1, 28, 28)).astype(np.float32))
    cache.write_text(text)
    arguments = ["--steps", "2", "--data", digits, "--images", "4", "--out", str(tmp_path / "l.json"), "--samples", "2"]
    assert calibrate(*arguments, "--method", "search", "--cache", str(cache)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"epskernels calibrate: --cache: expected what search has saved in {cache}: ")
    assert len(error.splitlines()) == 1 and cache.read_text() == text


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("unet/config.json", None, "expected a sample_size"),
        ("unet/config.json", "{", "expected a configuration of diffusers in"),
        ("unet/config.json", "[]", "expected a configuration of diffusers in"),
        ("scheduler/scheduler_config.json", "[]", "expected a configuration of diffusers in"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "none"}', "none is not implemented"),
        ("unet/config.json", {"time_embedding_type": "none"}, "timestep_input_dim"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(file, text, message, tiny, tmp_path, capsys):
    path = tmp_path / "model" / file
    shutil.copytree(tiny["plain"], tmp_path / "model")
    text = {"sample_size": None} if text is None else text
    path.write_text(json.dumps(json.loads(path.read_text()) | text) if isinstance(text, dict) else text)
    assert run("--model", str(tmp_path / "model"), "--seeds", "0") == 2
    error = capsys.readouterr().err
    assert error.startswith("epskernels sample: --model: ") and message in error and len(error.splitlines()) == 1


def test_an_error_that_announces_its_reason_says_it(tiny, tmp_path, capsys):
    shutil.copytree(tiny["plain"], tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [8, 16]}))
    assert run("--model", str(tmp_path / "model"), "--seeds", "0") == 1
    assert re.match(r"epskernels sample: Error.*: size mismatch for down_blocks.*\n$", capsys.readouterr().err)


# ---- images ----


def save_images(folder, names):
    """Image i of all is filled with 10*i."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(folder / name)


def levels(found):
    return ((found[:, 0, 0, 0] + 1) * 127.5 / 10).round().astype(int).tolist()


def test_images_of_class_folders(tmp_path):
    """In the order of their paths; a part of them is of all classes."""
    save_images(tmp_path, ["a/0.png", "a/1.png", "a/2.png", "b/deep/3.png", "b/deep/4.jpg", "b/deep/5.PNG"])
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "b" / "folder.png").mkdir()
    save_images(tmp_path / ".thumbnails", ["9.png"])
    (tmp_path / "a" / "._0.png").write_bytes(b"what another system writes beside a file")
    assert levels(images.load(tmp_path, (1, 8, 8))) == [0, 1, 2, 3, 4, 5]
    assert levels(images.load(tmp_path, (1, 8, 8), 3)) == [0, 2, 4]
    with pytest.raises(ValueError, match="expected 7 images in .*, got 6"):
        images.load(tmp_path, (1, 8, 8), 7)


def test_images_of_one_folder_are_the_first(tmp_path):
    save_images(tmp_path, [f"{i}.png" for i in range(4)])
    assert levels(images.load(tmp_path, (1, 8, 8), 2)) == [0, 1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected image files .* in .*empty or its directories, found none"):
        images.load(tmp_path / "empty", (1, 8, 8))


def test_dpmpp_begins_at_the_last_timestep():
    """Its timesteps are spaced as diffusers spaces them for it, whatever the model's own scheduler says."""
    for sampler in ("dpmpp_2m", "dpmpp_3m"):
        args = cli.build_parser().parse_args(["sample", "--sampler", sampler, "--steps", "5"])
        model, _ = common.load_model(args, "cpu")
        assert common.make_table(args, model, 1.0)["t"].tolist() == model.schedule.timesteps(5, "trailing").tolist()


def test_the_digests_of_a_model_do_not_say_where_it_lies(tmp_path):
    shutil.copytree(models.DIGITS, tmp_path / "copy")
    here, there = (common.model_digests(models.load(path, "cpu")) for path in (models.DIGITS, tmp_path / "copy"))
    assert here == there and here[0] != here[1]
