"""A page about a benchmark: table, bars, samples and sweeps in one HTML file that needs no other.

Made from what scripts/evaluate.py wrote as JSON (a *record*), and from the pictures it names.
"""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ldm.files import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

Record = Mapping[str, Any]

TRUE_PICTURE = "true picture"
TILE = 128  # pixels, side of a sample's pictures
SAMPLES = 3  # of each kind
STYLE = """
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
"""


class Sample(NamedTuple):
    """One item of a run: its value, and scene, masked scene, exemplar and result."""

    id: str
    value: float
    pictures: tuple[Image.Image, Image.Image, Image.Image, Image.Image]


def html_page(record: Record, samples: Mapping[str, Mapping[str, Sequence[Sample]]], plots: Mapping[str, Plot]) -> str:
    """The page.

    Args:
        record: of scripts/evaluate.py.
        samples: by figure's name and kind (worst, median, best).
        plots: by title.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Benchmark</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        f"<h1>Benchmark: {_text(Path(record['bench']).name)}</h1>",
        f"<p>{len(record['ids'])} items, features of {_text(record['features'])}, "
        f"real pictures: {_text(record['real'])}. In brackets 95 % intervals over items.</p>",
        f"<div class=wide>{_table(record)}</div>",
        "<h2>How each figure was measured</h2><ul>",
        *(
            f"<li><b>{_text(figure['name'])}</b>: {_text(figure['how'])}; n = {figure['n']}</li>"
            for figure in figure_rows(record).values()
        ),
        "</ul>",
    ]
    for title, plot in plots.items():
        parts.append(f"<h2>{_text(title)}</h2><img alt='{_text(title)}' src='{_data(_plot_bytes(plot))}'>")
    for name, kinds in samples.items():
        parts.append(f"<h2>Samples by {_text(name)}</h2><p>Scene, hole, exemplar, result.</p>")
        for kind, chosen in kinds.items():
            parts.append(f"<h3>{_text(kind)}</h3>")
            for sample in chosen:
                tiles = "".join(f"<img alt='' src='{_data(_png(picture))}'>" for picture in sample.pictures)
                parts.append(f"<div class=tiles>{tiles}<br><small>{sample.id}: {sample.value:.2f}</small></div>")
    settings = "".join(
        f"<li><b>{_text(name)}</b>: {_text(_listed(run['settings']) or 'no settings recorded')}"
        for name, run in record["runs"].items()
        if name != TRUE_PICTURE
    )
    parts.append(
        f"<h2>Settings</h2><ul>{settings}</ul><p><small>{_text(_listed(record['versions']))}</small></p></html>"
    )
    return "\n".join(parts)


def bars(record: Record) -> Plot:
    """One panel per figure: every run's value with its interval, and the paper's where it is the same measure."""
    from matplotlib.figure import Figure as Plot

    rows = list(figure_rows(record).items())
    if not rows:
        raise UserError("the record holds no figures; evaluate the benchmark again")
    columns = min(3, len(rows))
    height = -(-len(rows) // columns)
    names = list(record["runs"])
    plot = Plot(figsize=(4.4 * columns, (0.6 + 0.32 * len(names)) * height + 0.3), layout="constrained")
    axes = list(plot.subplots(height, columns, squeeze=False).flat)
    for axis, (key, first) in zip(axes, rows, strict=False):
        for position, name in enumerate(names):
            if figure := record["runs"][name]["figures"].get(key):
                low, high = figure["low"], figure["high"]
                error = None if low is None else [[max(figure["value"] - low, 0)], [max(high - figure["value"], 0)]]
                colour = "#bbb" if name == TRUE_PICTURE else "#4477aa"
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


def sweeps(record: Record) -> dict[str, Plot]:
    """Plots over guidance scales and over step counts, as far as the runs differ in them alone.

    Returns:
        Up to two plots by title: figures against the guidance scale, one line per sampler and step count; figures
        against seconds per picture, one line per sampler, one point per step count.
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
            "seconds per picture",
            label=lambda run: str(run["settings"]["num_steps"]),
        )
    return plots


def choose_samples(values: Sequence[float], better: str) -> dict[str, list[int]]:
    """Positions of the worst, median and best values."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=better == "lower")
    n = min(SAMPLES, len(order))
    middle = (len(order) - n) // 2
    return {"worst": order[:n], "median": order[middle : middle + n], "best": order[::-1][:n]}


def figure_rows(record: Record) -> dict[str, Mapping[str, Any]]:
    """Every figure once, by its key, as the first run that has it describes it."""
    rows: dict[str, Mapping[str, Any]] = {}
    for run in record["runs"].values():
        for key, figure in run["figures"].items():
            rows.setdefault(key, figure)
    return rows


def number(figure: Mapping[str, Any], value: float) -> str:
    """A value of a figure: two digits after the point, four where the figure lies within 0 and 1."""
    return f"{value:.{2 if abs(figure['value']) > 1.5 else 4}f}"


def interval(figure: Mapping[str, Any]) -> str:
    """`(low to high)`, or nothing."""
    if figure["low"] is None:
        return ""
    return f"({number(figure, figure['low'])} to {number(figure, figure['high'])})"


def arrow(figure: Mapping[str, Any]) -> str:
    """Where better values are."""
    return {"higher": "↑", "lower": "↓"}[figure["better"]]


# ---- parts ----


def _table(record: Record) -> str:
    runs, rows = record["runs"].values(), figure_rows(record)
    with_paper = any(first["paper"] is not None for first in rows.values())
    head = "".join(f"<th>{_text(name)}" for name in ("", *record["runs"], *(["paper"] if with_paper else [])))
    lines = []
    for key, first in rows.items():
        cells = [f"<td>{_text(first['name'])} {arrow(first)}"]
        cells += [f"<td>{_value(run['figures'][key])}" if key in run["figures"] else "<td>" for run in runs]
        if with_paper:
            cells.append("<td>" if first["paper"] is None else f"<td>{first['paper']:.2f}")
        lines.append(f"<tr>{''.join(cells)}")
    return f"<table><tr>{head}{''.join(lines)}</table>"


def _value(figure: Mapping[str, Any]) -> str:
    text = number(figure, figure["value"])
    return f"{text}<br><small>{interval(figure)}</small>" if interval(figure) else text


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


def _lines(series: Mapping[str, Sequence[Record]], abscissa: Any, title: str, label: Any = None) -> Plot:
    from matplotlib.figure import Figure as Plot

    first = next(iter(series.values()))[0]["figures"]
    keys = [key for key in first if not key.startswith("background")]
    plot = Plot(figsize=(4.4 * len(keys), 3.6), layout="constrained")
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


def _plot_bytes(plot: Plot) -> bytes:
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _png(picture: Image.Image) -> bytes:
    tile = picture.convert("RGB")
    scale = TILE / max(tile.size)
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    buffer = io.BytesIO()
    width, height = (max(1, round(side * scale)) for side in tile.size)
    tile.resize((width, height), resampling).save(buffer, format="png")
    return buffer.getvalue()


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
