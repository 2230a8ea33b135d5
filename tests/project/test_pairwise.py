import itertools
import os
import pathlib
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from ..support import pairwise


@hypothesis.given(st.data(), st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_every_pair_of_whatever_is_there_is_in_the_cover(data, sizes):
    product = list(itertools.product(*map(range, sizes)))
    some = data.draw(st.lists(st.sampled_from(product), unique=True))
    chosen = pairwise.cover(some)
    assert len(set(chosen)) == len(chosen)
    held = [pairwise.pairs(some[i]) for i in chosen]
    assert set().union(*held) == set().union(*map(pairwise.pairs, some))
    assert all(own - set().union(*held[:i]) for i, own in enumerate(held)), "one adds nothing"


@pytest.mark.parametrize(
    "sizes, count", [((3, 4), 12), ((3, 3, 3), 10), ((5, 9, 4, 3, 8), 72), ((3, 2, 2, 2, 2), 6)], ids=str
)
def test_the_cover_of_a_product_is_small(sizes, count):
    assert len(pairwise.cover(list(itertools.product(*map(range, sizes))))) == count


PRODUCTS = """
import pytest

@pytest.fixture(params="ab")
def letter(request):
    return request.param

two = pytest.mark.parametrize("x, y", [(0, 0), (0, 1), (1, 0)])
truth = pytest.mark.parametrize("true", [False, True])

@two
@truth
def test_of_two(x, y, true):
    pass

@two
@truth
def test_of_three(letter, x, y, true):
    pass

@pytest.mark.interpreted(2)
@pytest.mark.executed(cuda=1)
@pytest.mark.parametrize("kernel", ["cpu", "triton", "cuda_ptx", "triton_ptx"])
@pytest.mark.parametrize("number", range(6))
def test_of_kernels(kernel, number):
    pass

@pytest.mark.executed(cuda=1, triton=2)
@pytest.mark.parametrize("kernel", ["cuda_ptx", "triton_ptx"])
@truth
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("letter", "ab")
def test_on_the_machine(kernel, true, number, letter):
    pass
"""


@pytest.mark.parametrize(
    "expression, of_three, interpreted, cuda, of_machines",
    [
        pytest.param("not deep", 6, [0, 3], [3], {"cuda_ptx": 1, "triton_ptx": 2}, id="in pairs"),
        pytest.param(
            "", 12, [*range(6)], [*range(6)], {"cuda_ptx": 12, "triton_ptx": 6}, id="all", marks=pytest.mark.deep
        ),
    ],
)
def test_a_test_of_three_parametrizations_runs_in_pairs(tmp_path, expression, of_three, interpreted, cuda, of_machines):
    (tmp_path / "test_products.py").write_text(PRODUCTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.pairwise",
        "-o",
        "markers=deep\ninterpreted(n)\nexecuted(cuda, triton)",
        "-m",
        expression,
        "-v",
        "-c",
        "/dev/null",
    ]
    root = pathlib.Path(__file__).parents[2]
    interpreter = {**os.environ, "TRITON_INTERPRET": "1"}
    said = subprocess.run([*command, tmp_path], cwd=root, env=interpreter, capture_output=True, text=True).stdout
    assert said.count("test_of_two[") == 6 and said.count("test_of_three[") == of_three, said
    assert re.findall(r"kernels\[(\d)-cuda_ptx\] PASSED", said) == [*map(str, cuda)], said
    for name, count in of_machines.items():
        assert len(re.findall(rf"on_the_machine\[.*{name}.* PASSED", said)) == count, said
    assert said.count("-cpu] PASSED") == 6 and re.findall(r"(\d)-triton\] PASSED", said) == [*map(str, interpreted)], (
        said
    )
