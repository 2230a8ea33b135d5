"""The loop: seeds, history, guidance, learned variance, classifier guidance, callbacks, errors."""

import inspect

import pytest
import torch
from diffusers import DDIMInverseScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from scipy import stats

import epskernels
from epskernels import samplers, schedule

LINEAR = schedule.linear()
SHAPE = (2, 5, 3)
TABLES = {
    "ddpm": samplers.ddpm(LINEAR, 6, scaling=1.01),
    "ddpm-learned": samplers.ddpm(LINEAR, 6, scaling=1.01, variance="learned_range"),
    "ddim": samplers.ddim(LINEAR, 6, scaling=1.01),
    "ddim-eta": samplers.ddim(LINEAR, 6, scaling=1.01, eta=0.7),
    "edm_heun": samplers.edm_heun(schedule.KarrasSchedule(), 4, S_churn=3.0, S_max=50.0),
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 6, scaling=1.01),
    "euler": samplers.euler(LINEAR, 6, scaling=1.01),
    "heun": samplers.heun(LINEAR, 4, scaling=1.01),
    "dpmpp_2s": samplers.dpmpp_2s(schedule.KarrasSchedule(), 4, scaling=1.01, eta=1.0),
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde(LINEAR, 7, scaling=1.01),
    "unipc": samplers.unipc(LINEAR, 7, scaling=1.01, order=3, spacing="trailing"),
    "lcm": samplers.lcm(LINEAR, 4, scaling=1.01),
    "dit-learned": samplers.dit(7, scaling=1.01, guidance=1.0),
    "flow": samplers.ddim(schedule.FlowSchedule(shift=3.0), 5, prediction="flow"),
}

KARRAS = schedule.KarrasSchedule()
TABLES |= {  # every other sampler, as it is
    name: sampler(KARRAS if "grid_options" not in inspect.signature(sampler).parameters else LINEAR, 6, scaling=1.01)
    for name, sampler in samplers.SAMPLERS.items()
    if name not in {key.split("-")[0] for key in TABLES} | {"tcd", "flow_euler", "ddim_inverse"}
}
TABLES["tcd"] = samplers.tcd(LINEAR, 6, scaling=1.01)
TABLES["flow_euler"] = samplers.flow_euler(schedule.FlowSchedule(), 6, scaling=1.01, stochastic=True)


def model(x, t):
    return torch.tanh(0.3 * x) * (1 + 1e-4 * t.reshape(-1, 1, 1, 1))


def learned_model(x, t):
    return torch.cat([model(x, t), torch.sin(x)], dim=1)


def model_for(name):
    return learned_model if "learned" in name else model


