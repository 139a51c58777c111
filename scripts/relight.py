#!/usr/bin/env python
"""Relight a foreground with IC-Light: paint it in other light, chosen by a prompt, a direction or a background.

    python scripts/relight.py --config configs/iclight-fc.yaml --checkpoint iclight-fc.safetensors \\
        --image cup.png --prompt "a cup, sunshine from a window" --light left

docs/relight.md describes the models and all settings.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ldm.editing.cli import (
    add_model_options,
    add_output_options,
    add_safety_options,
    load_editor,
    run_command,
    save_results,
    set_up,
)
from ldm.editing.settings import EditSettings, add_options, given_options, numbers
from ldm.files import UserError, check_writable

LIGHT_OPTIONS = ("light", "size", "strength", "highres_scale", "highres_strength")
RECORDED = (*LIGHT_OPTIONS, "image", "mask", "background", "safety", "watermark")


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    files = parser.add_argument_group("files")
    files.add_argument("--image", required=True, help="the foreground", **file)
    files.add_argument("--mask", help="white where the foreground is; default: where the image is opaque", **file)
    files.add_argument("--background", help="background, for models that read one", **file)
    add_output_options(files)
    light = parser.add_argument_group("light")
    add_options(light, "prompt", "negative_prompt", prompt="subject and light", negative_prompt="what to avoid")
    directions = ("none", "left", "right", "top", "bottom")
    light.add_argument("--light", default="none", choices=directions, help="where it comes from; default: %(default)s")
    light.add_argument("--size", type=numbers, metavar="W,H", help="size of the first pass; default: about the model's")
    for name, default, help in (
        ("--strength", 0.9, "noise added to the initial image, 0 to 1"),
        ("--highres-scale", 1.5, "enlargement of the result"),
        ("--highres-strength", 0.5, "noise added before the second pass, 0 to 1; 0 leaves it out"),
    ):
        light.add_argument(name, type=float, default=default, metavar="X", help=f"{help}; default: %(default)s")
    add_model_options(parser.add_argument_group("model"))
    sampling = parser.add_argument_group("sampling")
    add_options(sampling, "sampler", "num_steps", "eta", "seed", "n_samples")
    add_options(sampling, "guidance_scale", guidance_scale="default: 2, or 7 for models that read a background")
    add_safety_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Relight, and return the exit status: 0, 1 if results are withheld, 2 on errors."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.checkpoint is None or args.decoder is not None:
        parser.error("give a --checkpoint, and no --decoder")
    if args.size is not None and (len(args.size) != 2 or min(args.size) < 1):
        parser.error(f"--size: got {args.size}, expected two numbers of pixels: W,H")
    # The number of steps is the sampler's own, as for inference.py.
    sampling: dict[str, Any] = {"num_steps": None} | given_options(args)
    try:
        settings = EditSettings(**sampling)
    except UserError as error:
        parser.error(str(error))
    return run_command(lambda: relight(args, sampling, settings))


def relight(args: argparse.Namespace, sampling: dict[str, Any], settings: EditSettings) -> int:
    """Relight a foreground, write the results and return the exit status: 1 if a filter withheld some of them."""
    from PIL import Image

    from ldm.editing.editor import model_metadata
    from ldm.editing.progress import edit_progress
    from ldm.editing.relight import Relighter, on_grey
    from ldm.editing.safety import drop_unsafe, load_filter
    from ldm.editing.watermark import add_watermark
    from ldm.images import open_image

    prepared = device, _ = set_up(args)
    # The files are read first: a wrong path should not wait for a large model.
    foreground = on_grey(args.image, args.mask)
    background = args.background and open_image(args.background)
    check_writable(args.outdir)
    content_filter = load_filter(args.safety, device) if args.safety else None
    light = {name: getattr(args, name) for name in LIGHT_OPTIONS}
    with ThreadPoolExecutor(1) as hashing:
        editor = load_editor(args, prepared)
        # Hashing a large file takes several seconds; meanwhile the device paints.
        metadata = hashing.submit(model_metadata, args, editor.model.weight_dtype)
        options: dict[str, Any] = light | sampling | {"seed": settings.seeds}
        with edit_progress(2 if args.highres_strength else 1, settings.steps) as progress:
            results = Relighter(editor.model).relight(foreground, background=background, **options, **progress)
    assert isinstance(results, list)
    record = metadata.result() | {"mode": "relight", "device": editor.device.type}
    record |= {"guidance_scale": None} | sampling  # None: the model's
    record |= {"sampler": settings.sampler, "num_steps": settings.steps}
    record |= {name: getattr(args, name) for name in RECORDED}
    seeds, safe = drop_unsafe(content_filter, settings.seeds, results, Image.new("L", results[0].size, 255))
    marked = [add_watermark(result, args.watermark) for result in safe]
    named = {f"{args.image.stem}_relit_{k}": (result, {"seed": k}) for k, result in zip(seeds, marked, strict=True)}
    save_results(args, named, record)
    return 1 if len(safe) < len(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
