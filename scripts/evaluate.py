"""Measure the results of a benchmark.

    python scripts/evaluate.py pretrained_models/mini/bench results/mini null=results/mini-null --json metrics.json
    python scripts/evaluate.py test_bench results/test_bench --features clip --metrics fid qs clip --real coco_square \\
        --gmm coco2017_gmm_k20 --json metrics.json

    python scripts/evaluate.py npz SAMPLES.npz REFERENCE.npz --inception pt_inception-2015-12-05-6726825d.pth
    python scripts/evaluate.py bpd CHECKPOINT DATA --config config.yaml --max-samples 1000

The last two are for models in pixel space, see docs/lineage.md.

RESULTS is what scripts/inference_test_bench.py wrote (its OUTDIR, or the folder results/ in it); several are measured
on the items that all of them hold, beside the bench's true images. Every metric is printed with its 95 % interval,
the network and preprocessing of its features, and the paper's number if the same thing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.evaluation.evaluate import Evaluation, Run

Record = Mapping[str, Any]  # what --json writes, see `report`
ARROWS = {"higher": "↑", "lower": "↓"}  # the direction of better values


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("bench", type=Path, metavar="BENCH", help="folder in the layout of COCOEE")
    add("results", nargs="+", metavar="[NAME=]RESULTS", help="edited images, ID.png; the first is the run of interest")
    add("--metrics", nargs="+", metavar="METRIC", help="fid qs clip dino identification background copying foreground-fid kid precision-recall diversity inception; default: fid clip identification background")  # fmt: skip  # noqa: E501
    add("--features", default="efficientnet-lite0", metavar="NETWORK", help="efficientnet-lite0 (its weights come with the eval extra) | clip[:FOLDER, FILE or hub name] | open_clip:ARCH/TAG | dinov2[:…]; default: %(default)s")  # fmt: skip  # noqa: E501
    add("--dino", metavar="NETWORK", help="of the DINO score: dinov2[:FOLDER or hub name]")
    add("--inception", type=Path, metavar="FILE", help="weights of plain FID, sFID and IS: pt_inception-2015-12-05-6726825d.pth")  # fmt: skip  # noqa: E501
    add("--real", type=Path, metavar="DIR", help="real images, or statistics of them (.npz); default: the bench's true images")  # fmt: skip  # noqa: E501
    add("--write-real", type=Path, metavar="FILE.npz", help="write the statistics of the real images, to be read once")
    add("--gmm", type=Path, metavar="FILE", help="of QS: the authors' pickle, or what scripts/fit_quality_gmm.py wrote")
    add(
        "--other-seeds", nargs="+", type=Path, default=[], metavar="RESULTS", help="of the first run, for the diversity"
    )
    add("--focus", nargs="+", default=[], metavar="CUTOUT",
        help="objects whose identification is also measured alone, as the bench's items.csv calls them")  # fmt: skip
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write figures, settings and versions there; scripts/report.py makes a page of it",
    )
    add("--markdown", type=Path, metavar="FILE", help="write the table there")
    add(
        "--cache",
        metavar="FOLDER",
        help="folder of features by content, or none; default: ~/.cache/paint-by-example/features",
    )
    add(
        "--strict", action="store_true", help="fail if an item or a real image would be left out, or a result is a JPEG"
    )
    add("--resamples", type=int, default=1000, help="of the bootstraps; default: %(default)s")
    add("--seed", type=int, default=0, help="of the bootstraps; default: %(default)s")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--workers", type=int, default=0, help="threads that read images; default: %(default)s")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default: %(default)s")
    return parser


def samples_parser() -> argparse.ArgumentParser:
    """Return the parser of `npz` and `bpd`, figures of models in pixel space."""
    parser = argparse.ArgumentParser(prog="evaluate.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    batches = commands.add_parser("npz", help="FID, sFID, IS, precision and recall of a batch, as guided-diffusion")
    batches.add_argument("samples", type=Path, help="arr_0 of an .npz, (N, H, W, C) uint8")
    batches.add_argument("reference", type=Path, help="likewise, perhaps with statistics of its training set")
    batches.add_argument("--inception", type=Path, metavar="FILE", help="weights of the Inception network of 2015")
    features = "instead of it, a network as above; then the distance has another name; default: %(default)s"
    batches.add_argument("--features", default="efficientnet-lite0", metavar="NETWORK", help=features)
    likelihood = commands.add_parser("bpd", help="bits per dimension, a bound of the negative log-likelihood")
    likelihood.add_argument("checkpoint", type=Path)
    likelihood.add_argument(
        "data", help="images: folder, CIFAR-10's archive or .npz; its validation part, if it has one"
    )
    likelihood.add_argument("--config", type=Path, metavar="YAML", help="of the checkpoint")
    likelihood.add_argument("--timesteps", default="", metavar="STEPS", help="250, ddim25, …; default: all")
    likelihood.add_argument("--max-samples", type=int, metavar="N", help="default: all")
    likelihood.add_argument("--npz", type=Path, metavar="FILE", help="write the terms of each timestep there")
    for command in (batches, likelihood):
        command.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
        command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


def evaluate_samples(args: argparse.Namespace) -> None:
    """Run `npz` or `bpd`: print the figures, and write the files."""
    from dataclasses import asdict, replace

    import numpy as np

    from ldm.config import load_config
    from ldm.data.image_folder import ImageDataset
    from ldm.editing.editor import pick_device
    from ldm.evaluation import samples
    from ldm.evaluation.features import load_network
    from ldm.evaluation.inception import load_inception
    from ldm.files import UserError, atomic_write, write_json
    from ldm.pixel_diffusion import PixelDiffusion, load_pixel_model

    device = pick_device(args.device)
    if args.command == "npz":
        network = load_inception(args.inception, device) if args.inception else load_network(args.features, device)
        figures = samples.compare_batches(args.samples, args.reference, network, args.batch_size)
        print(f"features: {network.name}")
    else:
        model = load_pixel_model(args.checkpoint, args.config, device=device)
        if not isinstance(model, PixelDiffusion):
            raise UserError(f"{args.checkpoint}: a classifier has no likelihood of images")
        config = load_config() if args.config is None else load_config(args.config)
        data = replace(config.data, kind="images", root=args.data)
        dataset = ImageDataset(replace(config, model=model.config, data=data), "validation", args.max_samples)
        bound, terms = samples.bits_per_dim(model, dataset, steps=args.timesteps, batch_size=args.batch_size)
        figures = {"bits per dim": bound}
        if args.npz:
            with atomic_write(args.npz) as partial, open(partial, "wb") as file:
                np.savez(file, **terms)  # pyright: ignore[reportArgumentType]
    for name, figure in figures.items():
        interval = "" if figure.low != figure.low else f" [{figure.low:.4f}, {figure.high:.4f}]"
        print(f"{name}: {figure.value:.4f}{interval}, n = {figure.n}{figure.note}")
    if args.json:
        write_json(args.json, {name: asdict(figure) for name, figure in figures.items()})


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    is_samples = words[:1] in (["npz"], ["bpd"])
    args = (samples_parser() if is_samples else build_parser()).parse_args(words)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            (evaluate_samples if is_samples else evaluate)(args)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def evaluate(args: argparse.Namespace) -> None:
    """Measure, print the table, and write the files."""
    from ldm.editing.editor import pick_device
    from ldm.evaluation.cache import open_cache
    from ldm.evaluation.cocoee import Bench
    from ldm.evaluation.evaluate import DEFAULT_METRICS, Evaluation, Run
    from ldm.evaluation.features import load_network
    from ldm.evaluation.inception import load_inception
    from ldm.evaluation.quality import load_gmm
    from ldm.files import check_writable, write_text

    for path in filter(None, (args.json, args.markdown, args.write_real)):
        check_writable(path.resolve().parent)
    bench = Bench(args.bench)
    runs = [named_run(text) for text in args.results]
    device = pick_device(args.device)
    evaluation = Evaluation(
        bench,
        runs,
        load_network(args.features, device),
        names=args.metrics or DEFAULT_METRICS,
        other_seeds=[Run.read(path) for path in args.other_seeds],
        real=args.real,
        gmm=load_gmm(args.gmm) if args.gmm else None,
        dino=load_network(args.dino, device) if args.dino else None,
        inception=load_inception(args.inception, device) if args.inception else None,
        focus=args.focus,
        num_resamples=args.resamples,
        seed=args.seed,
        strict=args.strict,
        options={"cache": open_cache(args.cache), "batch_size": args.batch_size, "num_workers": args.workers},
    )
    evaluation.measure()
    record = report(evaluation)
    print_table(record)
    for warning in record["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if args.write_real:
        evaluation.real_statistics.save(args.write_real)
    if args.markdown:
        write_text(args.markdown, markdown_table(record))
    if args.json:
        write_text(args.json, json.dumps(record, indent=2) + "\n")


def named_run(text: str) -> Run:
    """Return `[NAME=]FOLDER` as a run."""
    from ldm.evaluation.evaluate import Run

    name, separator, path = text.partition("=")
    return Run.read(Path(path), name) if separator and not Path(text).exists() else Run.read(Path(text))


def metric_rows(record: Record) -> dict[str, Record]:
    """Return every metric once, by its key, as the first run that has it describes it."""
    figures = [run["figures"] for run in record["runs"].values()]
    return {key: next(each[key] for each in figures if key in each) for run in figures for key in run}


def format_value(metric: Record, value: float) -> str:
    """Format with two digits after the point, or with four if the metric lies within 0 and 1."""
    return f"{value:.{2 if abs(metric['value']) > 1.5 else 4}f}"


def format_interval(metric: Record) -> str:
    """Return `(low to high)`, or nothing."""
    low, high = metric["low"], metric["high"]
    return "" if low is None else f"({format_value(metric, low)} to {format_value(metric, high)})"


def print_table(record: Record) -> None:
    """Print a section per metric: its name, how it was measured, and a line per run."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for key, first in metric_rows(record).items():
        console.print(f"\n{first['name']} {ARROWS[first['better']]}", style="bold", markup=False)
        console.print(f"{first['how']}; n = {first['n']}", style="dim", markup=False)
        table = Table.grid(padding=(0, 3))
        table.add_column()
        table.add_column(justify="right")
        for name, run in record["runs"].items():
            if metric := run["figures"].get(key):
                table.add_row(f"  {name}", format_value(metric, metric["value"]), format_interval(metric))
        if first["paper"] is not None:
            table.add_row("  the paper, on COCOEE", f"{first['paper']:.2f}")
        console.print(table)


