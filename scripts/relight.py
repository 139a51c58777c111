#!/usr/bin/env python
"""Relight a foreground with IC-Light: paint it in other light, chosen by a prompt, a direction or a background.

    python scripts/relight.py --config configs/iclight-fc.yaml --checkpoint iclight-fc.safetensors \\
        --image cup.png --prompt "a cup, sunshine from a window" --light left

docs/relight.md describes the models and all settings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ldm.editing.cli import load_editor, model_metadata, number, numbers, save_results
from ldm.editing.settings import EditSettings, add_options, given_options
from ldm.files import UserError

LIGHT_OPTIONS = ("light", "size", "strength", "highres_scale", "highres_strength")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    files = parser.add_argument_group("files")
    files.add_argument("--image", type=Path, required=True, metavar="FILE", help="the foreground")
    files.add_argument(
        "--mask", type=Path, metavar="FILE", help="white where the foreground is; default: where the image is opaque"
    )
    files.add_argument("--background", type=Path, metavar="FILE", help="background, for models that read one")
    files.add_argument("--outdir", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s")
    files.add_argument("--overwrite", action="store_true", help="replace results of the same name; else number them")
    light = parser.add_argument_group("light")
    add_options(light, "prompt", "negative_prompt", prompt="subject and light", negative_prompt="what to avoid")
    light.add_argument(
        "--light",
        default="none",
        choices=("none", "left", "right", "top", "bottom"),
        help="direction the light comes from; default: %(default)s",
    )
    light.add_argument("--size", type=numbers, metavar="W,H", help="size of the first pass; default: about the model's")
    light.add_argument(
        "--strength", type=number, default=0.9, help="noise added to the initial image, 0 to 1; default: %(default)s"
    )
    light.add_argument(
        "--highres-scale", type=number, default=1.5, metavar="X", help="enlargement of the result; default: %(default)s"
    )
    light.add_argument(
        "--highres-strength",
        type=number,
        default=0.5,
        metavar="X",
        help="noise added before the second pass, 0 to 1; 0 leaves it out; default: %(default)s",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="weights, .ckpt or .safetensors")
    model.add_argument("--config", type=Path, metavar="FILE", help="their config; default: config.yaml beside them")
    model.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    model.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the weights")
    sampling = parser.add_argument_group("sampling")
    add_options(sampling, "sampler", "num_steps", "eta", "seed", "n_samples")
    add_options(sampling, "guidance_scale", guidance_scale="default: 2, or 7 for models that read a background")
    shown = parser.add_argument_group("safety and provenance")
    shown.add_argument(
        "--safety",
        nargs="?",
        const="open-nsfw",
        metavar="FOLDER",
        help="withhold what a content filter flags: the folder of Stable Diffusion's safety checker, or %(const)s",
    )
    shown.add_argument(
        "--watermark", nargs="?", const="StableDiffusionV1", metavar="TEXT", help="mark results invisibly"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Relight, and return the exit status: 0, 1 if results are withheld, 2 on errors."""
    parser = build_parser()
    args = parser.parse_args(argv, argparse.Namespace(decoder=None))
    if args.size is not None and (len(args.size) != 2 or min(args.size) < 1):
        parser.error(f"--size: got {args.size}, expected two numbers of pixels: W,H")
    try:
        # The number of steps is the sampler's own, as for inference.py.
        sampling: dict[str, Any] = {"num_steps": None} | given_options(args)
        EditSettings(**sampling)  # checks them
    except UserError as error:
        parser.error(str(error))
    try:
        return relight(args, sampling)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        from ldm.editing.editor import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print("error: out of memory; use fewer --n-samples, --precision bf16 or --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def relight(args: argparse.Namespace, sampling: dict[str, Any]) -> int:
    """Relight a foreground, write the results and return the exit status: 1 if a filter withheld some of them."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image
    from tqdm import tqdm

    from ldm.checkpoint.io import sha256_file
    from ldm.editing.editor import checkpoint_file, pick_device, pick_dtype
    from ldm.editing.relight import Relighter, on_grey
    from ldm.editing.request import as_rgb
    from ldm.editing.safety import drop_unsafe, load_filter
    from ldm.editing.watermark import add_watermark

    # The files are read first: a wrong path should not wait for a large model.
    foreground = on_grey(args.image, args.mask)
    background = args.background and as_rgb(args.background)
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device)
    args.outdir.mkdir(parents=True, exist_ok=True)
    content_filter = load_filter(args.safety, device) if args.safety else None
    light = {name: getattr(args, name) for name in LIGHT_OPTIONS}
    settings = EditSettings(**sampling)
    steps = settings.steps * (2 if args.highres_strength else 1)
    with ThreadPoolExecutor(1) as hashing, tqdm(total=steps, desc="loading the model", unit="step") as bar:
        relighter = Relighter(load_editor(args, device, dtype).model)
        # Hashing a large file takes several seconds; meanwhile the device paints.
        digest = hashing.submit(sha256_file, checkpoint_file(args.checkpoint))

        def on_step(*_: object) -> None:
            bar.update()

        bar.set_description("painting")
        keywords: dict[str, Any] = light | sampling | {"seed": settings.seeds}
        results = relighter.relight(foreground, background=background, on_step=on_step, **keywords)
    assert isinstance(results, list)
    record = model_metadata(args, dtype, digest.result()) | {
        "mode": "relight",
        "device": device.type,
        "guidance_scale": None,  # the model's
        **sampling,
        "sampler": settings.sampler,
        "num_steps": settings.steps,
        **light,
        **{name: (value := getattr(args, name)) and str(value) for name in ("image", "mask", "background")},
        "checkpoint": str(args.checkpoint),
        "config": str(args.config or "beside the checkpoint"),
        "safety": args.safety,
        "watermark": args.watermark,
    }
    seeds, safe = drop_unsafe(content_filter, settings.seeds, results, Image.new("L", results[0].size, 255))
    if args.watermark:
        safe = [add_watermark(result, args.watermark) for result in safe]
    named = {
        f"{args.image.stem}_relit_{seed}": (result, {"seed": seed}) for seed, result in zip(seeds, safe, strict=True)
    }
    save_results(args.outdir, named, record, overwrite=args.overwrite)
    return 1 if len(safe) < len(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
