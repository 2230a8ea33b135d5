"""diffusers' schedulers with the step in one launch and Epsilon Scaling in it: see docs/diffusers.md.

A scheduler takes the configuration of diffusers' class of its name, and two arguments more: eps_scaling, lambda in any form that
`scaling.as_scaling` takes, and correction, of x' after each step, in any form that `corrections.as_correction` takes.

The names here are those of `pipelines.py`, which is read when one of them is asked for first. So `import epskernels` costs no
import of diffusers, and yet a saved pipeline, whose files name this package, finds its scheduler: diffusers looks for it among
the modules that are imported, and imports none itself.
"""

import difflib
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipelines import *  # noqa: F403


def _pipelines() -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.pipelines")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ModuleNotFoundError(
            f"{__name__} needs diffusers: pip install 'diffusers>=0.42'", name="diffusers"
        ) from error


def __getattr__(name: str) -> Any:
    if "." in name or not name.startswith("__"):  # dunders are what tools ask of every module
        if name in _pipelines().__all__:
            return getattr(_pipelines(), name)
        schedulers = {
            each for each in dir(importlib.import_module("diffusers.schedulers")) if each.endswith("Scheduler")
        }
        if "." in name or name in schedulers:  # one without a twin, as a saved pipeline names it
            return importlib.import_module(f"{__name__}.scaled").named(name)
        near = " or ".join(difflib.get_close_matches(name, {*schedulers, *_pipelines().__all__}))
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{near and f'; did you mean {near}?'}"
            f"{name.endswith('Scheduler') and ' docs/diffusers.md lists the schedulers' or ''}"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    try:
        return sorted({*globals(), *_pipelines().__all__})
    except ImportError:  # help goes on without what an extra brings
        return sorted(globals())
