"""Whole images with classes, from folders and archives."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.image_folder import ImageDataset, crop
from ldm.files import UserError
from tests.pixel import tiny_config, write_digits


def write_images(folder: Path, names: list[str], size: tuple[int, int] = (20, 12)) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)).save(folder / name)


def labels(dataset: ImageDataset) -> list[int]:
    return [int(dataset[0, i]["label"]) for i in range(len(dataset))]


def test_classes_are_subfolders(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/cat/1.png", "train/cat/x/2.jpg", "train/ant/1.png", "validation/cat/9.png"])
    train = ImageDataset(tiny_config(tmp_path, "model.unet.num_classes=2"), "train")
    assert train.classes == ["ant", "cat"] and labels(train) == [0, 1, 1]
    val = ImageDataset(tiny_config(tmp_path, "model.unet.num_classes=2"), "validation")
    assert labels(val) == [1]  # the number that it has in training


def test_classes_are_prefixes(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{name}_{i}.png" for name in ("dog", "bee") for i in range(3)])
    train = ImageDataset(tiny_config(tmp_path, "data.labels=prefix", "model.unet.num_classes=2"), "train")
    assert train.classes == ["bee", "dog"]


def test_the_number_of_classes_is_the_models(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/1.png", "b/1.png"])
    with pytest.raises(UserError, match="num_classes"):
        ImageDataset(tiny_config(tmp_path), "train")


def test_part_of_a_folder_is_held_out(tmp_path: Path) -> None:
    root = write_digits(tmp_path / "digits.npz", 200)
    parts = [ImageDataset(tiny_config(root), split) for split in ("train", "validation")]
    assert sum(map(len, parts)) == 200 and 1 <= len(parts[1]) <= 20
    assert parts[0].classes == parts[1].classes and len(parts[0].classes) == 10


def test_samples(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/1.png", "b/1.png", "b/2.png"])
    overrides = ("model.unet.num_classes=2", "model.unet.in_channels=3", "model.unet.out_channels=6")
    config = tiny_config(tmp_path, *overrides, "data.crop=random", "data.flip=true")
    dataset = ImageDataset(config, "train")
    sample = dataset[3, 0]
    assert sample["image"].shape == (3, 8, 8) and sample["image"].abs().max() <= 1
    assert torch.equal(sample["image"], dataset[3, 0]["image"]) and sample["key"] == dataset[3, 0]["key"]
    seen = {dataset[epoch, 0]["image"].numpy().tobytes() for epoch in range(8)}
    assert len(seen) > 1  # another crop and perhaps flip in each epoch
    validation = ImageDataset(config, "validation")
    assert torch.equal(validation[0, 0]["image"], validation[1, 0]["image"])


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/1.png", "b/1.png"])
    assert ImageDataset(tiny_config(tmp_path, "model.unet.num_classes=2"), "train")[0, 0]["image"].shape == (1, 8, 8)


def cifar(path: Path, *, binary: bool) -> np.ndarray:
    """Write an archive in CIFAR-10's format with two images in each of two training files."""
    images = np.random.default_rng(1).integers(256, size=(5, 3, 32, 32), dtype=np.uint8)
    with tarfile.open(path, "w:gz") as archive:
        for name, part in {"data_batch_1": slice(0, 2), "data_batch_2": slice(2, 4), "test_batch": slice(4, 5)}.items():
            rows = images[part].reshape(-1, 3072)
            numbers = list(range(part.start, part.stop))
            if binary:
                content = np.concatenate([np.array(numbers, np.uint8)[:, None], rows], axis=1).tobytes()
            else:
                content = pickle.dumps({b"data": rows, b"labels": numbers, b"batch_label": b"x"}, protocol=2)
            member = tarfile.TarInfo(f"cifar/{name}{'.bin' if binary else ''}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return images


@pytest.mark.parametrize("binary", [True, False])
def test_cifar_archives(tmp_path: Path, binary: bool) -> None:
    images = cifar(path := tmp_path / "cifar-10.tar.gz", binary=binary)
    rgb = ("model.unet.in_channels=3", "model.unet.out_channels=6", "model.image_size=32")
    train = ImageDataset(tiny_config(path, *rgb, "model.unet.num_classes=4"), "train")
    assert len(train) == 4 and labels(train) == [0, 1, 2, 3]
    assert torch.equal(train[0, 2]["image"], torch.from_numpy(images[2].astype(np.float32)) / 127.5 - 1)
    assert len(ImageDataset(tiny_config(path, *rgb, "model.unet.num_classes=null"), "validation")) == 1


def test_an_archive_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return print, ("run",)

    with tarfile.open(path := tmp_path / "c.tar.gz", "w:gz") as archive:
        content = pickle.dumps({b"data": Evil(), b"labels": []})
        member = tarfile.TarInfo("data_batch_1")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="not part of an array"):
        ImageDataset(tiny_config(path), "train")


@pytest.mark.parametrize("name", ["x.npz", "x.tar.gz"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=name):
        ImageDataset(tiny_config(tmp_path / name), "train")


@given(st.tuples(st.integers(1, 70), st.integers(1, 70)), st.integers(1, 24), st.randoms(use_true_random=False))
def test_crops_have_the_size(size: tuple[int, int], side: int, random: object) -> None:
    image = Image.new("RGB", size)
    assert crop(image, side).shape == (side, side, 3)
    assert crop(image, side, random.randrange).shape == (side, side, 3)  # pyright: ignore[reportAttributeAccessIssue]
