#!/usr/bin/env python
"""Make a small model from scratch: compose scenes, train the first stage, cache latents, train, export, evaluate.

    python scripts/make_mini.py --out results/mini
    python scripts/make_mini.py --out results/mini --dry-run
    python scripts/make_mini.py --out results/mini-gpu --base configs/mini.yaml configs/mini-gpu.yaml \\
        --count 40000 --draws 3 --workers 14 --device cuda

Without options, this command makes the bundled model on a CPU (docs/mini.md). It can be interrupted: started again, it
skips finished steps and resumes a training run from its last checkpoint. It writes the weights and their config to
OUT/model, the figures to OUT/metrics.json, and a page with figures and images to OUT/report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.config import load_config
from ldm.files import UserError
from scripts.pipeline import ROOT, Step, cli_args, in_newest_run, run_pipeline, script_path

PROTOCOLS = {"mini": "paper", "mini-ours": "ours"}  # sampling runs of the model and their protocols
BASELINES = ("null-token", "copy-paste", "seamless-clone", "opencv-inpaint")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for all outputs")
    add("--dry-run", action="store_true", help="print the commands and stop")
    scenes = parser.add_argument_group("scenes").add_argument
    scenes(
        "--material",
        type=Path,
        metavar="PATH",
        help="folder with cutouts/, extras/ and backgrounds/, or a file of scripts/scenes/pack.py "
        "(default: fetched from Debian packages)",
    )
    scenes("--count", type=int, default=20_000, help="training scenes (default: %(default)s)")
    scenes("--bench", type=int, default=200, metavar="M", help="items of the bench (default: %(default)s)")
    scenes(
        "--extra-share",
        type=float,
        default=0.3,
        metavar="P",
        help="share of objects that are drawings or emoji (default: %(default)s)",
    )
    scenes(
        "--patch-share",
        type=float,
        default=0.25,
        metavar="P",
        help="share of objects that are patches of photographs (default: %(default)s)",
    )
    scenes("--workers", type=int, default=2, help="processes for composing and reading (default: %(default)s)")
    training = parser.add_argument_group("training").add_argument
    training(
        "--first-stage",
        nargs="+",
        default=["configs/mini-autoencoder.yaml"],
        metavar="YAML",
        help="configs of the first stage, merged from left to right (default: configs/mini-autoencoder.yaml)",
    )
    training(
        "--base",
        nargs="+",
        default=["configs/mini.yaml"],
        metavar="YAML",
        help="configs of the diffusion model, merged likewise (default: configs/mini.yaml)",
    )
    training("--draws", type=int, default=4, help="cached variants of every scene (default: %(default)s)")
    training(
        "--set-first-stage", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides for the first stage"
    )
    training("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides for the diffusion model")
    training(
        "--device",
        metavar="NAME",
        help="device for caching, sampling and evaluation (for training: trainer.accelerator)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run_pipeline(plan(args), args.out / "steps", dry_run=args.dry_run)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.dry_run:
        print(f"weights: {args.out / 'model'}; figures and images: {args.out / 'report' / 'report.html'}")
    return 0


def plan(args: argparse.Namespace) -> list[Step]:
    """Return the commands in order.

    Raises:
        ConfigError: a config or an override cannot be used.
    """
    out, device = args.out, cli_args(device=args.device)
    scenes, cache, bench = out / "scenes", out / "cache", out / "scenes" / "bench"
    plain = load_config(*args.first_stage, overrides=args.set_first_stage).data.kind == "images"
    config = load_config(*args.base, overrides=args.set)
    size = config.model.image_size

    composing = cli_args(
        from_debian=out / "material" if args.material is None else None,
        material=args.material,
        out=scenes,
        count=args.count,
        size=2 * size if config.data.crop_margin_range else size,  # close crops need scenes with more detail
        seed=0,
        bench=args.bench,
        bench_size=size,
        hue_jitter=0.25,
        extra_share=args.extra_share,
        patch_share=args.patch_share,
        workers=args.workers,
    )
    encoder, model = (in_newest_run(out / run, "checkpoints/last.ckpt") for run in ("first-stage", "train"))
    train, weights = str(ROOT / "main.py"), out / "model" / "model.safetensors"
    caching = cli_args(checkpoint=encoder, root=scenes / "images", out=cache, draws=args.draws, workers=args.workers)
    splits = {"annotations": "train", "val_annotations": "validation"}  # with the objects' outlines
    shapes = ["data.kind=coco", *(f"data.{key}={scenes / 'annotations' / name}.json" for key, name in splits.items())]
    start = cli_args(pretrained_model=encoder, logdir=out / "train", name="mini")
    steps = [
        Step("compose", (script_path("scenes/compose"), *composing)),
        Step(
            "first-stage",
            (
                *(train, "--base", *args.first_stage),
                *cli_args(logdir=out / "first-stage", name="first-stage"),
                *(*args.set_first_stage, f"data.root={scenes / 'images'}", *([] if plain else shapes)),
            ),
            out / "first-stage",
        ),
        Step("cache", (script_path("cache_latents"), "--config", *args.base, *caching, *device, *shapes)),
        Step(
            "train",
            (
                *(train, "--base", *args.base, str(cache / "latents.yaml")),
                *(*start, "--train-from-scratch", *args.set, f"data.root={cache}"),
            ),
            out / "train",
        ),
        Step("export", (script_path("export_checkpoint"), model, str(weights), "--overwrite")),
    ]
    runs = {name: cli_args(checkpoint=weights, protocol=protocol) for name, protocol in PROTOCOLS.items()}
    runs |= {name: cli_args(method=name, checkpoint=weights if name == "null-token" else None) for name in BASELINES}
    for name, options in runs.items():
        command = (
            script_path("inference_test_bench"),
            str(bench),
            *cli_args(outdir=out / "results" / name),
            *options,
            *device,
        )
        steps.append(Step(f"sample-{name}", command))
    figures = cli_args(json=out / "metrics.json")
    metrics = ("--metrics", "fid", "clip", "identification", "background", "foreground-fid")
    results = [str(out / "results" / name) for name in runs]
    steps += [
        Step("evaluate", (script_path("evaluate"), str(bench), *results, *metrics, *figures, *device)),
        Step("report", (script_path("report"), str(out / "metrics.json"), *cli_args(out=out / "report"))),
    ]
    return steps


if __name__ == "__main__":
    raise SystemExit(main())
