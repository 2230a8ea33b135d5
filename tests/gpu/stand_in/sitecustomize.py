"""A stand-in for a GPU: with this folder on PYTHONPATH, every Python process takes the host for device "cuda".

    make gpu-check-dry

runs the whole of gpu-check so, that nothing trivial fails on the day when there is a GPU. A tensor "on the GPU" is one of the
host that says it is on cuda:0; the CUDA kernel is its source as host C++ (tests/support/kernels.py), the Triton kernel runs in
its interpreter, a stream does at once what it is given, an event is a time of the host's clock, and a graph repeats the
operations that it saw. torch.compile compiles nothing. Times, memory, waiting and what a compiler makes mean nothing here.
"""

import collections
import contextlib
import ctypes
import importlib.abc
import os
import sys
import threading
import time
import types

ABSENT = os.environ.get(
    "EPSKERNELS_STAND_IN_WITHOUT", ""
).split()  # modules that the machine with the GPU does not have
ROCM = "EPSKERNELS_STAND_IN_ROCM" in os.environ  # torch for AMD's GPUs, whose tensors are on "cuda" too
STREAM_LIBRARY = os.environ.get("EPSKERNELS_STAND_IN_LIBRARY")  # for libtorch_cuda.so of a torch without CUDA


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} (as on the machine with the GPU)", name=name)


if ABSENT:
    import importlib.util

    sys.meta_path.insert(0, Absent())
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name.partition(".")[0] in ABSENT else find_spec(name, package)
    )

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class OnGPU(torch.Tensor):
    """A tensor of the host that says it is on the GPU; what is computed from one is one."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class Mode(TorchFunctionMode):
    """Factories and Tensor.to with a device "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


def is_cuda(value):
    if isinstance(value, str):
        return value.partition(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def on_gpu(result):
    """The same memory, as a tensor of the GPU."""
    if isinstance(result, OnGPU):
        return result
    if result.requires_grad and result.is_leaf:
        return result.detach().as_subclass(OnGPU).requires_grad_()
    return result.as_subclass(OnGPU)


def on_host(result):
    return result.as_subclass(torch.Tensor) if isinstance(result, OnGPU) else result


def called(func, args, kwargs):
    """What a function of torch gives; moves between the devices are copies."""
    if func is torch.device:
        return func(*args, **kwargs)
    with torch._C.DisableTorchFunction():
        values = [*args, *kwargs.values()]
        given = [value for each in values for value in (each if isinstance(each, (list, tuple)) else [each])]
        there = any(isinstance(value, OnGPU) for value in given)
        if there and isinstance(func, torch._ops.OpOverload) and func.namespace == "epskernels":
            return run_kernel(func, args, kwargs, given)
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0] if there else on_gpu(args[0].clone())
        if name == "cpu":
            return on_host(args[0]).clone() if there else args[0]
        to_gpu = any(is_cuda(value) for value in values)
        args, kwargs = (tree_map_only((str, torch.device), here, part) for part in (args, kwargs))
        if name == "to":
            to_host = there and not to_gpu and names_a_device(args[1:], kwargs)
            crosses = to_host or (to_gpu and not isinstance(args[0], OnGPU))
            result = func(*args, **kwargs | {"copy": True} if crosses else kwargs)
            return on_host(result) if to_host else on_gpu(result) if to_gpu or there else result
        result = func(*args, **kwargs)
        if any(result is value for value in given):
            return result
        return tree_map_only(torch.Tensor, on_gpu, result) if there or to_gpu else result


def names_a_device(args, kwargs):
    return any(
        isinstance(value, (str, torch.device)) or type(value) is torch.Tensor for value in (*args, *kwargs.values())
    )


def here(value):
    return type(value)("cpu") if is_cuda(value) else value


def run_kernel(op, args, kwargs, given):
    """One of the package's ops: the CUDA kernel's own source, or, where gradients are wanted, the CPU kernel. On ROCm, where no
    kernel is registered for such tensors, what stands in."""
    if ROCM:
        from epskernels.ops.registration import _stand_in

        with torch._C._EnableTorchFunction(), Mode():
            return _stand_in(op.name().partition("::")[2].partition(".")[0])(*args, **kwargs)
    tensors = {id(value): on_host(value) for value in given if isinstance(value, OnGPU)}
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
    if not wants_gradient and "triton" not in op.name():
        from tests.support import kernels

        op = getattr(kernels.cuda_on_host()[1], op.name().partition("::")[2].partition(".")[0]).default
    args, kwargs = (tree_map_only(OnGPU, lambda tensor: tensors[id(tensor)], part) for part in (args, kwargs))
    back = {id(tensors[id(value)]): value for value in given if id(value) in tensors}
    return tree_map_only(torch.Tensor, lambda tensor: back.get(id(tensor), on_gpu(tensor)), op(*args, **kwargs))


# ---- streams, events and graphs ----


class Stream:
    """Does at once what it is given; busy until someone waits for it, as a real one may be."""

    def __init__(self, *_, **__):
        self.idle = False

    def query(self):
        return self.idle

    def synchronize(self):
        self.idle = True

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def wait_stream(self, stream):
        pass

    wait_event = wait_stream


