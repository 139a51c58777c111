"""Make a page of a benchmark's metrics: table, bars, best and worst samples, sweeps.

    python scripts/evaluate.py pretrained_models/mini/bench results/mini null=results/mini-null --json metrics.json
    python scripts/report.py metrics.json --out report

Writes OUT/report.html, one file that needs no other, and the plots as PNG beside it. Runs that differ in the guidance
scale or in the number of steps alone become curves.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.evaluation.evaluate import TRUE_IMAGE
from ldm.files import UserError, read_json
from scripts.evaluate import ARROWS, Record, format_interval, format_value, metric_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE = 128  # pixels, side of a sample's images
SAMPLES = 3  # of each kind
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Benchmark</title>
<meta name=viewport content="width=device-width"><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
small { color: #777; white-space: nowrap }
h2 { margin-top: 2.5rem }
img { max-width: 100% }
.tiles { margin: .6rem 0 }
.tiles img { width: 128px; height: 128px; object-fit: contain; background: #eee; margin: 2px }
.wide { overflow-x: auto }
</style>
<h1>Benchmark: {{ name }}</h1>
<p>{{ record.ids | length }} items, features of {{ record.features }}, real images: {{ record.real }}.
Brackets hold 95 % intervals over items.
{%- for warning in record.warnings %}<br><b>Warning: {{ warning }}.</b>{% endfor %}</p>
<div class=wide><table><tr><th>{% for run in record.runs %}<th>{{ run }}{% endfor %}<th>paper
{% for key, first in rows.items() %}<tr><td>{{ first.name }} {{ arrows[first.better] }}
{%- for run in record.runs.values() %}<td>{% if key in run.figures %}{% set metric = run.figures[key] -%}
{{ format_value(metric, metric.value) }}<br><small>{{ format_interval(metric) }}</small>{% endif %}{% endfor -%}
<td>{% if first.paper is not none %}{{ "%.2f" % first.paper }}{% endif %}{% endfor %}</table></div>
<h2>How each metric was measured</h2><ul>
{% for first in rows.values() %}<li><b>{{ first.name }}</b>: {{ first.how }}; n = {{ first.n }}</li>{% endfor %}</ul>
{% for title, png in plots.items() %}<h2>{{ title }}</h2><img alt="{{ title }}" src="{{ png }}">{% endfor %}
{% for name, kinds in samples.items() %}<h2>Samples by {{ name }}</h2><p>Scene, hole, exemplar, result.</p>
{% for kind, chosen in kinds.items() %}<h3>{{ kind }}</h3>{% for sample in chosen %}<div class=tiles>
{%- for image in sample.images %}<img alt="" src="{{ image }}">{% endfor -%}
<br><small>{{ sample.id }}: {{ "%.2f" % sample.value }}</small></div>{% endfor %}{% endfor %}{% endfor %}
<h2>Settings</h2><ul>{% for run, entry in record.runs.items() if run != true_image %}<li><b>{{ run }}</b>:
{% for key, value in entry.settings.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% else -%}
no settings recorded{% endfor %}{% endfor %}</ul>
<p><small>{% for key, value in record.versions.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}
</small></p></html>
"""


