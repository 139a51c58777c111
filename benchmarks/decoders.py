"""Compare decoders by encoding and decoding real images, without sampling; all pixels but the hole's are known.

    python benchmarks/decoders.py --decoder results/decoder/decoder.safetensors

Each item of the benchmark is cropped and encoded as for editing (the posterior is sampled) and decoded by the model's
own decoder, and by the other one without and with the known pixels. Errors are grey levels, 0 to 255, at the model's
size. The seam is the mean step across the hole's edge; ideally it equals the scene's own.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import ImageChops
from rich.console import Console
from rich.progress import track
from rich.table import Table
from seams import seam

from ldm.editing.editor import BUNDLED_MODEL, Editor
from ldm.editing.geometry import fit_scene
from ldm.evaluation.cocoee import Bench
from ldm.evaluation.metrics import background
from ldm.images import tensor_to_pil
from ldm.latent_diffusion import replace_decoder


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", type=Path, required=True, metavar="PATH")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the bundled model")
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument(
        "--bench", type=Path, default=BUNDLED_MODEL / "bench", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    editor = Editor.from_pretrained(args.checkpoint, config=args.config, device=args.device)
    model, config = editor.model, editor.model.config
    own, other = (
        model.first_stage_model,
        replace_decoder(model.first_stage_model, args.decoder).to(editor.device).eval(),
    )
    rows: dict[str, list[tuple[float, ...]]] = {}
    items = [*islice(Bench(args.bench), args.limit)]
    for number, item in enumerate(track(items, console=Console(stderr=True))):
        fitted = fit_scene(item.scene, item.hole_mask, config.image_size, crop_margin=config.crop_margin)
        image, keep_mask = fitted.image.to(editor.device), fitted.keep_mask.to(editor.device)
        z = model.encode_image(image, torch.Generator().manual_seed(number)) / config.scale_factor
        ways = {
            "own": own.decode(z),
            "other, hole unknown": other.decode(z),
            "other, pixels known": other.decode(z, image, keep_mask),
        }
        scene, hole = tensor_to_pil(fitted.image[0]), tensor_to_pil(1 - 2 * fitted.keep_mask[0].expand(3, -1, -1))
        hole = hole.convert("L")
        for way, pixels in {"(the scene)": image, **ways}.items():
            result = tensor_to_pil(pixels[0].clamp(-1, 1).float().cpu())
            kept, inside = background(result, scene, hole), background(result, scene, ImageChops.invert(hole))
            difference = np.abs(np.asarray(result).astype(int) - np.asarray(scene))[np.asarray(hole) < 128].mean()
            row = (kept.max_abs, float(difference), kept.psnr, kept.ssim, inside.psnr, seam(result, scene, hole).jump)
            rows.setdefault(way, []).append(row)
    header = ["kept: max |Δ|", "mean |Δ|", "PSNR, dB", "SSIM", "hole: PSNR, dB", "seam"]
    table = Table("decoder", *header, title=f"{len(items)} real scenes, encoded and decoded")
    for way, values in rows.items():
        table.add_row(way, *(f"{value:.3g}" for value in np.nanmean(np.array(values), axis=0)))
    Console().print(table)


if __name__ == "__main__":
    main()
