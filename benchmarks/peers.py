"""What users would pick instead, each as its users write it at its best; checked against ours before it is timed."""

import torch

from epskernels.table import COLUMNS

# ---- the same math as a stateless function, eager and under torch.compile ----


def functional_step(x, f, row, u=None, m1=None, z=None, v=None):
    """float32 inside; the row is a tensor, so that no step recompiles."""
    names = ("d_x", "d_f", "clip", "g", "c_x", "c_m0", "c_m1", "c_noise", "logvar_min", "logvar_max")
    d_x, d_f, clip, g, c_x, c_m0, c_m1, c_noise, logvar_min, logvar_max = (row[COLUMNS.index(name)] for name in names)
    dtype, x, f = x.dtype, x.float(), f.float()
    fhat = f if u is None else u.float() + g * (f - u.float())
    m0 = torch.clamp(d_x * x + d_f * fhat, -clip, clip)
    total = c_x * x + c_m0 * m0
    if m1 is not None:
        total = total + c_m1 * m1.float()
    if z is not None:
        if v is not None:
            frac = (v.float() + 1) / 2
            z = torch.exp(0.5 * (frac * logvar_max + (1 - frac) * logvar_min)) * z
        total = total + c_noise * z
    return total.to(dtype), m0.to(dtype)


def plain(x, f, row):
    return functional_step(x, f, row)[0]


def guidance(x, f, row, u):
    return functional_step(x, f, row, u=u)[0]


def history(x, f, row, m1):
    return functional_step(x, f, row, m1=m1)


def noise(x, f, row):
    return functional_step(x, f, row, z=torch.randn_like(x, dtype=torch.float32))[0]


def guidance_noise(x, f, row, u):
    return functional_step(x, f, row, u=u, z=torch.randn_like(x, dtype=torch.float32))[0]


def learned(x, f, row, v):
    return functional_step(x, f, row, z=torch.randn_like(x, dtype=torch.float32), v=v)[0]


# ---- the correction of a band, as its authors write it (arXiv 2604.16044) ----


def haar(values):
    """One level of Haar's wavelet over the last two dimensions, as a wavelet library has it: [LL, LH, HL, HH]."""
    height, width = values.shape[-2:]
    values = torch.nn.functional.pad(values, (0, width % 2, 0, height % 2))
    a, b, c, d = (values[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]


def inverse_haar(bands, like):
    low, lh, hl, hh = bands
    rows = [torch.stack([low + s * lh + t * hl + s * t * hh for t in (1, -1)], -1).flatten(-2) / 2 for s in (1, -1)]
    return torch.stack(rows, -2).flatten(-3, -2)[..., : like.shape[-2], : like.shape[-1]]


def band(x, f, row, z=None):
    """The step, the wavelets of x' and m0, their low bands moved apart, and the inverse."""
    (next_x, m0), l_next, l_m0 = functional_step(x, f, row, z=z), row[len(COLUMNS)], row[len(COLUMNS) + 1]
    of_next, of_m0 = haar(next_x.float()), haar(m0.float())
    return inverse_haar([of_next[0] * (1 + l_next) + of_m0[0] * l_m0, *of_next[1:]], x).to(x.dtype)


def band_noise(x, f, row):
    return band(x, f, row, z=torch.randn_like(x, dtype=torch.float32))


# ---- the formulas of EDM (arXiv 2206.00364, algorithm 1) and DPM-Solver++ (arXiv 2211.01095) on the denoised estimate ----


def euler(x, denoised, sigma, sigma_next):
    d = (x - denoised) / sigma
    return x + d * (sigma_next - sigma)


def heun(x, x_euler, denoised, denoised_euler, sigma, sigma_next):
    d = (x - denoised) / sigma
    d_next = (x_euler - denoised_euler) / sigma_next
    return x + (d + d_next) / 2 * (sigma_next - sigma)


def dpmpp_2m(x, denoised, denoised_before, sigma_before, sigma, sigma_next):
    t_before, t, t_next = (-s.log() for s in (sigma_before, sigma, sigma_next))
    h, r = t_next - t, (t - t_before) / (t_next - t)
    extrapolated = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * denoised_before
    return sigma_next / sigma * x - torch.expm1(-h) * extrapolated


# ---- diffusers ----


def scheduler_at(scheduler, x, f, row, steps=20):
    """A call of step() at the given step, in a loop that has come so far; it may be made again and again."""
    scheduler.set_timesteps(steps)
    state = x.clone()
    for t in scheduler.timesteps[:row]:
        scheduler.scale_model_input(state, t)  # some warn where they have not seen it
        state = scheduler.step(f, t, state, return_dict=False)[0]
    t, index = scheduler.timesteps[row], getattr(scheduler, "step_index", None)

    def step():
        if index is not None:
            scheduler._step_index = index
        return scheduler.step(f, t, x, return_dict=False)[0]

    return step
