"""The step's gradient, in PyTorch operations, so that it can be differentiated and compiled; the forward pass stays one kernel.

a_bar is the derivative of the loss by a. Written out by hand from reference.py::step_reference, with m0 the
clamp of p = d_x*x + d_f*fhat and T = m0_bar + c_m0*x'_bar + k_m0*y'_bar (without threshold and rescale):

    p_bar = T where -clip <= p <= clip, else 0             it passes at the bounds (torch.clamp too, up to 2.13)
    fhat_bar = d_f*p_bar + c_f*x'_bar,  f_bar = g*fhat_bar,  u_bar = (1 - g)*fhat_bar
    x_bar = c_x*x'_bar + k_x*y'_bar + d_x*p_bar

and so on. Rounding counts as the identity. A coefficient's gradient is a sum over the elements of all samples that use its row.
An idle coefficient has its term's gradient where the term's tensor is there, but for elements that are not finite, which
count as zero: uninitialised history stays harmless. `draw`, `guided_channels`, `t`, `c_in` and `c_in_next` have none.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..bands import low_band
from ..spec import BAND_COLUMNS, COLUMNS, EXP_LEAST, EXP_MOST, band_dims_of
from .reference import guided_elements


def noise_rows(rows: Tensor) -> Tensor:
    """Rows by which the step's x' is the noise that `rows` draw, for an x and an f of zeros."""
    made = torch.zeros_like(rows)
    made[:, COLUMNS.index("draw")] = rows[:, COLUMNS.index("draw")]
    made[:, COLUMNS.index("clip")] = float("inf")
    made[:, COLUMNS.index("g")] = made[:, COLUMNS.index("c_noise")] = 1.0
    return made


def step_gradients(
    wanted: Collection[str], bars_out: tuple[Tensor, Tensor | None, Tensor | None], x: Tensor, f: Tensor, rows: Tensor,
    index: Tensor, u: Tensor | None, m1: Tensor | None, m2: Tensor | None, v: Tensor | None, grad: Tensor | None,
    z: Tensor | None, y: Tensor | None, rescale: Tensor | None, threshold: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """{name: gradient, in the tensor's dtype} of those inputs of a step that `wanted` names.

    bars_out: x'_bar, m0_bar and y'_bar, as x; the last two may be None. z: the normals, given or made, or None where neither
    v nor rows is wanted. Computed in float32, or in float64 where x is.
    One function, although it is long: it follows the reference term by term, and most terms need what those before have made.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    given = {"x": x, "f": f, "rows": rows, "u": u, "m1": m1, "m2": m2, "v": v, "grad": grad, "noise": z, "y": y,
             "rescale": rescale, "threshold": threshold}  # fmt: skip
    dtypes = {name: tensor.dtype for name, tensor in given.items() if tensor is not None}
    x, f, next_bar = x.to(dtype), f.to(dtype), bars_out[0].to(dtype)
    u, m1, m2, v, grad, z, y = (t if t is None else t.to(dtype) for t in (u, m1, m2, v, grad, z, y))
    m0_bar, second_bar = (bar if bar is None else bar.to(dtype) for bar in bars_out[1:])
    each = (-1, *[1] * (x.dim() - 1))  # one number for each sample
    # By index_select, which does not wait for the device; a sample whose index is out of range is NaN already.
    which = index.reshape(-1).clamp(0, rows.shape[0] - 1)
    columns = rows.index_select(0, which).to(dtype).reshape(-1, rows.shape[1], *each[1:]).unbind(1)
    row = dict(zip(COLUMNS + BAND_COLUMNS, columns, strict=False))

    def held(tensor: Any, idle: Tensor) -> Any:
        return tensor if tensor is None else torch.where(idle & ~tensor.isfinite(), 0.0, tensor)

    # L is symmetric: what the corrected x' passes on to the row's own, and the sums behind the band's coefficients.
    band_bar: Tensor | None = None
    if "l_next" in row and (dims := band_dims_of(x.dim())):
        idle = (row["l_next"] == 0) & (row["l_m0"] == 0) & (row["l_x"] == 0)
        band_bar = held(low_band(next_bar, dims), idle)
        next_bar = next_bar + row["l_next"] * band_bar

    def through(c: str, k: str) -> Tensor:
        """The derivative by what x' has c times, and y' k times."""
        bar = row[c] * next_bar
        return bar if second_bar is None else bar + row[k] * second_bar

    output = f  # of the network, guided
    gain: Tensor | None = None  # its derivative by f
    if u is not None:
        guided = guided_elements(x, row["guided_channels"])
        unguided = (row["g"] == 1) | ~guided
        difference = torch.where(guided, held(f - u, unguided), 0.0)
        gain = torch.where(guided, row["g"], 1.0)
        # Of the same value as f where that is the output, and with a derivative by g.
        output = torch.where(unguided, f + (row["g"] - 1) * difference, u + row["g"] * difference)
    fhat = output if rescale is None else rescale.to(dtype).reshape(each) * output
    p = row["d_x"] * x + row["d_f"] * fhat
    m0 = clamped = p.clamp(-row["clip"], row["clip"])
    m0_total = through("c_m0", "k_m0")
    m0_total = m0_total if m0_bar is None else m0_bar + m0_total
    m0_total = m0_total if band_bar is None else m0_total + row["l_m0"] * band_bar
    clamped_bar = m0_total
    if threshold is not None:
        bound = threshold.to(dtype).reshape(each)
        m0 = clamped.clamp(-bound, bound) / bound
        clamped_bar = torch.where((clamped >= -bound) & (clamped <= bound), m0_total, 0.0) / bound
    p_bar = torch.where((p >= -row["clip"]) & (p <= row["clip"]), clamped_bar, 0.0)
    fhat_bar = row["d_f"] * p_bar + row["c_f"] * next_bar
    output_bar = fhat_bar if rescale is None else rescale.to(dtype).reshape(each) * fhat_bar
    z, grad = held(z, row["c_noise"] == 0), held(grad, row["c_grad"] == 0)

    s = None
    if v is not None:
        idle = (row["logvar_min"] == 0) & (row["logvar_max"] == 0)
        known = ~idle | v.isfinite()
        frac = (held(v, idle) + 1.0) * 0.5
        exponent = 0.5 * (frac * row["logvar_max"] + (1.0 - frac) * row["logvar_min"])
        s = exponent.clamp(EXP_LEAST, EXP_MOST).exp()
        s_bar = torch.zeros_like(s)
        if z is not None:
            s_bar = s_bar + row["c_noise"] * z * next_bar
        if grad is not None:
            s_bar = s_bar + row["c_grad"] * 2.0 * s * grad * next_bar
        exponent_bar = torch.where(known & (exponent >= EXP_LEAST) & (exponent <= EXP_MOST), s_bar * s, 0.0)

    bars = {}
    if "x" in wanted:
        bars["x"] = through("c_x", "k_x") + row["d_x"] * p_bar
        if band_bar is not None:
            bars["x"] = bars["x"] + row["l_x"] * band_bar
    if "f" in wanted:
        bars["f"] = output_bar if gain is None else gain * output_bar
    if "u" in wanted and gain is not None:
        bars["u"] = (1.0 - gain) * output_bar
    for name in ("m1", "m2", "y"):
        if name in wanted:
            bars[name] = through(f"c_{name}", f"k_{name}")
    if "v" in wanted:
        bars["v"] = exponent_bar * (0.25 * (row["logvar_max"] - row["logvar_min"]))
    if "grad" in wanted:
        bars["grad"] = row["c_grad"] * (next_bar if s is None else s * s * next_bar)
    if "noise" in wanted:
        bars["noise"] = row["c_noise"] * (next_bar if s is None else s * next_bar)
    if "rescale" in wanted:
        bars["rescale"] = (fhat_bar * output).sum_to_size(x.shape[0], *each[1:]).flatten()
    if "threshold" in wanted:
        bars["threshold"] = (-clamped_bar * clamped / bound).sum_to_size(x.shape[0], *each[1:]).flatten()
    if "rows" in wanted:
        terms = {
            "d_x": p_bar * x,
            "d_f": p_bar * fhat,
            "clip": torch.where(p > row["clip"], clamped_bar, torch.where(p < -row["clip"], -clamped_bar, 0.0)),
            "c_x": next_bar * x,
            "c_f": next_bar * fhat,
            "c_m0": next_bar * m0,
        }
        if u is not None:
            terms["g"] = output_bar * difference
        if grad is not None:
            terms["c_grad"] = next_bar * (grad if s is None else s * s * grad)
        if z is not None:
            terms["c_noise"] = next_bar * (z if s is None else s * z)
        if v is not None:
            terms["logvar_max"] = exponent_bar * 0.5 * frac
            terms["logvar_min"] = exponent_bar * 0.5 * (1.0 - frac)
        if second_bar is not None:
            terms |= {"k_x": second_bar * x, "k_m0": second_bar * m0}
        for name, tensor in (("m1", m1), ("m2", m2), ("y", y)):
            if tensor is not None:
                terms[f"c_{name}"] = next_bar * held(tensor, row[f"c_{name}"] == 0)
                if second_bar is not None:
                    terms[f"k_{name}"] = second_bar * held(tensor, row[f"k_{name}"] == 0)
        if band_bar is not None:
            own = row["c_x"] * x + row["c_f"] * fhat + row["c_m0"] * m0  # the row's x'
            for name, tensor in (("c_m1", m1), ("c_m2", m2), ("c_y", y), ("c_grad", grad), ("c_noise", z)):
                if tensor is not None:
                    power = 1.0 if s is None else {"c_grad": s * s, "c_noise": s}.get(name, 1.0)
                    own = own + row[name] * power * held(tensor, row[name] == 0)
            terms |= {"l_next": band_bar * own, "l_m0": band_bar * m0, "l_x": band_bar * x}
        sums = {name: term.sum_to_size(row["c_x"].shape).flatten() for name, term in terms.items()}
        none = torch.zeros_like(sums["c_x"])
        by_sample = torch.stack([sums.get(name, none) for name in row], 1)
        bars["rows"] = torch.zeros_like(rows).index_add(0, which, by_sample.to(rows.dtype))
    return {name: bar.to(dtypes[name]) for name, bar in bars.items()}
