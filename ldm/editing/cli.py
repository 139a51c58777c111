"""The command line of `inference.py`: one edit, or many.

Heavy imports come after parsing, so that a wrong option costs no waiting.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.editing.settings import EditSettings, add_options, given_options
from ldm.files import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ldm.editing.editor import Editor
    from ldm.editing.request import EditRequest

UNUSED_ORIGINAL = ("H", "W", "C", "f", "n_rows", "n_imgs")  # options of the original that take a number and do nothing
# Settings and options for a single edit only.
SINGLE_SETTINGS = ("n_samples", "per_component")
SINGLE_OPTIONS = ("sort_by_similarity", "box", "polygon", "reference_mask", "control")
MIN_TILE_HEIGHT, MAX_TILE_HEIGHT, SHEET_COLUMNS, SHEET_GAP = 256, 512, 6, 8  # of the contact sheet; pixels, tiles

# ---- parsing ----


def build_parser(description: str) -> argparse.ArgumentParser:
    """Build the parser of all options."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument_group("files", "without the first three: the bundled example").add_argument
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    add("--image", "--image_path", help="the scene, of any size", **file)
    add("--mask", "--mask_path", help="white where the scene is repainted", **file)
    add("--reference", "--reference_path", nargs="+", help="the exemplar, or one per component of the hole", **file)
    add("--outdir", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace results of the same name; else number them")
    add = parser.add_argument_group("many edits", "or folders for the files above, matched by name").add_argument
    add("--jobs", help="CSV or JSON lines, a row for each edit: docs/editing.md", **file)
    add("--batch-size", type=int, default=4, help="edits painted together; default: %(default)s")
    add("--workers", type=int, default=2, help="threads that read, and threads that write; default: %(default)s")
    hole = parser.add_argument_group("hole", "instead of --mask; without any, the scene's transparent part")
    outline: dict[str, Any] = {"type": numbers, "action": "append", "default": []}
    hole.add_argument("--box", metavar="X0,Y0,X1,Y1", help="a rectangle; repeatable", **outline)
    hole.add_argument("--polygon", metavar="X0,Y0,X1,Y1,X2,Y2,…", help="an outline; repeatable", **outline)
    add_options(hole, "dilate", "mask_shape", "per_component")
    exemplar = parser.add_argument_group("exemplar")
    exemplar.add_argument("--reference-mask", help="white where its object is; default: its opaque part", **file)
    add_options(exemplar, "reference_background", "reference_fit")
    text = parser.add_argument_group("text", "for models that read it, instead of --reference or with it")
    add_options(text, "prompt", "negative_prompt")
    sampling = parser.add_argument_group("sampling")
    add_options(sampling, "sampler", "num_steps", "guidance_scale", "guidance_interval", "eta", "seed", "n_samples")
    add_plms(sampling)
    sampling.add_argument("--ddim_steps", type=int, help="steps; without a sampler also --sampler ddim")
    sampling.add_argument("--n_iter", type=int, default=1, help="repeats --n-samples with further seeds")
    network: dict[str, Any] = {"nargs": "?", "const": "efficientnet-lite0", "metavar": "NETWORK"}
    similarity = "best first, by features of a network of scripts/evaluate.py; default: %(const)s, from the eval extra"
    sampling.add_argument("--sort-by-similarity", "--rank", help=similarity, **network)
    fit = parser.add_argument_group("fitting the scene to the model")
    add_options(fit, "crop_margin", "whole_image", "feather", "match_colors", "paste_back")
    _add_control_options(parser)
    add_model_options(parser.add_argument_group("model", "the bundled small one by default"))
    _add_provenance_options(parser)
    _add_original_options(parser)
    return parser


def add_plms(group: Any) -> None:
    """Add the original's `--plms`."""
    plms: dict[str, Any] = {"dest": "sampler", "action": "store_const", "const": "plms", "default": argparse.SUPPRESS}
    group.add_argument("--plms", help="the paper's: --sampler plms", **plms)


def add_model_options(group: Any) -> None:
    """Add the options that choose the model, its device and precision."""
    add = group.add_argument
    add("--checkpoint", "--ckpt", type=Path, metavar="FILE", help="weights, .ckpt or .safetensors")
    add("--config", type=Path, metavar="FILE", help="their config; default: config.yaml beside them")
    add("--decoder", type=Path, metavar="PATH", help="a decoder that reads the kept pixels: docs/asymmetric.md")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    precision = "of the weights; the original's full is fp32, its autocast fp16 on a GPU and fp32 elsewhere"
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16", "full", "autocast"), help=precision)


def _add_control_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("control", "by ControlNets of Stable Diffusion v1; repeatable").add_argument
    file: dict[str, Any] = {"type": Path, "action": "append", "default": [], "metavar": "FILE"}
    add("--control", help="the network", **file)
    add("--control-image", help="its hint image (edges, depth, a pose …) of the scene's size", **file)
    add("--control-scale", type=number, action="append", default=[], metavar="X", help="default: 1 for each")
    add("--guess-mode", action="store_true", help="follow the hint without words; a scale of 3 to 5 is advised")


def _add_provenance_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("safety and provenance").add_argument
    safety = "withhold what a content filter flags: the folder of Stable Diffusion's safety checker, or %(const)s"
    add("--safety", nargs="?", const="open-nsfw", metavar="FOLDER", help=safety)
    mark = "mark the whole image invisibly, as the original does; default text: %(const)s"
    add("--watermark", nargs="?", const="StableDiffusionV1", metavar="TEXT", help=mark)


def _add_original_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the original that have no effect: configs know the sizes, and seeds fix the noise."""
    parser.add_argument("--mode", default="edit", choices=("edit", "relight"), help=argparse.SUPPRESS)
    for name in UNUSED_ORIGINAL:
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    for name in ("fixed_code", "skip_save"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip_grid", action="store_true", help="write no contact sheet")


def number(text: str) -> float:
    """Parse a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text}, expected a finite number")
    return value


