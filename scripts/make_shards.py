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
import sys
from pathlib import Path

from ldm.config import ConfigError, load_config, split_overrides
from ldm.data.annotations import open_index
from ldm.data.shards import write_shards
from ldm.files import UserError


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


if __name__ == "__main__":
    raise SystemExit(main())
