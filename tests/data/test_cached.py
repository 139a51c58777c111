"""Cached latents: what is written is read back; damage is told in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ldm.data.box_dataset import sample_key
from ldm.data.cached import CachedDataset
from ldm.files import UserError
from ldm.images import exemplar_to_pixels
from scripts.cache_latents import write_cache


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image_moments": rng.standard_normal((5, 8, 4, 4)).astype(np.float16),
        "masked_moments": rng.standard_normal((5, 8, 4, 4)).astype(np.float16),
        "keep_mask": rng.integers(0, 256, (5, 1, 4, 4), dtype=np.uint8),
        "exemplar": rng.integers(0, 256, (5, 14, 14, 3), dtype=np.uint8),
    }


@pytest.fixture
def cache(arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    batches = [{name: array[i : i + 2] for name, array in arrays.items()} for i in range(0, 5, 2)]
    write_cache(tmp_path / "train.safetensors", 5, batches)
    return tmp_path


def test_round_trip(cache: Path, arrays: dict[str, np.ndarray]) -> None:
    assert [path.name for path in cache.iterdir()] == ["train.safetensors"]
    dataset = CachedDataset(cache, "train")
    assert len(dataset) == 5
    for index in range(5):
        sample = dataset[3, index]
        assert sample.pop("key") == sample_key([0, 3, index]) != dataset[0, index]["key"]
        assert {name: tuple(x.shape) for name, x in sample.items()} == {
            "image_moments": (8, 4, 4),
            "masked_moments": (8, 4, 4),
            "keep_mask": (1, 4, 4),
            "exemplar": (3, 14, 14),
        }
        assert {x.dtype for x in sample.values()} == {torch.float32}
        for name in ("image_moments", "masked_moments"):
            np.testing.assert_array_equal(sample[name], arrays[name][index].astype(np.float32))
        np.testing.assert_array_equal((sample["keep_mask"] * 255).round(), arrays["keep_mask"][index])
        pixels = (exemplar_to_pixels(sample["exemplar"][None])[0] + 1) * 127.5
        np.testing.assert_array_equal(pixels.round().permute(1, 2, 0), arrays["exemplar"][index])


def test_the_file_is_ordinary_safetensors(cache: Path, arrays: dict[str, np.ndarray]) -> None:
    stored = load_file(cache / "train.safetensors")
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name], array)


def test_features_of_exemplars(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    features = np.linspace(-3, 3, 5 * 2 * 6).reshape(5, 2, 6).astype(np.float16)
    write_cache(tmp_path / "train.safetensors", 5, [{**arrays, "exemplar_features": features}])
    sample = CachedDataset(tmp_path, "train")[0, 3]
    assert sample["exemplar_features"].dtype == torch.float32
    np.testing.assert_array_equal(sample["exemplar_features"], features[3].astype(np.float32))


def test_fewer_samples(cache: Path) -> None:
    assert len(CachedDataset(cache, "train", max_samples=3)) == 3
    assert len(CachedDataset(cache, "train", max_samples=30)) == 5


def test_missing_split(cache: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.safetensors: No such file or directory; .*cache_latents\.py"):
        CachedDataset(cache, "validation")


def test_truncated_file(cache: Path) -> None:
    path = cache / "train.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train\.safetensors.*scripts/cache_latents\.py"):
        CachedDataset(cache, "train")


def test_missing_array(cache: Path, arrays: dict[str, np.ndarray]) -> None:
    del arrays["keep_mask"]
    save_file(arrays, cache / "train.safetensors")
    with pytest.raises(UserError, match="keep_mask"):
        CachedDataset(cache, "train")


def test_arrays_of_different_lengths(cache: Path, arrays: dict[str, np.ndarray]) -> None:
    save_file({**arrays, "keep_mask": arrays["keep_mask"][:4]}, cache / "train.safetensors")
    with pytest.raises(UserError, match=r"\[4, 5\] samples"):
        CachedDataset(cache, "train")


def test_too_few_batches_leave_no_file(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_cache(tmp_path / "train.safetensors", 6, [arrays])
    assert not list(tmp_path.iterdir())
