"""Edit a picture: replace the hole of a scene by what an exemplar shows, or what a prompt says.

    python inference.py                                    # the bundled example with the bundled model
    python inference.py --image scene.jpg --mask hole.png --reference dog.jpg
    python inference.py --image scene.jpg --box 120,80,360,300 --reference dog.jpg
    python inference.py --image scene.jpg --mask hole.png --prompt "a dog" --config … --checkpoint …   # docs/text.md
    python inference.py --jobs jobs.csv --batch-size 16    # a row for each edit: docs/editing.md
    python inference.py --plms --config configs/v1.yaml --checkpoint model.ckpt --image … --mask … --reference …

The options of the original's scripts/inference.py are accepted in its spelling too. The heavy imports
come after parsing, so that a wrong option costs no waiting.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ldm.editing.editor import Editor

SAMPLER_NAMES = ("dpm_solver_pp", "plms", "ddim", "unipc", "ddpm")
DEFAULT_STEPS = {"dpm_solver_pp": 20, "unipc": 20, "plms": 50, "ddim": 50, "ddpm": 250}
SINGLE = ("rank", "separate", "whole_image", "guidance_interval", "box", "polygon", "reference_mask", "control")
UNUSED_ORIGINAL = ("H", "W", "C", "f", "n_rows", "n_imgs")  # of the original's options: take a number, do nothing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    files = parser.add_argument_group("files", "none of the first three: the bundled example")
    files.add_argument("--image", "--image_path", type=Path, metavar="FILE", help="the scene, of any size")
    files.add_argument("--mask", "--mask_path", type=Path, metavar="FILE", help="white where the scene is repainted")
    files.add_argument(
        "--reference", "--reference_path", type=Path, nargs="+", metavar="FILE",
        help="the exemplar; several: one for each separate part of the hole, from top to bottom",
    )  # fmt: skip
    files.add_argument("--outdir", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s")
    files.add_argument("--overwrite", action="store_true", help="replace results of the same name; else number them")
    bulk = parser.add_argument_group("in bulk", "also: folders for --image, --mask and --reference, matched by name")
    bulk.add_argument("--jobs", type=Path, metavar="FILE", help="CSV or JSON lines, a row for each edit")
    bulk.add_argument("--batch-size", type=int, default=4, help="edits painted together; default: %(default)s")
    bulk.add_argument("--workers", type=int, default=2, help="threads that read, and that write; default: %(default)s")
    hole = parser.add_argument_group("hole", "instead of --mask; without any, the scene's transparent part")
    hole.add_argument("--box", type=numbers, action="append", default=[], metavar="X0,Y0,X1,Y1",
                      help="a rectangle, in pixels of the scene; may be given again")  # fmt: skip
    hole.add_argument("--polygon", type=numbers, action="append", default=[], metavar="X0,Y0,X1,Y1,X2,Y2,…",
                      help="the inside of an outline; may be given again")  # fmt: skip
    hole.add_argument("--grow", type=int, default=0, metavar="PX", help="widen the hole by so many pixels")
    hole.add_argument("--shape", default="given", choices=("given", "box", "arbitrary"),
                      help="make its parts boxes, or shapes drawn as in training; default: %(default)s")  # fmt: skip
    hole.add_argument("--separate", action="store_true",
                      help="edit separate parts one by one, each with a crop of its own")  # fmt: skip
    exemplar = parser.add_argument_group("exemplar")
    exemplar.add_argument("--reference-mask", type=Path, metavar="FILE",
                          help="white where its object is; default: its opaque part")  # fmt: skip
    exemplar.add_argument("--reference-background", default="keep", choices=("keep", "grey"),
                          help="of the object; default: %(default)s")  # fmt: skip
    exemplar.add_argument("--reference-fit", default="squash", choices=("squash", "pad"),
                          help="to the encoder's square; default: %(default)s, as the paper")  # fmt: skip
    text = parser.add_argument_group("text", "for models that read it, instead of --reference or beside it")
    text.add_argument("--prompt", metavar="TEXT", help="what to paint")
    text.add_argument("--negative-prompt", metavar="TEXT", help="what not; default: nothing in particular")
    control = parser.add_argument_group("control", "by ControlNets of Stable Diffusion v1; may be given again")
    control.add_argument("--control", type=Path, action="append", default=[], metavar="FILE", help="the network")
    control.add_argument(
        "--control-image", type=Path, action="append", default=[], metavar="FILE",
        help="what it reads, edges, depth, a pose …, of the scene's size; one for each network",
    )  # fmt: skip
    control.add_argument(
        "--control-scale", type=number, action="append", default=[], metavar="X", help="default: 1 for each"
    )
    control.add_argument("--guess-mode", action="store_true", help="follow it without words: scale 3 to 5 is advised")
    model = parser.add_argument_group("model", "the bundled small one unless named")
    model.add_argument("--checkpoint", "--ckpt", type=Path, metavar="FILE", help="weights, .ckpt or .safetensors")
    model.add_argument("--config", type=Path, metavar="FILE", help="their config; default: config.yaml beside them")
    model.add_argument(
        "--decoder", type=Path, metavar="PATH",
        help="of the first stage, one that sees the pixels that are kept: docs/asymmetric.md",
    )  # fmt: skip
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
        "--guidance-scale", "--scale", type=number, default=5.0, help="default: %(default)s (the original's script: 1)"
    )
    sampling.add_argument(
        "--guidance-interval", type=number, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
        help="noise levels with guidance, from 0, data, to 1, noise; default: all",
    )  # fmt: skip
    sampling.add_argument(
        "--eta", "--ddim_eta", type=number, default=0.0, help="ddim's stochasticity; default: %(default)s"
    )
    sampling.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="of the first sample, or of each; default: 0"
    )
    sampling.add_argument("--n-samples", "--n_samples", type=int, default=1, help="default: %(default)s")
    sampling.add_argument("--n_iter", type=int, default=1, help="repeats --n-samples with further seeds")
    sampling.add_argument(
        "--rank", nargs="?", const="efficientnet-lite0", metavar="NETWORK",
        help="best first: samples by their similarity to the exemplar, to a network of scripts/evaluate.py --features; "
        "default: %(const)s, whose weights come with the eval extra",
    )  # fmt: skip
    fit = parser.add_argument_group("fitting the scene to the model")
    fit.add_argument(
        "--crop-margin",
        "--context-margin",
        type=number,
        help="scene shown on each side, times the hole's size; default: the model's",
    )
    fit.add_argument(
        "--feather", type=int, metavar="PX", help="over which the hole's edge fades; default: its size / 50"
    )
    fit.add_argument(
        "--match-colors", "--colour-agreement", action=argparse.BooleanOptionalAction, default=True,
        help="correct what was decoded, so that its colours agree with the scene's at the hole's edge (default)",
    )  # fmt: skip
    fit.add_argument("--whole-image", action="store_true", help="show the model the whole scene, as the paper does")
    shown = parser.add_argument_group("safety and provenance")
    shown.add_argument(
        "--safety", nargs="?", const="open-nsfw", metavar="FOLDER",
        help="withhold what a content filter flags: the folder of Stable Diffusion's safety checker, or a small "
        "classifier, which comes with the safety extra",
    )  # fmt: skip
    shown.add_argument(
        "--watermark", nargs="?", const="StableDiffusionV1", metavar="TEXT",
        help="mark all of the picture invisibly, as the original does; default text: %(const)s",
    )  # fmt: skip
    parser.add_argument("--mode", default="edit", choices=("edit", "relight"), help=argparse.SUPPRESS)
    original = parser.add_argument_group(
        "accepted and ignored",
        "from the original's command line: the config knows the sizes, a scene keeps its own, seeds fix the noise",
    )
    for name in UNUSED_ORIGINAL:
        original.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    for name in ("fixed_code", "skip_save", "skip_grid"):
        original.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    return parser


def number(text: str) -> float:
    """A number, and a finite one."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text}, expected a finite number")
    return value