class Event:
    def __init__(self, *_, **__):
        self.time = None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return max(end.time - self.time, 1e-7) * 1e3

    def query(self):
        return True

    def synchronize(self):
        pass

    def wait(self, stream=None):
        pass


class Recorder(TorchDispatchMode):
    """The operations between its begin and its end; what they wrote to memory that was there before is undone at the end, since a
    capture runs nothing."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()

    def keep(self, tensors):
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            for storage in (tensor.untyped_storage() for tensor in tensors):
                if storage.data_ptr() not in self.made | self.before.keys():
                    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.before[storage.data_ptr()] = (memory, memory.clone())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = [*zip(func._schema.arguments, args, strict=False)]
        arguments += [(argument, kwargs.get(argument.name)) for argument in func._schema.arguments[len(args) :]]
        written = [v for a, v in arguments if a.alias_info and a.alias_info.is_write and isinstance(v, torch.Tensor)]
        self.keep(written)
        given = {v.untyped_storage().data_ptr() for _, v in arguments if isinstance(v, torch.Tensor)}
        result = func(*args, **kwargs)
        results = [
            r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, torch.Tensor)
        ]
        self.made |= {r.untyped_storage().data_ptr() for r in results} - given

        def again():
            new = func(*args, **kwargs)
            for old, value in zip(results, new if isinstance(new, (tuple, list)) else [new], strict=False):
                if isinstance(value, torch.Tensor) and value.data_ptr() != old.data_ptr():
                    old.copy_(value)

        self.operations.append(again)
        return result

    def launched(self, launch, *arguments, **options):
        """A Triton kernel's launch, which does not go through torch's dispatcher."""
        self.keep([value for value in arguments if isinstance(value, torch.Tensor)])
        self.operations.append(lambda: launch(*arguments, **options))
        with _disable_current_modes():
            launch(*arguments, **options)

    def undo(self):
        for memory, content in self.before.values():
            memory.copy_(content)


class CUDAGraph:
    def __init__(self, *_, **__):
        self.recorder = Recorder()

    def replay(self):
        with torch._C.DisableTorchFunction():
            for operation in self.recorder.operations:
                operation()

    def reset(self):
        self.recorder = Recorder()

    def pool(self):
        return (0, 0)


capturing = []


@contextlib.contextmanager
def graph(cuda_graph, **_):
    capturing.append(cuda_graph.recorder)
    try:
        with cuda_graph.recorder:
            yield
    finally:
        capturing.pop()
        cuda_graph.recorder.undo()


class Triton(importlib.abc.MetaPathFinder):
    """Once the Triton backend is imported, its launches are recorded too."""

    def find_spec(self, name, path=None, target=None):
        if name != "epskernels.ops.triton_backend":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            make = module._launcher

            def launcher(kernel, device):
                launch = make(kernel, device)
                return lambda *a, **o: capturing[-1].launched(launch, *a, **o) if capturing else launch(*a, **o)

            module._launcher = launcher

        spec.loader.exec_module = exec_module
        return spec


# ---- torch.cuda ----

PROPERTIES = types.SimpleNamespace(
    name="stand-in", major=9, minor=0, multi_processor_count=132, L2_cache_size=2**7, total_memory=4 * 2**30,
    gcnArchName="gfx942:sramecc+:xnack-",
)  # fmt: skip
streams, sync_mode = [Stream()], [0]


@contextlib.contextmanager
def stream(chosen):
    streams.append(chosen)
    yield chosen
    streams.pop()


def set_sync_debug_mode(mode):
    sync_mode[0] = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


def gives(value):
    """A function of its own for each name: dynamo finds torch's functions by identity."""
    return lambda *_, **__: value


def compiled(model=None, **_):
    return compiled if model is None else model


def install():
    if ROCM:
        torch.version.cuda, torch.version.hip = None, "0.0 (stand-in)"
    elif torch.version.cuda is None:
        torch.version.cuda = "0.0 (stand-in)"
        if STREAM_LIBRARY:
            ctypes.CDLL(STREAM_LIBRARY)
    os.environ["TRITON_INTERPRET"] = "1"
    replaced = {
        "is_available": gives(True), "is_initialized": gives(True), "device_count": gives(1), "current_device": gives(0),
        "get_device_properties": gives(PROPERTIES), "get_device_name": gives(PROPERTIES.name), "_lazy_init": gives(None),
        "get_device_capability": gives((PROPERTIES.major, PROPERTIES.minor)), "device": gives(contextlib.nullcontext()),
        "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream,
        "current_stream": lambda *_: streams[-1], "synchronize": gives(None), "empty_cache": gives(None), "_sleep": gives(None),
        "memory_stats": gives(collections.Counter()), "set_device": gives(None), "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: sync_mode[0], "is_current_stream_capturing": lambda: bool(capturing),
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.device_index = gives(contextlib.nullcontext())
    torch.compile = compiled
    sys.meta_path.insert(0, Triton())
    Mode().__enter__()
    backward = torch.autograd._engine_run_backward

    def backward_in_mode(*args, **kwargs):  # the package's own backward is Python
        with torch._C._EnableTorchFunction(), Mode():
            return backward(*args, **kwargs)

    torch.autograd._engine_run_backward = backward_in_mode
    run = threading.Thread.run

    def run_in_mode(thread):
        with Mode():
            run(thread)

    threading.Thread.run = run_in_mode


install()
