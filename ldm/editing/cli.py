"""The command line of `inference.py`: one edit, or many.

Heavy imports come after parsing, so that a wrong option costs no waiting.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import chain, count
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.editing.settings import EditSettings, add_options, given_options, numbers
from ldm.files import UserError, check_writable, claimed

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ldm.editing.editor import Editor

# Options for a single edit only.
SINGLE_OPTIONS = ("sort_by_similarity", "box", "polygon", "reference_mask", "control")
# Options that go into the metadata of a single edit; paths become text.
RECORDED = ("image", "box", "polygon", "reference_mask", "decoder", "control", "control_image", "control_scale")
RECORDED += ("guess_mode", "safety", "watermark")
MIN_TILE_HEIGHT, MAX_TILE_HEIGHT, SHEET_COLUMNS, SHEET_GAP = 256, 512, 6, 8  # of the contact sheet; pixels, tiles
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
# Parameters of mallopt(3): M_MMAP_MAX none, M_TRIM_THRESHOLD never, M_TOP_PAD bytes, by which the heap grows at least.
MALLOPT = {-4: 0, -1: -1, -2: 64 * 2**20}


def build_parser(description: str) -> argparse.ArgumentParser:
    """Build the parser of all options."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    files = parser.add_argument_group("files", "without the first three: the bundled example")
    files.add_argument("--image", "--image_path", help="the scene, of any size", **FILE)
    files.add_argument("--mask", "--mask_path", help="white where the scene is repainted", **FILE)
    files.add_argument("--reference", "--reference_path", nargs="+", help="one, or one per component", **FILE)
    add_output_options(files)
    many = parser.add_argument_group("many edits", "or folders for the files above, matched by name")
    many.add_argument("--jobs", help="CSV or JSON lines, a row for each edit: docs/editing.md", **FILE)
    many.add_argument("--batch-size", type=int, default=4, help="edits painted together; default: %(default)s")
    many.add_argument("--workers", type=int, default=2, help="reading threads, and writing ones; default: %(default)s")
    many.add_argument("--strict", action="store_true", help="edit nothing if a row is wrong or a file missing")
    many.add_argument("--ignore-columns", action="store_true", help="pass over columns of unknown names")
    hole = parser.add_argument_group("hole", "instead of --mask; without any, the scene's transparent part")
    repeatable: dict[str, Any] = {"action": "append", "default": []}
    hole.add_argument("--box", type=numbers, metavar="X0,Y0,X1,Y1", help="a rectangle; repeatable", **repeatable)
    hole.add_argument("--polygon", type=numbers, metavar="X0,Y0,X1,Y1,…", help="an outline; repeatable", **repeatable)
    add_options(hole, "dilate", "mask_shape", "per_component")
    exemplar = parser.add_argument_group("exemplar")
    exemplar.add_argument("--reference-mask", help="white where its object is; default: its opaque part", **FILE)
    add_options(exemplar, "reference_background", "reference_fit")
    text = parser.add_argument_group("text", "for models that read it, instead of --reference or with it")
    add_options(text, "prompt", "negative_prompt")
    sampling = parser.add_argument_group("sampling")
    add_options(sampling, "sampler", "num_steps", "guidance_scale", "guidance_interval", "guidance_rescale")
    add_options(sampling, "eta", "seed", "n_samples")
    add_plms(sampling)
    sampling.add_argument("--ddim_steps", type=int, help="steps; without a sampler also --sampler ddim")
    sampling.add_argument("--n_iter", type=int, default=1, help="repeats --n-samples with further seeds")
    similarity = "best first, by features of a network of scripts/evaluate.py; default: %(const)s, from the eval extra"
    network: dict[str, Any] = {"nargs": "?", "const": "efficientnet-lite0", "metavar": "NETWORK", "help": similarity}
    sampling.add_argument("--sort-by-similarity", "--rank", **network)
    fit = parser.add_argument_group("fitting the scene to the model")
    add_options(fit, "crop_margin", "whole_image", "feather", "match_colors", "paste_back")
    control = parser.add_argument_group("control", "by ControlNets of Stable Diffusion v1; repeatable")
    control.add_argument("--control", help="the network", **FILE, **repeatable)
    control.add_argument("--control-image", help="its hint image, of the scene's size", **FILE, **repeatable)
    control.add_argument("--control-scale", type=float, metavar="X", help="default: 1 for each", **repeatable)
    control.add_argument("--guess-mode", action="store_true", help="follow the hint without words; try a scale of 4")
    add_model_options(parser.add_argument_group("model", "the bundled small one by default"))
    add_safety_options(parser)
    # Options of the original that have no effect: configs know the sizes, and seeds fix the noise.
    for name in ("mode", "H", "W", "C", "f", "n_rows", "n_imgs"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("fixed_code", "skip_save"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip_grid", action="store_true", help="write no contact sheet")
    return parser


def add_plms(group: Any) -> None:
    """Add the original's `--plms`."""
    plms: dict[str, Any] = {"dest": "sampler", "action": "store_const", "const": "plms", "default": argparse.SUPPRESS}
    group.add_argument("--plms", help="the paper's: --sampler plms", **plms)


def add_output_options(group: Any) -> None:
    """Add the options that say where results go."""
    group.add_argument("--outdir", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s")
    group.add_argument("--overwrite", action="store_true", help="replace results of the same name; else number them")


def add_model_options(group: Any) -> None:
    """Add the options that choose the model, its device, precision and use of memory."""
    group.add_argument("--checkpoint", "--ckpt", help="weights, .ckpt or .safetensors", **FILE)
    group.add_argument("--config", help="their config; default: config.yaml beside them", **FILE)
    group.add_argument("--decoder", help="a decoder that reads the kept pixels: docs/asymmetric.md", **FILE)
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    words = ("auto", "fp32", "bf16", "fp16", "full", "autocast")
    help = "of the weights; auto: bf16 or fp16 on CUDA, else fp32; the original's: full is fp32, autocast fp16 on CUDA"
    group.add_argument("--precision", default="auto", choices=words, help=f"{help}; default: %(default)s")
    help = "compile the UNet: minutes at the first step and for each batch size; pays for many edits on a GPU"
    group.add_argument("--compile", action="store_true", help=help)
    help = "keep freed memory in the process, which saves time, where the C library is glibc; default: yes"
    group.add_argument("--keep-memory", action=argparse.BooleanOptionalAction, default=True, help=help)


def add_safety_options(parser: argparse.ArgumentParser) -> None:
    """Add the content filter and the watermark."""
    group = parser.add_argument_group("safety and provenance")
    safety = "withhold what a content filter flags: the folder of Stable Diffusion's safety checker, or %(const)s"
    group.add_argument("--safety", nargs="?", const="open-nsfw", metavar="FOLDER", help=safety)
    mark = "mark the whole image invisibly, as the original does; default text: %(const)s"
    group.add_argument("--watermark", nargs="?", const="StableDiffusionV1", metavar="TEXT", help=mark)


def parse(argv: list[str] | None, description: str) -> tuple[argparse.Namespace, EditSettings]:
    """Parse and check the command line; return the options, with `is_bulk`, and the settings of all samples."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    args.is_bulk = args.jobs is not None or (args.image is not None and args.image.is_dir())
    given = given_options(args)
    if args.ddim_steps is not None:
        given = {"sampler": "ddim", "num_steps": args.ddim_steps} | given
    args.samples_per_call = given.get("n_samples", 1)
    args.control_scale = args.control_scale or [1.0] * len(args.control)
    try:
        given["n_samples"] = args.samples_per_call * args.n_iter
        settings = EditSettings(**given)
    except UserError as error:
        parser.error(str(error))
    references, outlines = args.reference or [], args.box or args.polygon
    is_conditioned = bool(references) or (settings.prompt is not None and not args.jobs)
    is_partial = bool(args.image) != is_conditioned or ((args.mask or outlines) and not args.image)
    single = [name for name in SINGLE_OPTIONS if getattr(args, name)]
    single += [name for name in ("n_samples", "per_component") if name in settings.changed()]
    single += ["seed"] if isinstance(settings.seed, tuple) else []
    singles = ", ".join("--" + name.replace("_", "-") for name in single)
    is_triple = len(args.control) == len(args.control_image) == len(args.control_scale)
    is_lone = not args.jobs and not (args.mask and len(references) == 1)
    bulk = [
        (args.jobs and (args.image or args.mask or references), "--jobs: names all files itself"),
        (is_lone, f"--image: {args.image} is a folder; give one for --mask and for --reference, too, or an exemplar"),
        (single, f"{singles}: not for many edits at once; give rows of --jobs what they need"),
        (min(args.batch_size, args.workers) < 1, "--batch-size and --workers: expected 1 or more"),
    ]
    mistakes = [
        (args.mode == "relight", "--mode relight: relighting has a command of its own, scripts/relight.py"),
        *(bulk if args.is_bulk else []),
        (is_partial, "give all three of --image, --mask and --reference (or --prompt), or none for the example"),
        (args.sort_by_similarity and args.image and not references, "--sort-by-similarity: needs a --reference"),
        (args.mask and outlines, "got --mask and --box or --polygon; give either"),
        (args.reference_mask and len(references) > 1, "--reference-mask: goes with a single --reference"),
        (args.config and not args.checkpoint, "got --config without --checkpoint; name the weights, too"),
        (not is_triple, "--control: give a --control-image, and a --control-scale or none, for each"),
        (args.guess_mode and not args.control, "--guess-mode: goes with --control"),
    ]
    for is_wrong, message in mistakes:
        if is_wrong:
            parser.error(message)
    return args, settings


def main(argv: list[str] | None = None, description: str = "Replace the hole of a scene by an exemplar.") -> int:
    """Edit, and return the exit status: 0, 1 if results are missing or withheld, 2 on errors."""
    args, settings = parse(argv, description)
    if args.is_bulk:
        return run_command(lambda: edit_bulk(args, settings), "a smaller --batch-size", "; start it again to go on")
    return run_command(lambda: edit(args, settings))


def run_command(command: Callable[[], int], remedy: str = "fewer --n-samples", hint: str = "") -> int:
    """Return a command's exit status, 2 after an error or 130 after an interruption; print each warning in a line.

    `remedy` is what to try when memory runs out, `hint` what to say after an interruption.
    """
    is_first = "torch" not in sys.modules
    gc.disable()  # no search for garbage in what modules keep anyway takes 0.6 s from a command, most at its end
    from ldm.editing.editor import explained_out_of_memory, has_bf16, pick_device

    if is_first:
        gc.freeze()
    gc.enable()
    is_gpu = pick_device("auto").type != "cpu"
    remedies = [remedy, *["--precision bf16"] * (is_gpu or has_bf16()), *["--device cpu"] * is_gpu]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            with explained_out_of_memory(" or ".join(remedies)):
                return command()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"interrupted{hint}", file=sys.stderr)
            return 130


def edit_bulk(args: argparse.Namespace, settings: EditSettings) -> int:
    """Edit this process's share of a table's rows, or of folders, and return the exit status: 1 if rows failed."""
    from ldm.editing.batch import Report, edit_many, match_folders, process_rank, read_jobs
    from ldm.editing.editor import model_metadata
    from ldm.editing.safety import load_filter

    report, (rank, processes) = Report(), process_rank()
    options: dict[str, Any] = {"report": None if args.strict else report}
    if args.jobs:
        jobs = read_jobs(args.jobs, settings, ignore_columns=args.ignore_columns, **options)
    else:
        jobs = match_folders(args.image, args.mask, args.reference[0], settings, apart=[args.outdir], **options)
    if args.strict and (missing := [file for job in jobs for file in job.files if not Path(file).is_file()]):
        raise UserError(f"{len(missing)} files are missing, first {missing[0]}; check the paths")
    if rank:  # the first process tells what is wrong with the table
        report = Report()
    check_writable(args.outdir)
    path = args.outdir / ("report.jsonl" if processes == 1 else f"report-{rank + 1}-of-{processes}.jsonl")
    jobs = jobs[rank::processes]
    try:
        if jobs:
            editor = load_editor(args)
            options = {name: getattr(args, name) for name in ("batch_size", "workers", "watermark")}
            options["content_filter"] = load_filter(args.safety, editor.device) if args.safety else None
            metadata = model_metadata(args, editor.model.weight_dtype)
            edit_many(editor, jobs, args.outdir, metadata=metadata, report=report, **options)
    finally:  # also where the disk is full, or after an interruption
        if report.done or report.failed or report.skipped:
            report.write(path, jobs)
    for name, reason in report.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    for kind, number in report.counts().most_common():
        print(f"{number} failed: {kind}", file=sys.stderr)
    print(f"{len(report.done)} done, {len(report.skipped)} there already, {len(report.failed)} failed; {path}")
    return 1 if report.failed else 0


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor, for the whole process; return whether it does.

    By default it gives every large tensor back to the system at once, and the next one is mapped and cleared anew,
    page by page. Other C libraries are left alone. Works best before the first tensor is made.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, value) == 1 for name, value in MALLOPT.items())


def set_up(args: argparse.Namespace) -> tuple[torch.device, str]:
    """Prepare the process as the model options say; return device and precision, fp32, bf16 or fp16."""
    import torch

    from ldm.editing.editor import pick_device, pick_precision

    if args.keep_memory:
        keep_freed_memory()
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    return device, pick_precision(args.precision, device)


def load_editor(args: argparse.Namespace, prepared: tuple[torch.device, str] | None = None) -> Editor:
    """Load the model that the options choose; `prepared` is what `set_up` returned, if it was called before."""
    from ldm.editing.editor import DTYPES, Editor
    from ldm.editing.progress import moving_bar

    device, precision = prepared or set_up(args)
    options = {name: getattr(args, name) for name in ("config", "decoder", "compile")}
    with moving_bar(desc="loading", bar_format="{desc} [{elapsed}]", leave=False):
        return Editor.from_pretrained(args.checkpoint, device=device, dtype=DTYPES[precision], **options)


def edit(args: argparse.Namespace, settings: EditSettings) -> int:
    """Edit a scene, write the results and return the exit status: 1 if a content filter withheld some."""
    from ldm.editing.editor import model_metadata
    from ldm.editing.progress import edit_progress
    from ldm.editing.request import make_request
    from ldm.editing.safety import drop_unsafe, load_filter
    from ldm.editing.watermark import add_watermark, check_watermark
    from ldm.images import open_image
    from ldm.models.controlnet import Control

    prepared = device, _ = set_up(args)
    name = args.image.stem if args.image else use_bundled_example(args)
    # The files come first: a wrong path should not wait for a large model.
    references = args.reference or [None]
    hole: dict[str, Any] = {"mask": args.mask, "boxes": args.box, "polygons": args.polygon}
    exemplar = references if len(references) > 1 else references[0]
    request = make_request(args.image, exemplar, settings, **hole, reference_mask=args.reference_mask)
    if args.watermark is not None:
        check_watermark(request.scene.size, args.watermark)
    check_writable(args.outdir, f"{name}_{settings.seeds[0]}_grid.png")
    content_filter = load_filter(args.safety, device) if args.safety else None
    network = None
    if args.sort_by_similarity:
        from ldm.evaluation.features import load_network

        network = load_network(args.sort_by_similarity, device)

    num_seeds, rounds = len(settings.seeds), len(request.components())
    # Seeds that are painted together: all listed ones, or `--n-samples` of them `--n_iter` times.
    size = num_seeds if isinstance(settings.seed, tuple) else args.samples_per_call
    with ThreadPoolExecutor(1) as hashing:
        editor = load_editor(args, prepared)
        # Hashing a large file takes several seconds; meanwhile the device paints.
        metadata = hashing.submit(model_metadata, args, editor.model.weight_dtype)
        hints = zip(args.control, args.control_image, args.control_scale, strict=True)
        controls = [Control(editor.load_controlnet(path), hint, x, args.guess_mode) for path, hint, x in hints]
        with edit_progress(rounds * ceil(num_seeds / size), settings.steps) as progress:
            results = editor.edit_request(request, controls=controls, batch_size=size, **progress)
    record = settings.record() | {name: getattr(args, name) for name in RECORDED} | metadata.result()
    record |= {k: getattr(editor.model.config, k) for k in ("crop_margin", "guidance_scale") if record[k] is None}
    record |= {"mask": args.mask or "drawn", "reference": args.reference or [], "device": editor.device.type}
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
    safe = [add_watermark(result, args.watermark) for result in safe]
    named = {f"{name}_{detail['seed']}": (result, detail) for result, detail in zip(safe, details, strict=True)}
    if not args.skip_grid:
        sheet = contact_sheet(open_image(args.image), request.hole, exemplars, safe)
        named[f"{name}_{settings.seeds[0]}_grid"] = (sheet, {"seed": [detail["seed"] for detail in details]})
    save_results(args, named, record)
    return 1 if len(safe) < len(results) else 0


def use_bundled_example(args: argparse.Namespace) -> str:
    """Set scene, mask and exemplar to those of the first bundled example; return its name."""
    from ldm.editing.editor import BUNDLED_MODEL, EXAMPLE_PARTS, bundled_examples

    for folder in bundled_examples():
        args.image, args.mask, *args.reference = (folder / f"{part}.png" for part in EXAMPLE_PARTS)
        return folder.name
    raise UserError(f"{BUNDLED_MODEL / 'examples'}: no bundled example; give --image, --mask and --reference")


def save_results(
    args: argparse.Namespace, images: Mapping[str, tuple[Image.Image, Mapping[str, Any]]], record: Mapping[str, Any]
) -> None:
    """Write images, by stem and each with its metadata, as PNGs; number all if a name is taken, without `--overwrite`.

    `args` has outdir, overwrite, and the names of checkpoint and config, which join the `record` of all images.
    """
    from ldm.images import save_png

    record = {**record, "checkpoint": args.checkpoint or "bundled", "config": args.config or "beside the checkpoint"}
    for suffix in chain([""], (f"_v{version}" for version in count(2))):
        paths = [args.outdir / f"{stem}{suffix}.png" for stem in images]
        with suppress(FileExistsError), ExitStack() as stack:
            for path in [] if args.overwrite else paths:
                stack.enter_context(claimed(path))
            for path, (image, detail) in zip(paths, images.values(), strict=True):
                verb = "overwrote" if args.overwrite and path.exists() else "wrote"
                save_png(image, path, {"parameters": json.dumps({**record, **detail}, default=str)})
                print(f"{verb} {path}")
            if suffix:
                print(f"kept the earlier results of the same name; these end in {suffix} (--overwrite replaces them)")
            return


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
    lefts = [sum(image.width + SHEET_GAP for image in tiles[k - k % SHEET_COLUMNS : k]) for k in range(len(tiles))]
    tops = [k // SHEET_COLUMNS * (height + SHEET_GAP) for k in range(len(tiles))]
    width = max(left + image.width for left, image in zip(lefts, tiles, strict=True))
    sheet = Image.new("RGB", (width, tops[-1] + height), "white")
    for image, left, top in zip(tiles, lefts, tops, strict=True):
        sheet.paste(image, (left, top))
    return sheet
