"""Datasets to batches: order, ranks, workers, resume.

Order and draws are functions of (seed, epoch, sample), and every sample carries a `key` from which the training step
draws its noise: a sample depends neither on the number of workers nor on the number of processes.
"""

import logging
import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Sampler

from ldm.config import Config, ConfigError
from ldm.data.annotations import open_index
from ldm.data.box_dataset import BoxDataset, Sample, SampleRecipe, open_captions
from ldm.data.cached import CachedDataset
from ldm.data.image_folder import ImageDataset
from ldm.data.shards import Shards
from ldm.files import UserError

logger = logging.getLogger(__name__)

Data = BoxDataset | CachedDataset | Shards | ImageDataset


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield the (epoch, index) pairs of one rank, shuffled by (seed, epoch), or in order without a seed.

    Consecutive samples go to consecutive ranks: a step of W processes with batch B holds the same samples as a step of
    one process with batch W·B. The remainder of `length` / `world_size` is left out. In the first `epoch`, `start`
    samples, of all ranks together, are skipped, for resuming.
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
        order, self.start = order[self.start :], 0
        last = len(order) // self.world_size * self.world_size
        yield from ((self.epoch, index) for index in order[self.rank : last : self.world_size].tolist())


class DataModule(pl.LightningDataModule):
    """Training and validation batches of a config, resumable in the middle of an epoch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check_source(config)
        self.data, self.seed = config.data, config.seed
        self.epoch, self.samples = 0, 0  # that a resumed run begins in, and the samples of it that were seen
        self.train_set = _split(config, "train", None)
        self.val_set = _split(config, "validation", self.data.max_val_samples)

    def train_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.train_set, self.data.batch_size, "training")

    def val_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.val_set, self.data.val_batch_size, "validation")

    def first_val_samples(self, count: int) -> list[Sample]:
        """Return the first validation samples of epoch 0."""
        data = replace(self.val_set, batch_size=count) if isinstance(self.val_set, Shards) else self.val_set
        return [data[0, i] for i in range(min(count, len(data)))]

    def _loader(self, data: Data, batch_size: int, purpose: str) -> DataLoader[Sample]:
        trains, workers = purpose == "training", self.data.num_workers
        part = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size} if self.trainer else {}
        if isinstance(data, Shards):
            data = replace(data, batch_size=batch_size, num_workers=workers, **part)
            order, start = EpochSampler(len(data), seed=None), self.samples // data.world_size
        else:
            order, start = EpochSampler(len(data), seed=self.seed if trains else None, **part), self.samples
        if trains:
            order.epoch, order.start = self.epoch, start
        if len(order) < (needed := batch_size if trains else 1):
            got = f"got {len(order)} {purpose} samples per process, expected at least {needed}"
            remedy = "; prepare more data" + " or lower data.batch_size" * trains
            raise UserError(f"{self.data.root}: {got}{remedy}")
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=order if trains else list(order),  # pyright: ignore[reportArgumentType]: pairs; a list keeps epoch 0
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=set_up_worker if workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            drop_last=trains,
        )

    def _step(self) -> int:
        """Return the number of samples in the batches of all processes together."""
        assert self.trainer is not None
        return self.data.batch_size * self.trainer.world_size

    def batches(self) -> tuple[int, int]:
        """Return how many batches an epoch has, and after how many of them a resumed run begins.

        Of the samples that were not seen whole batches remain, whatever the size of those before.
        """
        whole, left = (n // self._step() for n in (len(self.train_set), len(self.train_set) - self.samples))
        return whole, whole - left

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the checkpoint: the epoch, and the samples of it that all processes have seen."""
        assert self.trainer is not None
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]
        batch = self.trainer.fit_loop.epoch_loop.batch_progress
        seen, before = (self.samples, self.batches()[1]) if epoch == self.epoch else (0, 0)
        samples = seen + (batch.current.ready - before) * self._step()
        return {"epoch": epoch + 1, "samples": 0} if batch.is_last_batch else {"epoch": epoch, "samples": samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        step = self._step()
        # Earlier versions counted batches, of the size that they have now.
        self.epoch = state_dict.get("epoch", 0)
        self.samples = state_dict.get("samples", state_dict.get("batch", 0) * step)
        if isinstance(self.train_set, Shards):  # each worker reads its shards batch by batch
            self.samples = math.ceil(self.samples / step) * step
        whole, before = self.batches()
        if before >= whole:  # less than a batch is left
            self.epoch, self.samples = self.epoch + 1, 0


def set_up_worker(worker: int) -> None:
    """Keep OpenCV to one thread, and survive a signal to the process group: the trainer still needs its workers."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # Python also ends workers by SIGTERM: obey, later


def box_dataset(config: Config, split: str, *, max_samples: int | None = None, rebuild: bool = False) -> BoxDataset:
    """Open the images and boxes of a config; `rebuild` writes the index again."""
    index, recipe = open_index(config.data, split, rebuild=rebuild), sample_recipe(config)
    dataset = BoxDataset(index, recipe, seed=config.seed, max_samples=max_samples)
    if config.data.captions is not None:
        dataset.recipe = replace(recipe, captions=open_captions(config.data.captions, index, len(dataset)))
    return dataset


def sample_recipe(config: Config) -> SampleRecipe:
    """Return how a config makes samples of images."""
    model, hard_edges = config.model, "hole_mask" in config.model.input_channels
    recipe = SampleRecipe(model.image_size, model.exemplar_encoder.image_size, config.data, hard_edges)
    if config.data.augmentation is not None:
        _ = recipe.pipeline  # errors show here, not in a worker
    return recipe


def _split(config: Config, split: str, max_samples: int | None) -> Data:
    data, seed = config.data, config.seed
    if data.kind == "shards":
        buffer = data.shuffle_buffer if split == "train" else 0
        return Shards(data.root, split, sample_recipe(config), seed, buffer, max_samples)
    if data.kind == "images":
        return ImageDataset(config, split, max_samples)
    if data.kind == "cached":
        return CachedDataset(data.root, split, seed=seed, max_samples=max_samples)
    dataset = box_dataset(config, split, max_samples=max_samples)
    for line in dataset.index.left_out:
        rank_zero_only(logger.warning)("%s: left out: %s", split, line)
    return dataset


def _check_source(config: Config) -> None:
    """Check that the data hold what the model reads."""
    captions, kind = config.data.captions, config.data.kind
    if kind == "cached" and (config.stage == "first_stage" or "hole_mask" in config.model.input_channels):
        raise ConfigError("data.kind: got cached, expected images: the first stage and hole_mask are of pixels")
    if captions is None and config.stage == "diffusion" and config.model.condition != "exemplar":
        raise ConfigError("data.captions: got none for a model that reads text, expected classes or a CSV file")
    if captions is not None and kind in ("shards", "cached"):
        raise ConfigError(f"data.captions: got {captions} with data.kind {kind}, which holds none; use the images")
