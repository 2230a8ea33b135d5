"""Schedules against diffusers' own, ADM's respacing by its published algorithm, and the formulas of EDM and flow."""

import diffusers
import numpy as np
import pytest

from epskernels import schedule
from epskernels.schedule import DiscreteSchedule, FlowSchedule, KarrasSchedule, karras_sigmas

# Ours, and what diffusers calls it.
BETAS = {
    "linear": (schedule.linear, {"beta_schedule": "linear"}),
    "scaled_linear": (
        schedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (schedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
}
THEIRS = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}
each_betas = pytest.mark.parametrize("betas", BETAS)
each_of_theirs = pytest.mark.parametrize("theirs", THEIRS)


# ---- DDPM betas ----


@pytest.mark.parametrize("T", [10, 400, 1000])
@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero_snr"])
@each_betas
@each_of_theirs
def test_abar_is_that_of_diffusers(theirs, betas, zero_snr, T):
    ours, settings = BETAS[betas]
    ours = ours(T).zero_terminal_snr() if zero_snr else ours(T)
    theirs = THEIRS[theirs](num_train_timesteps=T, rescale_betas_zero_snr=zero_snr, **settings)
    theirs = theirs.alphas_cumprod.double().numpy()
    assert len(ours) == T and ours.abar.shape == (T,)
    # Theirs rounds beta = 0.999 to float32, 3e-5 of what is left of 1; the shift to zero SNR cancels the last alphas.
    np.testing.assert_allclose(ours.abar, theirs, rtol=4e-5, atol=2e-6 if zero_snr else 0)
    if zero_snr:
        assert ours.abar[-1] == 0 == theirs[-1]


@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero_snr"])
@each_betas
def test_alpha_and_sigma_preserve_variance(betas, zero_snr):
    s = BETAS[betas][0]()
    s = s.zero_terminal_snr() if zero_snr else s
    np.testing.assert_allclose(s.alpha**2, np.cumprod(1 - s.betas), rtol=1e-12, atol=0)
    np.testing.assert_allclose(s.alpha**2 + s.sigma**2, 1, rtol=1e-15)
    assert (np.diff(s.alpha) < 0).all() and (np.diff(s.sigma) > 0).all()


@each_betas
def test_zero_terminal_snr_keeps_the_first_alpha_and_is_affine_in_alpha(betas):
    """Lin et al., algorithm 1: shifted so that the last is 0, scaled so that the first stays."""
    plain = BETAS[betas][0]()
    zero = plain.zero_terminal_snr()
    assert zero.alpha[-1] == 0 and zero.sigma[-1] == 1 and zero.betas[-1] == 1
    assert zero.alpha[0] == pytest.approx(plain.alpha[0], rel=1e-12)
    slope = np.diff(zero.alpha) / np.diff(plain.alpha)
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)


def test_published_ends_of_the_betas():
    assert schedule.linear().betas[[0, -1]] == pytest.approx([1e-4, 0.02], rel=1e-12)
    assert schedule.scaled_linear().betas[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-12)
    assert schedule.cosine().betas[-1] == 0.999
    assert schedule.linear(3, 0.1, 0.3).abar == pytest.approx([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7])


def test_arrays_are_read_only():
    s = schedule.from_betas([0.1, 0.2])
    for array in (s.betas, s.abar, s.alpha, s.sigma):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.5


def test_betas_given_are_copied():
    betas = np.array([0.1, 0.2])
    s = schedule.from_betas(betas)
    betas[0] = 0.9
    assert s.betas[0] == 0.1


# ---- timesteps ----

COUNTS = [1, 2, 3, 7, 10, 20, 25, 30, 35, 50, 64, 99, 100, 250, 333, 500, 999, 1000]


def timesteps_of_diffusers(theirs, count, T=1000, **settings):
    theirs = THEIRS[theirs](num_train_timesteps=T, **settings)
    theirs.set_timesteps(count)
    return theirs.timesteps.tolist()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@each_of_theirs
def test_timesteps_are_those_of_diffusers(theirs, spacing, offset, count):
    if (spacing, offset, count) == ("leading", 1, 1000):
        with pytest.raises(ValueError, match="steps: .*1000"):  # theirs would ask the model for timestep 1000 of 1000
            schedule.linear().timesteps(count, spacing, offset)
        return
    expected = timesteps_of_diffusers(theirs, count, timestep_spacing=spacing, steps_offset=offset)
    assert schedule.linear().timesteps(count, spacing, offset).tolist() == expected


