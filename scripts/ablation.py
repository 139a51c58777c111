#!/usr/bin/env python
"""Train, sample and evaluate the five rows of the ablation table, and print them beside the paper's figures.

    python scripts/ablation.py --out results/ablation
    python scripts/ablation.py --out results/ablation --dry-run
    python scripts/ablation.py --out results/ablation-v1 --base configs/v1.yaml --bench test_bench \\
        --pretrained-model pretrained_models/sd-v1-4-modified-9channel.ckpt \\
        --prior pretrained_models/sd-v1-4-modified-9channel.ckpt \\
        --metrics fid qs clip --features clip --gmm GMM --real COCO_TEST2017

Each row is a config in configs/ablation, merged after --base. Without options, the command makes the table of the mini
model from the scenes of docs/mini.md and the bundled weights. It can be interrupted: started again, it skips finished
steps and resumes a training run from its last checkpoint. docs/ablation.md explains the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.config import load_config
from ldm.files import UserError, read_json, write_text
from scripts.pipeline import ROOT, Step, cli_args, in_newest_run, run_pipeline, script_path

OVERLAYS = ROOT / "configs" / "ablation"
ROWS = {
    "baseline": "Baseline",
    "prior": "+ Prior",
    "augmentation": "+ Augmentation",
    "bottleneck": "+ Bottleneck",
    "guidance": "+ Classifier-free guidance",
}
# Yang et al. 2023, Table 3. Missing figures are printed as a dash.
PAPER = {
    "baseline": {"FID": 3.61},
    "prior": {"FID": 3.40, "CLIP score": 88.79},
    "augmentation": {"FID": 3.44, "QS": 76.86, "CLIP score": 81.68},
    "bottleneck": {"FID": 3.26, "QS": 76.62, "CLIP score": 81.41},
    "guidance": {"FID": 3.18, "QS": 77.80, "CLIP score": 84.97},
}
PAPER_METRICS = ("FID", "QS", "CLIP score")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for runs, samples, figures and the table")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows to make (default: all)")
    add("--dry-run", action="store_true", help="print the commands and stop")
    training = parser.add_argument_group("training").add_argument
    training(
        "--base",
        nargs="+",
        default=["configs/mini.yaml"],
        metavar="YAML",
        help="configs that the rows modify (default: configs/mini.yaml)",
    )
    training(
        "--pretrained-model",
        default="pretrained_models/mini/model.safetensors",
        metavar="FILE",
        help="checkpoint with the frozen parts (default: %(default)s)",
    )
    training(
        "--prior",
        metavar="FILE",
        help="initial weights of rows 2 to 5 (default: --pretrained-model with fresh conditioning)",
    )
    training(
        "--scenes",
        type=Path,
        default=Path("dataset/mini"),
        metavar="DIR",
        help="images and boxes, if the base config trains on cached latents (default: %(default)s)",
    )
    training("--draws", type=int, metavar="N", help="cached variants of each scene (default: that of cache_latents.py)")
    training("--max-steps", type=int, metavar="N", help="training steps per row (default: trainer.max_steps of --base)")
    training("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides for main.py")
    measuring = parser.add_argument_group("sampling and evaluation").add_argument
    measuring(
        "--bench",
        type=Path,
        default=Path("dataset/mini/bench"),
        metavar="DIR",
        help="benchmark folder (default: %(default)s)",
    )
    measuring("--protocol", default="paper", choices=("paper", "ours"), help="default: %(default)s")
    measuring("--limit", type=int, metavar="N", help="only the first N items of the bench")
    measuring("--batch-size", type=int, default=16, metavar="B", help="batch size of sampling (default: %(default)s)")
    measuring(
        "--metrics",
        nargs="+",
        default=["fid", "clip", "identification", "copying"],
        metavar="NAME",
        help="metrics of evaluate.py (default: fid clip identification copying)",
    )
    measuring("--features", default="efficientnet-lite0", metavar="SPEC", help="default: %(default)s")
    measuring("--gmm", type=Path, metavar="FILE", help="mixture for the metric qs")
    measuring(
        "--real",
        type=Path,
        metavar="PATH",
        help="real images or their statistics, for the metric fid (default: those of --bench)",
    )
    measuring(
        "--device",
        metavar="NAME",
        help="device for caching, sampling and evaluation (for training: --set trainer.accelerator=NAME)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run_pipeline(plan(args), args.out / "steps", dry_run=args.dry_run)
        if not args.dry_run:
            tabulate(args.out, args.rows)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def plan(args: argparse.Namespace) -> list[Step]:
    """Return the commands in order.

    Raises:
        ConfigError: a config or an override cannot be used.
    """
    overrides = [*args.set, *([f"trainer.max_steps={args.max_steps}"] if args.max_steps else [])]
    configs = {name: load_config(*args.base, overlay(name), overrides=overrides) for name in args.rows}
    # A cache holds the random draws of the data pipeline: one cache without augmentation, one with it.
    drawn_by = {name: "augmentation" if configs[name].data.augment_exemplar else "baseline" for name in configs}
    cached = [name for name in configs if configs[name].data.kind == "cached"]
    device = cli_args(device=args.device)

    steps = []
    for drawer in dict.fromkeys(drawn_by[name] for name in cached):
        places = {"checkpoint": args.pretrained_model, "root": args.scenes, "out": args.out / "cache" / drawer}
        options = cli_args(**places, draws=args.draws)
        base = ("--config", *args.base, str(overlay(drawer)))
        steps.append(Step(f"cache-{drawer}", (script_path("cache_latents"), *base, *options, *device)))
    for name in configs:
        runs = args.out / name / "train"
        with_prior = configs[name].training.use_prior
        start = args.prior if args.prior and with_prior else args.pretrained_model
        fresh = ["training.fresh_conditioning=true"] if with_prior and not args.prior else []
        command = (str(ROOT / "main.py"), "--base", *args.base, str(overlay(name)))
        data = [f"data.root={args.out / 'cache' / drawn_by[name]}"] if name in cached else []
        options = cli_args(logdir=runs, name=name, pretrained_model=start)
        steps.append(Step(f"train-{name}", (*command, *options, *fresh, *overrides, *data), runs))
        samples = args.out / name / "samples"
        options = cli_args(
            outdir=samples,
            checkpoint=in_newest_run(runs, "checkpoints/last.ckpt"),
            config=in_newest_run(runs, "config.yaml"),
            protocol=args.protocol,
            guidance_scale=f"{configs[name].logging.guidance_scale:g}",
            batch_size=args.batch_size,
            limit=args.limit,
        )
        steps.append(Step(f"sample-{name}", (script_path("inference_test_bench"), str(args.bench), *options, *device)))
        options = cli_args(features=args.features, gmm=args.gmm, real=args.real, json=figures_path(args.out, name))
        command = (script_path("evaluate"), str(args.bench), f"{name}={samples}", "--metrics", *args.metrics)
        steps.append(Step(f"evaluate-{name}", (*command, *options, *device)))
    return steps


def overlay(name: str) -> Path:
    return OVERLAYS / f"{name}.yaml"


def figures_path(out: Path, row: str) -> Path:
    return out / row / "metrics.json"


# ---- the table ----


def read_figures(path: Path, row: str) -> dict[str, dict[str, Any]]:
    """Read the figures of a row that scripts/evaluate.py wrote: metric key => `name`, `value`, `low`, `high`, …

    Raises:
        UserError: the file does not hold figures of this row.
    """
    try:
        figures = read_json(path)["runs"][row]["figures"]
        return {key: figure for key, figure in figures.items() if isinstance(figure["value"], int | float)}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no figures of scripts/evaluate.py ({error!r}); evaluate the row again") from None


def tabulate(out: Path, rows: Iterable[str]) -> None:
    """Print the table and write OUT/ablation.md and OUT/ablation.json."""
    from rich.console import Console
    from rich.table import Table

    figures = {row: read_figures(figures_path(out, row), row) for row in rows}
    metrics = {key: str(figure.get("name", key)) for row in figures.values() for key, figure in row.items()}
    header = ["row", *metrics, *(f"paper: {name}" for name in PAPER_METRICS)]
    lines = []
    for row, measured in figures.items():
        paper = PAPER.get(row, {})
        theirs = [f"{paper[name]:.2f}" if name in paper else "–" for name in PAPER_METRICS]
        lines.append([ROWS[row], *(cell(measured.get(key)) for key in metrics), *theirs])

    table = Table(*header)
    for line in lines:
        table.add_row(*(text.replace(" [", "\n[") for text in line))
    Console(markup=False).print(table)
    notes = [f"- {key}: {name}" for key, name in metrics.items()]
    notes.append("- brackets: 95 % intervals; the figures of the paper belong to the full-size model on COCOEE")
    print("\n".join(notes))
    markdown = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    text = "".join(f"| {' | '.join(line)} |\n" for line in markdown)
    write_text(out / "ablation.md", "\n".join([text, *notes, ""]))
    record = {row: {"figures": measured, "paper": PAPER.get(row)} for row, measured in figures.items()}
    write_text(out / "ablation.json", json.dumps({"rows": record}, indent=2) + "\n")


def cell(figure: Mapping[str, Any] | None) -> str:
    """Format a figure as `value [low, high]`; without an interval as `value`."""
    if figure is None:
        return "–"
    value = f"{figure['value']:.4g}"
    if figure.get("low") is None or figure.get("high") is None:
        return value
    return f"{value} [{figure['low']:.4g}, {figure['high']:.4g}]"


if __name__ == "__main__":
    raise SystemExit(main())