class Sample(NamedTuple):
    """One item of a run: its value, and scene, masked scene, exemplar and result as PNG in data URLs."""

    id: str
    value: float
    images: list[str]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("record", type=Path, metavar="METRICS.json", help="file written by scripts/evaluate.py --json")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--run", metavar="NAME", help="run whose samples are shown; default: the first")
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
    """Write the page and its plots."""
    from jinja2 import Environment

    from ldm.files import atomic_write, write_text

    record = read_json(path)
    try:
        name = run or next(iter(record["runs"]))
    except (KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{path}: not a record of scripts/evaluate.py ({error}); write it with --json") from None
    if name not in record["runs"]:
        raise UserError(f"--run: got {name}, expected one of {', '.join(record['runs'])}")
    plots = {"Figures": bars(record), **sweeps(record)}
    page = (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            record=record,
            name=Path(record["bench"]).name,
            rows=metric_rows(record),
            plots={title: plot_url(plot) for title, plot in plots.items()},
            samples=samples(record, name),
            true_image=TRUE_IMAGE,
            arrows=ARROWS,
            format_value=format_value,
            format_interval=format_interval,
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    for title, plot in plots.items():
        with atomic_write(out / f"{title.split(':')[0].lower().replace(' ', '-')}.png") as partial:
            plot.savefig(partial, format="png", dpi=110)
    write_text(out / "report.html", page)
    print(out / "report.html")


def samples(record: Record, name: str) -> dict[str, dict[str, list[Sample]]]:
    """Return the worst, median and best items of a run by each metric that has values per item."""
    from ldm.evaluation.cocoee import Bench, images_by_id
    from ldm.images import open_image

    bench = Bench(record["bench"])
    run = record["runs"][name]
    results = images_by_id(Path(run["folder"])) if run["folder"] else {}
    found: dict[str, dict[str, list[Sample]]] = {}
    for key, values in run["per_item"].items():
        metric = run["figures"][key]
        kinds = found.setdefault(metric["name"], {})
        for kind, chosen in choose_samples(values, metric["better"]).items():
            kinds[kind] = []
            for k in chosen:
                item = bench.item(record["ids"][k])
                result = open_image(results[item.id]) if results else item.scene
                images = (item.scene, item.masked_scene(), item.exemplar, result)
                kinds[kind].append(Sample(item.id, values[k], [tile_url(image) for image in images]))
    return found


def choose_samples(values: Sequence[float], better: str) -> dict[str, list[int]]:
    """Positions of the worst, median and best values."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=better == "lower")
    n = min(SAMPLES, len(order))
    middle = (len(order) - n) // 2
    return {"worst": order[:n], "median": order[middle : middle + n], "best": order[::-1][:n]}


def bars(record: Record) -> Figure:
    """Draw a panel per metric: every run's value with its interval, and the paper's if it is the same measurement."""
    from matplotlib.figure import Figure

    rows = list(metric_rows(record).items())
    if not rows:
        raise UserError("the record holds no figures; evaluate the benchmark again")
    columns = min(3, len(rows))
    height = -(-len(rows) // columns)
    names = list(record["runs"])
    plot = Figure(figsize=(4.4 * columns, (0.6 + 0.32 * len(names)) * height + 0.3), layout="constrained")
    axes = list(plot.subplots(height, columns, squeeze=False).flat)
    for axis, (key, first) in zip(axes, rows, strict=False):
        for position, name in enumerate(names):
            if figure := record["runs"][name]["figures"].get(key):
                low, high = figure["low"], figure["high"]
                error = None if low is None else [[max(figure["value"] - low, 0)], [max(high - figure["value"], 0)]]
                colour = "#bbb" if name == TRUE_IMAGE else "#4477aa"
                axis.barh(position, figure["value"], xerr=error, color=colour, capsize=3, height=0.7)
        if first["paper"] is not None:
            axis.axvline(first["paper"], color="#cc3311", linestyle="--", linewidth=1)
            axis.text(first["paper"], len(names) - 0.4, " paper", color="#cc3311", fontsize=7)
        axis.set_title(f"{first['name']}\n{first['better']} is better", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.invert_yaxis()
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    return plot


def sweeps(record: Record) -> dict[str, Figure]:
    """Plots over guidance scales and over step counts, as far as the runs differ in them alone.

    Returns:
        Up to two plots by title: metrics against the guidance scale, one line per sampler and step count; metrics
        against seconds per image, one line per sampler, one point per step count.
    """
    runs = [run for run in record["runs"].values() if run["settings"].get("method") == "model"]
    plots = {}
    by_guidance = _series(runs, varying="guidance_scale", fixed=("sampler", "num_steps"))
    if by_guidance:
        plots["Guidance scale"] = _lines(by_guidance, lambda run: run["settings"]["guidance_scale"], "guidance scale")
    by_steps = _series([run for run in runs if run["timing"]], varying="num_steps", fixed=("sampler", "guidance_scale"))
    if by_steps:
        plots["Steps: quality against time"] = _lines(
            by_steps,
            lambda run: run["timing"]["seconds_per_picture"],
            "seconds per image",
            label=lambda run: str(run["settings"]["num_steps"]),
        )
    return plots


def _series(runs: Sequence[Record], *, varying: str, fixed: Sequence[str]) -> dict[str, list[Record]]:
    """Runs of equal `fixed` settings, sorted along the varying one, if it varies in at least one such series."""
    fixed = (*fixed, "guidance_interval", "crop_margin", "crop", "paste_back", "checkpoint_sha256")
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for run in runs:
        groups[tuple(str(run["settings"].get(key)) for key in fixed)].append(run)
    # Runs alone in their series stand beside those that vary, where all but the first of `fixed` is equal.
    varied = {
        shared[1:] for shared, members in groups.items() if len({run["settings"][varying] for run in members}) > 1
    }
    chosen = {shared: members for shared, members in groups.items() if shared[1:] in varied}
    telling = [k for k in range(len(fixed)) if k < 2 or len({shared[k] for shared in chosen}) > 1]
    return {
        ", ".join(f"{fixed[k].replace('_', ' ')} {str(shared[k])[:14]}" for k in telling): sorted(
            members, key=lambda run: run["settings"][varying]
        )
        for shared, members in chosen.items()
    }


def _lines(series: Mapping[str, Sequence[Record]], abscissa: Any, title: str, label: Any = None) -> Figure:
    from matplotlib.figure import Figure

    first = next(iter(series.values()))[0]["figures"]
    keys = [key for key in first if not key.startswith("background")]
    plot = Figure(figsize=(4.4 * len(keys), 3.6), layout="constrained")
    for axis, key in zip(plot.subplots(1, len(keys), squeeze=False).flat, keys, strict=True):
        for name, runs in series.items():
            points = [(abscissa(run), run["figures"][key], run) for run in runs if key in run["figures"]]
            low, high = (
                [abs(figure[end] - figure["value"]) if figure[end] is not None else 0.0 for _, figure, _ in points]
                for end in ("low", "high")
            )
            x, y = [point[0] for point in points], [figure["value"] for _, figure, _ in points]
            axis.errorbar(x, y, yerr=[low, high], marker="o", markersize=4, capsize=3, linewidth=1, label=name)
            for position, value, run in zip(x, y, (run for *_, run in points), strict=True):
                if label is not None:
                    axis.annotate(label(run), (position, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set_title(first[key]["name"], fontsize=8)
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    next(iter(plot.axes)).legend(fontsize=7)
    return plot


def plot_url(plot: Figure) -> str:
    """Return a plot as PNG in a data URL."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return data_url(buffer)


def tile_url(image: Image.Image) -> str:
    """Return an image, resized to a tile, as PNG in a data URL."""
    smaller = max(image.size) > TILE
    buffer = io.BytesIO()
    resampling = Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST
    ImageOps.contain(image.convert("RGB"), (TILE, TILE), resampling).save(buffer, format="png")
    return data_url(buffer)


def data_url(buffer: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    raise SystemExit(main())
