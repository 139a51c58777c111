"""Edit every item of a benchmark: BENCH -> OUTDIR/results/ID.png.

    python scripts/inference_test_bench.py pretrained_models/mini/bench --outdir results/mini
    python scripts/inference_test_bench.py test_bench --outdir results/test_bench --config configs/v1.yaml --checkpoint model.ckpt
    python scripts/inference_test_bench.py pretrained_models/mini/bench --outdir results/copy-paste --method copy-paste

`--protocol paper` shows the model the whole scene, takes 50 PLMS steps at guidance scale 5 and keeps the decoder's
whole picture; `--protocol ours` crops around the hole, takes 20 DPM-Solver++ steps and keeps the scene's own pixels
outside the hole. Single settings can be changed on top of either. A run that was stopped goes on where it stopped. The
original's options are accepted in its spelling.
"""  # noqa: E501 (commands to copy)

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ldm.files import UserError

UNUSED_ORIGINAL = ("H", "W", "C", "f", "n_rows", "n_imgs", "n_iter")  # take a number, do nothing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("bench", type=Path, nargs="?", default=Path("test_bench"), metavar="BENCH", help="in the layout of COCOEE; %(default)s")  # fmt: skip  # noqa: E501
    add("--outdir", type=Path, required=True, metavar="DIR")
    add("--checkpoint", "--ckpt", type=Path, metavar="FILE", help="default: the bundled model")
    add("--config", type=Path, metavar="FILE", help="default: config.yaml beside the checkpoint")
    add("--decoder", type=Path, metavar="PATH", help="one that sees the pixels that are kept: docs/asymmetric.md")
    add(
        "--method",
        default="model",
        help="model | null-token (inpainting without an exemplar) | other-exemplar (the next item's) | "
        "copy-paste | seamless-clone | opencv-inpaint (no model); default: %(default)s",
    )
    add("--limit", type=int, metavar="N", help="only the first N items")
    add("--results-only", "--skip_grid", "--skip_save", action="store_true", help="no source/ and grid/")
    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--protocol", default="paper", choices=("paper", "ours"), help="default: %(default)s")
    sampling("--sampler", help="instead of the protocol's")
    sampling("--plms", dest="sampler", action="store_const", const="plms", help="--sampler plms")
    sampling("--steps", "--ddim_steps", type=int, help="instead of the protocol's")
    sampling("--guidance-scale", "--scale", type=float, help="instead of the protocol's")
    sampling("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
             help="noise levels with guidance, from 0, data, to 1, noise; default: all")  # fmt: skip
    sampling(
        "--crop-margin",
        "--context-margin",
        type=float,
        metavar="M",
        help="scene shown around the hole, times the hole's size; default: the model's",
    )
    sampling("--match-colors", "--colour-agreement", action="store_true", default=None,
             help="with --protocol ours: correct what is pasted at the hole's edge, as editing does")  # fmt: skip
    sampling("--eta", "--ddim_eta", type=float, default=0.0, help="ddim's stochasticity; default: %(default)s")
    sampling("--seed", type=int, default=0, help="item k uses seed + k; default: %(default)s")
    machine = parser.add_argument_group("machine").add_argument
    machine("--batch-size", "--n_samples", type=int, default=16, help="per process; default: %(default)s")
    machine("--workers", type=int, default=0, help="loader processes; default: %(default)s")
    machine("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    machine("--devices", type=int, default=1, help="processes on this node; default: %(default)s")
    machine("--num-nodes", type=int, default=1, help="default: %(default)s")
    machine(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "fp16", "full", "autocast"),
        help="of the weights; the original's full is fp32, its autocast fp16",
    )
    for name in UNUSED_ORIGINAL:
        add(f"--{name}", type=int, help=argparse.SUPPRESS)
    add("--fixed_code", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Options to settings, and the run itself."""
    from ldm.evaluation.benchmark import METHODS, PROTOCOLS, Settings, edit_bench
    from ldm.evaluation.cocoee import Bench

    if args.method not in METHODS:
        raise UserError(f"--method: got {args.method}, expected one of {', '.join(METHODS)}")
    asked = {
        "sampler": args.sampler,
        "num_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval and tuple(args.guidance_interval),
        "crop_margin": args.crop_margin,
        "match_colors": args.match_colors,
        "eta": args.eta,
    }
    if args.method == "null-token" and args.guidance_scale is None:
        asked["guidance_scale"] = 1.0  # guidance has nothing to point at: same pictures in half the time
    settings = Settings(
        method=args.method,
        protocol=replace(PROTOCOLS[args.protocol], **{key: value for key, value in asked.items() if value is not None}),
        seed=args.seed,
        checkpoint=args.checkpoint,
        config=args.config,
        decoder=args.decoder,
        precision={"full": "fp32", "autocast": "fp16"}.get(args.precision) or args.precision,
    )
    count = edit_bench(
        Bench(args.bench),
        args.outdir,
        settings,
        limit=args.limit,
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=args.device,
        devices=args.devices,
        num_nodes=args.num_nodes,
        whole_output=not args.results_only,
    )
    print(f"{count} results in {args.outdir / 'results'}")


if __name__ == "__main__":
    raise SystemExit(main())
