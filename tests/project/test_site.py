"""The documentation: docstrings that stand alone."""

import inspect
import re

import pytest

from epskernels import k_diffusion, samplers
from epskernels.docstrings import described

FUNCTIONS = {f"samplers.{name}": getattr(samplers, name) for name in [*samplers.SAMPLERS, "dit"]} | {
    f"k_diffusion.{name}": getattr(k_diffusion, name) for name in k_diffusion.__all__ if name.startswith("sample_")
}


# ---- docstrings ----


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_tells_every_argument(name):
    function = FUNCTIONS[name]
    entries = re.findall(r"^(\w+(?:, \w+)*): \S", function.__doc__, re.M)
    assert [one for entry in entries for one in entry.split(", ")] == list(inspect.signature(function).parameters)
    assert not re.search(rf"\bas (in|for) `?({'|'.join(samplers.SAMPLERS)})\b", function.__doc__)


def test_described():
    common = {"a": "first.", "b": "of all.", "c": "never."}

    @described(common, {"b": "of some."})
    def function(a, b, low, high, kept):
        """What it does.

        high: a bound: not
            the lowest.
        kept, low: of its own.
        Raises ValueError for c: and others.
        """

    assert function.__doc__.splitlines() == [
        "What it does.", "", "a: first.", "b: of some.", "high: a bound: not the lowest.", "kept, low: of its own.",
        "Raises ValueError for c: and others.",
    ]  # fmt: skip

    def incomplete(a, low, high, kept):
        """What it does."""

    with pytest.raises(ValueError, match="incomplete: expected a text for each argument, found none for low, kept"):
        described(common, {"high": "there."})(incomplete)

    def undocumented(anything):
        pass

    assert described(common)(undocumented).__doc__ is None  # as under python -OO
