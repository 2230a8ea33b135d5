"""How the plots look, and how they are written: colours that the colour-blind tell apart, the same file for the same numbers.

Titles say what was found, from the numbers that are drawn. It does not choose what is drawn.
"""

import pathlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .files import write_whole
from .typing import FilePath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKERS", "PALETTE", "figures", "finish", "largest_gap", "save_figure"]

# Okabe and Ito, "Color Universal Design", 2008; without yellow, which is too pale for lines, and black, which is for what is
# compared with. Markers tell them apart in grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
# The same file for the same numbers: matplotlib puts the date into these.
_UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def figures(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.6) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, row by row, `width` x `height` inches each. Raises ImportError, saying what to install."""
    try:
        from cycler import cycler
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib", name="matplotlib") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_prop_cycle(cycler(color=PALETTE))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish(axis: "Axes", size: float = 8) -> None:
    """After all is drawn: a legend where there is something to name; the title, and letters of `size` points."""
    axis.title.set_fontsize(size + 2)
    axis.tick_params(labelsize=size)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_fontsize(size + 1)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=size, frameon=False)


def save_figure(figure: "Figure", path: FilePath) -> None:
    """By the path's suffix, or as .png, whole or not at all: the same bytes for the same figure. Letters become outlines."""
    import matplotlib

    path = pathlib.Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    with matplotlib.rc_context({"svg.hashsalt": "epskernels", "svg.fonttype": "path"}):
        write_whole(
            path, lambda file: figure.savefig(file, format=path.suffix[1:], metadata=_UNDATED.get(path.suffix.lower()))
        )


def largest_gap(ratio: ArrayLike, error: ArrayLike = 0.0) -> str:
    """What a title says of ratios that should be 1: the one farthest from it, of those more than two standard errors away."""
    gap = np.asarray(ratio, dtype=np.float64) - 1
    clear = np.isfinite(gap) & (np.abs(gap) > 2 * np.nan_to_num(error))
    if not np.isfinite(gap).any():
        return "not measured"
    if not clear.any():
        return "as in training"
    worst = gap[np.argmax(np.where(clear, np.abs(gap), -1))]
    return f"up to {100 * abs(worst):.2g} % {'larger' if worst > 0 else 'smaller'} than in training"
