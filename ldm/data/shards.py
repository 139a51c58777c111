"""Samples of images and boxes that `scripts/make_shards.py` packed into WebDataset tars.

A shard holds, per image, `NUMBER.json` with its size, boxes and outlines, the image file, and `NUMBER.mask.png` if it
has a mask; NUMBER is the image's place in the index. WebDataset's own shuffling cannot be resumed in mid-epoch bit for
bit, so the order is made here.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import BinaryIO

import numpy as np
from torch.utils.data import Dataset

from ldm.data.box_dataset import MAX_ATTEMPTS, Sample, SampleRecipe, sample_key
from ldm.data.box_index import Entry
from ldm.files import UserError
from ldm.images import UNREADABLE, Box

logger = logging.getLogger(__name__)

Members = dict[str, bytes]  # content by extension


def _unpacked(members: Members) -> tuple[Entry, Callable[[str], BinaryIO]]:
    """Return the entry of an image, and a function that opens its files by their names in it."""
    record = json.loads(members["json"])
    mask = next((name for name in members if name.startswith("mask.")), "")
    image = next(name for name in members if name not in ("json", mask))
    shapes = [[np.array(outline, dtype=np.float32) for outline in outlines] for outlines in record["shapes"]]
    boxes, orientation = [Box(*corners) for corners in record["boxes"]], record.get("orientation", 1)
    entry = Entry(image, tuple(record["size"]), boxes, shapes, mask, orientation=orientation)
    return entry, lambda name: io.BytesIO(members[name])


@dataclass(eq=False)
class Shards(Dataset[Sample]):
    """Samples of shards by (epoch, place in the epoch), with their `key`: the part of one process.

    Every process takes the same number of samples per epoch: a worker that runs out of images starts its shards again.
    A `DataLoader` requests places in order, batch by batch, from its workers in turn: each worker then reads a stream.
    """

    root: str  # folder, http(s)://…, s3://… (read by the AWS command line), or pipe:COMMAND that prints the file {}
    split: str
    recipe: SampleRecipe
    seed: int = 0  # decides order and draws
    buffer: int = 1000  # number of images that a worker shuffles among; 0 keeps the order
    max_samples: int | None = None  # per epoch, of all processes
    batch_size: int = 1  # as in the loader
    num_workers: int = 0  # as in the loader
    rank: int = 0
    world_size: int = 1
    shards: list[tuple[str, int]] = field(default_factory=list)  # read from SPLIT.json if empty

    def __post_init__(self) -> None:
        self.shards = self.shards or listed_shards(self.root, self.split)
        self.workers = max(self.num_workers, 1)
        self._next: tuple[int, int, int] | None = None  # epoch, worker and place of what the stream gives next
        self._stream: Iterator[Sample] = iter(())

    def __len__(self) -> int:
        """Number of samples of an epoch in this process; the stream itself is endless."""
        total = sum(samples for _, samples in self.shards)
        return min(total, self.max_samples or total) // self.world_size

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, place = item
        batch, within = divmod(place, self.batch_size)
        # A loader that resumes in mid-epoch starts with its first worker: the batch decides whose stream is read.
        worker, place = batch % self.workers, batch // self.workers * self.batch_size + within
        if self._next != (epoch, worker, place):
            self._stream = self._samples(epoch, worker, place)
        self._next = epoch, worker, place + 1
        return next(self._stream)

    def _samples(self, epoch: int, worker: int, start: int) -> Iterator[Sample]:
        """Yield the endless samples of a worker, from the `start`th on."""
        failures = 0  # each is replaced by a second draw of the next image, so that the samples after it do not move
        for lap, i, members in islice(self._shuffled(epoch, worker), start, None):
            try:
                entry, open_file = _unpacked(members)
                for more in range(failures, -1, -1):
                    draw = [self.seed, epoch, i, *([lap, more] if lap or more else [])]
                    sample = self.recipe(entry, open_file, np.random.default_rng(draw))
                    yield {**sample, "key": sample_key(draw)}
                failures = 0
            except (*UNREADABLE, KeyError, StopIteration) as error:
                failures += 1
                logger.warning("%s: image %d skipped (%s)", self.root, i, error)
                if failures == MAX_ATTEMPTS:
                    raise UserError(f"{self.root}: {failures} images in a row are damaged; see the log") from None

    def _shuffled(self, epoch: int, worker: int) -> Iterator[tuple[int, int, Members]]:
        """Yield (lap, NUMBER, content by extension) of a worker's images, over and over, shuffled within a buffer."""
        rng = np.random.default_rng([self.seed, epoch, self.rank, worker])
        for lap in count():
            buffer: list[tuple[int, Members]] = []
            image = None
            for image in self._read(epoch, worker):
                buffer.append(image)
                if len(buffer) > self.buffer:
                    yield lap, *buffer.pop(int(rng.integers(len(buffer))))
            if image is None:
                raise UserError(f"{self.root}: no image of the shards can be read; see the log")
            for k in rng.permutation(len(buffer)).tolist():
                yield lap, *buffer[k]

    def _read(self, epoch: int, worker: int) -> Iterator[tuple[int, Members]]:
        """Yield the images of a worker's shards once."""
        from webdataset.tariterators import tarfile_samples

        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        # With fewer shards than consumers, those that share a shard take its images in turn.
        turn, first = divmod(worker * self.world_size + self.rank, len(order))
        consumers = self.world_size * self.workers
        sharing = len(range(first, consumers, len(order)))

        def skip(error: Exception) -> bool:
            logger.warning("%s: the rest of a shard skipped (%s)", self.root, error)
            return True

        urls = ({"url": _address(self.root, self.shards[k][0])} for k in order[first::consumers].tolist())
        for place, sample in enumerate(tarfile_samples(urls, handler=skip)):
            if place % sharing == turn:
                yield int(sample["__key__"]), {k: v for k, v in sample.items() if not k.startswith("__")}


def listed_shards(root: str, split: str) -> list[tuple[str, int]]:
    """Read the names and numbers of samples of the shards in a folder or at an address."""
    from webdataset.gopen import gopen

    address = _address(root, f"{split}.json")
    try:
        with gopen(address) as stream:
            return [(shard["name"], int(shard["samples"])) for shard in json.loads(stream.read())["shards"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{address}: no list of shards ({error}); check data.root, or run make_shards.py") from None


def _address(root: str, name: str) -> str:
    if root.startswith("pipe:"):
        return root.replace("{}", name)
    address = f"{root.rstrip('/')}/{name}"
    return f"pipe:aws s3 cp {address} -" if root.startswith("s3://") else address
