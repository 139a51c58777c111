#!/usr/bin/env python
"""Relight a foreground with IC-Light: paint it in other light, chosen by a prompt, a direction or a background.

    python scripts/relight.py --config configs/iclight-fc.yaml --checkpoint iclight-fc.safetensors \\
        --image cup.png --prompt "a cup, sunshine from a window" --light left

docs/relight.md describes the models and all settings.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

SAMPLER_NAMES = ("dpm_solver_pp", "plms", "ddim", "unipc", "ddpm")
DEFAULT_STEPS = {"dpm_solver_pp": 20, "unipc": 20, "plms": 50, "ddim": 50, "ddpm": 250}


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
    light.add_argument("--prompt", default="", metavar="TEXT", help="subject and light")
    light.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid; default: common faults")
    light.add_argument(
        "--light",
        default="none",
        choices=("none", "left", "right", "top", "bottom"),
        help="direction the light comes from; default: %(default)s",
    )
    light.add_argument("--size", type=size, metavar="W,H", help="size of the first pass; default: about the model's")
    light.add_argument(
        "--strength", type=number, default=0.9, help="noise added to the initial light, 0 to 1; default: %(default)s"
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
    sampling.add_argument("--sampler", default="dpm_solver_pp", choices=SAMPLER_NAMES, help="default: %(default)s")
    steps = ", ".join(f"{name} {count}" for name, count in DEFAULT_STEPS.items())
    sampling.add_argument("--steps", type=int, help=f"steps of each pass; default: {steps}")
    sampling.add_argument("--guidance-scale", type=number, help="default: 2 without a background model, 7 with one")
    sampling.add_argument("--seed", type=int, nargs="+", default=[0], help="seed of the first sample, or of each")
    sampling.add_argument("--n-samples", type=int, default=1, help="default: %(default)s")
    shown = parser.add_argument_group("safety and provenance")
    shown.add_argument(
        "--safety",
        nargs="?",
        const="open-nsfw",
        metavar="FOLDER",
        help="drop results that a content filter flags: the folder of Stable Diffusion's safety checker, or %(const)s",
    )
    shown.add_argument(
        "--watermark", nargs="?", const="StableDiffusionV1", metavar="TEXT", help="mark results invisibly"
    )
    return parser


def number(text: str) -> float:
    """Parse a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text}, expected a finite number")
    return value


def size(text: str) -> tuple[int, int]:
    """Parse `W,H` as two positive numbers of pixels."""
    sides = [round(number(word)) for word in text.replace(",", " ").split()]
    if len(sides) != 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected two numbers of pixels: W,H")
    return sides[0], sides[1]


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.steps = DEFAULT_STEPS[args.sampler] if args.steps is None else args.steps
    if min(args.n_samples, args.steps) < 1:
        parser.error("--n-samples and --steps: expected 1 or more")
    if len(args.seed) > 1 and args.n_samples not in (1, len(args.seed)):
        parser.error(f"got {len(args.seed)} seeds for {args.n_samples} samples, expected one for each")
    try:
        return relight(args)
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


def relight(args: argparse.Namespace) -> int:
    """Relight a foreground, write the results and return the exit status: 1 if a filter dropped some of them."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image
    from tqdm import tqdm

    from ldm.checkpoint.io import sha256_file
    from ldm.editing.cli import save_results
    from ldm.editing.editor import Editor, checkpoint_file, pick_device, pick_dtype
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
    settings: dict[str, Any] = {
        "prompt": args.prompt,
        "light": args.light,
        "sampler": args.sampler,
        "num_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "strength": args.strength,
        "highres_scale": args.highres_scale,
        "highres_strength": args.highres_strength,
        "size": args.size,
    }
    if args.negative_prompt is not None:
        settings["negative_prompt"] = args.negative_prompt
    seeds = args.seed if len(args.seed) > 1 else [args.seed[0] + i for i in range(args.n_samples)]
    passes = 2 if args.highres_strength else 1
    with ThreadPoolExecutor(1) as beside, tqdm(total=passes * args.steps, desc="loading the model", unit="step") as bar:
        relighter = Relighter(
            Editor.from_pretrained(args.checkpoint, config=args.config, device=device, dtype=dtype).model
        )
        # Several seconds for a large file, while the device computes.
        digest = beside.submit(sha256_file, checkpoint_file(args.checkpoint))
        bar.set_description("painting")
        results = relighter.relight(
            foreground, background=background, seed=seeds, on_step=lambda *_: bar.update(), **settings
        )
    assert isinstance(results, list)
    num_made = len(results)
    seeds, results = drop_unsafe(content_filter, seeds, results, Image.new("L", results[0].size, 255))
    if args.watermark:
        results = [add_watermark(result, args.watermark) for result in results]
    record = settings | {
        "mode": "relight",
        "image": str(args.image),
        "mask": args.mask and str(args.mask),
        "background": args.background and str(args.background),
        **common_record(args, device.type, str(dtype).removeprefix("torch."), digest.result()),
    }
    named = {
        f"{args.image.stem}_relit_{seed}": (result, {"seed": seed}) for seed, result in zip(seeds, results, strict=True)
    }
    save_results(args.outdir, named, record, overwrite=args.overwrite)
    return 1 if len(results) < num_made else 0


def common_record(args: argparse.Namespace, device: str, precision: str, digest: str) -> dict[str, Any]:
    """Return the part of an image's metadata that names version, model, filter and precision."""
    from ldm import __version__

    return {
        "version": __version__,
        "checkpoint": str(args.checkpoint),
        "checkpoint_sha256": digest,
        "config": str(args.config or "beside the checkpoint"),
        "safety": args.safety,
        "watermark": args.watermark,
        "device": device,
        "precision": precision,
    }


if __name__ == "__main__":
    raise SystemExit(main())
