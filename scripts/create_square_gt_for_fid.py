"""Make the real images for FID: resize the short side to 512, crop the centre to 512 x 512, save as PNG.

    python scripts/create_square_gt_for_fid.py dataset/coco/test2017 dataset/coco/test2017_square

Images keep their relative path below the target folder. An interrupted run continues where it stopped. Damaged images,
and images that differ only in their extension, are named and left out, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="FOLDER", help="folder with images, also in subfolders")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder for the results")
    parser.add_argument("--size", type=int, default=512, help="pixels; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="threads; default: %(default)s")
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be used")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return create(args.source, args.target, args.size, args.workers, strict=args.strict)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def create(source: Path, target: Path, size: int, workers: int, *, strict: bool = False) -> int:
    """Convert all images of `source` that have no result in `target` yet; return 1 if some cannot be used, else 0."""
    from tqdm import tqdm

    from ldm.files import Skipped, check_writable
    from ldm.images import find_images

    if size < 1 or workers < 1:
        raise ValueError("--size and --workers: expected 1 or more")
    skipped, jobs = Skipped(strict=strict), dict[Path, Path]()  # by result
    for path in find_images(source):
        result = (target / path.relative_to(source)).with_suffix(".png")
        if path.is_relative_to(target):  # a target inside the source
            continue
        if result in jobs:
            skipped.add(f"of the stem of {jobs[result].name}; rename one", path)
        else:
            jobs[result] = path
    check_writable(target)
    todo = {result: path for result, path in jobs.items() if not result.exists()}
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="image") as bar:
        for path, reason in zip(todo.values(), pool.map(convert, todo, todo.values(), repeat(size)), strict=True):
            bar.update()
            if reason:
                skipped.add(reason.removeprefix(f"{path}: "), path)
    print(f"{sum(result.exists() for result in jobs)} images in {target}")
    if skipped:
        print(f"left out: {skipped}", file=sys.stderr)
    return int(bool(skipped))


def convert(result: Path, path: Path, size: int) -> str:
    """Convert one file; return why it cannot be used, or an empty text."""
    from ldm.files import UserError
    from ldm.images import open_image, save_png

    try:
        image = open_image(path)
    except UserError as error:
        return str(error)
    save_png(square(image, size), result)
    return ""


def square(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` (bilinear, antialiased; the long side is rounded down) and crop the centre."""
    from PIL import Image

    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


if __name__ == "__main__":
    raise SystemExit(main())
