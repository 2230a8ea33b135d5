"""Pictures of samples: labelled panels side by side for a file, half blocks for a terminal. Nothing here samples."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files import write_whole
from ..images import to_bytes
from ..typing import FilePath

if TYPE_CHECKING:
    from PIL import Image, ImageFont

PAPER, INK, GAP_COLOUR = 255, 32, 200  # grey levels; opaque, so that a dark page shows the same
MARGIN, GAP, FONT_SIZE, LINE = 16, 2, 15, 21  # pixels
IMAGE, WIDEST, NARROWEST = 96, 2000, 260  # of an upscaled image, of all images of a panel, of a panel: pixels


# ---- for a file ----


def draw(panels: Mapping[str, np.ndarray], captions: Sequence[str] = ()) -> "Image.Image":
    """The panels side by side, each a square grid of images under its title; the captions above all of them.

    panels: {title: images (N, C, H, W) in [-1, 1]}, C 1 or 3. Small images are upscaled by a whole factor, without smoothing.
    Text is ASCII: the font that comes with Pillow has no more.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    grids = [image_grid(images) for images in panels.values()]
    widths = [max(grid.shape[1], NARROWEST) for grid in grids]
    total = sum(widths) + MARGIN * (len(widths) + 1)
    heads = [_wrapped(caption, font, total - 2 * MARGIN) for caption in captions]
    titles = [_wrapped(title, font, width) for title, width in zip(panels, widths, strict=True)]
    top = MARGIN + LINE * sum(map(len, heads)) + (MARGIN // 2 if heads else 0)
    first = top + LINE * max(map(len, titles))
    channels = max(grid.shape[2] for grid in grids)
    page = np.full((first + max(len(grid) for grid in grids) + MARGIN, total, channels), PAPER, np.uint8)
    lefts = [MARGIN + sum(widths[:i]) + MARGIN * i for i in range(len(widths))]
    for left, grid in zip(lefts, grids, strict=True):
        page[first : first + len(grid), left : left + grid.shape[1]] = grid
    image = Image.fromarray(page.squeeze(2) if channels == 1 else page)
    pen = ImageDraw.Draw(image)
    lines = [(MARGIN, MARGIN + LINE * i, text) for i, text in enumerate(sum(heads, []))]
    for left, title in zip(lefts, titles, strict=True):
        lines += [(left, top + LINE * i, text) for i, text in enumerate(title)]
    for left, above, text in lines:
        pen.text((left, above), text, fill=INK if channels == 1 else (INK,) * 3, font=font)
    return image


def image_grid(images: np.ndarray) -> NDArray[np.uint8]:
    """(N, C, H, W) in [-1, 1] as a grid with as many columns as rows, or one more: uint8 (H', W', C)."""
    n, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    scale = max(1, min(IMAGE // max(height, width), WIDEST // (columns * width)))
    cell = height * scale + GAP, width * scale + GAP
    grid = np.full((rows * cell[0] - GAP, columns * cell[1] - GAP, channels), GAP_COLOUR, np.uint8)
    for i, image in enumerate(to_bytes(images)):
        above, left = i // columns * cell[0], i % columns * cell[1]
        enlarged = image.repeat(scale, 0).repeat(scale, 1)
        grid[above : above + height * scale, left : left + width * scale] = enlarged
    return grid


def save(image: "Image.Image", path: FilePath) -> None:
    """A .png, whole or not at all."""
    write_whole(path, lambda file: image.save(file, format="PNG", optimize=True))


def _wrapped(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> list[str]:
    """The text in lines that fit into the width, broken between words; a word that is too long stays whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# ---- for a terminal ----


def can_show(stream: IO[str] | Any) -> bool:
    """Whether the stream is a terminal with colours and half blocks, and NO_COLOR (no-color.org) does not forbid them."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb" or not stream.isatty():
        return False
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def preview(panels: Mapping[str, np.ndarray], columns: int) -> str:
    """Each panel as its title and one row of its first images, at half their size, as many as the columns have room for.

    panels: {title: images (N, 1, H, W) in [-1, 1]}, H divisible by 4, W by 2. A character is two pixels, one above the other, of
    the 24 greys of terminals with 256 colours.
    """
    lines: list[str] = []
    for title, images in panels.items():
        n, _, height, width = images.shape
        shown = to_bytes(images[: max(1, (columns + 1) // (width // 2 + 1))])
        halved = shown.reshape(len(shown), height // 2, 2, width // 2, 2).mean((2, 4))
        greys = 232 + np.rint(halved * (23 / 255)).astype(int)
        lines += [title, *_half_blocks(greys)]
    return "\n".join(lines)


def _half_blocks(greys: NDArray[np.int_]) -> Iterator[str]:
    for upper, lower in zip(greys[:, ::2].transpose(1, 0, 2), greys[:, 1::2].transpose(1, 0, 2), strict=True):
        images = (
            "".join(f"\x1b[38;5;{a};48;5;{b}m\u2580" for a, b in zip(over, under, strict=True))
            for over, under in zip(upper, lower, strict=True)
        )
        yield "\x1b[0m ".join(images) + "\x1b[0m"
