"""Shards: the same samples as loose files, each once, whoever reads them and wherever reading begins."""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.config import DataConfig
from ldm.data.box_dataset import BoxDataset, SampleRecipe
from ldm.data.box_index import AnnotatedImage, BoxIndex, IndexWriter, Object
from ldm.data.datamodule import EpochSampler
from ldm.data.shards import Shards, listed_shards
from ldm.files import UserError
from scripts.make_shards import write_shards

N = 23
RECIPE = SampleRecipe(16, 14, DataConfig(p_object_mask=0.3))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    outline = np.array([[6, 5], [20, 8], [12, 18]], dtype=np.float32)
    writer = IndexWriter(root / "index", {"images": str(root)})
    for i in range(N):
        name = f"{i % 3}/{i}.{('jpg', 'png')[i % 2]}"
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(root / name)
        mask = ""
        if i % 4 == 1:
            mask = f"{i}-mask.png"
            Image.fromarray(np.kron(rng.integers(0, 2, (4, 4)), np.ones((6, 8))).astype(np.uint8) * 255).save(
                root / mask
            )
        objects = [Object((4, 4, 22, 20), outlines=[outline] if i % 2 else []), Object((0, 0, 16, 12))]
        writer.add(AnnotatedImage(name, (32, 24), objects, mask))
    writer.write()
    return root


def pack(images: Path, out: Path, max_bytes: int = 5000) -> Path:
    write_shards(BoxIndex(images / "index"), out, "train", max_bytes=max_bytes)
    return out


@pytest.fixture(scope="module")
def packed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(images, tmp_path_factory.mktemp("shards"))


def keys(samples: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(sample["key"]) for sample in samples]


def part(root: Path | str, batch_size: int = 2, buffer: int = 5, **options: int) -> Shards:
    return Shards(str(root), "train", RECIPE, seed=7, buffer=buffer, batch_size=batch_size, **options)


def read(reader: Shards, epoch: int = 0, start: int = 0, count: int | None = None) -> list[dict[str, torch.Tensor]]:
    return [reader[epoch, place] for place in range(start, len(reader) if count is None else count)]


def test_the_list_says_what_is_there(packed: Path) -> None:
    shards = json.loads((packed / "train.json").read_text())["shards"]
    assert [(shard["name"], shard["samples"]) for shard in shards] == listed_shards(str(packed), "train")
    assert len(shards) > 3
    assert sum(shard["samples"] for shard in shards) == N
    for shard in shards:
        content = (packed / shard["name"]).read_bytes()
        assert len(content) == shard["bytes"] and hashlib.sha256(content).hexdigest() == shard["sha256"]


def test_samples_are_those_of_loose_files_each_once(packed: Path, images: Path) -> None:
    loose = BoxDataset(BoxIndex(images / "index"), RECIPE, seed=7)
    for epoch in (0, 3):
        streamed = read(part(packed), epoch)
        assert len({*keys(streamed)}) == N
        for i in range(N):
            expected = loose[epoch, i]
            same = [s for s in streamed if torch.equal(s["exemplar"], expected["exemplar"])]
            assert len(same) == 1
            assert all(torch.equal(same[0][name], value) for name, value in expected.items())


def test_epochs_have_orders_of_their_own(packed: Path, images: Path) -> None:
    def order(epoch: int) -> list[float]:
        return [float(sample["image"][0, 0, 0]) for sample in read(part(packed), epoch)]

    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 3), (2, 1), (2, 2), (3, 4)])
def test_processes_and_workers_share_an_epoch(packed: Path, world_size: int, workers: int) -> None:
    """As many samples for each, none twice."""
    readers = [part(packed, num_workers=workers, rank=r, world_size=world_size) for r in range(world_size)]
    seen = [key for reader in readers for key in keys(read(reader))]
    assert {len(reader) for reader in readers} == {N // world_size}
    assert len(set(seen)) == len(seen)  # a further draw of an image is another sample


def test_fewer_shards_than_readers(images: Path, tmp_path: Path) -> None:
    root = pack(images, tmp_path / "one", max_bytes=10**9)
    assert len(listed_shards(str(root), "train")) == 1
    readers = [part(root, 1, num_workers=2, rank=r, world_size=2, buffer=0) for r in range(2)]
    assert len({key for reader in readers for key in keys(read(reader, count=10))}) == 20


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_loader_goes_on_in_the_middle(packed: Path, workers: int) -> None:
    def batches(begin: int) -> list[list[int]]:
        reader = part(packed, 2, num_workers=workers)
        places = EpochSampler(len(reader), seed=None, epoch=1, start=2 * begin)
        loader = DataLoader(reader, 2, sampler=places, num_workers=workers, drop_last=True)
        return [batch["key"].tolist() for batch in loader]

    whole = batches(0)
    for start in (1, 4, 5):
        assert batches(start) == whole[start:]


def damage(root: Path) -> None:
    """The image of one member is no image; another shard lacks its end."""
    first, second = (root / name for name, _ in listed_shards(str(root), "train")[:2])
    with tarfile.open(first) as tar:
        member = next(m for m in tar if not m.name.endswith("json"))
        offset = member.offset_data
    content = bytearray(first.read_bytes())
    content[offset : offset + 60] = bytes(60)
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:3000])


def test_damaged_members_are_skipped(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pack(images, tmp_path / "damaged")
    damage(root)
    whole = read(part(root, buffer=3))
    assert len(whole) == N and len({*keys(whole)}) == N
    assert "image" in caplog.text and "skipped" in caplog.text
    for start in range(1, 9):
        assert keys(read(part(root, buffer=3), start=start)) == keys(whole)[start:]


def test_validation_starts_its_shards_again_without_a_buffer(packed: Path) -> None:
    reader = part(packed, buffer=0)
    assert len({*keys(read(reader, count=2 * N))}) == 2 * N, "the second lap draws other samples"


def test_nothing_readable(images: Path, tmp_path: Path) -> None:
    root = pack(images, tmp_path / "gone")
    for path in root.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=str(root)):
        read(part(root))
    with pytest.raises(UserError, match=r"validation\.json"):
        Shards(str(root), "validation", RECIPE)


def test_writing_goes_on_and_repeats_itself(images: Path, packed: Path, tmp_path: Path) -> None:
    out = pack(images, tmp_path / "out")
    files = {path.name: path.read_bytes() for path in packed.iterdir() if path.suffix}
    assert files == {path.name: path.read_bytes() for path in out.iterdir() if path.suffix}
    names = sorted(path.name for path in out.glob("*.tar"))
    (out / names[1]).unlink()
    (out / "train.json").unlink()
    untouched = (out / names[0]).stat().st_mtime_ns
    assert pack(images, out) == out
    assert files == {path.name: path.read_bytes() for path in out.iterdir() if path.suffix}
    assert (out / names[0]).stat().st_mtime_ns == untouched
    with pytest.raises(UserError, match=str(out)):
        pack(images, out, max_bytes=4000)


@pytest.fixture
def address(packed: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(packed)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_remote(packed: Path, address: str) -> None:
    expected = keys(read(part(packed)))
    assert keys(read(part(address))) == expected
    command = f"{sys.executable} -c 'import sys; sys.stdout.buffer.write(open(sys.argv[1], \"rb\").read())'"
    assert keys(read(part(f"pipe:{command} {packed}/{{}}"))) == expected
    with pytest.raises(UserError, match=f"{address}/nowhere/train"):
        listed_shards(f"{address}/nowhere", "train")


def test_a_list_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps({"shards": [{"name": "x"}]}))
    with pytest.raises(UserError, match=r"train\.json"):
        listed_shards(str(tmp_path), "train")
