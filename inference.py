"""Edit a picture: replace the hole of a scene by what an exemplar shows.

    python inference.py                                    # the bundled example with the bundled model
    python inference.py --image scene.jpg --mask hole.png --reference dog.jpg
    python inference.py --plms --config configs/v1.yaml --checkpoint model.ckpt --image … --mask … --reference …

The options of the original's scripts/inference.py are accepted in its spelling too. The heavy imports
come after parsing, so that a wrong option costs no waiting.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

SAMPLER_NAMES = ("dpm_solver_pp", "plms", "ddim", "unipc", "ddpm")
DEFAULT_STEPS = {"dpm_solver_pp": 20, "unipc": 20, "plms": 50, "ddim": 50, "ddpm": 250}
TILE_HEIGHT = (256, 512)  # pixels, least and most in the grid
UNUSED_ORIGINAL = ("H", "W", "C", "f", "n_rows", "n_imgs")  # of the original's options: take a number, do nothing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    files = parser.add_argument_group("files", "none of the first three: the bundled example")
    files.add_argument("--image", "--image_path", type=Path, metavar="FILE", help="the scene, of any size")
    files.add_argument("--mask", "--mask_path", type=Path, metavar="FILE", help="white where the scene is repainted")
    files.add_argument("--reference", "--reference_path", type=Path, metavar="FILE", help="the exemplar")
    files.add_argument("--outdir", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s")
    files.add_argument("--overwrite", action="store_true", help="replace results of the same name; else number them")
    model = parser.add_argument_group("model", "the bundled small one unless named")
    model.add_argument("--checkpoint", "--ckpt", type=Path, metavar="FILE", help="weights, .ckpt or .safetensors")
    model.add_argument("--config", type=Path, metavar="FILE", help="their config; default: config.yaml beside them")
    model.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    model.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "fp16", "full", "autocast"),
        help="of the weights; the original's full is fp32, its autocast fp16 on a GPU and fp32 elsewhere",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sampler", choices=SAMPLER_NAMES, help="default: dpm_solver_pp")
    sampling.add_argument(
        "--plms", dest="sampler", action="store_const", const="plms", help="the paper's: --sampler plms"
    )
    steps = ", ".join(f"{name} {count}" for name, count in DEFAULT_STEPS.items())
    sampling.add_argument("--steps", type=int, help=f"default: {steps}")
    sampling.add_argument("--ddim_steps", type=int, help="steps; without a sampler also --sampler ddim")
    sampling.add_argument(
        "--guidance-scale", "--scale", type=float, default=5.0, help="default: %(default)s (the original's script: 1)"
    )
    sampling.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="noise levels with guidance, from 0, data, to 1, noise; default: all",
    )  # fmt: skip
    sampling.add_argument(
        "--eta", "--ddim_eta", type=float, default=0.0, help="ddim's stochasticity; default: %(default)s"
    )
    sampling.add_argument("--seed", type=int, default=0, help="of the first sample; default: %(default)s")
    sampling.add_argument("--n-samples", "--n_samples", type=int, default=1, help="default: %(default)s")
    sampling.add_argument("--n_iter", type=int, default=1, help="repeats --n-samples with further seeds")
    fit = parser.add_argument_group("fitting the scene to the model")
    fit.add_argument(
        "--context-margin", type=float, help="scene shown on each side, times the hole's size; default: the model's"
    )
    fit.add_argument("--feather", type=int, default=0, help="pixels over which the hole's edge fades; %(default)s")
    fit.add_argument("--whole-image", action="store_true", help="show the model the whole scene, as the paper does")
    original = parser.add_argument_group(
        "accepted and ignored",
        "from the original's command line: the config knows the sizes, a scene keeps its own, seeds fix the noise",
    )
    for name in UNUSED_ORIGINAL:
        original.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    for name in ("fixed_code", "skip_save", "skip_grid"):
        original.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.sampler is None:
        args.sampler = "dpm_solver_pp" if args.ddim_steps is None else "ddim"
    given = [count for count in (args.steps, args.ddim_steps) if count is not None]
    args.steps = given[0] if given else DEFAULT_STEPS[args.sampler]
    files = [args.image, args.mask, args.reference]
    if any(files) and not all(files):
        parser.error("got some of --image, --mask, --reference; give all three, or none for the bundled example")
    if args.config and not args.checkpoint:
        parser.error("got --config without --checkpoint; name the weights too (--checkpoint FILE)")
    if args.eta and args.sampler != "ddim":
        parser.error(f"--eta: got {args.eta} with the sampler {args.sampler}; only --sampler ddim uses it")
    if min(args.n_samples, args.n_iter, args.steps) < 1:
        parser.error("--n-samples, --n_iter and --steps: expected 1 or more")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            edit(args)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            from ldm.editing import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            print("error: out of memory; use fewer --n-samples, --precision bf16 or --device cpu", file=sys.stderr)
            return 2
    return 0


def edit(args: argparse.Namespace) -> None:
    """Read the files, load the model, edit, and write the results."""
    import torch
    from tqdm import tqdm

    from ldm import __version__
    from ldm.editing import EXAMPLE_PARTS, Editor, as_hole, as_rgb, pick_device, save_png

    name = args.image.stem if args.image else ""
    if not args.image:
        folder = bundled_example()
        name, args.image, args.mask, args.reference = folder.name, *(folder / f"{part}.png" for part in EXAMPLE_PARTS)
    # The files come first: a wrong path should not wait for a large model.
    scene, hole, exemplar = as_rgb(args.image), as_hole(args.mask), as_rgb(args.reference)
    device = pick_device(args.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision, torch.float32)
    if args.precision == "autocast" and device.type == "cuda":
        dtype = torch.float16
    args.outdir.mkdir(parents=True, exist_ok=True)

    options: dict[str, Any] = {
        "sampler": args.sampler,
        "num_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": tuple(args.guidance_interval),
        "eta": args.eta,
        "context_margin": args.context_margin,
        "feather": args.feather,
        "whole_image": args.whole_image,
    }
    seeds = [args.seed + i for i in range(args.n_samples * args.n_iter)]
    results: list[Image.Image] = []
    with tqdm(total=args.n_iter * args.steps, desc="loading the model", unit="step") as bar:
        editor = Editor.from_pretrained(args.checkpoint, config=args.config, device=device, dtype=dtype)

        def on_step(_step: int, num_steps: int, *_: object) -> None:
            bar.total = args.n_iter * num_steps  # some step counts are rounded up
            bar.update()

        if options["context_margin"] is None:
            options["context_margin"] = editor.model.config.context_margin
        bar.set_description("painting")
        for i in range(0, len(seeds), args.n_samples):
            batch = seeds[i : i + args.n_samples]
            edited = editor.edit(scene, hole, exemplar, seed=batch, on_step=on_step, **options)
            results += edited if isinstance(edited, list) else [edited]

    settings = options | {
        "version": __version__,
        "image": str(args.image),
        "mask": str(args.mask),
        "reference": str(args.reference),
        "checkpoint": str(args.checkpoint or "bundled"),
        "config": str(args.config or "beside the checkpoint"),
        "device": device.type,
        "precision": str(dtype).removeprefix("torch."),
    }
    pictures = {f"{name}_{seed}": (image, {"seed": seed}) for seed, image in zip(seeds, results, strict=True)}
    if not args.skip_grid:
        pictures[f"{name}_{args.seed}_grid"] = (side_by_side(scene, hole, exemplar, results), {"seed": seeds})
    suffix = "" if args.overwrite else free_suffix(args.outdir, list(pictures))
    for stem, (image, seed) in pictures.items():
        path = args.outdir / f"{stem}{suffix}.png"
        replaced = path.exists()
        save_png(image, path, {"parameters": json.dumps(settings | seed)})
        print(f"{'overwrote' if replaced else 'wrote'} {path}")
    if suffix:
        print(f"kept the earlier results of the same name; these end in {suffix} (--overwrite replaces them)")


def bundled_example() -> Path:
    """The folder of the first bundled example."""
    from ldm.editing import BUNDLED_MODEL, EditingError, bundled_examples

    for folder in bundled_examples():
        return folder
    raise EditingError(
        f"{BUNDLED_MODEL / 'examples'}: the bundled example is not there; give --image, --mask and --reference"
    )


def free_suffix(folder: Path, stems: list[str]) -> str:
    """Nothing, or the first of _v2, _v3 … with which none of the names is taken in the folder."""
    number = 1
    while any((folder / f"{stem}{f'_v{number}' if number > 1 else ''}.png").exists() for stem in stems):
        number += 1
    return f"_v{number}" if number > 1 else ""


def side_by_side(
    scene: Image.Image, hole: Image.Image, exemplar: Image.Image, results: list[Image.Image]
) -> Image.Image:
    """Scene, scene with its hole, exemplar and results, in one row of equal height."""
    from PIL import Image

    from ldm.data.transforms import MID_GREY

    height = min(max(scene.height, TILE_HEIGHT[0]), TILE_HEIGHT[1])

    def tile(image: Image.Image) -> Image.Image:
        width = min(max(round(image.width * height / image.height), 1), 4 * height)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    tiles = [tile(image) for image in (scene, scene, exemplar, *results)]
    tiles[1].paste(MID_GREY, mask=hole.resize(tiles[1].size, Image.Resampling.NEAREST))
    gap = 8
    grid = Image.new("RGB", (sum(t.width + gap for t in tiles) - gap, height), "white")
    left = 0
    for image in tiles:
        grid.paste(image, (left, 0))
        left += image.width + gap
    return grid


if __name__ == "__main__":
    raise SystemExit(main())
