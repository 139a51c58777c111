"""Edit every item of a benchmark: BENCH -> OUTDIR/results/ID.png.

    python scripts/inference_test_bench.py pretrained_models/mini/bench --outdir results/mini
    python scripts/inference_test_bench.py test_bench --outdir results/test_bench --config configs/v1.yaml \\
        --checkpoint model.ckpt
    python scripts/inference_test_bench.py pretrained_models/mini/bench --outdir results/copy-paste --method copy-paste
    torchrun --nproc-per-node 8 scripts/inference_test_bench.py …    # or --devices 8

`--protocol paper` shows the model the whole scene, takes 50 PLMS steps at guidance scale 5 and keeps the decoder's
whole image. `--protocol ours` is the editor's default. Single settings can be changed on top of either. A run that was
stopped goes on where it stopped. The original's options are accepted in its spelling.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from ldm.editing.cli import add_model_options, add_plms, run_command, set_up
from ldm.editing.settings import add_options, given_options
from ldm.files import UserError

SETTINGS = (
    "sampler",
    "num_steps",
    "guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "eta",
    "crop_margin",
    "whole_image",
    "feather",
    "match_colors",
    "paste_back",
    "reference_fit",
)
UNUSED_ORIGINAL = ("H", "W", "C", "f", "n_rows", "n_imgs", "n_iter")  # take a number, do nothing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "bench",
        type=Path,
        nargs="?",
        default=Path("test_bench"),
        metavar="BENCH",
        help="folder in the layout of COCOEE; default: %(default)s",
    )
    add("--outdir", type=Path, required=True, metavar="DIR")
    add(
        "--method",
        default="model",
        help="model | null-token (inpainting without an exemplar) | other-exemplar (the next item's) | "
        "copy-paste | seamless-clone | opencv-inpaint (no model); default: %(default)s",
    )
    add("--limit", type=int, metavar="N", help="only the first N items")
    add("--strict", action="store_true", help="stop at the first item that fails; default: go on with the others")
    add("--results-only", "--skip_grid", "--skip_save", action="store_true", help="no source/ and grid/")
    sampling = parser.add_argument_group("settings", "in place of the protocol's")
    sampling.add_argument("--protocol", default="paper", choices=("paper", "ours"), help="default: %(default)s")
    add_plms(sampling)
    add_options(sampling, *SETTINGS)
    sampling.add_argument("--ddim_steps", dest="num_steps", type=int, default=argparse.SUPPRESS, help="--steps")
    sampling.add_argument("--seed", type=int, nargs=1, default=[0], help="item k uses seed + k; default: 0")
    machine = parser.add_argument_group("machine").add_argument
    machine("--batch-size", "--n_samples", type=int, default=16, help="per process; default: %(default)s")
    machine("--workers", type=int, default=2, help="threads that read, and that write; default: %(default)s")
    machine("--devices", type=int, default=1, help="processes on this node; default: %(default)s")
    machine("--num-nodes", type=int, default=1, help="several nodes are started by torchrun; default: %(default)s")
    add_model_options(parser.add_argument_group("model", "the bundled small one by default"))
    for name in UNUSED_ORIGINAL:
        add(f"--{name}", type=int, help=argparse.SUPPRESS)
    add("--fixed_code", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_command(lambda: edit(args), "a smaller --batch-size", "; start it again to go on")


def edit(args: argparse.Namespace) -> int:
    """Turn the options into a run, edit the benchmark and return the exit status."""
    from ldm.evaluation.benchmark import METHODS, PROTOCOLS, BenchmarkRun
    from ldm.evaluation.cocoee import Bench

    if args.method not in METHODS:
        raise UserError(f"--method: got {args.method}, expected one of {', '.join(METHODS)}")
    if args.num_nodes > 1 and "RANK" not in os.environ:
        raise UserError(f"--num-nodes: got {args.num_nodes}, expected torchrun to start the processes")
    asked = given_options(args)
    if args.method == "null-token":
        asked.setdefault("guidance_scale", 1.0)  # without a condition guidance changes nothing and costs half the time
    run = BenchmarkRun(
        Bench(args.bench),
        args.outdir,
        method=args.method,
        settings=replace(PROTOCOLS[args.protocol], **asked),
        checkpoint=args.checkpoint,
        config=args.config,
        decoder=args.decoder,
        precision=set_up(args)[1],
        compile=args.compile,
        limit=args.limit,
        batch_size=args.batch_size,
        workers=max(args.workers, 1),
        device=args.device,
        strict=args.strict,
        has_source=not args.results_only,
        prepare=partial(set_up, args),
    )
    failed = run.edit(args.devices)
    for id_, reason in failed.items():
        print(f"failed: {id_}: {reason}", file=sys.stderr)
    number = len(run.jobs()) - len(failed)
    print(f"{number} results in {args.outdir / 'results'}{f', {len(failed)} items failed' * bool(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
