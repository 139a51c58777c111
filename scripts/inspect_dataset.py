#!/usr/bin/env python
"""Describe a dataset as the model sees it: counts, box sizes, what is left out and why, a contact sheet.

    python scripts/inspect_dataset.py --base configs/v1.yaml
    python scripts/inspect_dataset.py data.kind=coco data.root=my/images data.annotations=my/instances.json
    python scripts/inspect_dataset.py data.kind=masks data.root=my/product --sheet product.png

The settings are those of the training config: `main.py` with the same arguments trains on what is shown here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.config import ConfigError, load_config, split_overrides
from ldm.data.box_dataset import BoxDataset
from ldm.data.box_index import BoxIndex
from ldm.data.datamodule import box_dataset
from ldm.files import UserError, check_writable, claim
from ldm.images import exemplar_to_pixels, save_png, tensor_to_pil

SAMPLES = 16  # on the contact sheet
COLUMNS = 4
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further arguments, section.key=value, override the configs, as for main.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs, merged from left to right")
    add("--splits", nargs="+", default=["train", "validation"], metavar="SPLIT", help="default: train validation")
    add("--sheet", type=Path, metavar="PNG",
        help="contact sheet of training samples: scene, hole, exemplar; default: beside the index")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a sheet of the same name; else the new one gets a number")
    add("--epoch", type=int, default=0, help="epoch whose draws the sheet shows; default: %(default)s")
    add("--rebuild", action="store_true", help="write the index again even if it is up to date")
    return parser


def main(argv: list[str] | None = None) -> int:
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    try:
        config = load_config(*args.base, overrides=overrides)
        if config.data.kind == "cached":
            raise ConfigError("data.kind: got 'cached', whose boxes are gone; inspect what the cache was made from")
        if args.sheet and "train" in args.splits:
            check_writable(args.sheet.parent, args.sheet.name)  # before the index is read and samples are drawn
        for split in args.splits:
            dataset = box_dataset(config, split, rebuild=args.rebuild)
            print("\n".join(description(split, dataset.index)))
            if captions := dataset.recipe.captions:
                first = (captions(dataset.index[i], 0) for i in range(min(SAMPLES, len(dataset))))
                print(f"  captions: {' | '.join(first)} …")
            if split == "train":
                sheet, path = contact_sheet(dataset, args.epoch), args.sheet or dataset.index.path.with_suffix(".png")
                others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
                path = path if args.overwrite else claim(itertools.chain([path], others))
                save_png(sheet, path)
                print(f"{path}: {min(SAMPLES, len(dataset))} samples, each scene, masked scene, exemplar")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def description(split: str, index: BoxIndex) -> list[str]:
    """Describe an index in lines of text."""
    shares, aspects, counts, shaped = box_statistics(index)
    lines = [
        f"{split}: {len(index):,} images, {index.num_boxes:,} boxes ({index.metadata['format']}, "
        f"{index.metadata['images']})",
        f"  boxes per image: {_quantiles(counts, '.0f')}",
        f"  box, share of its image: {_quantiles(shares, '.0%')}",
        f"  box, width over height: {_quantiles(aspects, '.2f')}",
    ]
    if index.has_shapes:
        lines.append(f"  shape known: {shaped:.0%} of boxes")
    return [*lines, *(f"  left out: {text}" for text in index.left_out)]


def box_statistics(index: BoxIndex, limit: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return area fractions and aspects of boxes, boxes per image, and the fraction of boxes with a shape.

    Of large datasets, `limit` images at equal distances are used.
    """
    shares, aspects, counts, shaped = [], [], [], 0
    for i in np.unique(np.linspace(0, len(index) - 1, min(limit, len(index))).astype(int)).tolist():
        entry = index[i]
        area = entry.size[0] * entry.size[1]
        counts.append(len(entry.boxes))
        for box, shape in zip(entry.boxes, entry.shapes, strict=True):
            width, height = box.right - box.left, box.bottom - box.top
            shares.append(width * height / area)
            aspects.append(width / height)
            shaped += bool(shape or entry.mask)
    return np.array(shares), np.array(aspects), np.array(counts), shaped / len(shares)


def _quantiles(values: np.ndarray, form: str) -> str:
    found = zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    return ", ".join(f"{value:{form}} ({quantile:.0%})" for quantile, value in found)


def contact_sheet(dataset: BoxDataset, epoch: int) -> Image.Image:
    """Show samples spread over the dataset as the model gets them: scene, masked scene, exemplar, row by row."""
    count = min(SAMPLES, len(dataset))
    size, gap = dataset.recipe.image_size, 4
    rows = -(-count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (3 * size + gap) - gap, rows * (size + gap) - gap), "white")
    for k, i in enumerate(np.linspace(0, len(dataset) - 1, count).astype(int).tolist()):
        sample = dataset[epoch, i]
        pictures = (sample["image"], sample["masked_image"], exemplar_to_pixels(sample["exemplar"]))
        for column, pixels in enumerate(pictures):
            picture = tensor_to_pil(pixels).resize((size, size), Image.Resampling.BILINEAR)
            sheet.paste(picture, (k % COLUMNS * (3 * size + gap) + column * size, k // COLUMNS * (size + gap)))
    return sheet


if __name__ == "__main__":
    raise SystemExit(main())
