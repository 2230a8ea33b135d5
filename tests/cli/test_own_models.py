"""Models of one's own: the class, `--model module:function`, and the images that go in and come out."""

import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import epskernels
from epskernels import cli, images, models, samplers, scaling, schedule
from epskernels.cli import common
from epskernels.seeds import parse, spelled

from ..support.markdown_examples import environment

SAMPLERS = set(common.offered_samplers())
MODULE = '''
import numpy as np
import torch

from epskernels import schedule
from epskernels.models import Model


class Network(torch.nn.Module):
    """f = w*tanh(x + t/1000 + label), of any shape."""

    def __init__(self, channels=1):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))
        self.channels = channels

    def forward(self, x, t, labels=None):
        shift = t.float() / 1000 + (0 if labels is None else labels)
        assert x.dtype == self.w.dtype and t.shape == (len(x),)
        return (self.w * torch.tanh(x + shift.reshape(-1, *[1] * (x.dim() - 1)))).repeat(1, self.channels, 1, 1)


def ddpm(device):
    return Model(Network().eval().to(device), schedule.linear(100), (1, 8, 8), clip=1.0)


def other(device):
    network = Network().eval().to(device)
    network.w.data += 0.25
    return Model(network, schedule.linear(100), (1, 8, 8), clip=1.0)


def learned(device):
    return Model(Network(2).eval(), schedule.linear(100), (1, 8, 8), clip=1.0, variance="learned_range")


def rgb(device):
    return Model(Network().eval(), schedule.linear(100), (3, 8, 6), clip=1.0, classes=2, empty=2)


def edm(device):
    return Model(Network().eval(), schedule.KarrasSchedule(), (1, 8, 8))


def flow(device):
    return Model(Network().eval(), schedule.FlowSchedule(3.0), [1, 8, 8])


def latent(device):
    vae = torch.nn.Upsample(scale_factor=2).eval()
    network = Network().eval()
    decode = lambda latents: vae(latents[:, :3].clamp(-1, 1))
    return Model(network, schedule.scaled_linear(100), (4, 4, 4), decode=decode, weights=[network, vae, torch.ones(2)])


def bare(device):
    return Model(lambda x, t: 0.1 * x, schedule.linear(100), (1, 8, 8))


def curves(device):
    return Model(Network().eval(), schedule.linear(100), (1, 24))


def nan(device):
    return Model(lambda x, t: float("nan") * x, schedule.linear(100), (1, 8, 8), weights=torch.ones(1))


def training(device):
    return Model(Network(), schedule.linear(100), (1, 8, 8))


def fails(device):
    return {}["checkpoint"]


def nothing(device):
    pass


def some_nan(device):
    """Where the mean of x is above 0."""
    model = lambda x, t: torch.where(x.mean((1, 2, 3), keepdim=True) > 0, torch.nan, 0.1 * x)
    return Model(model, schedule.linear(100), (1, 8, 8), weights=torch.ones(1))


def double(device):
    network = torch.nn.Linear(8, 8, dtype=torch.float64)
    return Model(lambda x, t: network(x), schedule.linear(100), (1, 8, 8), weights=torch.ones(1))


def two(device, more):
    pass


def elsewhere(device):
    return Model(Network().eval().to("meta"), schedule.linear(100), (1, 8, 8))


number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of the user's module, which is the current one."""
    (tmp_path / "own_networks.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import numpy\n\nnumpy.no_such_thing\n")
    (tmp_path / "own_needs.py").write_text("import no_such_package\n")
    (tmp_path / "own_typo.py").write_text("def model(device)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("own_networks", "own_broken", "own_needs"):
        sys.modules.pop(name, None)


def run(function, *arguments, steps=3, seeds="0-4", command="sample"):
    rest = ["--seeds", seeds] if command == "sample" else []
    given = ["--model", f"own_networks:{function}", "--steps", str(steps), "--quiet", *rest]
    return cli.main([command, *given, *[str(argument) for argument in arguments]])


def made(function):
    return common.load_function("--model", f"own_networks:{function}")("cpu")


# ---- the class ----


def network(x, t, labels=None):
    return x if labels is None else x * (labels + 1).reshape(-1, 1, 1, 1)


def test_what_a_model_takes_for_granted():
    sigma = schedule.KarrasSchedule()
    on_timesteps = schedule.KarrasSchedule(model=schedule.linear())
    expected = {schedule.linear(): "epsilon", sigma: "sample", on_timesteps: "epsilon", schedule.FlowSchedule(): "flow"}
    for path, prediction in expected.items():
        model = models.Model(network, path, (1, 2, 2))
        assert (model.prediction, model.weights, model.clip, model.classes) == (prediction, (), None, 0)
    assert models.Model(network, sigma, (1, 2, 2), prediction="v_prediction").prediction == "v_prediction"
    module = torch.nn.Linear(1, 1).eval()
    assert models.Model(module, sigma, (1, 2, 2)).weights == (module,)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"network": 3}, TypeError, "network: expected a callable, got 3"),
        ({"network": None}, TypeError, "network: expected a callable, got None"),
        ({"decode": "vae"}, TypeError, "decode: expected a callable or None, got 'vae'"),
        ({"schedule": "linear"}, TypeError, "schedule: expected a DiscreteSchedule, KarrasSchedule or FlowSchedule, got 'li"),
        ({"shape": 3}, ValueError, "shape: expected the sizes of one sample"),
        ({"shape": ()}, ValueError, "shape: expected the sizes of one sample"),
        ({"shape": (3, 0, 8)}, ValueError, r"shape: expected the sizes of one sample.*got \(3, 0, 8\)"),
        ({"shape": (3, True, 8)}, ValueError, "shape: expected the sizes"),
        ({"prediction": "eps"}, ValueError, "prediction: expected .*'epsilon'.*got 'eps'"),
        ({"variance": "learned"}, ValueError, "variance: expected .*'learned_range'.*got 'learned'"),
        ({"clip": -1}, ValueError, "clip: expected a value above 0, or None, got -1"),
        ({"classes": 1.5}, ValueError, "classes: expected an integer of at least 0, got 1.5"),
        ({"classes": -1}, ValueError, "classes: expected an integer of at least 0, got -1"),
        ({"empty": 3}, ValueError, "empty: expected a label, of a network with classes, or None, got 3"),
        ({"classes": 3, "empty": "none"}, ValueError, "empty: expected a label, .*got 'none'"),
        ({"grid": {"steps": 3}}, ValueError, r"grid: expected spacing and steps_offset, got \['steps'\]"),
        ({"grid": {"spacing": "even"}}, ValueError, "spacing: expected 'leading'"),
        ({"final": "last"}, ValueError, "final: expected 'clean' or 'first', got 'last'"),
        ({"schedule": schedule.FlowSchedule(), "final": "first"}, ValueError, "grid, final: expected none with a FlowSchedule"),
        ({"weights": ["vae"]}, TypeError, "weights: expected modules and tensors, got 'vae'"),
        ({"weights": torch.nn.Linear(1, 1)}, ValueError, "weights: expected modules in evaluation mode, got a Linear in train"),
        ({"network": torch.nn.Linear(1, 1)}, ValueError, "weights: expected modules in evaluation mode, got a Linear in train"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_wrong_model_cannot_be_made(changes, error, message):
    with pytest.raises(error, match=message):
        models.Model(**{"network": network, "schedule": schedule.linear(), "shape": (1, 2, 2), **changes})


def test_labels_and_guidance():
    x, t = torch.arange(8.0).reshape(2, 1, 2, 2), torch.tensor([3, 3])
    model = models.Model(network, schedule.linear(), (1, 2, 2), classes=3, empty=9)
    assert torch.equal(model.callable(2)(x, t), 3 * x)
    f, u = model.callable(1, 2.0)(x, t)
    assert torch.equal(f, 2 * x) and torch.equal(u, 10 * x)
    for label in (None, 3, -1):
        with pytest.raises(ValueError, match=r"class: expected a class in \[0, 3\), got"):
            model.callable(label)
    with pytest.raises(ValueError, match="guidance and class need a network with classes"):
        models.Model(network, schedule.linear(), (1, 2, 2)).callable(0)
    one = models.Model(network, schedule.linear(), (1, 2, 2), classes=1)
    with pytest.raises(ValueError, match="guidance: expected 1, since this network has no empty class, got 2"):
        one.callable(0, 2.0)
    pairs = models.Model(lambda x, t: (x, x), schedule.linear(), (1, 2, 2))
    with pytest.raises(TypeError, match="network: expected it to return f alone, got a pair"):
        pairs.callable()(x, t)


def test_x_comes_in_the_dtype_of_the_weights():
    x, t = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(1)
    for weights, expected in (
        (None, torch.float32),
        ([torch.ones(1, dtype=torch.int64), torch.ones(1).half()], torch.float16),
    ):
        model = models.Model(lambda x, t: x, schedule.FlowSchedule(), (1, 2, 2), weights=weights)
        assert model.callable()(x, t).dtype == expected


def test_images_of_samples():
    model = models.Model(network, schedule.linear(), (3, 2, 2))
    x = torch.rand(2, 3, 2, 2)
    assert torch.equal(model.images(x), x)
    decoded = models.Model(network, schedule.linear(), (4, 2, 2), decode=lambda latents: latents[:, :1].bfloat16())
    assert torch.equal(decoded.images(torch.ones(2, 4, 2, 2)), torch.ones(2, 1, 2, 2))
    for decode in (lambda x: x, lambda x: x[:1, :3], lambda x: x[:, 0], lambda x: None):
        wrong = models.Model(network, schedule.linear(), (4, 2, 2), decode=decode)
        with pytest.raises(ValueError, match=r"what decode returns: expected images \(2, 1 or 3, H, W\), got"):
            wrong.images(torch.ones(2, 4, 2, 2))


# ---- module:function ----


def test_samples_are_those_of_the_library(own, capsys):
    """Also for a denoiser of sigma and a flow, each with the sampler that is its default."""
    tables = {
        "ddpm": samplers.ddpm(schedule.linear(100), 3, clip=1.0),
        "edm": samplers.edm_heun(schedule.KarrasSchedule(), 3),
        "flow": samplers.flow_euler(schedule.FlowSchedule(3.0), 3),
        "learned": samplers.ddpm(schedule.linear(100), 3, clip=1.0, variance="learned_range"),
    }
    for name, table in tables.items():
        assert run(name, "--out", own / "s.npz") == 0
        expected = epskernels.sample(made(name).network, table, range(5), (1, 8, 8))
        assert np.array_equal(np.load(own / "s.npz")["samples"], expected.numpy()), name
        assert f"{table.name.partition('[')[0]}, 3 steps, 5 seeds" in capsys.readouterr().out


def test_guidance_of_classes(own):
    assert run("rgb", "--class", "1", "--guidance", "3", "--lambda", "1.01", "--out", own / "s.npz") == 0
    table = samplers.ddpm(schedule.linear(100), 3, clip=1.0, guidance=3.0, scaling=1.01)
    expected = epskernels.sample(made("rgb").callable(1, 3.0), table, range(5), (3, 8, 6))
    assert np.array_equal(np.load(own / "s.npz")["samples"], expected.numpy())


def test_a_command_of_its_own_finds_the_module(own):
    command = [
        sys.executable,
        "-m",
        "epskernels",
        "sample",
        "--model",
        "own_networks:edm",
        "--steps",
        "2",
        "--seeds",
        "0",
    ]
    result = subprocess.run(command, cwd=own, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0 and "edm_heun, 2 steps, 1 seeds" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "function, refused",
    [
        ("ddpm", {"flow_euler", "consistency"}),
        ("edm", {"flow_euler", "ddpm", "ddim", "lcm", "tcd"}),
        ("flow", SAMPLERS - {"flow_euler", "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde"}),
    ],
    ids=["betas", "sigma", "flow"],
)
def test_the_samplers_that_a_schedule_allows(function, refused, own, capsys):
    """As docs/your_model.md tells. The others are refused by name, before anything is written."""
    found = set()
    for name in sorted(SAMPLERS):
        status = run(function, "--sampler", name, "--out", f"{name}/s.npz", seeds="0")
        error = capsys.readouterr().err
        if status == 2:
            assert f"--sampler: {name} does not fit the model: " in error and len(error.splitlines()) == 1, error
            found.add(name)
        assert (own / name).exists() == (status == 0)
    assert found == refused


@pytest.mark.parametrize(
    "text, message",
    [
        ("own_networks:nothing", "--model: expected own_networks:nothing to return an epskernels.models.Model, got None"),
        ("own_networks:two", "--model: own_networks:two(device) raised TypeError: two() missing 1 required positional"),
        ("own_networks:number", "--model: expected own_networks:number to be a function, got 3"),
        ("own_networks:no.such", "--model: own_networks has no 'no.such' ({}/own_networks.py)"),
        ("own_networks:fails", "own_networks:fails(device) raised KeyError: 'checkpoint' ({}/own_networks.py, line 73)"),
        ("own_networks:training", "raised ValueError: weights: expected modules in evaluation mode, got a Network in training"),
        ("own_networks:elsewhere", "--model: expected own_networks:elsewhere to put its weights on cpu, got a tensor on meta"),
        ("own_absent:model", "--model: no module 'own_absent' in {} or among the installed ones"),
        ("own_networks.deeper:model", "--model: no module 'own_networks.deeper' in {} or among the installed ones"),
        ("own_broken:model", "--model: own_broken cannot be imported: AttributeError: "),
        ("own_needs:model", "--model: own_needs cannot be imported: ModuleNotFoundError: No module named 'no_such_package' ({}"),
        ("own_typo:model", "--model: own_typo cannot be imported: SyntaxError: expected ':' (own_typo.py, line 1)"),
        ("own_networks.py:ddpm", "--model: expected a module's name, such as own_networks:ddpm, without .py, got 'own_"),
        ("a/own_networks.py:ddpm", "--model: expected a module's name, such as own_networks:ddpm, without .py, got 'a/own_"),
        ("own_networks", "--model: expected unet/config.json in own_networks, the directory of a diffusers pipeline"),
        ("own_networks:", "--model: expected unet/config.json in own_networks:"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_model(text, message, own, capsys):
    assert cli.main(["sample", "--model", text, "--steps", "2", "--seeds", "0", "--out", "new/s.npz"]) == 2
    error = capsys.readouterr().err
    assert message.format(own) in error and len(error.splitlines()) == 1 and not (own / "new").exists()


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        ("edm", ["--variance", "fixed_small"], "--variance: not an option of --sampler edm_heun"),
        ("ddpm", ["--class", "1"], "guidance and class need a network with classes"),
        ("rgb", ["--class", "2"], "class: expected a class in [0, 2), got 2"),
        ("edm", ["--time-shift", "10", "--sampler", "euler"], "--time-shift: expected a model that is told timesteps, got one"),
        ("bare", ["--out", "folder"], "--out: folder can be continued by the same weights alone, and own_networks:bare names"),
        ("curves", ["--out", "grid.png"], "--out: samples: expected images (1, 1 or 3, H, W), got (1, 1, 24)"),
        ("curves", ["--out", "folder", "--uint8"], "--out: samples: expected images (1, 1 or 3, H, W), got (1, 1, 24)"),
        ("curves", ["--out", "new.npz", "--uint8"], "--out: samples: expected images (1, 1 or 3, H, W), got (1, 1, 24)"),
        ("ddpm", ["--uint8"], "--uint8: expected an --out that is a .npz or a directory"),
        ("ddpm", ["--uint8", "--out", "grid.png"], "--uint8: expected an --out that is a .npz or a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refused_before_anything_is_written(function, arguments, message, own, capsys):
    before = set(own.iterdir())
    assert run(function, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert {path for path in own.iterdir() if path.suffix or path.name == "folder"} == before


def test_a_directory_is_continued_by_the_same_weights_and_function(own, capsys):
    again = ["--out", "folder", "--batch", "2", "--variance", "fixed_small"]
    assert run("ddpm", *again) == run("ddpm", *again) == 0
    assert "3 of them before; by rank: 0" in capsys.readouterr().out
    for function in ("other", "rgb"):
        assert run(function, *again, *(["--class", "0"] if function == "rgb" else [])) == 2
        assert re.search("begun with other settings.*model was '", capsys.readouterr().err)


def test_digests_of_models(own):
    def digests(function, name="own_networks:ddpm"):
        model = made(function)
        model.name = name
        return common.model_digests(model)

    assert digests("ddpm") == digests("ddpm") and digests("ddpm")[1] != digests("other")[1]
    assert digests("ddpm")[0] != digests("ddpm", "own_networks:again")[0] and digests("bare")[1] is None
    assert digests("ddpm")[1] != digests("latent")[1]


def test_lambda_of_weights_that_nobody_knows(own, capsys):
    np.save("data.npy", np.random.default_rng(0).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32))
    fit = ["--data", "data.npy", "--images", "4", "--fit", "constant", "--out"]
    assert run("bare", *fit, "bare.json", command="calibrate") == 0
    assert run("ddpm", *fit, "known.json", command="calibrate") == 0
    capsys.readouterr()
    for function, file, warns in (
        ("bare", "bare.json", ""), ("bare", "known.json", "cannot be compared"), ("ddpm", "known.json", ""),
        ("ddpm", "bare.json", "cannot be compared"), ("other", "known.json", "other weights"),
    ):  # fmt: skip
        assert run(function, "--lambda", file) == 0
        error = capsys.readouterr().err
        assert warns in error and bool(error) == bool(warns), (function, file)


def test_calibrates_denoisers_flows_and_latents(own, capsys):
    """Latents are floats of any size; of others, floats are in [-1, 1]."""
    np.save("data.npy", np.random.default_rng(0).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32))
    np.save("latents.npy", 3 * np.random.default_rng(0).standard_normal((4, 4, 4, 4)).astype(np.float32))
    for function, data in (("edm", "data.npy"), ("flow", "data.npy"), ("latent", "latents.npy")):
        fit = ["--data", data, "--images", "4", "--fit", "constant", "--out", "found.json"]
        assert run(function, *fit, command="calibrate") == 0, function
        assert run(function, "--lambda", "found.json") == 0 and not capsys.readouterr().err
    np.save("data.npy", 3 * np.load("data.npy"))
    assert run("edm", "--data", "data.npy", "--images", "4", "--out", "no.json", command="calibrate") == 2
    assert "data: expected uint8, or floats in [-1, 1], in data.npy" in capsys.readouterr().err
    np.save("data.npy", np.zeros((4, 1, 8, 8), np.float32))
    cache = ["--data", "data.npy", "--images", "4", "--method", "search", "--cache", "trials.json", "--out", "no.json"]
    assert run("bare", *cache, command="calibrate") == 2
    assert "--cache: trials.json can be continued by the same weights alone" in capsys.readouterr().err


# ---- what other tools read ----


def test_bytes_are_rounded_to_the_nearest():
    levels = np.arange(256.0)
    around = np.stack([levels - 0.49, levels, levels + 0.49]) / 127.5 - 1
    x = np.concatenate([around.ravel(), [-1.5, 1.5, np.nan, np.inf]]).astype(np.float32).reshape(1, 1, 1, -1)
    found = images.to_bytes(x)
    assert found.dtype == np.uint8 and found.shape == (1, 1, 772, 1)
    assert found.ravel().tolist() == [*range(256)] * 3 + [0, 255, 128, 255]


def pytorch_fid(folder):
    """The files that pytorch-fid takes, as it reads them."""
    endings = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")
    found = sorted(path for ending in endings for path in folder.glob(f"*.{ending}"))
    return [path.name for path in found], np.stack([np.asarray(Image.open(path).convert("RGB")) for path in found])


@pytest.mark.parametrize(
    "function, more", [("ddpm", []), ("rgb", ["--class", "1"]), ("latent", [])], ids=["grey", "rgb", "latent"]
)
def test_a_folder_of_pngs_and_an_array(function, more, own):
    """The bytes of the samples of one run in memory, from a directory and from memory."""
    given = ["--batch", "2", "--out", "floats.npz"]
    assert run(function, *more, *given, seeds="3,0-2,1000000") == 0
    found = np.load("floats.npz")
    expected = images.to_bytes(made(function).images(torch.from_numpy(found["samples"])).numpy())
    assert run(function, *more, "--uint8", *given[:2], "--out", "folder", "--out", "a.npz", seeds="3,0-2,1000000") == 0
    names, pixels = pytorch_fid(own / "folder" / "samples")
    assert names == [f"{seed:07d}.png" for seed in (0, 1, 2, 3, 1000000)]
    order = np.argsort(found["seeds"])
    assert np.array_equal(pixels, np.broadcast_to(expected[order], pixels.shape))
    assert Image.open("folder/samples/0000000.png").mode == ("L" if function == "ddpm" else "RGB")
    assert run(function, *more, "--uint8", *given[:2], "--out", "b.npz", seeds="3,0-2,1000000") == 0
    for name in ("a.npz", "b.npz"):
        array = np.load(name)
        assert array["arr_0"].dtype == np.uint8 and array["arr_0"].flags.c_contiguous
        assert np.array_equal(array["arr_0"], np.broadcast_to(expected, (*expected.shape[:3], 3)))
        assert array["seeds"].tolist() == [3, 0, 1, 2, 1000000]
        assert array["arr_1"].tolist() == [1] * 5 if more else "arr_1" not in array
    shape = (1 if function == "ddpm" else 3, *expected.shape[1:3])
    assert images.load("folder/samples", shape).shape == (5, *shape)


def test_what_is_compared_has_two_folders_and_two_arrays(own):
    assert run("ddpm", "--uint8", "--compare", "--lambda", "1.2", "--out", "both", "--out", "both.npz") == 0
    arrays = np.load("both.npz")
    assert set(arrays) == {"seeds", "arr_0", "baseline"}
    for folder, name in (("samples", "arr_0"), ("baseline", "baseline")):
        assert np.array_equal(pytorch_fid(own / "both" / folder)[1], arrays[name])
    assert not np.array_equal(arrays["arr_0"], arrays["baseline"])


def test_pngs_that_are_not_there_are_made_from_the_samples(own, capsys, monkeypatch):
    """Of a run without them too. What a killed process left is removed."""
    given = ["--out", "folder", "--batch", "2"]
    assert run("ddpm", *given) == 0 and not (own / "folder" / "samples").exists()
    printed = re.findall("sha256 .*", capsys.readouterr().out)
    monkeypatch.setattr(cli.sample, "sample", None)
    assert run("ddpm", *given, "--uint8") == 0
    assert re.findall("sha256 .*", capsys.readouterr().out) == printed
    folder = own / "folder" / "samples"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 5
    (folder / "000003.png").unlink()
    left = folder / f"000003.png.{socket.gethostname()}.999999999.tmp"
    left.write_bytes(b"a part")
    assert run("ddpm", *given, "--uint8") == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ---- real images ----


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_larger_images_are_cropped_to_their_centre_and_resized(tmp_path, caplog):
    rng = np.random.default_rng(0)
    wide, exact = rng.integers(0, 256, (20, 36, 3), np.uint8), rng.integers(0, 256, (10, 10, 3), np.uint8)
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", exact)
    expected = Image.fromarray(wide).resize((10, 10), Image.Resampling.BICUBIC, box=(8, 0, 28, 20))
    found = images.to_bytes(images.load(tmp_path, (3, 10, 10)))
    assert np.array_equal(found, [np.asarray(expected), exact])
    said = (
        f"data: 1 of 2 images of {tmp_path} were cropped to their centre and resized to 10 x 10, the first from 20 x 36"
    )
    assert caplog.messages == [said]
    for shape in ((3, 11, 10), (3, 10, 11)):
        wanted = f"expected {shape}, the network's shape, or larger, in {tmp_path / 'b.png'}, got (3, 10, 10)"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            images.load(tmp_path, shape)
    with pytest.raises(ValueError, match=r"expected a .npy or .npz for samples of shape \(1, 24\), got a directory"):
        images.load(tmp_path, (1, 24))


def test_images_of_a_class(tmp_path):
    """Classes are counted in the order of their folders' names, as ImageFolder does; mnist and arr_1 tell too."""
    for i, name in enumerate(["cat/1.png", "cat/deep/2.png", "ant/1.png", "ant/3.png", "bee/1.png"]):
        save(tmp_path / "data" / name, np.full((4, 4), i, np.uint8))
    levels = lambda **named: images.to_bytes(images.load(tmp_path / "data", (1, 4, 4), **named))[:, 0, 0, 0].tolist()  # noqa: E731
    assert levels() == [2, 3, 4, 0, 1] and levels(label=0) == [2, 3]
    assert levels(label=2) == [0, 1] and levels(label=2, count=1) == [0]
    with pytest.raises(ValueError, match="data: expected a directory for class 3 in .*, got 3 directories"):
        levels(label=3)
    with pytest.raises(ValueError, match="data: expected 2 images of class 1 in .*, got 1"):
        levels(label=1, count=2)
    whole = images.load("mnist", (1, 28, 28))
    assert np.array_equal(images.load("mnist", (1, 28, 28), 20, label=7), whole[3500:4000:25])
    array = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    for labels in ([1, 0, 1], [1.0, 0, 1]):
        np.savez(tmp_path / "a.npz", array, np.array(labels))
        every = images.load(tmp_path / "a.npz", (3, 4, 4))
        if labels == [1, 0, 1] and isinstance(labels[0], int):
            assert np.array_equal(images.load(tmp_path / "a.npz", (3, 4, 4), label=1), every[::2])
        else:
            with pytest.raises(ValueError, match="data: expected an integer label for each image in .*, got float64"):
                images.load(tmp_path / "a.npz", (3, 4, 4), label=1)


def test_bytes_with_their_channels_last(tmp_path):
    """As guided-diffusion's reference batches have them, beside the statistics that stand there too."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels, mu=np.zeros(3), sigma=np.eye(3))
    np.save(tmp_path / "a.npy", pixels)
    for name in ("a.npz", "a.npy"):
        assert np.array_equal(images.to_bytes(images.load(tmp_path / name, (3, 4, 5))), pixels)
    square = pixels[:, :3, :3]
    np.save(tmp_path / "b.npy", square)  # (N, C, H, W) where it can be either
    assert np.array_equal(images.to_bytes(images.load(tmp_path / "b.npy", (3, 3, 3))), square.transpose(0, 2, 3, 1))
    for array, shape in ((pixels, (1, 4, 5)), (pixels.astype(np.float32), (3, 4, 5)), (pixels, (3, 5, 4))):
        np.save(tmp_path / "b.npy", array)
        with pytest.raises(ValueError, match=r"data: expected images \(N, "):
            images.load(tmp_path / "b.npy", shape)
    for value in (np.inf, np.nan):
        np.save(tmp_path / "c.npy", np.full((2, 4), value, np.float32))
        with pytest.raises(ValueError, match="data: expected uint8, or finite floats, in"):
            images.load(tmp_path / "c.npy", (4,), bounded=False)


def test_a_class_of_the_data_is_what_calibrate_takes(own, capsys):
    rng = np.random.default_rng(0)
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"):
        save(own / "data" / name, rng.integers(0, 256, (8, 6, 3), np.uint8))
    given = ["--data", "data", "--fit", "constant", "--out", "l.json", "--class", "1"]
    assert run("rgb", *given, "--images", "3", command="calibrate") == 0
    assert scaling.load("l.json")[1]["images"] == 3
    assert run("rgb", *given, "--images", "4", command="calibrate") == 2
    assert "data: expected 4 images of class 1 in data, got 3" in capsys.readouterr().err


# ---- what goes wrong, in one line ----


@pytest.mark.parametrize("out", ["images.npz", "folder"])
def test_says_which_samples_are_not_finite(out, own, capsys):
    """With --uint8 NaN looks like an image: grey. Then the exit status says so too, after all is written."""
    assert run("some_nan", "--out", "raw.npz", seeds="3-9,20") == 0
    saved = np.load("raw.npz")
    bad = [int(seed) for seed, x in zip(saved["seeds"], saved["samples"], strict=True) if not np.isfinite(x).all()]
    assert 0 < len(bad) < 8
    said = f"{len(bad)} of 8 samples are not finite (seeds {spelled(bad)})"
    assert capsys.readouterr().err == f"warning: {said}\n"
    for _ in range(2):  # also of a directory that is there
        assert run("some_nan", "--out", out, "--uint8", "--batch", "3", seeds="3-9,20") == 1
        error = f"epskernels sample: --uint8: expected finite samples, got others: {said}; NaN was written as grey\n"
        assert capsys.readouterr().err == error
    if out == "folder":
        assert len(list((own / "folder/samples").glob("*.png"))) == 8
    else:
        assert np.load(out)["arr_0"].shape == (8, 8, 8, 3)


def test_seeds_are_spelled_as_ranges():
    assert spelled([0, 1, 2, 3, 7, 9, 8]) == "0-3, 7, 9, 8" and spelled([5]) == "5" and spelled([]) == ""
    assert spelled(range(0, 100, 2), most=3) == "0, 2, 4, ..."
    assert list(parse(spelled([1, 2, 5]).replace(" ", ""))) == [1, 2, 5]


def test_what_a_network_raises_says_what_it_was_called_with(own, capsys):
    assert run("double", "--out", "s.npz") == 1
    said = capsys.readouterr().err
    assert (
        "dtype" in said and "(epskernels: the model was called with x, float32 (5, 1, 8, 8), and t, int64 (5,))" in said
    )


@pytest.mark.parametrize("name", ["absent.npy", "absent.npz"])
def test_real_images_that_are_not_there(name, own, capsys):
    assert run("ddpm", "--data", name, "--out", "lambda.json", command="calibrate") == 2
    assert (
        capsys.readouterr().err == f"epskernels calibrate: --data: expected a file of images, and there is no {name}\n"
    )


def test_another_run_s_directory_is_told_shortly(own, capsys):
    assert run("ddpm", "--out", "folder") == 0
    capsys.readouterr()
    assert run("other", "--out", "folder") == 2
    error = capsys.readouterr().err
    assert re.search(r"model was '[0-9a-f]{8}\.\.\. [0-9a-f]{8}\.\.\.', is ", error) and not re.search(
        "[0-9a-f]{20}", error
    )
    assert error.endswith("; take another directory, or delete this one\n")
