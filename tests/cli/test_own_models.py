"""Models of one's own: the class, `--model module:function`, and the images that go in and come out."""

import re
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import epskernels
from epskernels import cli, images, models, samplers, scaling, schedule, shards
from epskernels.cli import common

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


def learned():
    return Model(Network(2).eval(), schedule.linear(100), (1, 8, 8), clip=1.0, variance="learned_range")


def rgb(device=None):
    return Model(Network().eval(), schedule.linear(100), (3, 8, 6), clip=1.0, classes=2, empty=2)


def edm():
    return Model(Network().eval(), schedule.KarrasSchedule(), (1, 8, 8))


def flow():
    return Model(Network().eval(), schedule.FlowSchedule(3.0), [1, 8, 8])


def latent():
    vae = torch.nn.Upsample(scale_factor=2).eval()
    network = Network().eval()
    decode = lambda latents: vae(latents[:, :3].clamp(-1, 1))
    return Model(network, schedule.scaled_linear(100), (4, 4, 4), decode=decode, weights=[network, vae, torch.ones(2)])


def bare():
    return Model(lambda x, t: 0.1 * x, schedule.linear(100), (1, 8, 8))


def curves():
    return Model(Network().eval(), schedule.linear(100), (1, 24))


def nan():
    return Model(lambda x, t: float("nan") * x, schedule.linear(100), (1, 8, 8), weights=torch.ones(1))


def training():
    return Model(Network(), schedule.linear(100), (1, 8, 8))


def fails(device):
    return {}["checkpoint"]


def nothing():
    pass


def two(device, more):
    pass


def keyword(*, device):
    pass


def elsewhere():
    return Model(Network().eval().to("meta"), schedule.linear(100), (1, 8, 8))


number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of the user's module, which is the current one."""
    (tmp_path / "own_networks.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import numpy\n\nnumpy.no_such_thing\n")
    (tmp_path / "own_needs.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own_networks", "own_broken", "own_needs"):
        sys.modules.pop(name, None)


def run(function, *arguments, steps=3, seeds="0-4", command="sample"):
    rest = ["--seeds", seeds] if command == "sample" else []
    given = ["--model", f"own_networks:{function}", "--steps", str(steps), "--quiet", *rest]
    return cli.main([command, *given, *[str(argument) for argument in arguments]])


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
        ({"decode": "vae"}, TypeError, "decode: expected a callable, got 'vae'"),
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
        ({"weights": torch.nn.Linear(1, 1)}, ValueError, "a Linear in training mode: call its eval"),
        ({"network": torch.nn.Linear(1, 1)}, ValueError, "a Linear in training mode: call its eval"),
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
    assert torch.equal(one.callable()(x, t), x)
    with pytest.raises(ValueError, match="guidance: expected 1, since this network has no empty class, got 2"):
        one.callable(0, 2.0)
    pairs = models.Model(lambda x, t, labels: (x, x), schedule.linear(), (1, 2, 2), classes=1, empty=1)
    with pytest.raises(TypeError, match="network: expected it to return f alone"):
        pairs.callable(0, 2.0)(x, t)


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
        with pytest.raises(ValueError, match=r"expected images of 1 or 3 channels, \(2, C, H, W\), of decode, got"):
            wrong.images(torch.ones(2, 4, 2, 2))


# ---- module:function ----


def test_samples_are_those_of_the_library(own, capsys):
    """Also for a denoiser of sigma and a flow, each with the sampler that is its default."""
    from own_networks import Network

    net = Network().eval()
    tables = {
        "ddpm": samplers.ddpm(schedule.linear(100), 3, clip=1.0),
        "edm": samplers.edm_heun(schedule.KarrasSchedule(), 3),
        "flow": samplers.flow_euler(schedule.FlowSchedule(3.0), 3),
        "learned": samplers.ddpm(schedule.linear(100), 3, clip=1.0, variance="learned_range"),
    }
    for name, table in tables.items():
        assert run(name, "--out", own / "s.npz") == 0
        expected = epskernels.sample(Network(2).eval() if name == "learned" else net, table, range(5), (1, 8, 8))
        assert np.array_equal(np.load(own / "s.npz")["samples"], expected.numpy()), name
        assert f"{table.name.partition('[')[0]}, 3 steps, 5 seeds" in capsys.readouterr().out


