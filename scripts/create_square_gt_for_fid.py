"""Make the real images for FID: resize the short side to 512, crop the centre to 512 x 512, save as PNG.

    python scripts/create_square_gt_for_fid.py dataset/coco/test2017 dataset/coco/test2017_square

Images keep their relative path below the target folder. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
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
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        create(args.source, args.target, args.size, args.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def create(source: Path, target: Path, size: int, workers: int) -> None:
    """Convert all images of `source` that have no result in `target` yet."""
    from tqdm import tqdm

    from ldm.images import find_images

    if size < 1 or workers < 1:
        raise ValueError("--size and --workers: expected 1 or more")
    jobs = {path: (target / path.relative_to(source)).with_suffix(".png") for path in find_images(source)}
    if len(set(jobs.values())) < len(jobs):
        raise ValueError(f"{source}: two images differ only in their extension; rename one")
    todo = [(path, result, size) for path, result in jobs.items() if not result.exists()]
    for folder in {result.parent for _, result, _ in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="image") as bar,
    ):
        for _ in pool.map(convert, *zip(*todo, strict=True)) if todo else ():
            bar.update()
    print(f"{len(jobs)} images in {target}")


def convert(path: Path, result: Path, size: int) -> None:
    """Convert one file."""
    from ldm.images import open_image, save_png

    save_png(square(open_image(path), size), result)


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
