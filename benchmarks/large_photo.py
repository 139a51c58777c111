"""Measure time, memory and changed pixels of edits in photographs of 24 and 0.24 megapixels.

    python benchmarks/large_photo.py
    python benchmarks/large_photo.py --config configs/v1.yaml --checkpoint model.ckpt --device cuda --steps 50

The photograph is an enlarged example of the bundled model with noise. Each row is a run of `inference.py` without the
grid, its start-up included; it reads JPEG and writes PNG.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from bulk import timed
from PIL import Image, ImageChops
from rich.console import Console
from rich.table import Table

from ldm.editing.editor import bundled_examples
from ldm.images import open_image

SIZE = (6000, 4000)
HOLES = {"small": (2600, 1700, 3400, 2300), "large": (500, 300, 5500, 3700)}


def photograph() -> Image.Image:
    """Make an image of SIZE with detail down to single pixels."""
    picture = open_image(bundled_examples()[0] / "scene.png").resize(SIZE, Image.Resampling.BICUBIC)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 24, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    return ImageChops.add(picture, noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the bundled model")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", default="20")
    args = parser.parse_args()
    model = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    model += ["--config", args.config] if args.config else []
    table = Table("megapixels", "hole", "seconds", "peak memory, MiB", "pixels changed outside", "inside, %")
    with tempfile.TemporaryDirectory() as name, Console(stderr=True).status("editing"):
        folder, photo = Path(name), photograph()
        exemplar = bundled_examples()[0] / "exemplar.png"
        for scale in (10, 1):
            scene = folder / f"scene{scale}.jpg"
            photo.reduce(scale).save(scene, quality=95)
            for hole_name, corners in HOLES.items():
                box = [corner // scale for corner in corners]
                words = ["--image", str(scene), "--box", ",".join(map(str, box)), "--reference", str(exemplar)]
                words += ["--outdir", str(folder / hole_name), "--skip_grid", "--steps", args.steps]
                seconds, memory = timed(*words, "--device", args.device, *model)
                with Image.open(folder / hole_name / f"{scene.stem}_0.png") as result:
                    differs = (np.asarray(result) != np.asarray(open_image(scene))).any(-1)
                inside = np.zeros_like(differs)
                inside[box[1] : box[3], box[0] : box[2]] = True
                shares = f"{differs[~inside].sum()}", f"{100 * differs[inside].mean():.0f}"
                table.add_row(f"{differs.size / 1e6:g}", hole_name, f"{seconds:.1f}", f"{memory:.0f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
