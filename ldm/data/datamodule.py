"""Datasets to batches: order, ranks, workers, resume.

Order and randomness are functions of (seed, epoch, sample): the sampler hands (epoch, index) pairs to the
dataset, and every sample carries a `key` from which the training step draws its noise. Neither the number of
workers nor the number of processes changes what a sample looks like.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.config import Config, ConfigError
from ldm.data.cached import CachedDataset
from ldm.data.open_images import OpenImagesDataset


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) pairs of one rank, shuffled by (seed, epoch).

    Consecutive samples of the shuffled order go to consecutive ranks, so that a step of W processes
    with batch B holds the same samples as a step of one process with batch W·B.

    Args:
        length: samples in the dataset; the remainder of a division by `world_size` is left out.
        epoch: the first epoch that is run; `set_epoch` gives the later ones.
        start: samples of this rank to leave out in that first epoch, for resuming.
    """

    def __init__(
        self, length: int, *, seed: int, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0
    ) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        own = order[: len(self) * self.world_size][self.rank :: self.world_size]
        start, self.start = self.start, 0
        for index in own[start:]:
            yield self.epoch, int(index)


class KeyedDataset(Dataset[dict[str, Tensor]]):
    """Passes (epoch, index) on and adds `key`, the seed of the sample's own random draws in training."""

    def __init__(self, dataset: OpenImagesDataset | CachedDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        key = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        return {**self.dataset[epoch, index], "key": torch.tensor(int(key))}


class DataModule(pl.LightningDataModule):
    """Training and validation batches of a config, resumable in the middle of an epoch.

    Raises:
        FileNotFoundError, ValueError: the data are missing or too few; the message says what to run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.stage == "first_stage" and config.data.kind == "cached":
            raise ConfigError("data.kind: got 'cached', expected 'open_images': the first stage is trained on pixels")
        self.data, self.seed = config.data, config.seed
        self._position = {"epoch": 0, "batch": 0}  # of the next batch, where a checkpoint was loaded
        self.train_set = KeyedDataset(_dataset(config, "train", None), self.seed)
        self.val_set = KeyedDataset(_dataset(config, "validation", self.data.max_val_samples), self.seed)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        world_size, rank = self._processes()
        sampler = EpochSampler(
            len(self.train_set),
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            epoch=self._position["epoch"],
            start=self._position["batch"] * self.data.batch_size,
        )
        return self._loader(self.train_set, self.data.batch_size, sampler)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        world_size, rank = self._processes()
        share = len(self.val_set) // world_size  # equal for all ranks, who wait for each other
        return self._loader(self.val_set, self.data.val_batch_size, range(rank, share * world_size, world_size))

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(
        self, dataset: KeyedDataset, batch_size: int, sampler: EpochSampler | Sequence[int]
    ) -> DataLoader[dict[str, Tensor]]:
        if len(sampler) < batch_size:
            split = "training" if dataset is self.train_set else "validation"
            raise ValueError(
                f"{self.data.root}: got {len(dataset)} {split} samples, expected at least a batch of {batch_size} per "
                "process; prepare more data or lower data.batch_size and data.val_batch_size"
            )
        workers = self.data.num_workers
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,  # pyright: ignore[reportArgumentType]: pairs, which KeyedDataset takes
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_outlive_signals if workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )

    def state_dict(self) -> dict[str, int]:
        """Epoch and batch (of one rank) that come next after the checkpoint."""
        assert self.trainer is not None
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": epoch + 1, "batch": 0}
        return {"epoch": epoch, "batch": progress.current.ready}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = {"epoch": 0, **state_dict}


def _outlive_signals(worker: int) -> None:
    """Let a worker go on when a signal for the run reaches the whole process group: the trainer still needs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # Python also ends workers by SIGTERM: obey, later


def open_images(
    config: Config,
    split: str,
    *,
    root: str | Path | None = None,
    seed: int | None = None,
    max_samples: int | None = None,
) -> OpenImagesDataset:
    """The samples that a config asks for, from photographs and boxes; `root` and `seed` stand in for the config's."""
    data = config.data
    margins = data.context_margins
    return OpenImagesDataset(
        data.root if root is None else root,
        split,
        image_size=config.model.image_size,
        exemplar_size=config.model.exemplar_encoder.image_size,
        arbitrary_mask_percent=data.arbitrary_mask_percent,
        augment_exemplar=data.augment_exemplar,
        context_margins=(margins[0], margins[1]) if margins else None,
        seed=config.seed if seed is None else seed,
        max_samples=max_samples,
    )


def _dataset(config: Config, split: str, max_samples: int | None) -> OpenImagesDataset | CachedDataset:
    if config.data.kind == "cached":
        return CachedDataset(config.data.root, split, max_samples=max_samples)
    return open_images(config, split, max_samples=max_samples)