def markdown_table(record: Record) -> str:
    """Format metrics as rows, runs as columns; below it how each metric was measured."""
    runs, rows = record["runs"], metric_rows(record)
    lines = [["", *runs, "paper (COCOEE)"], ["---", *["---:"] * (len(runs) + 1)]]
    for key, first in rows.items():
        shown = [run["figures"].get(key) for run in runs.values()]
        values = [
            "" if metric is None else f"{format_value(metric, metric['value'])} {format_interval(metric)}"
            for metric in shown
        ]
        paper = "" if first["paper"] is None else f"{first['paper']:.2f}"
        lines.append([f"{first['name']} {ARROWS[first['better']]}", *values, paper])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [f"{first['name']}: {first['how']}; n = {first['n']}" for first in rows.values()]
    return "\n".join([table, "", *(f"- {note}" for note in [*notes, *record["warnings"]]), ""])


def warnings_of(evaluation: Evaluation) -> list[str]:
    """Say what makes the figures differ from those of the whole benchmark."""
    notes, n, m = [], len(evaluation.ids), len(evaluation.bench)
    if n < m:
        left_out = evaluation.left_out
        notes.append(f"measured on {n} of {m} items, so without the paper's figures; left out: {left_out}")
    if "clip" in evaluation.names and len(evaluation.paper_boxes) < n:
        lost = n - len(evaluation.paper_boxes)
        notes.append(f"the paper's crop leaves nothing of {lost} holes; its score is of the other items")
    if evaluation.lossy:
        notes.append(f"results are not exact: {evaluation.lossy}; write PNG")
    if evaluation.unreadable and evaluation.real:
        reason = next(iter(evaluation.unreadable.values()))
        notes.append(f"{len(evaluation.unreadable)} real images are left out, the first: {reason}")
    return notes


def report(evaluation: Evaluation) -> dict[str, Any]:
    """Return all metrics and their conditions, for a JSON file; the first run's values stand at its top level too."""
    import platform
    from dataclasses import asdict
    from importlib.metadata import version

    from ldm import __version__

    gmm = evaluation.gmm
    packages = ("torch", "numpy", "transformers", "pillow")
    return {
        **{key: metric.value for key, metric in evaluation.metrics[evaluation.runs[0].name].items()},
        "bench": str(evaluation.bench.root),
        "ids": evaluation.ids,
        "warnings": warnings_of(evaluation),
        "features": evaluation.network.name,
        "features_key": evaluation.network.key,
        "real": str(evaluation.real or "the bench's true pictures"),
        "gmm": gmm.provenance if gmm else None,
        "bootstrap": {"resamples": evaluation.num_resamples, "seed": evaluation.seed},
        "versions": {
            "paint-by-example": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "runs": {
            run.name: {
                "folder": str(run.folder or ""),
                "settings": dict(run.settings),
                "timing": dict(run.timing),
                "figures": {key: asdict(metric) for key, metric in evaluation.metrics[run.name].items()},
                "per_item": evaluation.per_item[run.name],
            }
            for run in evaluation.runs
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
