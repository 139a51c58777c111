#!/usr/bin/env python
"""Pack images and boxes into WebDataset tars, for training from storage that favours few large files.

    python scripts/make_shards.py --base configs/v1.yaml --out /scratch/open-images
    python main.py --base configs/v1.yaml data.kind=shards data.root=/scratch/open-images

An interrupted run continues: finished shards are kept. Images are packed unchanged; the training settings apply when
they are read. `data.root` may also be an address: `https://host/folder`,
`s3://bucket/folder`, or `pipe:any command that writes {}`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.config import ConfigError, load_config, split_overrides
from ldm.data.annotations import open_index
from ldm.data.box_index import BoxIndex, Entry
from ldm.files import UserError, atomic_write, write_text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further arguments, section.key=value, override the configs, as for main.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs, merged from left to right")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the shards and their lists")
    add("--splits", nargs="+", default=["train", "validation"], metavar="SPLIT", help="default: train validation")
    add("--megabytes", type=int, default=256, metavar="N", help="largest size of a shard; default: %(default)s")
    add("--workers", type=int, default=2, metavar="N", help="number of threads; default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.megabytes < 1 or args.workers < 1:
        parser.error("--megabytes and --workers: expected 1 or more")
    try:
        config = load_config(*args.base, overrides=overrides)
        if config.data.kind in ("cached", "shards"):
            raise ConfigError(f"data.kind: got {config.data.kind!r}, expected images and boxes")
        for split in args.splits:
            index = open_index(config.data, split)
            size = args.megabytes * 1_000_000
            shards = write_shards(index, args.out, split, max_bytes=size, workers=args.workers)
            total = sum(shard["bytes"] for shard in shards)
            print(f"{split}: {len(index):,} images in {len(shards)} shards, {total / 1e6:,.1f} MB, in {args.out}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_shards(
    index: BoxIndex, out: Path, split: str, *, max_bytes: int = 2**28, workers: int = 1
) -> list[dict[str, Any]]:
    """Pack the images of an index into OUT/SPLIT-000000.tar and so on, listed in OUT/SPLIT.json.

    A shard holds images of at most `max_bytes`, or a single larger one. An interrupted run is continued; UserError if
    `out` holds shards of other images. The files do not depend on the number of threads, `workers`.
    """
    images = Path(index.metadata["images"])
    spans = list(_spans(index, images, max_bytes))
    plan = json.dumps({"index": index.path.stat().st_size, "images": str(images), "spans": spans})
    plan_path = out / f".{split}.plan.json"
    if plan_path.is_file() and plan_path.read_text(encoding="utf-8") != plan:
        raise UserError(f"{out}: holds shards of other images or another size; choose another folder or empty it")
    write_text(plan_path, plan)

    def write_shard(number: int) -> dict[str, Any]:  # an existing one is complete, and kept
        path, (first, last) = out / f"{split}-{number:06d}.tar", spans[number]
        if not path.is_file():
            with atomic_write(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
                for name, content in (member for i in range(first, last) for member in _members(i, index[i], images)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": path.name, "samples": last - first, "bytes": path.stat().st_size, "sha256": digest}

    with ThreadPoolExecutor(workers) as pool:
        written = pool.map(write_shard, range(len(spans)))
        shards = list(tqdm(written, total=len(spans), desc=f"{split}: shards", unit="shard"))
    write_text(out / f"{split}.json", json.dumps({"shards": shards}, indent=1) + "\n")
    return shards


def _spans(index: BoxIndex, images: Path, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last (exclusive) image of each shard."""
    first, total = 0, 0
    for i in tqdm(range(len(index)), desc="sizes", unit=" images", delay=3):
        size = (images / index[i].name).stat().st_size
        if total and total + size > max_bytes:
            yield first, i
            first, total = i, 0
        total += size
    yield first, len(index)


def _members(i: int, entry: Entry, images: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the members of an image; see `ldm.data.shards`."""
    shapes = [[outline.tolist() for outline in outlines] for outlines in entry.shapes]
    record = {"name": entry.name, "size": entry.size, "boxes": entry.boxes, "shapes": shapes}
    if entry.orientation != 1:
        record["orientation"] = entry.orientation
    yield f"{i:09d}.json", json.dumps(record).encode()
    yield f"{i:09d}{Path(entry.name).suffix.lower() or '.image'}", (images / entry.name).read_bytes()
    if entry.mask:
        yield f"{i:09d}.mask{Path(entry.mask).suffix.lower() or '.image'}", (images / entry.mask).read_bytes()


if __name__ == "__main__":
    raise SystemExit(main())