def numbers(text: str) -> list[float]:
    """`1,2,3` or `1,2 3,4` as numbers."""
    try:
        return [number(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers with commas between them") from None


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.mode == "relight":
        parser.error("--mode relight: relighting has a command of its own, scripts/relight.py")
    if args.sampler is None:
        args.sampler = "dpm_solver_pp" if args.ddim_steps is None else "ddim"
    given = [count for count in (args.steps, args.ddim_steps) if count is not None]
    args.steps = given[0] if given else DEFAULT_STEPS[args.sampler]
    in_bulk = args.jobs is not None or (args.image is not None and args.image.is_dir())
    if in_bulk:
        check_bulk(parser, args)
    scales = args.control_scale or [1.0] * len(args.control)
    if not len(args.control) == len(args.control_image) == len(scales):
        parser.error("--control: give a --control-image, and a --control-scale or none, for each")
    if args.guess_mode and not args.control:
        parser.error("--guess-mode: goes with --control")
    drawn = args.mask or args.box or args.polygon
    prompted = args.prompt is not None and not args.jobs
    if bool(args.image) != bool(args.reference or prompted) or (drawn and not args.image):
        parser.error(
            "got some of --image, --mask, --reference (or --prompt); give all three, or none for the bundled example"
        )
    if args.rank and args.image and not args.reference:
        parser.error("--rank: compares with an exemplar; give a --reference, too")
    if args.mask and (args.box or args.polygon):
        parser.error("got --mask and --box or --polygon; give either")
    if args.reference_mask and len(args.reference or ()) > 1:
        parser.error("--reference-mask: goes with a single --reference")
    if len(args.seed) > 1 and args.n_samples * args.n_iter not in (1, len(args.seed)):
        parser.error(f"got {len(args.seed)} seeds for {args.n_samples * args.n_iter} samples, expected one for each")
    if args.grow < 0:
        parser.error(f"--grow: got {args.grow}, expected 0 or more pixels")
    if args.config and not args.checkpoint:
        parser.error("got --config without --checkpoint; name the weights too (--checkpoint FILE)")
    if args.eta and args.sampler != "ddim":
        parser.error(f"--eta: got {args.eta} with the sampler {args.sampler}; only --sampler ddim uses it")
    if min(args.n_samples, args.n_iter, args.steps) < 1:
        parser.error("--n-samples, --n_iter and --steps: expected 1 or more")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return edit_many(args) if in_bulk else edit(args)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            from ldm.editing.editor import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            remedy = "a smaller --batch-size" if in_bulk else "fewer --n-samples"
            print(f"error: out of memory; use {remedy}, --precision bf16 or --device cpu", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted" + ("; the same command goes on from here" if in_bulk else ""), file=sys.stderr)
            return 130


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """End with a message where one of the options was given another value than its default."""
    wrong = [name for name in names if getattr(args, name) != parser.get_default(name)]
    if wrong:
        parser.error(f"{', '.join('--' + name.replace('_', '-') for name in wrong)}: {why}")


def check_bulk(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where options make no sense for many edits."""
    if args.jobs and (args.image or args.mask or args.reference):
        parser.error("--jobs: names all files itself; leave out --image, --mask and --reference")
    if not args.jobs and not (args.mask and args.reference and len(args.reference) == 1):
        parser.error(
            f"--image: {args.image} is a folder; give folders for --mask and --reference, too, or one exemplar"
        )
    why = "not for many edits at once; give rows of --jobs what they need"
    refuse(parser, args, SINGLE, why)
    if args.n_samples * args.n_iter > 1 or len(args.seed) > 1:
        parser.error(f"--n-samples, --n_iter and several seeds: {why}")
    if min(args.batch_size, args.workers) < 1:
        parser.error("--batch-size and --workers: expected 1 or more")


def edit_many(args: argparse.Namespace) -> int:
    """Edit the rows of a table, or folders, and return the exit status: 1 where rows failed.

    Under torchrun every process takes its share of the rows.
    """
    import os

    import torch

    from ldm import __version__
    from ldm.checkpoint.io import sha256_file
    from ldm.editing.batch import match_folders, read_jobs, run_jobs
    from ldm.editing.editor import checkpoint_file, pick_device, pick_dtype
    from ldm.editing.safety import load_filter
    from ldm.latent_diffusion import decoder_file

    defaults = {
        "seed": args.seed[0],
        "grow": args.grow,
        "shape": args.shape,
        "reference_background": args.reference_background,
        "reference_fit": args.reference_fit,
        "crop_margin": args.crop_margin,
        "feather": args.feather,
        "match_colors": args.match_colors,
        "sampler": args.sampler,
        "num_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "eta": args.eta,
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
    }
    if args.jobs:
        jobs = read_jobs(args.jobs, defaults)
    else:
        jobs = match_folders(args.image, args.mask, args.reference[0], defaults)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    editor = load_editor(args, device, dtype)
    about = {
        "version": __version__,
        "checkpoint_sha256": sha256_file(checkpoint_file(args.checkpoint)),
        "precision": str(dtype).removeprefix("torch."),
    }
    if args.decoder:
        about["decoder_sha256"] = sha256_file(decoder_file(args.decoder))
    args.outdir.mkdir(parents=True, exist_ok=True)
    report = run_jobs(
        editor,
        jobs[rank::processes],
        args.outdir,
        batch_size=args.batch_size,
        workers=args.workers,
        about=about,
        content_filter=load_filter(args.safety, device) if args.safety else None,
        watermark=args.watermark,
    )
    path = args.outdir / ("report.jsonl" if processes == 1 else f"report-{rank + 1}-of-{processes}.jsonl")
    report.write(path)
    for name, reason in report.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"{len(report.done)} done, {len(report.skipped)} there already, {len(report.failed)} failed; {path}")
    return 1 if report.failed else 0


def load_editor(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Editor:
    from ldm.editing.editor import Editor

    return Editor.from_pretrained(args.checkpoint, config=args.config, decoder=args.decoder, device=device, dtype=dtype)


def edit(args: argparse.Namespace) -> int:
    """Read the files, load the model, edit, write the results and return the exit status: 1 where some are withheld."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from ldm.checkpoint.io import sha256_file
    from ldm.editing.editor import (
        EXAMPLE_PARTS,
        as_rgb,
        checkpoint_file,
        given_hole,
        pick_device,
        pick_dtype,
        prepare_exemplar,
        upright,
    )
    from ldm.editing.results import contact_sheet, save_results
    from ldm.editing.safety import drop_unsafe, load_filter
    from ldm.editing.watermark import add_watermark, check_watermark
    from ldm.models.controlnet import Control

    name = args.image.stem if args.image else ""
    if not args.image:
        folder = bundled_example()
        name, (args.image, args.mask, *args.reference) = folder.name, (folder / f"{part}.png" for part in EXAMPLE_PARTS)
    # The files come first: a wrong path should not wait for a large model.
    scene = upright(args.image)
    holes = {"mask": args.mask, "boxes": args.box, "polygons": args.polygon, "grow": args.grow, "shape": args.shape}
    hole = given_hole(scene, scene.size, **holes, seed=args.seed[0])
    look = {"background": args.reference_background, "fit": args.reference_fit}
    exemplars = [prepare_exemplar(path, args.reference_mask, **look) for path in args.reference or ()]
    if args.watermark:
        check_watermark(scene.size, args.watermark)
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device)
    args.outdir.mkdir(parents=True, exist_ok=True)

    options: dict[str, Any] = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "sampler": args.sampler,
        "num_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": tuple(args.guidance_interval),
        "eta": args.eta,
        "crop_margin": args.crop_margin,
        "feather": args.feather,
        "match_colors": args.match_colors,
        "whole_image": args.whole_image,
        "separate": args.separate,
    }
    seeds = args.seed if len(args.seed) > 1 else [args.seed[0] + i for i in range(args.n_samples * args.n_iter)]
    content_filter = load_filter(args.safety, device) if args.safety else None
    network = None
    if args.rank:
        from ldm.evaluation.features import load_network

        network = load_network(args.rank, device)
    results: list[Image.Image] = []
    with (
        ThreadPoolExecutor(1) as beside,
        tqdm(total=args.n_iter * args.steps, desc="loading the model", unit="step") as bar,
    ):
        editor = load_editor(args, device, dtype)

        # Several seconds for a large file, while the device paints.
        digest = beside.submit(sha256_file, checkpoint_file(args.checkpoint))

        def on_step(_step: int, num_steps: int, *_: object) -> None:
            bar.total = args.n_iter * num_steps  # some step counts are rounded up
            bar.update()

        if options["crop_margin"] is None:
            options["crop_margin"] = editor.model.config.crop_margin
        scales = args.control_scale or [1.0] * len(args.control)
        controls = [
            Control(editor.load_controlnet(path), picture, scale, args.guess_mode)
            for path, picture, scale in zip(args.control, args.control_image, scales, strict=True)
        ]
        bar.set_description("painting")
        size = max(args.n_samples, len(args.seed))
        for i in range(0, len(seeds), size):
            batch = seeds[i : i + size]
            shown = exemplars if len(exemplars) > 1 else exemplars[0] if exemplars else None
            edited = editor.edit(scene, hole, shown, seed=batch, controls=controls, on_step=on_step, **options)
            results += edited if isinstance(edited, list) else [edited]

    settings = options | {
        "image": str(args.image),
        "mask": str(args.mask or "drawn"),
        "box": args.box,
        "polygon": args.polygon,
        "grow": args.grow,
        "shape": args.shape,
        "reference": [str(path) for path in args.reference or ()],
        "reference_mask": args.reference_mask and str(args.reference_mask),
        "reference_background": args.reference_background,
        "reference_fit": args.reference_fit,
        "control": [str(path) for path in args.control],
        "control_image": [str(path) for path in args.control_image],
        "control_scale": args.control_scale,
        "guess_mode": args.guess_mode,
        "decoder": args.decoder and str(args.decoder),
        **common_settings(args, device, dtype, digest.result()),
    }
    num_made = len(results)
    seeds, results = drop_unsafe(content_filter, seeds, results, hole)
    if not results:
        return 1
    details: list[dict[str, Any]] = [{"seed": seed} for seed in seeds]
    if network is not None:
        from ldm.evaluation.metrics import region_similarities

        scores = region_similarities(network, results, hole, exemplars)
        details = [detail | {"similarity": round(score, 2)} for detail, score in zip(details, scores, strict=True)]
        order = sorted(range(len(seeds)), key=lambda i: -scores[i])
        seeds, results = [seeds[i] for i in order], [results[i] for i in order]
        details = [details[i] for i in order]
        print(f"similarity to the exemplar by {network.name}, best first:")
        print("\n".join(f"  {detail['similarity']:6.2f}  seed {detail['seed']}" for detail in details))
    if args.watermark:
        results = [add_watermark(result, args.watermark) for result in results]
    pictures = {f"{name}_{seed}": (image, detail) for seed, image, detail in zip(seeds, results, details, strict=True)}
    if not args.skip_grid:
        pictures[f"{name}_{args.seed[0]}_grid"] = (
            contact_sheet(as_rgb(scene), hole, exemplars, results),
            {"seed": seeds},
        )
    save_results(args.outdir, pictures, settings, overwrite=args.overwrite)
    return 1 if len(results) < num_made else 0


def common_settings(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, digest: str) -> dict[str, Any]:
    """Of a picture's metadata what every mode writes."""
    from ldm import __version__

    return {
        "version": __version__,
        "checkpoint": str(args.checkpoint or "bundled"),
        "checkpoint_sha256": digest,
        "config": str(args.config or "beside the checkpoint"),
        "safety": args.safety,
        "watermark": args.watermark,
        "device": device.type,
        "precision": str(dtype).removeprefix("torch."),
    }


def bundled_example() -> Path:
    """The folder of the first bundled example."""
    from ldm.editing.editor import BUNDLED_MODEL, bundled_examples

    for folder in bundled_examples():
        return folder
    raise UserError(
        f"{BUNDLED_MODEL / 'examples'}: the bundled example is not there; give --image, --mask and --reference"
    )


if __name__ == "__main__":
    raise SystemExit(main())
