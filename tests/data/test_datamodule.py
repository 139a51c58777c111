"""The order of training samples, and data that do not suit the model."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ldm.config import ConfigError, load_config
from ldm.data.datamodule import DataModule, EpochSampler, set_up_worker
from ldm.files import UserError
from tests.data.test_annotations import masks

lengths = st.integers(1, 60)
world_sizes = st.integers(1, 5)
epochs = st.integers(0, 4)


@given(lengths, world_sizes, epochs, st.integers(0, 3))
def test_ranks_share_the_samples_of_one_order(length: int, world_size: int, epoch: int, seed: int) -> None:
    """Step for step, W ranks see what one process with a W times larger batch sees."""
    whole = list(EpochSampler(length, seed=seed, epoch=epoch))
    assert sorted(index for _, index in whole) == list(range(length))
    assert {e for e, _ in whole} == {epoch}
    ranks = [
        list(EpochSampler(length, seed=seed, rank=rank, world_size=world_size, epoch=epoch))
        for rank in range(world_size)
    ]
    assert len({len(own) for own in ranks}) == 1
    assert [pair for step in zip(*ranks, strict=True) for pair in step] == whole[: length // world_size * world_size]


@given(lengths, world_sizes, world_sizes, st.data())
def test_a_start_leaves_out_what_was_seen_by_as_many_or_other_ranks(
    length: int, before: int, after: int, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(0, length // before))
    seen = list(EpochSampler(length, seed=3, epoch=2))[: steps * before]
    ranks = [
        EpochSampler(length, seed=3, rank=rank, world_size=after, epoch=2, start=len(seen)) for rank in range(after)
    ]
    assert {len(sampler) for sampler in ranks} == {length // after}  # Lightning counts from the epoch's beginning
    rest = [pair for step in zip(*(list(sampler) for sampler in ranks), strict=True) for pair in step]
    order = list(EpochSampler(length, seed=3, epoch=2))
    assert seen + rest == order[: len(seen) + (length - len(seen)) // after * after]
    for sampler in ranks:
        sampler.set_epoch(3)
    whole = EpochSampler(length, seed=3, rank=after - 1, world_size=after, epoch=3)
    assert list(ranks[-1]) == list(whole)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {
        (seed, epoch): [index for _, index in EpochSampler(200, seed=seed, epoch=epoch)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    in_place = [np.mean(np.array(order) == np.arange(200)) for order in orders.values()]
    assert max(in_place) < 0.1


class ThreadCounts(Dataset[int]):
    """Items are OpenCV's number of threads in the worker."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return cv2.getNumThreads()


def test_workers_keep_opencv_to_one_thread() -> None:
    loader = DataLoader(ThreadCounts(), batch_size=None, num_workers=1, worker_init_fn=set_up_worker)
    assert list(loader) == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.condition=text"], r"data\.captions"),
        (["data.captions=classes", "data.kind=shards"], r"data\.captions: .*shards"),
        (["model.input_channels=[x_t,hole_mask,z_masked]", "data.kind=cached"], r"data\.kind: .*cached"),
    ],
)
def test_data_that_a_model_cannot_read(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        DataModule(load_config(overrides=overrides))


@pytest.mark.parametrize(("samples", "batches"), [(1, [1]), (3, [3]), (5, [4, 1])])
def test_validation_uses_what_is_there(samples: int, batches: list[int], tmp_path: Path) -> None:
    root = masks(tmp_path)  # 8 of its images are for validation
    more = ["data.val_batch_size=4", f"data.max_val_samples={samples}", "data.num_workers=0", "model.image_size=16"]
    module = DataModule(load_config(overrides=["data.kind=masks", f"data.root={root.root}", *more]))
    assert [len(batch["key"]) for batch in module.val_dataloader()] == batches
    module.data.batch_size = 1000
    with pytest.raises(UserError, match=r"24 training .*1000"):
        module.train_dataloader()