@pytest.mark.parametrize("T", [1000, 400])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_of_every_count_are_those_of_diffusers(spacing, T):
    """Ties included. At some counts diffusers' "trailing" runs on to -1: count + 1 timesteps, cut off here."""
    ours, different = schedule.linear(T), {}
    for count in range(1, T + 1):
        expected = timesteps_of_diffusers("ddim", count, T, timestep_spacing=spacing)[:count]
        got = ours.timesteps(count, spacing).tolist()
        if got != expected:
            different[count] = [pair for pair in zip(got, expected, strict=True) if pair[0] != pair[1]][:2]
    assert not different, f"{len(different)} counts differ, the first {list(different.items())[:3]}"


def space_timesteps(T, section_counts):
    """guided-diffusion's respace.py, the textbook: the chosen timesteps, ascending."""
    size_per, extra = T // len(section_counts), T % len(section_counts)
    start, chosen = 0, []
    for i, count in enumerate(section_counts):
        size = size_per + (1 if i < extra else 0)
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        current = 0.0
        for _ in range(count):
            chosen.append(start + round(current))
            current += stride
        start += size
    return sorted(set(chosen))


ADM_BY_HAND = {
    # (1000 - 1)/(5 - 1) = 249.75
    ("5", 1000): [0, 250, 500, 749, 999],
    # 999/19 = 52.579
    ("20", 1000): [0, 53, 105, 158, 210, 263, 315, 368, 421, 473, 526, 578, 631, 684, 736, 789, 841, 894, 946, 999],
    ("ddim4", 1000): [0, 250, 500, 750],
    ("ddim25", 1000): list(range(0, 1000, 40)),
    ("ddim50", 1000): list(range(0, 1000, 20)),
    ("1", 1000): [0],
    # sections of 4, 3 and 3; 3/1 and 2/2
    ("2,1,3", 10): [0, 3, 4, 7, 8, 9],
    # sections of 100 each: 99/9 = 11, 11, and 99/19 = 5.2105
    ("10,10,20", 300): [
        *range(0, 100, 11), *range(100, 200, 11),
        200, 205, 210, 216, 221, 226, 231, 236, 242, 247, 252, 257, 263, 268, 273, 278, 283, 289, 294, 299,
    ],
    ("1000", 1000): list(range(1000)),
}  # fmt: skip


@pytest.mark.parametrize("steps, T", ADM_BY_HAND, ids=[f"{steps}_of_{T}" for steps, T in ADM_BY_HAND])
def test_adm_respacing_by_hand(steps, T):
    assert schedule.linear(T).timesteps(steps)[::-1].tolist() == ADM_BY_HAND[steps, T]


@pytest.mark.parametrize("steps", ["10,10,20", "10,15,20", "90,60,60,20,20", "1,1,1", "3", "334,333,333", "7,5,3,2"])
@pytest.mark.parametrize("T", [1000, 1001, 4000])
def test_adm_respacing_of_sections(T, steps):
    expected = space_timesteps(T, [int(count) for count in steps.split(",")])
    assert schedule.linear(T).timesteps(steps)[::-1].tolist() == expected


@pytest.mark.parametrize("T", [100, 1000])
def test_adm_respacing_of_every_count(T):
    s = schedule.linear(T)
    for count in range(1, T + 1):
        assert s.timesteps(str(count))[::-1].tolist() == space_timesteps(T, [count]), count


def test_timesteps_given_are_kept():
    s = schedule.linear()
    for given in ([999, 500, 0], (7,), np.array([5, 3], dtype=np.int32)):
        t = s.timesteps(given)
        assert t.dtype == np.int64 and t.tolist() == list(given)


@pytest.mark.parametrize("final", ["clean", "first"])
def test_grid_of_timesteps(final):
    s = schedule.linear()
    grid = s.grid(4, "trailing", final=final)
    assert grid.t.tolist() == [999, 749, 499, 249] and grid.discrete and grid.initial_sigma == 1
    assert (grid.alpha == s.alpha[[999, 749, 499, 249]]).all() and (grid.sigma == s.sigma[[999, 749, 499, 249]]).all()
    end = (1, 0) if final == "clean" else (s.alpha[0], s.sigma[0])
    assert (grid.alpha_next == [*grid.alpha[1:], end[0]]).all() and (grid.sigma_next == [*grid.sigma[1:], end[1]]).all()
    assert (grid.c_in == 1).all() and len(grid) == 4


# ---- EDM noise levels ----


@pytest.mark.parametrize("steps", [2, 3, 7, 18, 40, 256])
@pytest.mark.parametrize("low, high, rho", [(0.002, 80.0, 7.0), (0.03, 15.0, 3.0), (0.1, 1.0, 1.0)])
def test_karras_sigmas(steps, low, high, rho):
    got = karras_sigmas(steps, low, high, rho)
    root = [high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho)) for i in range(steps)]
    np.testing.assert_allclose(got, [r**rho for r in root], rtol=1e-12)
    assert got[[0, -1]] == pytest.approx([high, low], rel=1e-12)
    assert (np.diff(got) < 0).all()


