"""Datasets to batches: order, ranks, workers, resume.

Order and randomness are functions of (seed, epoch, sample): the sampler hands (epoch, index) pairs to the dataset, and
every sample carries a `key` from which the training step draws its noise. A sample therefore depends neither on the
number of workers nor on the number of processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.config import Config, ConfigError
from ldm.data.annotations import AnnotationSource, open_index
from ldm.data.box_dataset import BoxDataset, Sample, SampleRecipe, open_captions, sample_key
from ldm.data.cached import CachedDataset
from ldm.data.shards import ShardPart, Shards
from ldm.files import UserError


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield the (epoch, index) pairs of one rank, shuffled by (seed, epoch).

    Consecutive samples of the shuffled order go to consecutive ranks: a step of W processes with batch B holds the same
    samples as a step of one process with batch W·B.

    Args:
        length: number of samples in the dataset; the remainder of a division by `world_size` is left out.
        seed: None keeps the order, for a dataset that shuffles itself.
        epoch: the first epoch; `set_epoch` sets the later ones.
        start: number of samples of this rank to skip in the first epoch, for resuming.
    """

    def __init__(
        self, length: int, *, seed: int | None, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0
    ) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        own = order[: len(self) * self.world_size][self.rank :: self.world_size]
        start, self.start = self.start, 0
        for index in own[start:]:
            yield self.epoch, int(index)


