"""How the plots look, and how they are written: colours that the colour-blind tell apart, the same small file for the same
numbers.

Titles say what was found, from the numbers that are drawn. It does not choose what is drawn.
"""

import hashlib
import io
import pathlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .files import write_whole
from .typing import FilePath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKERS", "PALETTE", "figures", "finish", "largest_gap", "plain_ticks", "save_figure", "styled"]

# Okabe and Ito, "Color Universal Design", 2008; without yellow, which is too pale for lines, and black, which is for what is
# compared with. Markers tell them apart in grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
_LETTERS: dict[Any, Any] = {"svg.hashsalt": "epskernels", "svg.fonttype": "none", "font.family": "sans-serif",
                            "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"]}  # fmt: skip
# The same file for the same numbers: matplotlib puts the date into these.
_UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def figures(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.6) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, row by row, `width` x `height` inches each. Raises ImportError, saying what to install."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib", name="matplotlib") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, styled(figure.subplots(rows, columns, squeeze=False).flat)


def styled(axes: "Iterable[Axes]") -> "list[Axes]":
    """The axes with this package's colours, grid and frame."""
    from cycler import cycler

    axes = list(axes)
    for axis in axes:
        axis.set_prop_cycle(cycler(color=PALETTE))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return axes


def plain_ticks(axis: "Axes", *ways: str, spread: str = "") -> None:
    """Ticks of logarithmic axes ("x", "y") as people write them. spread: of which of them there are ticks at 2 and 5 too."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    large = EngFormatter(sep="")  # 10k, 1M

    for way in ways:
        scale = axis.xaxis if way == "x" else axis.yaxis
        if way in spread:
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(FuncFormatter(lambda value, _: large(value) if value >= 10_000 else f"{value:,.10g}"))
        scale.set_minor_formatter(NullFormatter())


def finish(axis: "Axes", size: float = 8, **options: Any) -> None:
    """After all is drawn: letters of `size` points, and a legend where there is something to name. options: of it."""
    axis.title.set_fontsize(size + 2)
    axis.tick_params(labelsize=size)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_fontsize(size + 1)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=size, frameon=False, **options)


def save_figure(figure: "Figure", path: FilePath) -> None:
    """By the path's suffix, or as .png, whole or not at all: the same bytes for the same figure.

    The letters of an .svg stay letters, which a reader can search and copy: in DejaVu Sans, whose width the layout is for, or in
    a font that is no wider.
    """
    import matplotlib

    path = pathlib.Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    kind = path.suffix[1:].lower()
    made = io.BytesIO()
    with matplotlib.rc_context(_LETTERS):
        figure.savefig(made, format=kind, metadata=_UNDATED.get(path.suffix.lower()))
    data = _smaller(made.getvalue().decode()).encode() if kind == "svg" else made.getvalue()
    write_whole(path, lambda file: file.write(data))


def _smaller(svg: str) -> str:
    """The same drawing in a quarter of the bytes: tenths of a point, each style once, nothing between and around tags."""
    styles: dict[str, str] = {}

    def short(number: re.Match[str]) -> str:
        value = float(number[0])
        return f"{value:.4g}" if value < 1000 else f"{value:.1f}"

    def tag(found: re.Match[str]) -> str:
        text = re.sub(r"\d+\.\d{2,}", short, re.sub(r"\s+", " ", found[0]))
        text = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=<g) id="(?!axes_)[^"]*"', "", text)
        text = re.sub(r"(?<=[\d\"]) ?\b([MLQCz])\b ?", r"\1", text)  # of a path
        return re.sub(
            r'style="([^"]*)"', lambda style: f'class="{styles.setdefault(style[1], f"s{len(styles)}")}"', text
        )

    svg = re.sub(r">\s*\n\s*<", "><", re.sub(r"<[a-z][^>]*>", tag, svg))
    svg = re.sub(r"<g>(<[^<>]*/>|<text[^<>]*>[^<>]*</text>)</g>", r"\1", re.sub(r"<g>(<[^<>]*/>)</g>", r"\1", svg))
    own = (
        f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}"  # a page may hold several drawings: no rule is for another's
    )
    rules = "".join(f".{own} .{name}{{{style}}}" for style, name in styles.items())
    return svg.replace("<svg ", f'<svg class="{own}" ', 1).replace("</style>", f"{rules}</style>", 1)


def largest_gap(ratio: ArrayLike, error: ArrayLike = 0.0) -> str:
    """What a title says of ratios that should be 1: the one farthest from it, of those more than two standard errors away."""
    gap = np.asarray(ratio, dtype=np.float64) - 1
    clear = np.isfinite(gap) & (np.abs(gap) > 2 * np.nan_to_num(error))
    if not np.isfinite(gap).any():
        return "not measured"
    if not clear.any():
        return "as in training"
    worst = gap[np.argmax(np.where(clear, np.abs(gap), -1))]
    much = 100 * abs(worst)
    said = f"{much:.0f}" if much >= 10 else f"{much:.2g}"
    return f"up to {said} % {'larger' if worst > 0 else 'smaller'} than in training"
