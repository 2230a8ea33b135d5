"""A round of calls for compute-sanitizer: every form of the kernels' accesses, once, on allocations without slack.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.gpu.gpu_sanitize cuda triton

History that the row leaves out is never initialised, so that initcheck sees who reads it.
"""

import itertools
import sys

import torch

import epskernels
from epskernels.spec import COLUMNS, band_dims_of

from ..ops.test_rows_on_device import wide
from ..ops.test_step_bits import assert_same_bits, make_inputs, random_rows, reference
from ..support import kernels

NAMES = ("u", "m1", "m2", "v", "grad", "seeds")
SETS = ((), ("seeds",), ("u", "m1", "seeds"), NAMES)
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))
SIZES = (1, 31, 2048, 5003)
BAND_SHAPES = ((37,), (2, 48), (2, 5, 7), (3, 6, 32), (2, 3, 3, 8))
OFFSETS = (0, 1)  # the second makes every address a misaligned one


def placed(value, offset):
    """On the GPU, `offset` elements into an allocation that ends with the tensor."""
    if not value.dtype.is_floating_point:
        return value.cuda()
    buffer = torch.zeros(value.numel() + offset, dtype=value.dtype, device="cuda")
    view = buffer[offset:].view(value.shape)
    view.copy_(value)
    return view


def check(backend, x_dtype, f_dtype, shape, names, offset, seed, by_band=False):
    batch = 3
    inputs = make_inputs((batch, *shape), names, seed, x_dtype, f_dtype)
    rows, index = random_rows(4, names, seed, idle=0), torch.tensor([1, 3, 0])
    if by_band:
        rows = wide(rows, band_dims_of(inputs["x"].dim()), seed)
    for column, key in (("c_m1", "m1"), ("c_m2", "m2")):
        if key in names:
            rows[3, COLUMNS.index(column)] = 0
    there = {key: placed(value, offset) for key, value in inputs.items()}
    for key in ("m1", "m2"):
        if key in names:  # sample 1 takes row 3, which leaves both out: its history is not even initialised
            fresh = torch.empty(inputs[key].numel() + offset, dtype=x_dtype, device="cuda")[offset:].view(batch, *shape)
            for b in (0, 2):
                fresh[b].copy_(inputs[key][b])
            there[key] = fresh
    x, f = there.pop("x"), there.pop("f")
    got = epskernels.step(x, f, rows.cuda(), index.cuda(), **there, return_m0=True, backend=backend)
    expected = reference(rows, index, inputs)
    for result, wanted, what in zip(got, expected, ("x'", "m0"), strict=True):
        assert_same_bits(result.cpu(), wanted, f"{what} of {backend}, {names}, {shape}, offset {offset}")
    if "u" in names:
        sums = kernels.overload(backend, "moments")(f, there["u"], rows.cuda(), index.cuda())
        expected = epskernels.moments(inputs["f"], inputs["u"], rows, index)
        assert_same_bits(sums.cpu(), expected, f"moments of {backend}, {shape}, offset {offset}")


def main(backends):
    calls = 0
    for backend, (x_dtype, f_dtype), names in itertools.product(backends, DTYPES, SETS):
        for size, offset in itertools.product(SIZES, OFFSETS):
            check(backend, x_dtype, f_dtype, (size,), names, offset, calls)
            calls += 1
        print(f"{calls} calls", flush=True)
        for shape, offset in itertools.product(BAND_SHAPES, OFFSETS):
            check(backend, x_dtype, f_dtype, shape, names, offset, calls, by_band=True)
            calls += 1
    for backend, dtype in itertools.product(backends, (torch.float32, torch.bfloat16)):
        check(backend, dtype, dtype, (2**19 + 3,), ("seeds",), 0, calls)
        latent = epskernels.normal([1, 2], (5003,), dtype=dtype, device="cuda", backend=backend)
        assert torch.equal(latent.cpu(), epskernels.normal([1, 2], (5003,), dtype=dtype))
        calls += 2
    torch.cuda.synchronize()
    print(f"{calls} calls, all with the bits of the reference")


if __name__ == "__main__":
    main(sys.argv[1:])