def test_guidance_of_classes(own):
    from own_networks import rgb

    assert run("rgb", "--class", "1", "--guidance", "3", "--lambda", "1.01", "--out", own / "s.npz") == 0
    table = samplers.ddpm(schedule.linear(100), 3, clip=1.0, guidance=3.0, scaling=1.01)
    expected = epskernels.sample(rgb().callable(1, 3.0), table, range(5), (3, 8, 6))
    assert np.array_equal(np.load(own / "s.npz")["samples"], expected.numpy())


def test_the_samplers_that_a_schedule_allows(own, capsys):
    """Those that are offered run, the others are refused by name, before anything is written."""
    import own_networks

    everything = cli.common.offered_samplers()
    assert {"flow_euler", "consistency"} <= set(everything) and not {"pfgmpp", "ddim_inverse"} & set(everything)
    for function, refused in (
        ("ddpm", {"flow_euler", "consistency"}),
        ("edm", {"ddpm", "ddim", "lcm", "tcd", "flow_euler"}),
        ("flow", {"edm_euler", "edm_heun", "euler", "unipc", "consistency", "lcm", "tcd"}),
    ):
        offered = set(cli.common.offered_samplers(getattr(own_networks, function)(*["cpu"] * (function == "ddpm"))))
        assert refused <= set(everything) - offered and len(offered) >= 7
        for name in everything:
            status = run(function, "--sampler", name, "--out", own / "new" / "s.npz", seeds="0")
            assert (status == 0) == (name in offered), (function, name)
            error = capsys.readouterr().err
            assert status == 0 or (error.startswith("epskernels sample: ") and len(error.splitlines()) == 1)
            assert status == 0 or re.search(f"--sampler: {name} cannot sample a model with a .*expected one of ", error)


