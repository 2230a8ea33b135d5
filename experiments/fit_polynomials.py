"""How the polynomials of epskernels/spec.py were found, and that none could be shorter.

    python experiments/fit_polynomials.py

Each is the polynomial of its degree with the least largest relative error (Remez's exchange algorithm, in float64), its
coefficients rounded to float32. The script finds sin, cos and exp again, to the bit, and of ln the six lowest coefficients. The
two highest of ln are not found again: they differ by 1 and 4 units in the last place, as fits on coarser grids do. The error is
larger by one part in 14,000. They stay, because the bits of the noise depend on them.
"""

import math
import pathlib
import runpy

import numpy as np

SPEC = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "epskernels" / "spec.py"))
# By polynomial: the function, the interval, and the powers whose coefficients are 1 and are not fitted.
# cos and sin are even and odd: half of their interval tells all.
FUNCTIONS = {
    "LOG": (np.log1p, math.sqrt(0.5) - 1, math.sqrt(2) - 1, ()),
    "SIN": (np.sin, 0.0, math.pi / 4, (1,)),
    "COS": (np.cos, 0.0, math.pi / 4, (0,)),
    "EXP": (np.exp, -math.log(2) / 2, math.log(2) / 2, (0,)),
}
GRID = 100_001


def grid(low, high):
    """Points of the interval, closer at its ends, without 0, where the relative error of ln and sin is 0/0."""
    points = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(GRID) / (GRID - 1))
    return points[np.abs(points) > 1e-7]


def relative_error(name, coefficients):
    """The largest one over the interval, of the exact sum with these coefficients by power."""
    function, low, high, _ = FUNCTIONS[name]
    x = grid(low, high)
    return np.abs(sum(c * x**power for power, c in coefficients.items()) / function(x) - 1).max()


def fit(name, powers, fixed=()):
    """{power: coefficient} with the least largest relative error; those of the powers in `fixed` are 1. Float64.

    The error is made to have one size, and signs that alternate, at one point more than there are coefficients. These points then
    move to where the error is largest, until it is larger nowhere. Where the term of the lowest free power changes its sign, as
    x/exp(x) does, the error is taken times that sign: only then does the best one's alternate.
    """
    function, low, high, _ = FUNCTIONS[name]
    x = grid(low, high)
    free = [power for power in powers if power not in fixed]
    sign = np.sign(x ** min(free) / function(x))
    columns = np.stack([sign * x**power / function(x) for power in free], axis=1)
    target = sign * (1 - sum(x**power for power in fixed) / function(x))
    alternating = (-1.0) ** np.arange(len(free) + 1)
    chosen = np.linspace(0, len(x) - 1, len(free) + 1).round().astype(int)
    for _ in range(50):
        *coefficients, level = np.linalg.solve(np.column_stack([columns[chosen], alternating]), target[chosen])
        error = target - columns @ coefficients
        if np.abs(error).max() <= abs(level) * (1 + 1e-6):
            return dict(zip(free, coefficients, strict=True)) | dict.fromkeys(fixed, 1.0)
        runs = np.split(np.arange(len(x)), np.flatnonzero(np.diff(np.sign(error))) + 1)
        chosen = np.array([run[np.abs(error[run]).argmax()] for run in runs])
        while len(chosen) > len(free) + 1:  # an end that is one too many
            chosen = chosen[1:] if abs(error[chosen[0]]) < abs(error[chosen[-1]]) else chosen[:-1]
    raise RuntimeError(f"{name}: the exchange of {free} did not end")


def compare(name):
    """A polynomial's largest relative error; the best one's; the best one's of a coefficient less, where none is fixed; and by
    power, how many units in float32's last place lie between its coefficient and the best one's, rounded."""
    used = SPEC["POLYNOMIALS"][name]
    best = fit(name, used, FUNCTIONS[name][3])
    shorter = fit(name, sorted(used)[:-1])
    units = {p: (float(np.float32(best[p])) - c) / float(np.spacing(np.float32(abs(c)))) for p, c in used.items()}
    return {
        "error": relative_error(name, used),
        "best": relative_error(name, best),
        "shorter": relative_error(name, shorter),
        "units": units,
    }


if __name__ == "__main__":
    print("largest relative error, log2   in use    best   one coefficient less")
    for name in FUNCTIONS:
        result = compare(name)
        errors = [math.log2(result[key]) for key in ("error", "best", "shorter")]
        others = {power: round(units) for power, units in result["units"].items() if units}
        print("{:<28} {:>8.2f} {:>7.2f} {:>22.2f}".format(name, *errors), f"  differs by {others}" if others else "")
