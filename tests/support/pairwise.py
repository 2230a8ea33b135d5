"""Of a product of parameters, a few combinations that hold every pair of values; the others are marked `deep`.

So are, beyond a number that a test gives, its cases for Triton's interpreter, and those on the PTX machine. Triton's on that
machine run in pairs even among the deep: each compiles a kernel.

A fault shows at one value, or where two meet: a dtype and a layout, a kernel and an input. Whatever meets in the product meets
in the cover; the rest of the product repeats it beside other values.
"""

import collections
import heapq
import itertools

import pytest

from epskernels import build

MACHINES = {"cuda_ptx", "triton_ptx"}  # kernels.py::MACHINES


def pairs(combination):
    """Every two values of a tuple, with their places."""
    return set(itertools.combinations(enumerate(combination), 2))


def cover(combinations):
    """The indices of combinations (tuples of one length) among which is every pair that any of them holds.

    The next one is always one that holds the most pairs not yet held, the first of several. What each can add only falls, so
    that one whose count still stands at the head of the heap is the best of all.
    """
    held, chosen = set(), []
    heap = [(-len(pairs(combination)), i) for i, combination in enumerate(combinations)]
    heapq.heapify(heap)
    while heap:
        counted, i = heapq.heappop(heap)
        new = pairs(combinations[i]) - held
        if counted == -len(new) < 0:
            chosen.append(i)
            held |= new
        elif new:
            heapq.heappush(heap, (-len(new), i))
    return chosen


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(config, items):
    """A test with three parametrizations or more, those of its fixtures included, runs in pairs."""
    left_out = {*_beside_pairs(items, lambda ids: "triton_ptx" in ids)}  # each compiles its own, in seconds
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]
    for item in _beside_pairs(items, lambda ids: not MACHINES.intersection(ids)):
        item.add_marker(pytest.mark.deep)
    _thin_machines(items)
    _thin_interpreted(items)


def _beside_pairs(items, of):
    """Of the products, over these ids, what is not needed for all pairs."""
    products = collections.defaultdict(list)
    for item in items:
        of_many = hasattr(item, "callspec") and len(item.callspec._idlist) > 2  # one id from each parametrization
        if of_many and of(item.callspec._idlist) and not item.get_closest_marker("deep"):
            products[item.path, item.originalname].append(item)
    for product in products.values():
        chosen = cover([item.callspec._idlist for item in product])
        yield from (product[i] for i in set(range(len(product))).difference(chosen))


def _thin_machines(items):
    """`@pytest.mark.executed(cuda=n, triton=m)`: so many of a test's cases on the PTX machine stay, spread over all of them."""
    cases = collections.defaultdict(list)
    for item in items:
        for name in set(getattr(getattr(item, "callspec", None), "_idlist", ())).intersection(MACHINES):
            cases[item.path, item.originalname, name].append(item)
    for (*_, name), found in cases.items():
        mark = found[0].get_closest_marker("executed")
        most = min(mark.kwargs.get(name.removesuffix("_ptx"), 0) if mark else 0, len(found))
        chosen = {(2 * i + 1) * len(found) // (2 * most) for i in range(most)}
        for i in set(range(len(found))).difference(chosen):
            found[i].add_marker(pytest.mark.deep)


def _thin_interpreted(items):
    """`@pytest.mark.interpreted(n)`: n of a test's cases for Triton's interpreter stay, spread over all of them."""
    if not build.interprets_triton():
        return
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and "triton" in item.callspec._idlist and item.get_closest_marker("interpreted"):
            cases[item.path, item.originalname].append(item)
    for found in cases.values():
        (most,) = found[0].get_closest_marker("interpreted").args
        chosen = {i * len(found) // most for i in range(most)}
        for i in set(range(len(found))).difference(chosen):
            found[i].add_marker(pytest.mark.deep)