@pytest.mark.parametrize("name", TABLES)
def test_a_seed_gives_the_same_sample_in_any_batch(name):
    table, run = TABLES[name], model_for(name)
    together = epskernels.sample(run, table, range(7), SHAPE)
    assert together.shape == (7, *SHAPE) and together.isfinite().all()
    alone = [epskernels.sample(run, table, [seed], SHAPE) for seed in range(7)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_gives_the_same_samples(name, dtype):
    compiled = epskernels.sample(model_for(name), TABLES[name], range(3), SHAPE, dtype=dtype)
    with epskernels.use_backend("reference"):
        reference = epskernels.sample(model_for(name), TABLES[name], range(3), SHAPE, dtype=dtype)
    assert compiled.dtype == dtype
    assert torch.equal(compiled, reference)


def test_the_loop_is_the_steps_by_hand():
    table = TABLES["dpmpp_2m"]
    x, m1 = epskernels.normal([3, 4], SHAPE), None
    for i in range(len(table)):
        t = torch.full((2,), int(table["t"][i]))
        x, m1 = epskernels.step(x, model(x, t), table, i, m1=torch.zeros_like(x) if m1 is None else m1, return_m0=True)
    assert torch.equal(epskernels.sample(model, table, [3, 4], SHAPE), x)


def test_discrete_timesteps_are_integers_and_noise_levels_floats():
    seen = []

    def spy(x, t):
        seen.append(t)
        return model(x, t)

    epskernels.sample(spy, TABLES["ddim"], [0, 1], SHAPE)
    assert [int(t[0]) for t in seen] == TABLES["ddim"]["t"].tolist() and seen[0].dtype == torch.int64
    seen.clear()
    epskernels.sample(spy, TABLES["edm_heun"], [0, 1], SHAPE)
    assert seen[0].dtype == torch.float32 and seen[0].shape == (2,) and len(seen) == 7


def test_input_is_scaled_by_c_in():
    table = samplers.edm_euler(schedule.KarrasSchedule(model=LINEAR), 4, prediction="epsilon")
    norms = []

    def spy(x, t):
        norms.append(x.std().item())
        return x  # the noise, were the data zero

    epskernels.sample(spy, table, range(64), SHAPE)
    assert norms[0] == pytest.approx(1, abs=0.1)


def test_guidance_uses_the_second_output():
    table = samplers.ddim(LINEAR, 6, guidance=3.0)
    guided = epskernels.sample(lambda x, t: (model(x, t), torch.zeros_like(x)), table, [1, 2], SHAPE)
    tripled = epskernels.sample(lambda x, t: 3 * model(x, t), samplers.ddim(LINEAR, 6), [1, 2], SHAPE)
    torch.testing.assert_close(guided, tripled, rtol=1e-4, atol=1e-5)


def test_a_table_without_learned_variance_ignores_the_second_half():
    plain = epskernels.sample(model, TABLES["ddim"], [1], SHAPE)
    assert torch.equal(epskernels.sample(learned_model, TABLES["ddim"], [1], SHAPE), plain)


def test_classifier_guidance_shifts_the_samples():
    table = TABLES["ddpm"]
    plain = epskernels.sample(model, table, [1], SHAPE)
    shifted = epskernels.sample(model, table, [1], SHAPE, cond_fn=lambda x, t: torch.ones_like(x))
    assert (shifted > plain).float().mean() > 0.9


def test_callback_sees_every_row():
    rows = []
    final = epskernels.sample(
        model, TABLES["ddim"], [1], SHAPE, callback=lambda i, x, m0: rows.append((i, x.clone(), m0.clone()))
    )
    assert [i for i, _, _ in rows] == list(range(6))
    assert torch.equal(rows[-1][1], final) and torch.equal(rows[-1][2], final)


def test_no_gradient_is_recorded():
    weight = torch.ones(1, requires_grad=True)
    assert not epskernels.sample(lambda x, t: weight * x, TABLES["ddim"], [1], SHAPE).requires_grad


def test_progress_bar_goes_to_stderr(capsys):
    epskernels.sample(model, TABLES["ddim"], [1], SHAPE, progress=True)
    captured = capsys.readouterr()
    assert "ddim[6]" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"table": epskernels.concat([TABLES["ddim"], TABLES["ddpm"]])}, "table: expected one sampler's, got 2"),
        ({"table": TABLES["ddpm-learned"]}, "model: ddpm.*needs the learned variance"),
        ({"cond_fn": lambda x, t: x, "table": TABLES["dpmpp_2m"]}, "cond_fn: dpmpp_2m"),
        ({"seeds": [2**64]}, "seeds: expected integers of 64 bits"),
        ({"seeds": torch.zeros(2)}, "seeds: expected an int64 tensor"),
        ({"dtype": torch.float64}, "dtype: expected float32, float16 or bfloat16, got torch.float64"),
        ({"dtype": "cuda"}, "dtype: expected float32, float16 or bfloat16, got cuda"),
        (
            {"cond_fn": lambda x, t: x[:, :1], "table": TABLES["ddpm"]},
            r"cond_fn: expected a gradient of shape .*\(1, 1, 5, 3\)",
        ),
    ],
    ids=[
        "several samplers",
        "no learned variance",
        "no classifier guidance",
        "large seed",
        "float seeds",
        "dtype",
        "no dtype",
        "gradient of another shape",
    ],
)
def test_refused(kwargs, message):
    arguments = {"model": model, "table": TABLES["ddim"], "seeds": [1], "shape": SHAPE} | kwargs
    with pytest.raises(ValueError, match=message):
        epskernels.sample(**arguments)


