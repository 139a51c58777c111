"""Make a page of a benchmark's figures: table, bars, best and worst samples, sweeps.

    python scripts/evaluate.py pretrained_models/mini/bench results/mini null=results/mini-null --json metrics.json
    python scripts/report.py metrics.json --out report

Writes OUT/report.html, one file that needs no other, and the plots as PNG beside it. Runs that differ in the guidance
scale or in the number of steps alone become curves.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.files import UserError

if TYPE_CHECKING:
    from ldm.evaluation.report import Sample


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("record", type=Path, metavar="METRICS.json", help="what scripts/evaluate.py --json wrote")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--run", metavar="NAME", help="whose samples are shown; default: the first")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        write(args.record, args.out, args.run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: Path, out: Path, run: str | None) -> None:
    """The page and its plots."""
    from ldm.evaluation.report import bars, html_page, sweeps
    from ldm.files import atomic_write, write_text

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name = run or next(iter(record["runs"]))
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{path}: not a record of scripts/evaluate.py ({error}); write it with --json") from None
    if name not in record["runs"]:
        raise UserError(f"--run: got {name}, expected one of {', '.join(record['runs'])}")
    plots = {"Figures": bars(record), **sweeps(record)}
    page = html_page(record, samples(record, name), plots)
    out.mkdir(parents=True, exist_ok=True)
    for title, plot in plots.items():
        with atomic_write(out / f"{title.split(':')[0].lower().replace(' ', '-')}.png") as partial:
            plot.savefig(partial, format="png", dpi=110)
    write_text(out / "report.html", page)
    print(out / "report.html")


def samples(record: dict[str, Any], name: str) -> dict[str, dict[str, list[Sample]]]:
    """Worst, median and best items of a run by each figure that has values per item."""
    from ldm.evaluation.cocoee import Bench
    from ldm.evaluation.report import Sample, choose_samples
    from ldm.images import open_image

    bench = Bench(record["bench"])
    position = {id_: k for k, id_ in enumerate(bench.ids)}
    run = record["runs"][name]
    found: dict[str, dict[str, list[Sample]]] = {}
    for key, values in run["per_item"].items():
        figure = run["figures"][key]
        kinds = found.setdefault(figure["name"], {})
        for kind, chosen in choose_samples(values, figure["better"]).items():
            kinds[kind] = []
            for k in chosen:
                item = bench[position[record["ids"][k]]]
                result = open_image(Path(run["folder"]) / f"{item.id}.png")
                kinds[kind].append(Sample(item.id, values[k], (item.scene, item.masked_scene(), item.exemplar, result)))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