@pytest.mark.parametrize(
    "text, message",
    [
        ("own_networks:nothing", "--model: expected own_networks:nothing to return an epskernels.models.Model, got None"),
        ("own_networks:two", "--model: expected own_networks:two to take a device, or nothing, it needs device, more"),
        ("own_networks:keyword", "--model: expected own_networks:keyword to take a device, or nothing, it needs device"),
        ("own_networks:number", "--model: expected a function, own_networks:number is 3"),
        ("own_networks:no.such", "--model: own_networks has no no.such"),
        ("own_networks:fails", "own_networks:fails raised KeyError: 'checkpoint' ({}/own_networks.py, line 73)"),
        ("own_networks:training", "raised ValueError: weights: expected modules for inference, got a Network in training"),
        ("own_networks:elsewhere", "--device: the weights of own_networks:elsewhere are on meta, expected cpu: let the function"),
        ("own_absent:model", "--model: no module own_absent in {}, nor installed"),
        ("own_networks.deeper:model", "--model: no module own_networks.deeper in {}, nor installed"),
        ("own_broken:model", "--model: importing own_broken raised AttributeError: "),
        ("own_needs:model", "--model: importing own_needs raised ModuleNotFoundError: No module named 'no_such_package' ({}"),
        ("own_networks", "model: expected unet/config.json in own_networks, the directory of a diffusers pipeline"),
        ("own_networks:", "model: expected unet/config.json in own_networks:"),
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
        ("edm", ["--time-shift", "10", "--sampler", "euler"], "--time-shift: expected a model of timesteps, a DiscreteSchedule"),
        ("bare", ["--out", "folder"], "--out: folder is continued by a model of the same weights, and own_networks:bare says"),
        ("curves", ["--out", "grid.png"], "--out, --format: expected images of 1 or 3 channels, (1, C, H, W), of the samples"),
        ("curves", ["--out", "folder", "--format", "png"], "--out, --format: expected images of 1 or 3 channels"),
        ("ddpm", ["--format", "png"], "--format: png is for a directory, and no --out (no suffix) names one"),
        ("ddpm", ["--format", "adm", "--out", "folder"], "--format: adm is for a .npz, and no --out names one"),
        ("ddpm", ["--format", "png", "--out", "folder", "--out", "s.npz"], "--format: png keeps pixels, and s.npz is for sam"),
        ("ddpm", ["--format", "png", "--out", "folder", "--seeds", "0-3,2-5"], "--seeds: expected each once, .* got 2 again"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refused_before_anything_is_written(function, arguments, message, own, capsys):
    before = sorted(own.rglob("*.npz")) + sorted(own.rglob("*.json"))
    assert run(function, *arguments) == 2
    error = capsys.readouterr().err
    assert (message in error or re.search(message, error)) and len(error.splitlines()) == 1
    assert sorted(own.rglob("*.npz")) + sorted(own.rglob("*.json")) == before and not (own / "folder").exists()


def test_a_directory_is_continued_by_the_same_weights_and_function(own, capsys):
    assert run("ddpm", "--out", "folder", "--batch", "2") == 0
    assert (
        run("ddpm", "--out", "folder", "--batch", "2") == 0
        and "3 of them before; by rank: 0" in capsys.readouterr().out
    )
    for function in ("other", "learned"):
        assert run(function, "--out", "folder", "--batch", "2", "--variance", "fixed_small") == 2
        assert re.search("begun with other settings.*: .*model was '", capsys.readouterr().err)


def test_digests_of_models(own):
    import own_networks

    def digests(function, name="own_networks:ddpm"):
        model = getattr(own_networks, function)(*["cpu"] * (function in ("ddpm", "other")))
        model.name = name
        return common.model_digests(model)

    assert digests("ddpm") == digests("ddpm") and digests("ddpm")[1] != digests("other")[1]
    assert digests("ddpm")[0] != digests("ddpm", "own_networks:again")[0] and digests("bare")[1] is None
    assert digests("ddpm")[0] != digests("latent")[0] and digests("ddpm")[1] != digests("latent")[1]
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    told = []
    for eps in (1e-5, 1e-3):
        unet.register_to_config(norm_eps=eps)
        wrapped = lambda x, t: unet(x, t)  # noqa: E731
        told.append(
            common.model_digests(models.Model(wrapped, schedule.linear(), (1, 8, 8), weights=unet.eval(), name="unet"))
        )
    assert told[0][0] != told[1][0] and told[0][1] == told[1][1]


def test_lambda_of_weights_that_nobody_knows(own, capsys):
    np.save("data.npy", np.random.default_rng(0).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32))
    fit = ["--data", "data.npy", "--images", "4", "--fit", "constant", "--out"]
    assert run("bare", *fit, "bare.json", command="calibrate") == 0
    assert run("ddpm", *fit, "known.json", command="calibrate") == 0
    capsys.readouterr()
    for function, file, warns in (
        ("bare", "bare.json", None), ("bare", "known.json", "cannot be compared"), ("ddpm", "known.json", None),
        ("ddpm", "bare.json", "cannot be compared"), ("other", "known.json", "other weights"),
    ):  # fmt: skip
        assert run(function, "--lambda", file) == 0
        error = capsys.readouterr().err
        assert (warns is None and not error) or (warns is not None and warns in error), (function, file)


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
    cache = ["--method", "search", "--cache", "trials.json", "--out", "no.json"]
    np.save("data.npy", np.zeros((4, 1, 8, 8), np.float32))
    assert run("bare", "--data", "data.npy", "--images", "4", *cache, command="calibrate") == 2
    assert "--cache: trials.json is continued by a model of the same weights" in capsys.readouterr().err


# ---- what other tools read ----


def test_bytes_are_rounded_to_the_nearest():
    levels = torch.arange(256.0)
    around = torch.stack([levels - 0.49, levels, levels + 0.49]) / 127.5 - 1
    x = torch.cat([around.flatten(), torch.tensor([-1.5, 1.5, np.nan])]).reshape(1, 1, 1, -1)
    expected = [*range(256)] * 3 + [0, 255, 0]
    found = images.to_bytes(x)
    assert found.dtype == np.uint8 and found.shape == (1, 1, 771, 1) and found.flatten().tolist() == expected
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(images.to_bytes(torch.from_numpy(images.to_floats(every)))[..., 0], every[0])


def pytorch_fid(folder):
    """The files that pytorch-fid takes, as it reads them."""
    endings = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")
    found = sorted(path for ending in endings for path in folder.glob(f"*.{ending}"))
    return [path.name for path in found], np.stack([np.asarray(Image.open(path).convert("RGB")) for path in found])


def clean_fid(folder):
    """The same of clean-fid, which looks into folders, and takes arrays too."""
    endings = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp", "npy", "JPEG", "JPG", "PNG")
    found = sorted(path for ending in endings for path in folder.rglob(f"*.{ending}"))
    return [path.name for path in found], np.stack([np.asarray(Image.open(path).convert("RGB")) for path in found])


@pytest.mark.parametrize("read", [pytorch_fid, clean_fid])
@pytest.mark.parametrize(
    "function, more", [("ddpm", []), ("rgb", ["--class", "0"]), ("latent", [])], ids=["grey", "rgb", "latent"]
)
def test_a_folder_of_pngs(function, more, read, own, capsys):
    import own_networks

    assert run(function, *more, "--out", "memory.npz") == 0
    assert run(function, *more, "--out", "pngs", "--format", "png", "--batch", "2", seeds="3,0-2,1000000") == 0
    assert "3 chunks of up to 2 seeds in pngs, 0 of them before" in capsys.readouterr().out
    model = getattr(own_networks, function)(*["cpu"] * (function == "ddpm"))
    expected = images.to_bytes(model.images(torch.from_numpy(np.load("memory.npz")["samples"])))[:4]
    names, pixels = read(own / "pngs")
    assert names == [f"{seed:07d}.png" for seed in (0, 1, 2, 3, 1000000)]
    assert np.array_equal(pixels[:4], np.broadcast_to(expected, pixels[:4].shape))
    assert Image.open("pngs/0000000.png").mode == ("L" if function == "ddpm" else "RGB")
    assert images.load("pngs", (1 if function == "ddpm" else 3, *expected.shape[1:3])).shape[0] == 5


def test_pngs_are_continued_and_the_damaged_are_made_again(own, capsys):
    given = ["--out", "pngs", "--format", "png", "--compare", "--lambda", "1.1", "--batch", "2"]
    assert run("ddpm", *given) == 0
    printed = re.findall("sha256 of the pixels of the .*", capsys.readouterr().out)
    before = {path: path.read_bytes() for path in (own / "pngs").rglob("*.png")}
    assert len(before) == 10 and len(printed) == 2 and not list((own / "pngs").rglob("*.tmp"))
    samples = own / "pngs" / "samples"
    (samples / "000004.png").unlink()
    swapped = (own / "pngs" / "baseline" / "000001.png").read_bytes()  # another sample's
    (samples / "000001.png").write_bytes(swapped)
    Image.open(samples / "000002.png").save(samples / "000002.png")  # the same pixels, but nothing says whose
    assert run("ddpm", *given) == 0
    captured = capsys.readouterr()
    assert "3 of them before" in captured.out and captured.err.count("is damaged, and is made again") == 2
    assert re.findall("sha256 of the pixels of the .*", captured.out) == printed
    assert {path: path.read_bytes() for path in before} == before
    assert run("ddpm", *given) == 0 and "6 of them before; by rank: 0" in capsys.readouterr().out
    for changed in (["--lambda", "1.2"], ["--seeds", "0-5"], ["--batch", "3"]):
        assert run("ddpm", *given, *changed) == 2
        assert "begun with other settings" in capsys.readouterr().err
    assert run("ddpm", "--lambda", "1.1", "--batch", "2", "--compare", "--out", "pngs") == 2
    assert "images was 'png', is None" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pngs: expected samples, it holds png images"):
        shards.Shards("pngs")


def test_a_run_of_pngs_is_of_bytes(own):
    settings = {"names": ["samples"], "batch": 2, "images": "png"}
    run_ = shards.begin("pngs", settings, [4, 7, 5])
    assert isinstance(run_, shards.Pngs) and isinstance(shards.opened("pngs", [4, 7, 5]), shards.Pngs)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 1), np.uint8)
    for array in (pixels, pixels[:2].astype(np.float32), pixels[:2, ..., 0], pixels[:2].repeat(2, 3)):
        with pytest.raises(ValueError, match=r"pngs: expected uint8 \(2, H, W, 1 or 3\) for"):
            run_.write("samples", 0, array)
    run_.write("samples", 0, pixels[:2])
    assert run_.missing() == ([("samples", 1)], []) and sorted(path.name for path in (own / "pngs").iterdir()) == [
        "000004.png", "000007.png", "run.json",
    ]  # fmt: skip
    run_.write("samples", 1, pixels[2:])
    assert np.array_equal(run_.load(), pixels) and len(run_) == 2
    shards.begin("samples", {"names": ["samples"], "batch": 2, "shape": [1]}, [4])
    with pytest.raises(ValueError, match="samples: expected PNG images, it holds samples"):
        shards.Pngs("samples", [4])