OUTPUTS = {
    "shape": (lambda x, t: x.flatten(1), r"an output of shape \(2, 2, 5, 3\), as x has, got \(2, 30\)"),
    "twice the channels": (
        lambda x, t: torch.cat([x, x], 1)[..., :2],
        r"an output of shape \(2, 4, 5, 3\), twice the channels of x, got \(2, 4, 5, 2\)",
    ),
    "unconditional": (
        lambda x, t: (x, x[:1]),
        r"an unconditional output of shape \(2, 2, 5, 3\), as the conditional one has, got \(1, 2, 5, 3\)",
    ),
    "dtype": (
        lambda x, t: x.double(),
        r"an output of float32, float16 or bfloat16, got float64 \(2, 2, 5, 3\); a network in double is called as lambda",
    ),
    "device": (lambda x, t: x.to("meta"), "an output on cpu, as x is, got one on meta"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_of_the_model_that_does_not_fit_is_refused(case):
    """Wherever a model is called: all calls are made by `ask` and judged by `outputs`."""
    broken, message = OUTPUTS[case]
    with pytest.raises(ValueError, match=f"^model: expected {message}"):
        epskernels.sample(broken, TABLES["ddim"], [1, 2], SHAPE)
    with pytest.raises(ValueError, match=f"^model: expected {message}"):
        epskernels.exposure.measure(broken, TABLES["ddim"], torch.zeros(2, *SHAPE))
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=f"^model: expected {message}"):
        epskernels.GraphedSampler(broken, TABLES["ddim"], 2, SHAPE)([1, 2])


def test_what_a_model_raises_says_what_it_was_called_with():
    """torch says neither that x has one dtype and the network another, nor that t is a fraction."""
    double = torch.nn.Linear(3, 3, dtype=torch.float64)
    embedding = torch.nn.Embedding(1000, 3)
    karras = samplers.edm_euler(schedule.KarrasSchedule(model=LINEAR), 5, prediction="epsilon")
    for broken, table, t in ((double, TABLES["ddim"], "int64"), (embedding, karras, "float32")):
        call = (lambda x, t: double(x)) if broken is double else (lambda x, t: x * embedding(t)[:, None, None])
        with pytest.raises(RuntimeError) as caught:
            epskernels.sample(call, table, [1, 2], SHAPE)
        said = f"epskernels: the model was called with x, float32 (2, 2, 5, 3), and t, {t} (2,)"
        assert caught.value.__notes__ == [said]


OUTPUT = "model: expected it to return a tensor f, a pair .f, u., or what has f as .sample, got "
ADM = samplers.ddpm(LINEAR, 5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"table": "ddim"}, "table: expected a Table, such as samplers.ddim.schedule, steps. makes, got 'ddim'$"),
        ({"table": None}, "table: expected a Table, .*, got None$"),
        ({"table": ADM.rows}, "table: expected a Table, .*, got torch.Tensor$"),
        ({"model": None}, "model: expected a callable, got None$"),
        ({"model": "unet"}, "model: expected a callable, got 'unet'$"),
        ({"callback": 3}, "callback: expected a callable, got 3$"),
        ({"cond_fn": 3, "table": ADM}, "cond_fn: expected a callable, got 3$"),
        ({"cond_fn": lambda x, t: None, "table": ADM}, "cond_fn: expected it to return a tensor, as x, got None$"),
        ({"start": [1.0]}, "start: expected a tensor, got list of 1$"),
        ({"model": lambda x, t: None}, OUTPUT + "None$"),
        ({"model": lambda x, t: {"sample": x}}, OUTPUT + "dict$"),
        ({"model": lambda x, t: (x,)}, OUTPUT + "tuple of 1$"),
        ({"model": lambda x, t: (x, x, x)}, OUTPUT + "tuple of 3$"),
        ({"model": lambda x, t: [x, x]}, OUTPUT + "list of 2$"),
        ({"model": lambda x, t: (x, 1.0)}, OUTPUT + "tuple of 2$"),
        ({"model": lambda x, t: x.numpy()}, OUTPUT + "numpy.ndarray$"),
        ({"model": lambda x, t: torch.distributions.Normal(x, 1.0)}, OUTPUT + "torch.distributions.normal.Normal$"),
    ],
    ids=range(17),
)
def test_what_is_no_such_thing_is_refused(kwargs, message):
    arguments = {"model": model, "table": TABLES["ddim"], "seeds": [1], "shape": SHAPE} | kwargs
    with pytest.raises(TypeError, match=message):
        epskernels.sample(**arguments)


@pytest.mark.parametrize(
    "seeds, shape", [(None, SHAPE), (1, SHAPE), ([0.5], SHAPE), ([1], 4), ([1], "ab"), ([1], (4.0,))]
)
def test_seeds_and_shape_are_named(seeds, shape):
    with pytest.raises((ValueError, RuntimeError), match="seeds: expected" if shape is SHAPE else "shape: expected"):
        epskernels.sample(model, TABLES["ddim"], seeds, shape)


