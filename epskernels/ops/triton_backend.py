"""The Triton kernels as a backend: their launches, eager and under torch.compile, and the functions of the ops."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import triton_op, wrap_triton

from ..spec import INPUTS, MOMENTS_TILE, OUTPUTS, ROW_WIDTHS, STREAM_INITIAL, band_dims_of
from .checks import (
    check_memory,
    check_moments,
    check_normal,
    check_outputs,
    check_outputs_like,
    check_step,
    check_values,
    fail,
)
from .triton_kernels import INTERPRETED, level_kernel, normal_kernel, step_kernel, tiles_kernel

Launch = Callable[..., None]  # a kernel's, with its grid and arguments


def _block_of(numel: int) -> tuple[int, int]:
    """(elements, warps) of a program, for samples of numel elements: 8 elements a thread. The bits do not depend on it."""
    if INTERPRETED.value:
        return min(max(triton.next_power_of_2(numel), 8), 65536), 1
    return (1024, 128 // _warp_size()) if numel > 512 else (256, 1)


@functools.cache
def _warp_size() -> int:
    """Threads: 64 on AMD's data-centre chips, 32 on others. Of the device that comes first; the bits do not depend on it."""
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def _batch(tensor: Tensor | None, numel: int, written: bool = False) -> tuple[Tensor | None, int]:
    """The tensor and its batch stride; one whose samples are not contiguous in themselves, as a contiguous one."""
    if tensor is None:
        return None, 0
    if not tensor.is_neg():  # its elements are what its memory holds
        if tensor.is_contiguous():
            return tensor, numel
        if tensor[0].is_contiguous():
            return tensor, tensor.stride(0)
    return (torch.empty_like if written else torch.clone)(tensor, memory_format=torch.contiguous_format), numel


def _resolved(*tensors: Any) -> list[Any]:
    """Those of which single elements are read, as their memory holds them."""
    return [tensor if tensor is None else tensor.resolve_neg() for tensor in tensors]


def _images(x: Tensor, band: int) -> tuple[int, int | None, int | None, int]:
    """(x's elements with those outside that its tiles cover, height, width, ALIGNED): see triton_kernels.py::step_kernel."""
    numel, width = x.numel(), x.shape[-1]
    height = x.shape[-2] if band == 2 else 1
    if band == 0 or (band == 1 and width % 2 == 0):
        return numel, None, None, 1
    rows = numel // (width * height) * triton.cdiv(height, band) * band
    aligned = 4 if width % 4 == 0 else 2 if width % 2 == 0 else 1
    return rows * triton.cdiv(width, 4) * 4, None if height % band == 0 else height, width, aligned