def test_karras_sigmas_of_edm_by_hand():
    """18 steps of arXiv 2206.00364's CIFAR-10 sampler."""
    got = karras_sigmas(18)
    assert got[:3] == pytest.approx([80, 57.586, 40.786], rel=1e-4)
    assert got[-1] == pytest.approx(0.002)
    assert karras_sigmas(1).tolist() == pytest.approx([80])


def test_karras_grid_of_a_denoiser():
    grid = KarrasSchedule(0.01, 50.0, rho=5.0).grid(12)
    assert (grid.sigma == karras_sigmas(12, 0.01, 50.0, 5.0)).all()
    assert (grid.t == grid.sigma).all() and (grid.alpha == 1).all() and (grid.c_in == 1).all() and not grid.discrete
    assert grid.initial_sigma == grid.sigma[0] and grid.sigma_next[-1] == 0 and grid.alpha_next[-1] == 1


@each_betas
def test_karras_grid_of_a_network_of_timesteps(betas):
    """The timesteps told to the network are those whose noise-to-signal ratio is sigma."""
    model = BETAS[betas][0]()
    ratios = model.sigma / model.alpha
    karras = KarrasSchedule(model=model)
    grid = karras.grid(25)
    assert grid.sigma[[0, -1]] == pytest.approx([min(80, ratios[-1]), max(0.002, ratios[0])])
    whole = np.floor(grid.t).astype(int)
    above = np.minimum(whole + 1, len(model) - 1)
    log_ratio = np.log(ratios[whole]) * (1 - (grid.t - whole)) + np.log(ratios[above]) * (grid.t - whole)
    np.testing.assert_allclose(np.exp(log_ratio), grid.sigma, rtol=1e-9)
    np.testing.assert_allclose(grid.c_in, 1 / np.sqrt(1 + grid.sigma**2), rtol=1e-15)
    assert not grid.discrete
    t = np.array([900, 500, 3, 0])
    np.testing.assert_allclose(karras.grid_at(ratios[t]).t, t, atol=1e-9)
    # What the network sees, c_in*(x_0 + sigma*eps), is the training distribution of that timestep.
    at = karras.grid_at(ratios[t])
    np.testing.assert_allclose(at.c_in, model.alpha[t], rtol=1e-12)
    np.testing.assert_allclose(at.c_in * at.sigma, model.sigma[t], rtol=1e-12)


@pytest.mark.parametrize("outside", [{"sigma_max": 14.7}, {"sigma_min": 0.029}], ids=repr)
def test_noise_levels_that_the_network_has_not_seen_are_refused(outside):
    """scaled_linear's ratios lie between 0.0292 and 14.61."""
    with pytest.raises(ValueError, match=f"sigma: .*{next(iter(outside.values()))}"):
        KarrasSchedule(model=schedule.scaled_linear(), **outside)


# ---- flow ----


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 6.93])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_grid(steps, shift):
    grid = FlowSchedule(shift=shift, T=1000).grid(steps)
    s = [1 - i / steps for i in range(steps)]
    np.testing.assert_allclose(grid.sigma, [shift * v / (1 + (shift - 1) * v) for v in s], rtol=1e-12)
    np.testing.assert_allclose(grid.alpha, 1 - grid.sigma, rtol=1e-15)
    np.testing.assert_allclose(grid.t, 1000 * grid.sigma, rtol=1e-15)
    assert grid.sigma[0] == 1 == grid.initial_sigma and grid.sigma_next[-1] == 0 and grid.alpha_next[-1] == 1
    assert (np.diff(grid.sigma) < 0).all() and not grid.discrete and (grid.c_in == 1).all()


def test_flow_shift_is_an_odds_ratio():
    """sigma/(1 - sigma) is shift times what it is without: eq. 23 of arXiv 2403.03206 solved for the odds."""
    plain, shifted = FlowSchedule().grid(10).sigma[1:], FlowSchedule(shift=3).grid(10).sigma[1:]
    np.testing.assert_allclose(shifted / (1 - shifted), 3 * plain / (1 - plain), rtol=1e-12)


def test_repr_names_the_schedule():
    assert repr(schedule.linear(400)) == "DiscreteSchedule(linear, T=400)"
    assert "zero terminal SNR" in repr(schedule.cosine().zero_terminal_snr())
    assert isinstance(schedule.cosine(), DiscreteSchedule)
    assert repr(KarrasSchedule()) == "KarrasSchedule(0.002..80, rho=7.0)"
    assert repr(FlowSchedule(3.0)) == "FlowSchedule(shift=3.0, T=1000)"
