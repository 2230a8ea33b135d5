"""`epskernels demo`, and the pictures that it and `epskernels sample` draw."""

import io
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import epskernels
from epskernels import cli, corrections, images, models, quality, samplers, schedule
from epskernels.cli import demo, picture

pytestmark = pytest.mark.usefixtures("one_thread")


def digits_of(seeds, **options):
    """Of the bundled network as its scheduler runs it, by the sampler's own arguments."""
    model = models.load()
    table = samplers.ddim(model.schedule, 10, **{"clip": 1.0, "spacing": "leading", "final": "clean"} | options)
    return torch.cat(
        [epskernels.sample(model.callable(), table, part, model.shape) for part in seeds.split(100)]
    ).numpy()


def real_features():
    return quality.digit_features(images.load("mnist", (1, 28, 28)))


# ---- the command ----


def test_a_new_process_outside_the_checkout(tmp_path):
    """The picture has the digits without a correction on the left and with it on the right, of the seeds that were asked for."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(epskernels.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "epskernels", "demo", "--seeds", "0-3,9"],
        cwd=tmp_path, env={**environment, "TERM": "xterm-256color"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr.startswith(
        "Frechet distance: 64 features of a Gaussian and 5 samples: "
    ), done
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stdout and "wrote samples.png\n" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    seeds, real, said = torch.tensor([0, 1, 2, 3, 9]), real_features(), re.findall(r"distance +(\d+\.\d)", done.stdout)
    with Image.open(tmp_path / "samples.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (16 + 3 * 21 + 8 + 21 + 2 * 86 - 2 + 16, 16 + 260 + 16 + 260 + 16)
    for left, printed, correction in zip((16, 292), said, (None, corrections.dc(-0.16)), strict=True):
        digits = digits_of(seeds, correction=correction)
        assert float(printed) == pytest.approx(quality.frechet(real, quality.digit_features(digits)), abs=0.06)
        assert_shown(pixels, left, digits, columns=3)


def assert_shown(pixels, left, digits, columns):
    """The picture has the digits, three pixels wide for one, in a panel that begins there and ends at the lower margin."""
    for i, digit in enumerate(digits):
        above = len(pixels) - 16 - -(-len(digits) // columns) * 86 + 2 + i // columns * 86
        beside = left + i % columns * 86
        expected = np.kron(digit[0].clip(-1, 1) * 127.5 + 127.5, np.ones((3, 3)))
        difference = np.abs(pixels[above : above + 84, beside : beside + 84] - expected)
        assert difference.max() <= 1.5  # another process, or another machine, may round otherwise


def test_the_picture_of_the_readme():
    """`epskernels demo --out docs/demo.png` writes it again."""
    with Image.open(pathlib.Path(__file__).parents[2] / "docs" / "demo.png") as image:
        pixels = np.asarray(image)
    for left, correction in ((16, None), (16 + 342 + 16, corrections.dc(demo.WEIGHT))):
        assert_shown(pixels, left, digits_of(torch.arange(16), correction=correction), columns=4)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    "environment, shown",
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["a terminal", "an empty NO_COLOR", "NO_COLOR", "a terminal without colours"],
)
def test_a_terminal_shows_a_preview(environment, shown, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo, "sample", lambda call, table, seeds, shape: torch.zeros(len(seeds), *shape))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["demo", "--out", str(tmp_path / "a.png"), "--seeds", "0-19"]) == 0
    lines = sys.stdout.getvalue().splitlines()
    previewed = [line for line in lines if "\u2580" in line]
    assert len(previewed) == (2 * 7 if shown else 0) and any("\x1b" in line for line in lines) == shown
    assert all(line.count("\u2580") == 5 * 14 and line.endswith("\x1b[0m") for line in previewed)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == 2 * (4 * 86 - 2) + 3 * 16  # 16 of the 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "digits.jpg"], "--out: expected a .png file, got digits.jpg"),
        (["--out", "digits"], "--out: expected a .png file, got digits"),
        (["--out", "/dev/null/a.png"], "--out: /dev/null/a.png cannot be written: "),
        (["--seeds", "7"], "--seeds: expected 2 to 10,000 seeds, got 1"),
        (["--seeds", "0-99999999999"], "--seeds: expected 2 to 10,000 seeds, got 100,000,000,000"),
        (["--seeds", "many"], "--seeds: expected seeds such as"),
    ],
)
def test_refused_before_the_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", None)
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["demo", *arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and message in captured.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_diffusers_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli.main(["demo", "--out", str(tmp_path / "a.png")]) == 2
    assert "diffusers is missing: pip install diffusers safetensors pillow" in capsys.readouterr().err


def test_what_it_says_to_do_next_runs(tmp_path, monkeypatch):
    from diffusers import DDIMPipeline

    monkeypatch.chdir(tmp_path)
    *_, search, fused, table, sampled = (line[19:].split("    ")[0] for line in demo.NEXT.splitlines())
    program, *arguments = shlex.split(search)
    args = cli.build_parser().parse_args(arguments)
    assert program == "epskernels" and args.correction == "dc" and args.steps == demo.STEPS
    corrections.dc(-0.1).save(args.out)
    names = {"epskernels": epskernels, "samplers": samplers, "schedule": schedule, "model": lambda x, t: 0.1 * x}
    names["pipe"] = DDIMPipeline.from_pretrained(models.DIGITS)
    exec("\n".join([fused, table, sampled]), names)
    assert names["pipe"].scheduler.config.correction["low"] == -0.1 and names["images"].shape == (8, 3, 32, 32)


@pytest.mark.deep
@pytest.mark.parametrize(
    "name, options",
    [("without", {}), ("with", {"correction": corrections.dc(demo.WEIGHT)}), ("trailing", {"spacing": "trailing"})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_distances_that_it_remembers(name, options):
    digits = digits_of(torch.arange(1000), **options)
    assert quality.frechet(real_features(), quality.digit_features(digits)) == pytest.approx(
        demo.MEASURED[name], abs=0.06
    )


# ---- pictures ----


def test_grid_of_three_images():
    grid = picture.image_grid(np.stack([np.full((1, 2, 2), value) for value in (-1.0, np.nan, 2.0)]))
    assert grid.shape == (2 * 98 - 2, 2 * 98 - 2, 1)
    assert (grid[:96, :96] == 0).all() and (grid[:96, 98:] == 128).all() and (grid[98:, :96] == 255).all()
    assert (grid[98:, 98:] == 200).all() and (grid[96:98] == 200).all() and (grid[:, 96:98] == 200).all()


@pytest.mark.parametrize(
    "count, shape, scale",
    [(1, (1, 28, 28), 3), (1, (3, 64, 40), 1), (1, (3, 300, 200), 1), (1, (1, 8, 30), 3), (5000, (1, 8, 8), 3)],
    ids=["digits", "too large for two", "large", "the longer side", "many"],
)
def test_small_images_are_upscaled_by_a_whole_factor(count, shape, scale):
    values = np.random.default_rng(0).uniform(-1, 1, (count, *shape))
    grid, first = picture.image_grid(values), images.to_bytes(values)[0]
    expected = np.kron(first, np.ones((scale, scale, 1)))
    assert np.array_equal(grid[: expected.shape[0], : expected.shape[1]], expected)
    if count == 1:
        assert grid.shape == expected.shape


@pytest.mark.parametrize("channels", [1, 3])
def test_titles_and_captions_are_written(channels):
    """Dark text above each panel, broken where the panel ends, and nothing over the images."""
    white = np.ones((4, channels, 28, 28))
    plain, drawn = (picture.draw(titles, lines) for titles, lines in (
        ({"": white, " ": white}, [""]), ({"left": white, "word " * 30: white}, ["a caption"]),
    ))  # fmt: skip
    assert plain.mode == drawn.mode == ("L" if channels == 1 else "RGB") and drawn.size[0] == plain.size[0] == 568
    taller = (drawn.size[1] - plain.size[1]) // 21
    assert taller >= 4 and drawn.size[1] - plain.size[1] == 21 * taller
    pixels = np.asarray(drawn).reshape(drawn.size[1], drawn.size[0], -1)[..., 0]
    text = pixels[: -16 - 170] < 100
    assert text[16:37, 16:200].any() and text[45:66, 16:276].any() and text[45:66, 292:552].any()
    assert text[45:, 292:552].any(1).sum() > 21 * taller * 0.4 and not text[66:, :276].any()
    assert not text[:, 276:292].any() and not text[:, 552:].any() and (pixels[-16 - 170 :] >= 200).all()


def test_preview_halves_an_image():
    black, white = np.full((4, 4), -1.0), np.ones((4, 4))
    half = np.concatenate([black[:2], white[:2]])
    shown = picture.preview({"a title": np.stack([black, white, half])[:, None]}, columns=8)
    cells = [f"\x1b[38;5;{upper};48;5;{lower}m\u2580" * 2 for upper, lower in ((232, 232), (255, 255), (232, 255))]
    assert shown == "a title\n" + "\x1b[0m ".join(cells) + "\x1b[0m"
    assert (
        picture.preview({"": np.stack([black, white, half])[:, None]}, columns=7)
        == "\n" + "\x1b[0m ".join(cells[:2]) + "\x1b[0m"
    )
