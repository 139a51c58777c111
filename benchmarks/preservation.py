"""Measure how editing changes the rest of a scene, and how visible the hole's edge is.

    python benchmarks/preservation.py                                         the bundled benchmark and examples
    python benchmarks/preservation.py --decoder results/decoder/decoder.safetensors    a mask-conditioned decoder
    python benchmarks/preservation.py --config configs/v1.yaml --checkpoint model.ckpt --bench test_bench --limit 500

Every scene is painted once (20 steps of DPM-Solver++, guidance scale 5) and finished in several ways: the whole decoded
image, as in most pipelines; the hole alone pasted back; pasted with a feather; pasted with colours matched along the
edge; with both. Differences are grey levels, 0 to 255. The seam is the mean step across the hole's edge, also as a
multiple of the scene's own steps beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from seams import seam
from torch import Tensor

from ldm.editing.editor import BUNDLED_MODEL, Editor
from ldm.editing.geometry import FittedScene, fit_scene
from ldm.evaluation.cocoee import Bench
from ldm.evaluation.metrics import background
from ldm.images import load_mask, open_image

WAYS: dict[str, Callable[[FittedScene, Tensor], Image.Image]] = {
    "decoded": lambda fitted, x: fitted.put_back(x, paste_back=False),
    "pasted": lambda fitted, x: fitted.put_back(x, match_colors=False),
    "feather": lambda fitted, x: fitted.put_back(x, match_colors=False, feather=None),
    "match colors": lambda fitted, x: fitted.put_back(x),
    "both": lambda fitted, x: fitted.put_back(x, feather=None),
}
Task = tuple[Image.Image, Image.Image, Image.Image]  # scene, hole, exemplar


def bench_items(root: Path, limit: int | None) -> list[Task]:
    return [(item.scene, item.hole_mask, item.exemplar) for item in islice(Bench(root), limit)]


def examples() -> list[Task]:
    """Return the example photographs of the bundled model."""
    folders = sorted((BUNDLED_MODEL / "examples").iterdir())
    return [(open_image(f / "scene.png"), load_mask(f / "mask.png"), open_image(f / "exemplar.png")) for f in folders]


def finished(editor: Editor, tasks: list[Task], name: str) -> Iterator[tuple[Task, dict[str, Image.Image]]]:
    """Paint each task once and finish it in every way."""
    config = editor.model.config
    for number, task in enumerate(track(tasks, name, console=Console(stderr=True))):
        scene, hole, exemplar = task
        fitted = fit_scene(scene, hole, config.image_size, crop_margin=config.crop_margin)
        options = {"sampler": "dpm_solver_pp", "num_steps": 20, "guidance_scale": 5.0}
        (painted,) = editor.paint(fitted.image, fitted.keep_mask, editor.exemplar_tensor(exemplar), [number], **options)
        yield task, {way: finish(fitted, painted) for way, finish in WAYS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the bundled model")
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--decoder", type=Path, metavar="PATH", help="default: the model's own")
    parser.add_argument(
        "--bench", type=Path, default=BUNDLED_MODEL / "bench", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    editor = Editor.from_pretrained(args.checkpoint, config=args.config, decoder=args.decoder, device=args.device)
    for name, tasks in (("bench", bench_items(args.bench, args.limit)), ("photographs", examples())):
        rows: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for (scene, hole, _), results in finished(editor, tasks, name):
            for way, result in results.items():
                outside = np.asarray(hole) < 128
                difference = np.abs(np.asarray(result).astype(int) - np.asarray(scene))[outside]
                kept, edge = background(result, scene, hole), seam(result, scene, hole)
                row = [difference.max(), difference.mean(), kept.psnr, kept.ssim, edge.jump, edge.jump / edge.usual]
                rows[way].append([float(value) for value in row])
        header = ["max |Δ|", "mean |Δ|", "PSNR, dB", "SSIM", "seam", "seam / scene's steps"]
        table = Table(name, *header, title=f"{len(tasks)} scenes; outside the hole, and at its edge")
        for way, values in rows.items():
            found = np.array(values)
            middle = np.append(np.nanmean(found[:, :5], axis=0), np.nanmedian(found[:, 5]))
            middle[0] = found[:, 0].max()
            table.add_row(way, *(f"{value:.3g}" for value in middle))
        Console().print(table)


if __name__ == "__main__":
    main()