def numbers(text: str) -> list[float]:
    """Parse `1,2,3` or `1,2 3,4`."""
    try:
        return [number(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers with commas between them") from None


def parse(argv: list[str] | None, description: str) -> tuple[argparse.Namespace, EditSettings]:
    """Parse and check the command line.

    Returns:
        The options, with `is_bulk`, and the settings of all samples.
    """
    parser = build_parser(description)
    args = parser.parse_args(argv)
    if args.mode == "relight":
        parser.error("--mode relight: relighting has a command of its own, scripts/relight.py")
    args.is_bulk = args.jobs is not None or (args.image is not None and args.image.is_dir())
    given = given_options(args)
    if args.ddim_steps is not None:
        given = {"sampler": "ddim", "num_steps": args.ddim_steps} | given
    args.samples_per_call = given.get("n_samples", 1)
    try:
        given["n_samples"] = args.samples_per_call * args.n_iter
        settings = EditSettings(**given)
    except UserError as error:
        parser.error(str(error))
    if args.is_bulk:
        _check_bulk(parser, args, settings)
    _check_files(parser, args, settings)
    args.control_scale = args.control_scale or [1.0] * len(args.control)
    if not len(args.control) == len(args.control_image) == len(args.control_scale):
        parser.error("--control: give a --control-image, and a --control-scale or none, for each")
    if args.guess_mode and not args.control:
        parser.error("--guess-mode: goes with --control")
    return args, settings


def _check_files(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: EditSettings) -> None:
    is_conditioned = bool(args.reference) or (settings.prompt is not None and not args.jobs)
    if bool(args.image) != is_conditioned or ((args.mask or args.box or args.polygon) and not args.image):
        parser.error(
            "got some of --image, --mask, --reference (or --prompt); give all three, or none for the bundled example"
        )
    if args.sort_by_similarity and args.image and not args.reference:
        parser.error("--sort-by-similarity: compares with an exemplar; give a --reference, too")
    if args.mask and (args.box or args.polygon):
        parser.error("got --mask and --box or --polygon; give either")
    if args.reference_mask and len(args.reference or ()) > 1:
        parser.error("--reference-mask: goes with a single --reference")
    if args.config and not args.checkpoint:
        parser.error("got --config without --checkpoint; name the weights too (--checkpoint FILE)")


def _check_bulk(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: EditSettings) -> None:
    if args.jobs and (args.image or args.mask or args.reference):
        parser.error("--jobs: names all files itself; leave out --image, --mask and --reference")
    if not args.jobs and not (args.mask and args.reference and len(args.reference) == 1):
        parser.error(
            f"--image: {args.image} is a folder; give folders for --mask and --reference, too, or one exemplar"
        )
    single = [name for name in SINGLE_OPTIONS if getattr(args, name)]
    single += [name for name in SINGLE_SETTINGS if name in settings.changed()]
    single += ["seed"] if isinstance(settings.seed, tuple) else []
    if single:
        names = ", ".join("--" + name.replace("_", "-") for name in single)
        parser.error(f"{names}: not for many edits at once; give rows of --jobs what they need")
    if min(args.batch_size, args.workers) < 1:
        parser.error("--batch-size and --workers: expected 1 or more")


def main(argv: list[str] | None = None, description: str = "Replace the hole of a scene by an exemplar.") -> int:
    """Edit, and return the exit status: 0, 1 if results are missing or withheld, 2 on errors."""
    args, settings = parse(argv, description)
    remedy = "a smaller --batch-size" if args.is_bulk else "fewer --n-samples"
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return edit_bulk(args, settings) if args.is_bulk else edit(args, settings)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            from ldm.editing.editor import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            print(f"error: out of memory; use {remedy}, --precision bf16 or --device cpu", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted" + ("; the same command goes on from here" if args.is_bulk else ""), file=sys.stderr)
            return 130


# ---- many edits ----


def edit_bulk(args: argparse.Namespace, settings: EditSettings) -> int:
    """Edit the rows of a table, or folders, and return the exit status: 1 if rows failed.

    Under torchrun every process takes its share of the rows.
    """
    from ldm.checkpoint.io import sha256_file
    from ldm.editing.batch import edit_many, match_folders, process_rank, read_jobs
    from ldm.editing.editor import checkpoint_file, pick_device, pick_dtype
    from ldm.editing.safety import load_filter

    if args.jobs:
        jobs = read_jobs(args.jobs, settings)
    else:
        jobs = match_folders(args.image, args.mask, args.reference[0], settings)
    rank, processes = process_rank()
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device)
    editor = load_editor(args, device, dtype)
    args.outdir.mkdir(parents=True, exist_ok=True)
    report = edit_many(
        editor,
        jobs[rank::processes],
        args.outdir,
        batch_size=args.batch_size,
        workers=args.workers,
        metadata=model_metadata(args, dtype, sha256_file(checkpoint_file(args.checkpoint))),
        content_filter=load_filter(args.safety, device) if args.safety else None,
        watermark=args.watermark,
    )
    path = args.outdir / ("report.jsonl" if processes == 1 else f"report-{rank + 1}-of-{processes}.jsonl")
    report.write(path)
    for name, reason in report.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"{len(report.done)} done, {len(report.skipped)} there already, {len(report.failed)} failed; {path}")
    return 1 if report.failed else 0


def model_metadata(args: argparse.Namespace, dtype: torch.dtype, digest: str) -> dict[str, Any]:
    """Return what decides images besides job and settings: version, weights, precision."""
    from ldm import __version__
    from ldm.checkpoint.io import sha256_file
    from ldm.latent_diffusion import decoder_file

    metadata = {
        "version": __version__,
        "checkpoint_sha256": digest,
        "precision": str(dtype).removeprefix("torch."),
    }
    if args.decoder:
        metadata["decoder_sha256"] = sha256_file(decoder_file(args.decoder))
    return metadata


def load_editor(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Editor:
    from ldm.editing.editor import Editor

    return Editor.from_pretrained(args.checkpoint, config=args.config, decoder=args.decoder, device=device, dtype=dtype)


# ---- one edit ----


def edit(args: argparse.Namespace, settings: EditSettings) -> int:
    """Read the files, load the model, edit, write the results; return 1 if a content filter withheld some."""
    from ldm.editing.editor import pick_device, pick_dtype
    from ldm.editing.request import as_rgb, make_request
    from ldm.editing.safety import drop_unsafe, load_filter
    from ldm.editing.watermark import add_watermark, check_watermark

    name = args.image.stem if args.image else use_bundled_example(args)
    # The files come first: a wrong path should not wait for a large model.
    references = args.reference or [None]
    request = make_request(
        args.image,
        references if len(references) > 1 else references[0],
        settings,
        mask=args.mask,
        boxes=args.box,
        polygons=args.polygon,
        reference_mask=args.reference_mask,
    )
    if args.watermark:
        check_watermark(request.scene.size, args.watermark)
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device)
    args.outdir.mkdir(parents=True, exist_ok=True)
    content_filter = load_filter(args.safety, device) if args.safety else None
    network = None
    if args.sort_by_similarity:
        from ldm.evaluation.features import load_network

        network = load_network(args.sort_by_similarity, device)

    results, record = paint(args, request, device, dtype)
    seeds, safe = drop_unsafe(content_filter, settings.seeds, results, request.hole)
    if not safe:
        return 1
    exemplars = [image for image in request.exemplars if image is not None]
    details: list[dict[str, Any]] = [{"seed": seed} for seed in seeds]
    if network is not None:
        from ldm.evaluation.metrics import region_similarities

        scores = region_similarities(network, safe, request.hole, exemplars)
        order = sorted(range(len(seeds)), key=lambda i: -scores[i])
        safe = [safe[i] for i in order]
        details = [details[i] | {"similarity": round(scores[i], 2)} for i in order]
        print(f"similarity to the exemplar by {network.name}, best first:")
        print("\n".join(f"  {detail['similarity']:6.2f}  seed {detail['seed']}" for detail in details))
    if args.watermark:
        safe = [add_watermark(result, args.watermark) for result in safe]
    named = {f"{name}_{detail['seed']}": (result, detail) for result, detail in zip(safe, details, strict=True)}
    if not args.skip_grid:
        sheet = contact_sheet(as_rgb(args.image), request.hole, exemplars, safe)
        named[f"{name}_{settings.seeds[0]}_grid"] = (sheet, {"seed": [detail["seed"] for detail in details]})
    save_results(args.outdir, named, record, overwrite=args.overwrite)
    return 1 if len(safe) < len(results) else 0


def paint(
    args: argparse.Namespace, request: EditRequest, device: torch.device, dtype: torch.dtype
) -> tuple[list[Image.Image], dict[str, Any]]:
    """Load the model and paint all samples, with a progress bar.

    Returns:
        The results, and the metadata of all of them.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from ldm.checkpoint.io import sha256_file
    from ldm.editing.editor import checkpoint_file
    from ldm.models.controlnet import Control

    settings, results = request.settings, []
    with (
        ThreadPoolExecutor(1) as hashing,
        tqdm(total=args.n_iter * settings.steps, desc="loading the model", unit="step") as bar,
    ):
        editor = load_editor(args, device, dtype)
        # Hashing a large file takes several seconds; meanwhile the device paints.
        digest = hashing.submit(sha256_file, checkpoint_file(args.checkpoint))

        def on_step(_step: int, num_steps: int, *_: object) -> None:
            bar.total = args.n_iter * num_steps  # samplers round some step counts up
            bar.update()

        controls = [
            Control(editor.load_controlnet(path), hint, scale, args.guess_mode)
            for path, hint, scale in zip(args.control, args.control_image, args.control_scale, strict=True)
        ]
        bar.set_description("painting")
        for seeds in _calls(args, settings):
            part = replace(settings, seed=seeds, n_samples=len(seeds))
            results += editor.edit_request(replace(request, settings=part), controls=controls, on_step=on_step)
        record = settings.record()
        if settings.crop_margin is None:
            record["crop_margin"] = editor.model.config.crop_margin
        record |= input_metadata(args) | model_metadata(args, dtype, digest.result()) | {"device": device.type}
    return results, record


def _calls(args: argparse.Namespace, settings: EditSettings) -> Iterator[tuple[int, ...]]:
    """Yield the seeds that are painted together: all listed ones, or `--n-samples` of them `--n_iter` times."""
    size = len(settings.seeds) if isinstance(settings.seed, tuple) else args.samples_per_call
    for i in range(0, len(settings.seeds), size):
        yield tuple(settings.seeds[i : i + size])


def input_metadata(args: argparse.Namespace) -> dict[str, Any]:
    """Return the files of a single edit for its metadata."""
    paths = {name: getattr(args, name) for name in ("reference_mask", "decoder")}
    lists = {name: getattr(args, name) or [] for name in ("reference", "control", "control_image")}
    return {
        "image": str(args.image),
        "mask": str(args.mask or "drawn"),
        "box": args.box,
        "polygon": args.polygon,
        **{name: [str(path) for path in paths] for name, paths in lists.items()},
        **{name: path and str(path) for name, path in paths.items()},
        "control_scale": args.control_scale,
        "guess_mode": args.guess_mode,
        "checkpoint": str(args.checkpoint or "bundled"),
        "config": str(args.config or "beside the checkpoint"),
        "safety": args.safety,
        "watermark": args.watermark,
    }


def use_bundled_example(args: argparse.Namespace) -> str:
    """Set scene, mask and exemplar to those of the first bundled example; return its name."""
    from ldm.editing.editor import BUNDLED_MODEL, EXAMPLE_PARTS, bundled_examples

    for folder in bundled_examples():
        args.image, args.mask, *args.reference = (folder / f"{part}.png" for part in EXAMPLE_PARTS)
        return folder.name
    raise UserError(
        f"{BUNDLED_MODEL / 'examples'}: the bundled example is not there; give --image, --mask and --reference"
    )


# ---- results ----


def save_results(
    folder: Path,
    images: Mapping[str, tuple[Image.Image, Mapping[str, Any]]],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write PNGs and report them; without `overwrite` all are numbered if one of the names is taken.

    Args:
        images: by stem, each with metadata of its own.
        record: metadata of all of them.

    Raises:
        OSError: a file cannot be written.
    """
    from ldm.images import save_png

    suffix = "" if overwrite else _free_suffix(folder, list(images))
    for stem, (image, detail) in images.items():
        path = folder / f"{stem}{suffix}.png"
        verb = "overwrote" if path.exists() else "wrote"
        save_png(image, path, {"parameters": json.dumps({**record, **detail})})
        print(f"{verb} {path}")
    if suffix:
        print(f"kept the earlier results of the same name; these end in {suffix} (--overwrite replaces them)")


def _free_suffix(folder: Path, stems: Sequence[str]) -> str:
    """Return "", or the first of _v2, _v3 … with which none of the names is taken in the folder."""
    suffix, version = "", 1
    while any((folder / f"{stem}{suffix}.png").exists() for stem in stems):
        version += 1
        suffix = f"_v{version}"
    return suffix


def contact_sheet(
    scene: Image.Image, hole: Image.Image, exemplars: Sequence[Image.Image], results: Sequence[Image.Image]
) -> Image.Image:
    """Lay out scene, scene with its hole, exemplars and results at equal height, SHEET_COLUMNS to a row."""
    from PIL import Image

    from ldm.images import MID_GREY

    height = min(max(scene.height, MIN_TILE_HEIGHT), MAX_TILE_HEIGHT)

    def tile(image: Image.Image) -> Image.Image:
        width = min(max(round(image.width * height / image.height), 1), 4 * height)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    tiles = [tile(image) for image in (scene, scene, *exemplars, *results)]
    tiles[1].paste(MID_GREY, mask=hole.resize(tiles[1].size, Image.Resampling.NEAREST))
    rows = [tiles[i : i + SHEET_COLUMNS] for i in range(0, len(tiles), SHEET_COLUMNS)]
    width = max(sum(image.width + SHEET_GAP for image in row) for row in rows) - SHEET_GAP
    sheet = Image.new("RGB", (width, len(rows) * (height + SHEET_GAP) - SHEET_GAP), "white")
    for number, row in enumerate(rows):
        left = 0
        for image in row:
            sheet.paste(image, (left, number * (height + SHEET_GAP)))
            left += image.width + SHEET_GAP
    return sheet