@pytest.mark.parametrize(
    "function, more", [("ddpm", []), ("rgb", ["--class", "1"]), ("latent", [])], ids=["grey", "rgb", "latent"]
)
def test_the_array_that_adm_s_evaluator_reads(function, more, own):
    """From memory, from a directory of samples, and from one of PNGs; its network takes three channels."""
    assert run(function, *more, "--out", "adm.npz", "--format", "adm", "--batch", "2") == 0
    found = np.load("adm.npz")
    shape = (5, 8, 6 if function == "rgb" else 8, 3)
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == shape and found["arr_0"].flags.c_contiguous
    assert ("arr_1" in found) == bool(more) and (not more or found["arr_1"].tolist() == [1] * 5)
    for name, format in (("floats", ["adm"]), ("pngs", ["adm", "png"])):
        formats = [part for each in format for part in ("--format", each)]
        assert (
            run(
                function, *more, "--out", name, "--out", f"{name}.npz", "--out", f"{name}.png", *formats, "--batch", "2"
            )
            == 0
        )
        assert np.array_equal(np.load(f"{name}.npz")["arr_0"], found["arr_0"])
    assert np.array_equal(np.asarray(Image.open("floats.png")).shape, np.asarray(Image.open("pngs.png")).shape)
    assert run(function, *more, "--compare", "--lambda", "1.2", "--out", "adm.npz", "--format", "adm") == 0
    assert set(np.load("adm.npz")) == {"arr_0", "baseline", *(["arr_1"] if more else [])}
    assert images.load("adm.npz", (1 if function == "ddpm" else 3, *shape[1:3])).shape[0] == 5


