"""Measure the results of a benchmark.

    python scripts/evaluate.py dataset/mini/bench results/bench --null results/bench-null --json metrics.json

RESULTS is what scripts/inference_test_bench.py wrote (its OUTDIR, or the folder results/ in it). Printed
is *identification*: how often an edited region is closer to its own exemplar than to another one of the
bench (EfficientNet-Lite0 features, all ordered pairs; chance is 0.5), with a 95 % interval. Beside the
results stand, where given, the same bench edited with the null token and with other exemplars; and
always what pasting the exemplar into the hole's box reaches, and the true picture. Every run is compared
with the items' own exemplars: what the null token and other exemplars reach is what the scene alone says.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from ldm.evaluation.identification import Estimate


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bench", type=Path, metavar="BENCH", help="folder in the layout of COCOEE")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="edited pictures, ID.png")
    parser.add_argument("--null", type=Path, metavar="RESULTS", help="the same bench edited with the null token")
    parser.add_argument("--other", type=Path, metavar="RESULTS", help="the same bench edited with other exemplars")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        figures = evaluate(args)
        if args.json:
            write_json(args.json, figures)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(args: argparse.Namespace) -> dict[str, object]:
    """Measure, print the table, and return the figures."""
    from tqdm import tqdm

    from ldm.data.cocoee import Bench
    from ldm.data.transforms import open_image
    from ldm.editing import pick_device
    from ldm.evaluation.features import image_features, load_feature_network
    from ldm.evaluation.identification import identification
    from ldm.evaluation.regions import copy_paste, hole_region

    bench = Bench(args.bench)
    runs = {"results": args.results, "null token": args.null, "other exemplar": args.other}
    folders = {name: results_folder(path) for name, path in runs.items() if path}
    ids, ignored = common_ids(bench.ids, folders)
    if ignored:
        print(f"measured on the {len(ids)} of {len(bench)} items that all runs hold", file=sys.stderr)

    regions: dict[str, list[Image.Image]] = {name: [] for name in (*folders, "copy-paste", "true picture")}
    exemplars: list[Image.Image] = []
    position = {id_: k for k, id_ in enumerate(bench.ids)}
    for item in (bench[position[id_]] for id_ in tqdm(ids, desc="reading", unit="item", disable=None, leave=False)):
        exemplars.append(item.exemplar)
        for name, folder in folders.items():
            result = open_image(folder / f"{item.id}.png")
            if result.size != item.scene.size:
                raise ValueError(
                    f"{folder / f'{item.id}.png'}: got {result.size} pixels, expected the scene's {item.scene.size}; "
                    "is it of another benchmark?"
                )
            regions[name].append(hole_region(result, item.hole_mask))
        pasted = copy_paste(item.scene, item.hole_mask, item.exemplar)
        regions["copy-paste"].append(hole_region(pasted, item.hole_mask))
        regions["true picture"].append(hole_region(item.scene, item.hole_mask))

    network = load_feature_network(pick_device(args.device))
    exemplar_features = image_features(network, exemplars, batch_size=args.batch_size, label="exemplars")
    labels = exemplar_labels(bench.root, ids)
    estimates = {}
    for name, pictures in regions.items():
        features = image_features(network, pictures, batch_size=args.batch_size, label=name)
        estimates[name] = identification(features, exemplar_features, labels)
    print_table(estimates)
    return {
        "identification": estimates["results"].value,
        "n": len(ids),
        "runs": {name: {"identification": vars(estimate)} for name, estimate in estimates.items()},
    }


def results_folder(path: Path) -> Path:
    """The folder with the pictures: `path/results` if there is one, else `path`."""
    folder = path / "results" if (path / "results").is_dir() else path
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; scripts/inference_test_bench.py writes it")
    return folder


def common_ids(ids: list[str], folders: dict[str, Path]) -> tuple[list[str], int]:
    """The ids of which every run has a picture, and how many others there are."""
    common = [id_ for id_ in ids if all((folder / f"{id_}.png").is_file() for folder in folders.values())]
    if len(common) < 2:
        names = ", ".join(str(folder) for folder in folders.values())
        raise ValueError(f"{names}: got {len(common)} items of the benchmark in common, expected at least 2")
    return common, len(ids) - len(common)


def exemplar_labels(root: Path, ids: list[str]) -> list[str] | None:
    """Which cut-out each item shows, where the bench says so (items.csv of scripts/compose_scenes.py)."""
    path = root / "items.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        cutouts = {f"{int(row['ID']):012d}": row["Cutout"] for row in csv.DictReader(file)}
    missing = [id_ for id_ in ids if id_ not in cutouts]
    if missing:
        raise ValueError(f"{path}: lists no item {missing[0]}; compose the bench again")
    return [cutouts[id_] for id_ in ids]


def print_table(estimates: dict[str, Estimate]) -> None:
    """One row per run; figures in per cent."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="identification, %: 50 is chance")
    table.add_column("run")
    for column in ("value", "95 % interval", "n"):
        table.add_column(column, justify="right")
    for name, estimate in estimates.items():
        interval = f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
        table.add_row(name, f"{100 * estimate.value:.1f}", interval, str(estimate.n))
    Console().print(table)


def write_json(path: Path, figures: dict[str, object]) -> None:
    """Write the figures, whole or not at all."""
    from ldm.files import replacing

    with replacing(path) as partial:
        partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