class KeyedDataset(Dataset[Sample]):
    """Add `key` to the samples of a dataset: the seed of the sample's own draws in training."""

    def __init__(self, dataset: BoxDataset | CachedDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def first(self, count: int) -> list[Sample]:
        """Return the first samples of epoch 0."""
        return [self[i] for i in range(min(count, len(self)))]

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        return {**self.dataset[epoch, index], "key": sample_key([self.seed, epoch, index])}


class DataModule(pl.LightningDataModule):
    """Training and validation batches of a config, resumable in the middle of an epoch.

    Raises:
        UserError: the data are missing or too few, or do not suit the model.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check_source(config)
        self.data, self.seed = config.data, config.seed
        self._position = {"epoch": 0, "batch": 0}  # of the next batch, if a checkpoint was loaded
        self.train_set = _split(config, "train", None)
        self.val_set = _split(config, "validation", self.data.max_val_samples)

    def train_dataloader(self) -> DataLoader[Sample]:
        world_size, rank = self._processes()
        position, batch_size = self._position, self.data.batch_size
        start = {"epoch": position["epoch"], "start": position["batch"] * batch_size}
        if isinstance(self.train_set, Shards):
            part = self._part(self.train_set, batch_size)
            return self._loader(part, batch_size, EpochSampler(len(part), seed=None, **start))
        sampler = EpochSampler(len(self.train_set), seed=self.seed, rank=rank, world_size=world_size, **start)
        return self._loader(self.train_set, batch_size, sampler)

    def val_dataloader(self) -> DataLoader[Sample]:
        world_size, rank = self._processes()
        if isinstance(self.val_set, Shards):
            part = self._part(self.val_set, self.data.val_batch_size)
            return self._loader(part, self.data.val_batch_size, [(0, place) for place in range(len(part))])
        share = len(self.val_set) // world_size  # equal for all ranks, who wait for each other
        return self._loader(self.val_set, self.data.val_batch_size, range(rank, share * world_size, world_size))

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _part(self, shards: Shards, batch_size: int) -> ShardPart:
        world_size, rank = self._processes()
        workers = self.data.num_workers
        return ShardPart(shards, batch_size=batch_size, num_workers=workers, rank=rank, world_size=world_size)

    def _loader(
        self,
        dataset: KeyedDataset | ShardPart,
        batch_size: int,
        sampler: EpochSampler | Sequence[int] | Sequence[tuple[int, int]],
    ) -> DataLoader[Sample]:
        if len(sampler) < batch_size:
            split = "training" if isinstance(sampler, EpochSampler) else "validation"
            raise UserError(
                f"{self.data.root}: got {len(sampler)} {split} samples for each process, expected at least a batch of "
                f"{batch_size}; prepare more data or lower data.batch_size and data.val_batch_size"
            )
        workers = self.data.num_workers
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,  # pyright: ignore[reportArgumentType]: pairs, which the datasets take
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=set_up_worker if workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the batch (of one rank) that follow the checkpoint."""
        assert self.trainer is not None
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": epoch + 1, "batch": 0}
        return {"epoch": epoch, "batch": progress.current.ready}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = {"epoch": 0, **state_dict}


def set_up_worker(worker: int) -> None:
    """Keep OpenCV to one thread, and survive a signal to the process group: the trainer still needs its workers."""
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # Python also ends workers by SIGTERM: obey, later


def annotation_source(config: Config) -> tuple[AnnotationSource, Path | None]:
    """Return where the annotations of a config are, and the folder for their index, if the config names one."""
    data = config.data
    annotations, validation, index = (
        None if path is None else Path(path) for path in (data.annotations, data.val_annotations, data.index)
    )
    return AnnotationSource(Path(data.root), annotations, validation), index


def box_dataset(config: Config, split: str, *, max_samples: int | None = None) -> BoxDataset:
    """Open the images and boxes of a config.

    Raises:
        UserError: the annotations or captions cannot be used.
    """
    data = config.data
    source, folder = annotation_source(config)
    index = open_index(data.kind, source, split, folder)
    recipe, count = sample_recipe(config), len(index) if max_samples is None else min(len(index), max_samples)
    if data.captions is not None:
        recipe = replace(recipe, captions=open_captions(data.captions, index, count))
    return BoxDataset(index, index.metadata["images"], recipe, seed=config.seed, max_samples=max_samples)


def sample_recipe(config: Config) -> SampleRecipe:
    """Return how a config makes samples of images.

    Raises:
        ConfigError: `data.augmentation` is not a pipeline that can be used.
    """
    data, margins = config.data, config.data.crop_margin_range
    recipe = SampleRecipe(
        image_size=config.model.image_size,
        exemplar_size=config.model.exemplar_encoder.image_size,
        p_arbitrary_mask=data.p_arbitrary_mask,
        p_object_mask=data.p_object_mask,
        augment_exemplar=data.augment_exemplar,
        augmentation_strength=data.augmentation_strength,
        augmentation=data.augmentation,
        grey_background=data.grey_background,
        crop_margin_range=(margins[0], margins[1]) if margins else None,
        hard_edges="hole_mask" in config.model.input_channels,
    )
    if data.augmentation is not None:
        _ = recipe.pipeline  # errors show here, not in a worker
    return recipe


def _split(config: Config, split: str, max_samples: int | None) -> KeyedDataset | Shards:
    data, seed = config.data, config.seed
    if data.kind == "shards":
        recipe, buffer = sample_recipe(config), data.shuffle_buffer if split == "train" else 0
        return Shards(data.root, split, recipe, seed=seed, buffer=buffer, max_samples=max_samples)
    if data.kind == "cached":
        return KeyedDataset(CachedDataset(data.root, split, max_samples=max_samples), seed)
    return KeyedDataset(box_dataset(config, split, max_samples=max_samples), seed)


def _check_source(config: Config) -> None:
    """Check that the data hold what the model reads."""
    captions, kind = config.data.captions, config.data.kind
    if kind == "cached" and config.stage == "first_stage":
        raise ConfigError("data.kind: got cached, expected images and boxes: the first stage is trained on pixels")
    if kind == "cached" and "hole_mask" in config.model.input_channels:
        raise ConfigError("data.kind: got cached, whose masks are for keep_mask in model.input_channels, not hole_mask")
    if config.stage == "diffusion" and config.model.condition != "exemplar" and captions is None:
        raise ConfigError("data.captions: got none for a model that reads text, expected classes or a CSV file")
    if captions is not None and kind in ("shards", "cached"):
        raise ConfigError(
            f"data.captions: got {captions!r} with data.kind {kind}, which holds none; use the images themselves"
        )