def test_pngs_that_are_not_finite_are_told_of(own, capsys):
    assert run("nan", "--out", "pngs", "--format", "png") == 0
    assert capsys.readouterr().err == "warning: some samples are not finite\n"
    assert not np.asarray(Image.open("pngs/000000.png")).any()


# ---- real images ----


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_images_are_cropped_to_the_centre_and_resized(tmp_path, caplog):
    """A square in the middle of a wide image, by Pillow's own crop and bicubic filter; a warning says how many."""
    wide = np.random.default_rng(0).integers(0, 256, (20, 36, 3), np.uint8)
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", wide[:10, :10])
    expected = Image.fromarray(wide).crop((8, 0, 28, 20)).resize((10, 10), Image.Resampling.BICUBIC)
    found = images.to_bytes(torch.from_numpy(images.load(tmp_path, (3, 10, 10))))
    assert np.array_equal(found[0], np.asarray(expected)) and np.array_equal(found[1], wide[:10, :10])
    said = f"data: 1 of 2 images of {tmp_path} were cropped to their centre and resized to 10 x 10 (Pillow, bicubic), "
    assert caplog.messages == [f"{said}the first from 20 x 36"]
    tall = images.to_bytes(torch.from_numpy(images.load(tmp_path, (3, 10, 5))))
    assert np.array_equal(tall[0], np.asarray(Image.fromarray(wide).crop((13, 0, 23, 20)).resize((5, 10), 3)))
    with pytest.raises(
        ValueError, match=r"\(3, 11, 10\), the network's shape, in .*b.png, or more pixels, got \(3, 10, 10\)"
    ):
        images.load(tmp_path, (3, 11, 10))
    with pytest.raises(ValueError, match=r"expected a .npy or .npz for samples of shape \(1, 24\), got images"):
        images.load(tmp_path, (1, 24))


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.JPEG", "a.bmp", "a.webp", "a.tif", "a.tiff", "a.ppm", "a.pgm", "a.gif"]
)
def test_any_common_image_file(name, tmp_path):
    save(tmp_path / name, np.full((8, 8), 60, np.uint8))
    for channels in (1, 3):
        found = images.load(tmp_path, (channels, 8, 8))
        assert found.shape == (1, channels, 8, 8) and np.abs((found + 1) * 127.5 - 60).max() < 2