def test_a_model_may_return_diffusers_outputs():
    """A network of diffusers itself; and a pair of its outputs."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    table = TABLES["ddim"]
    expected = epskernels.sample(lambda x, t: unet(x, t).sample, table, [1, 2], (3, 8, 8))
    assert isinstance(unet(expected, torch.tensor([1, 1])), UNet2DOutput)
    assert torch.equal(epskernels.sample(unet, table, [1, 2], (3, 8, 8)), expected)

    guided = samplers.ddim(LINEAR, 6, guidance=3.0)
    expected = epskernels.sample(lambda x, t: (model(x, t), x), guided, [1], SHAPE)
    both = lambda x, t: (UNet2DOutput(model(x, t)), UNet2DOutput(x))  # noqa: E731
    assert torch.equal(epskernels.sample(both, guided, [1], SHAPE), expected)


def test_guided_table_without_unconditional_output_is_refused():
    with pytest.raises(RuntimeError, match="u: missing"):
        epskernels.sample(model, samplers.ddim(LINEAR, 6, guidance=3.0), [1], SHAPE)


def test_starts_from_the_state_given():
    table, start = TABLES["ddim"], torch.randn(2, *SHAPE)
    latents = table.initial_sigma * epskernels.normal([3, 4], SHAPE)
    assert torch.equal(
        epskernels.sample(model, table, [3, 4], SHAPE, start=latents), epskernels.sample(model, table, [3, 4], SHAPE)
    )
    assert not torch.equal(
        epskernels.sample(model, table, [3, 4], SHAPE, start=start), epskernels.sample(model, table, [3, 4], SHAPE)
    )
    with pytest.raises(ValueError, match=r"start: expected shape \(3, 2, 5, 3\), got \(2, 2, 5, 3\)"):
        epskernels.sample(model, table, [3, 4, 5], SHAPE, start=start)


@pytest.mark.parametrize("D", [1, 128])
def test_pfgmpp_prior(D):
    """Its radius squared over sigma_max^2*D is a beta prime variable, its direction that of the seed's Gaussian."""
    seeds, N = range(4000), 12
    x = epskernels.pfgmpp_prior(seeds, (3, 4), 80.0, D).double()
    radii = x.flatten(1).square().sum(1) / (80.0**2 * D)
    assert stats.kstest(radii.numpy(), stats.betaprime(N / 2, D / 2).cdf).pvalue > 1e-3
    z = epskernels.normal(seeds, (3, 4)).double()
    cosine = torch.nn.functional.cosine_similarity(x.flatten(1), z.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(len(seeds), dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(epskernels.pfgmpp_prior([17], (3, 4), 80.0, D)[0].double(), x[17])


def test_pfgmpp_is_edm_for_many_dimensions():
    x = epskernels.pfgmpp_prior(range(5), SHAPE, 80.0, 10**6)
    torch.testing.assert_close(x, 80.0 * epskernels.normal(range(5), SHAPE), rtol=5e-3, atol=0)
    table = samplers.pfgmpp(schedule.KarrasSchedule(), 5)
    assert torch.equal(table.rows, samplers.edm_heun(schedule.KarrasSchedule(), 5).rows)


def test_dit_is_adm_without_clamping():
    expected = samplers.ddpm(LINEAR, "50", scaling=1.003, variance="learned_range", clip=None, guidance=4.0)
    assert torch.equal(samplers.dit(50, scaling=1.003, guided_channels=0).rows, expected.rows)
    x, f, u, v = torch.randn(4, 2, 4, 3, 3)
    fhat = torch.cat([(u + 4 * (f - u))[:, :3], f[:, 3:]], dim=1)
    guided = epskernels.step(x, f, samplers.dit(50), 5, u=u, v=v, seeds=torch.arange(2))
    plain = epskernels.step(x, fhat, samplers.dit(50, guidance=1.0), 5, v=v, seeds=torch.arange(2))
    assert torch.equal(guided, plain)


# ---- from an image to its latent ----


def test_ddim_inverse_is_that_of_diffusers():
    scheduler, image = DDIMInverseScheduler(beta_schedule="linear", clip_sample=False), 0.5 * torch.randn(2, *SHAPE)
    scheduler.set_timesteps(20)
    expected = image
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, t.expand(2)), t, expected).prev_sample
    table = samplers.ddim_inverse(LINEAR, 20)
    assert table.initial_sigma == 0 and table["t"].tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(epskernels.sample(model, table, [0, 1], SHAPE, start=image), expected, rtol=0, atol=2e-6)


def test_ddim_leads_back_to_the_image():
    """To first order in the step, since each eps is that of the other end."""
    image = 0.5 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    found = []
    for steps in (100, 200, 500):
        latent = epskernels.sample(model, samplers.ddim_inverse(LINEAR, steps), [0, 1], SHAPE, start=image)
        back = epskernels.sample(model, samplers.ddim(LINEAR, steps), [0, 1], SHAPE, start=latent)
        found.append((back - image).abs().max().item() * steps)
    assert max(found) < 1.3 * min(found), found
