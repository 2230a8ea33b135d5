"""The reference as a backend of every op: checked arguments, results in the layout that the other backends return."""

import torch

from ..spec import INPUTS, STREAM_INITIAL
from .checks import check_moments, check_normal, check_outputs, check_step, check_values, rows_in_use
from .reference import moments_reference, normal_reference, step_reference


def _reference(inputs, named, writes_y=False):
    """What step_reference returns, and all inputs by name."""
    inputs = dict(zip(INPUTS, inputs, strict=False)) | named
    check_step(**inputs)
    check_values(inputs, writes_y)
    return step_reference(**inputs), inputs


def _like(results, x):
    """In the layout that torch.empty_like(x) has, as every backend returns it."""
    return tuple(torch.empty_like(x).copy_(result) for result in results)


def reference_step(*inputs, **named):
    results, inputs = _reference(inputs, named)
    return _like(results[:1], inputs["x"])[0]


def reference_step_m0(*inputs, **named):
    results, inputs = _reference(inputs, named)
    return _like(results[:2], inputs["x"])


def reference_step_y(*inputs, **named):
    results, inputs = _reference(inputs, named, writes_y=True)
    return _like(results[:3], inputs["x"])


def _reference_into(outputs, inputs, named):
    results, inputs = _reference(inputs, named, writes_y=outputs["y_out"] is not None)
    check_outputs(outputs, inputs)
    for output, result in zip(outputs.values(), results, strict=True):
        if output is not None:
            for half in output.split(len(result)):
                half.copy_(result)


def reference_step_out(*inputs, out, m0=None, y_out=None, model_input=None, **named):
    _reference_into({"out": out, "m0": m0, "y_out": y_out, "model_input": model_input}, inputs, named)


def reference_step_(x, *inputs, m0=None, y_out=None, model_input=None, **named):
    _reference_into({"x": x, "m0": m0, "y_out": y_out, "model_input": model_input}, (x, *inputs), named)


def reference_normal(seeds, shape, dtype, draw=0, stream=STREAM_INITIAL):
    check_normal(seeds, shape, dtype, draw, stream)
    return normal_reference(seeds, shape, draw, stream).to(dtype).contiguous()


def reference_moments(f, u=None, rows=None, index=None):
    check_moments(f, u, rows, index)
    if u is not None and f.device.type == "cpu":
        rows_in_use(rows, index)
    return moments_reference(f, u, rows, index)


REFERENCE = {
    "step": reference_step,
    "step_plain": reference_step,
    "step_m0": reference_step_m0,
    "step_y": reference_step_y,
    "step_out": reference_step_out,
    "step_": reference_step_,
    "moments": reference_moments,
    "normal": reference_normal,
}