def test_other_modes_become_grey_or_rgb(tmp_path):
    pixels = np.full((8, 8, 4), 40, np.uint8)
    save(tmp_path / "alpha.png", pixels)
    Image.fromarray(pixels[..., :3]).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(pixels[..., 0] > 3).save(tmp_path / "two.png")
    found = images.to_bytes(torch.from_numpy(images.load(tmp_path, (3, 8, 8))))
    assert [int(image[0, 0, 0]) for image in found] == [40, 40, 255] or abs(int(found[1, 0, 0, 0]) - 40) < 26


def test_images_of_a_class(tmp_path):
    """Classes are counted in the order of their folders' names, as ImageFolder does; mnist and arr_1 tell too."""
    for i, name in enumerate(["cat/1.png", "cat/deep/2.png", "ant/1.png", "ant/3.png", "bee/1.png"]):
        save(tmp_path / "data" / name, np.full((4, 4), 20 * i, np.uint8))
    levels = lambda **named: (images.load(tmp_path / "data", (1, 4, 4), **named)[:, 0, 0, 0] + 1) * 127.5 / 20  # noqa: E731
    assert levels().round().tolist() == [2, 3, 4, 0, 1] and levels(label=0).round().tolist() == [2, 3]
    assert levels(label=2).round().tolist() == [0, 1] and levels(label=2, count=1).round().tolist() == [0]
    with pytest.raises(ValueError, match="data: expected a folder for class 3 in .*, got 3 folders"):
        levels(label=3)
    with pytest.raises(ValueError, match="data: expected 2 images of class 1 in .*, got 1"):
        levels(label=1, count=2)
    whole = images.load("mnist", (1, 28, 28))
    assert np.array_equal(images.load("mnist", (1, 28, 28), 20, label=7), whole[3500:3520])
    array = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    np.savez(tmp_path / "a.npz", array, np.array([1, 0, 1]))
    assert np.array_equal(
        images.load(tmp_path / "a.npz", (3, 4, 4), label=1), images.load(tmp_path / "a.npz", (3, 4, 4))[::2]
    )
    np.savez(tmp_path / "b.npz", array, np.array([1.0, 0, 1]))
    with pytest.raises(ValueError, match="data: expected an integer label for each image in .*, got float64"):
        images.load(tmp_path / "b.npz", (3, 4, 4), label=1)


def test_bytes_with_their_channels_last(tmp_path):
    """As guided-diffusion's reference batches have them, beside the statistics that stand there too."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    expected = images.to_floats(pixels.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "a.npz", arr_0=pixels, mu=np.zeros(3), sigma=np.eye(3))
    np.save(tmp_path / "a.npy", pixels)
    for name in ("a.npz", "a.npy"):
        assert np.array_equal(images.load(tmp_path / name, (3, 4, 5)), expected)
    grey = pixels[..., :1].repeat(3, 3)
    np.save(tmp_path / "grey.npy", grey)
    assert np.array_equal(images.load(tmp_path / "grey.npy", (1, 4, 5)), expected[:, :1])
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
