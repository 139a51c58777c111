"""Whole images with class labels, for models in pixel space: folders, CIFAR-10's archives, `.npz` batches.

Dimensions: N images · S side of a sample in pixels · C channels.
"""

import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.config import Config
from ldm.data.box_dataset import Sample, sample_key
from ldm.files import UserError
from ldm.images import find_images, open_image

HELD_OUT = 50  # where a folder has no validation part, about one image of so many is held out
SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}  # names of sub-folders
ARRAY_MAKERS = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")
Source = Path | np.ndarray


class ImageDataset(Dataset[Sample]):
    """Images of a config's `data.root`, by (epoch, index): `image` (C, S, S) in [-1, 1], `label` () int64, `key`.

    Validation is never flipped or cropped at random. `classes` are the names of the labels, in alphabetical order,
    those of the training part. UserError if there is no image, if one is damaged, or if the model has another number
    of classes.
    """

    def __init__(self, config: Config, split: str, max_samples: int | None = None) -> None:
        self.data, self.seed, self.size = config.data, config.seed, config.model.image_size
        model = config.model
        self.grey = model.unet.in_channels // len(model.input_channels) == 1
        self.trains = split == "train"
        self.sources, names, self.classes = _open(Path(self.data.root), split, self.data.labels)
        if unknown := set(names) - set(self.classes):
            raise UserError(f"{self.data.root}: {split} has a class that training has not: {min(unknown)}")
        self.labels = [self.classes.index(name) for name in names]
        part = "classifier" if model.kind == "classifier" else "unet"
        if (wanted := getattr(model, part).num_classes) not in (None, len(self.classes)):
            found = f"{len(self.classes)} classes ({', '.join(self.classes[:5])} …)"
            raise UserError(f"{self.data.root}: {found}, but model.{part}.num_classes is {wanted}")
        self.length = min(len(self.sources), max_samples or len(self.sources))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        source, draw = self.sources[item[1]], [self.seed, *item]
        rng = np.random.default_rng(draw)
        image = open_image(source) if isinstance(source, Path) else Image.fromarray(source.squeeze())
        image = image.convert("L" if self.grey else "RGB")
        randomly = self.trains and self.data.crop == "random"
        pixels = crop(image, self.size, (lambda n: int(rng.integers(n))) if randomly else None)
        if self.trains and self.data.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        levels = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).reshape(self.size, self.size, -1)
        label = torch.tensor(self.labels[item[1]])
        return {"image": levels.permute(2, 0, 1).contiguous(), "label": label, "key": sample_key(draw)}


def crop(image: Image.Image, size: int, draw: Callable[[int], int] | None = None) -> np.ndarray:
    """Reduce an image to a square of `size`, (S, S) or (S, S, 3) uint8: its centre, or drawn by `draw(n)` below n.

    Halved by averaging while it is twice too large, then resized bicubically until its smaller side is the square's;
    for drawn crops that side is up to 1 / 0.8 longer.

    Source: Dhariwal & Nichol 2021, published code.
    """
    side = size if draw is None else size + draw(math.ceil(size / 0.8) - size + 1)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    spare = image.height - size, image.width - size
    top, left = (n // 2 for n in spare) if draw is None else (draw(n + 1) for n in spare)
    return np.asarray(image)[top : top + size, left : left + size]


def _open(root: Path, split: str, labels: str) -> tuple[Sequence[Source], list[str], list[str]]:
    """Return images, the names of their classes, and all classes: files of a folder, or pixels of an archive."""
    if root.suffixes[-2:] == [".tar", ".gz"] and root.is_file():
        images, names = _read_cifar(root, split)
        return images, names, sorted(set(names))
    folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if root.suffix == ".npz":
        images, labelled = read_batch(root)
        sources = list(images)
        names = [f"{number:04}" for number in (np.zeros(len(images), int) if labelled is None else labelled).tolist()]
    else:
        place = folder or root
        sources = find_images(place)
        names = [path.relative_to(place).parts[0] if path.parent != place else "" for path in sources]
        if labels == "prefix":  # NAME_…: the class is what stands before the first underscore
            names = [path.name.split("_")[0] for path in sources]
    if folder:
        classes = sorted(set(names)) if split == "train" else _open(root, "train", labels)[2]
        return sources, names, classes
    # The same images are held out wherever the data lie, the first one in any case.
    held = [i == 0 or zlib.crc32(f"{i}".encode()) % HELD_OUT == 0 for i in range(len(names))]
    chosen = [i for i, out in enumerate(held) if out == (split != "train")]
    return [sources[i] for i in chosen], [names[i] for i in chosen], sorted(set(names))


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a batch of images: `arr_0` (N, H, W, C) uint8 and, if there is one, `arr_1` (N,) labels."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["arr_0"], arrays.get("arr_1")
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path}: no batch of images with arr_0: {error}") from None


class _Arrays(pickle.Unpickler):
    """Reads CIFAR-10's dictionaries of arrays, and calls nothing but what makes arrays."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # as before NumPy 2
        if f"{module}.{name}" in ARRAY_MAKERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


def _read_cifar(path: Path, split: str) -> tuple[Sequence[Source], list[str]]:
    """Read CIFAR-10's archive for Python or of binary files."""
    images, labels, begins = [], [], "data_batch" if split == "train" else "test_batch"
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda m: m.name):
                if not Path(member.name).name.startswith(begins):
                    continue
                content = archive.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                if member.name.endswith(".bin"):  # a byte for the label, then the pixels
                    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                    numbers, rows = rows[:, 0].tolist(), rows[:, 1:]
                else:
                    batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
                    numbers, rows = batch[b"labels"], batch[b"data"]
                images += list(np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))
                labels += numbers
    except (tarfile.TarError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not CIFAR-10's archive: {error}") from None
    if not images:
        raise UserError(f"{path}: holds no {begins}*; pass cifar-10-python.tar.gz or cifar-10-binary.tar.gz")
    return images, [f"{number:04}" for number in labels]