def _run_step(
    launch: Launch, written: Sequence[Tensor | None], x: Tensor, f: Tensor, rows: Tensor, index: Tensor, u: Tensor | None,
    m1: Tensor | None, m2: Tensor | None, v: Tensor | None, grad: Tensor | None, noise: Tensor | None, seeds: Tensor | None,
    y: Tensor | None, rescale: Tensor | None, threshold: Tensor | None, block: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """One call of `launch`, with the grid, the kernel's arguments and its options. written: out, m0, y_out, model_input."""
    rows, index, seeds, rescale, threshold = _resolved(rows, index, seeds, rescale, threshold)
    batch = x.shape[0]
    numel, channels = x.numel() // batch, x.shape[1] if x.dim() > 1 else 1
    outputs = [_batch(tensor, numel, written=True) for tensor in written]
    tensors = outputs + [_batch(tensor, numel) for tensor in (x, f, u, m1, m2, y, v, grad, noise)]
    channel_numel, doubled = numel // channels, written[3] is not None and written[3].shape[0] != batch
    # One sample, where nothing depends on the sample: programs are not wasted on small ones.
    guided_period = numel
    alone = seeds is None and rescale is None and threshold is None and index.dim() == 0 and not doubled
    if alone and all(stride == numel for t, stride in tensors if t is not None):
        batch, numel = 1, batch * numel
    band = band_dims_of(x.dim()) if rows.shape[1] == ROW_WIDTHS[1] else None
    lanes, height, width, aligned = _images(x, band or 0)
    size, warps = block or _block_of(lanes // batch)
    tiles = triton.cdiv(lanes // batch, size)
    launch(
        (batch * tiles,),
        *(item for pair in tensors for item in pair),
        *(item for t in (rescale, threshold, seeds) for item in (t, 0 if t is None else t.stride(0))),
        rows, rows.stride(0), rows.shape[0], index, index.stride(0) if index.dim() else 0,
        numel, guided_period, channel_numel, None if batch == 1 else tiles, x.shape[0], height, width,
        DOUBLED=doubled, BLOCK=size, BAND=band, ALIGNED=aligned, num_warps=warps,
    )  # fmt: skip
    for tensor, (result, _) in zip(written, outputs, strict=True):
        if tensor is not None and result is not None and result is not tensor:
            tensor.copy_(result)


def _run_normal(
    launch: Launch, out: Tensor, seeds: Tensor, draw: int, stream: int, block: tuple[int, int] | None = None
) -> None:
    seeds = seeds.resolve_neg()
    numel = out.numel() // seeds.shape[0]
    size, warps = block or _block_of(numel)
    tiles = triton.cdiv(numel, size)
    arguments = out, seeds, seeds.stride(0), draw, stream, numel, None if seeds.shape[0] == 1 else tiles
    launch((seeds.shape[0] * tiles,), *arguments, BLOCK=size, num_warps=warps)


def _run_moments(
    launch_tiles: Launch, launch_level: Launch, f: Tensor, u: Tensor | None, rows: Tensor | None, index: Tensor | None
) -> Tensor:
    batch, sums = f.shape[0], 2 if u is None else 4
    numel = f.numel() // batch
    tiles = triton.cdiv(numel, MOMENTS_TILE)
    resolved_rows, resolved_index = _resolved(rows, index)
    values = torch.empty(batch * sums, tiles, dtype=torch.float64, device=f.device)
    launch_tiles(
        (batch * tiles,), values, *_batch(f, numel), *_batch(u, numel),
        *((None, 0, 0) if u is None else (resolved_rows, resolved_rows.stride(0), resolved_rows.shape[0])),
        *((None, 0) if u is None else (resolved_index, resolved_index.stride(0) if resolved_index.dim() else 0)),
        numel, numel // f.shape[1] if f.dim() > 1 else 1, tiles, TILE=MOMENTS_TILE, num_warps=1,
    )  # fmt: skip
    while (count := values.shape[1]) > 1:
        padded = triton.next_power_of_2(count)
        shorter = values.new_empty(len(values), max(padded // MOMENTS_TILE, 1))
        arguments = shorter, values, count, padded, shorter.shape[1]
        launch_level((shorter.numel(),), *arguments, TILE=MOMENTS_TILE, num_warps=1)
        values = shorter
    return values.reshape(batch, sums)


def _launcher(kernel: Any, device: torch.device) -> Launch:
    if device.type == "cpu" and not INTERPRETED.value:
        fail("backend 'triton' was asked for, and the tensors are on cpu")

    def launch(grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        with torch.accelerator.device_index(device.index):
            kernel[grid](*arguments, **options, enable_fp_fusion=False)

    return launch


# ---- for torch.compile: ops whose bodies it traces, down to the kernel ----


@triton_op("epskernels::triton_step_out", mutates_args={"out", "m0", "y_out", "model_input"})
def triton_step_out_op(
    x: Tensor, f: Tensor, rows: Tensor, index: Tensor, u: Tensor | None, m1: Tensor | None, m2: Tensor | None,
    v: Tensor | None, grad: Tensor | None, noise: Tensor | None, seeds: Tensor | None, y: Tensor | None, rescale: Tensor | None,
    threshold: Tensor | None, out: Tensor, m0: Tensor | None, y_out: Tensor | None, model_input: Tensor | None,
) -> None:  # fmt: skip
    """As step_out, with `out` given."""
    inputs = (x, f, rows, index, u, m1, m2, v, grad, noise, seeds, y, rescale, threshold)
    check_step(*inputs)
    check_outputs_like(x, f, {"out": out, "m0": m0, "y_out": y_out, "model_input": model_input})

    def launch(grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        wrap_triton(step_kernel)[grid](*arguments, **options)

    _run_step(launch, (out, m0, y_out, model_input), *inputs)


@triton_op("epskernels::triton_normal", mutates_args=())
def triton_normal_op(seeds: Tensor, shape: list[int], dtype: torch.dtype, draw: int, stream: int) -> Tensor:
    """As normal."""
    check_normal(seeds, shape, dtype, draw, stream)

    def launch(grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        wrap_triton(normal_kernel)[grid](*arguments, **options)

    out = torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)
    _run_normal(launch, out, seeds, draw, stream)
    return out


# ---- the functions of the backend, by op ----


def _step(outputs: dict[str, Any], inputs: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Runs the step into `outputs`: {"out" or "x": tensor, "m0", "y_out", "model_input": tensor or None}."""
    by_name: dict[str, Any] = {**dict.fromkeys(INPUTS), **dict(zip(INPUTS, inputs, strict=False)), **named}
    x = by_name["x"]
    if is_compiling():
        torch.ops.epskernels.triton_step_out(*by_name.values(), *_made(outputs, x).values())
        return tuple(outputs.values())
    check_step(**by_name)
    check_memory(by_name)
    if os.environ.get("EPSKERNELS_CHECK_ROWS") == "1":
        check_values(by_name, outputs["y_out"] is not None)
    launch = _launcher(step_kernel, x.device)
    given = {key: tensor for key, tensor in outputs.items() if tensor is not NEW}
    check_outputs(given, by_name)
    check_memory(given)
    _run_step(launch, tuple(_made(outputs, x).values()), *by_name.values())
    return tuple(outputs.values())


NEW = object()  # an output to be made, once all inputs are known to be good


def _made(outputs: dict[str, Any], x: Tensor) -> dict[str, Any]:
    outputs |= {key: torch.empty_like(x) for key, tensor in outputs.items() if tensor is NEW}
    return outputs


def _new(*names: str) -> dict[str, Any]:
    return {**dict.fromkeys(OUTPUTS), **dict.fromkeys(names, NEW)}


def triton_step(*inputs: Tensor | None, **named: Tensor | None) -> Tensor:
    """x'."""
    return _step(_new("out"), inputs, named)[0]


def triton_step_m0(*inputs: Tensor | None, **named: Tensor | None) -> tuple[Tensor, ...]:
    """(x', m0)."""
    return _step(_new("out", "m0"), inputs, named)[:2]


def triton_step_y(*inputs: Tensor | None, **named: Tensor | None) -> tuple[Tensor, ...]:
    """(x', m0, y')."""
    return _step(_new("out", "m0", "y_out"), inputs, named)[:3]


def triton_step_out(
    *inputs: Tensor | None, out: Tensor, m0: Tensor | None = None, y_out: Tensor | None = None,
    model_input: Tensor | None = None, **named: Tensor | None,
) -> None:  # fmt: skip
    """Writes to the outputs that are given."""
    _step({"out": out, "m0": m0, "y_out": y_out, "model_input": model_input}, inputs, named)


def triton_step_(
    x: Tensor, *inputs: Tensor | None, m0: Tensor | None = None, y_out: Tensor | None = None,
    model_input: Tensor | None = None, **named: Tensor | None,
) -> None:  # fmt: skip
    """Writes x' to x, and the other outputs that are given."""
    _step({"x": x, "m0": m0, "y_out": y_out, "model_input": model_input}, (x, *inputs), named)


def triton_normal(
    seeds: Tensor, shape: list[int], dtype: torch.dtype, draw: int = 0, stream: int = STREAM_INITIAL
) -> Tensor:
    """The generator's normals, (B, *shape)."""
    if is_compiling():
        return torch.ops.epskernels.triton_normal(seeds, shape, dtype, draw, stream)
    check_normal(seeds, shape, dtype, draw, stream)
    check_memory({"seeds": seeds})
    launch = _launcher(normal_kernel, seeds.device)
    out = torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)
    _run_normal(launch, out, seeds, draw, stream)
    return out


def triton_moments(
    f: Tensor, u: Tensor | None = None, rows: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """Sums over each sample, float64 (B, 2) or (B, 4)."""
    check_moments(f, u, rows, index)
    check_memory({"f": f, "u": u, "rows": rows, "index": index})
    return _run_moments(_launcher(tiles_kernel, f.device), _launcher(level_kernel, f.device), f, u, rows, index)


TRITON: dict[str, Callable[..., Any]] = {
    "step": triton_step,
    "step_plain": triton_step,
    "step_m0": triton_step_m0,
    "step_y": triton_step_y,
    "step_out": triton_step_out,
    "step_": triton_step_,
    "normal": triton_normal,
    "moments": triton_moments,
}
