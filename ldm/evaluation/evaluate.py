"""Evaluation of edited benchmarks: runs x metrics => a table of numbers with their conditions.

The paper's number stands beside ours only if the same thing was measured.

Dimension key: N items · D feature channels · M real images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.evaluation import frechet, metrics
from ldm.evaluation.cocoee import Bench, images_by_id
from ldm.evaluation.features import PAPER_REGION, SQUASH, WHOLE, Box, FeatureNetwork, View, extract, iter_features
from ldm.evaluation.inception import LOGITS, POOLED, SPATIAL, inception_score
from ldm.evaluation.metrics import Estimate, cosine_scores
from ldm.evaluation.quality import GaussianMixture, quality_scores
from ldm.files import Skipped, UserError, read_json, read_table, whole
from ldm.images import find_images, open_image

TRUE_IMAGE = "true picture"  # the run that consists of the benchmark's own scenes; a key of metrics.json
FRECHET_RESAMPLES = 100  # each is an eigenvalue problem
MANIFOLD_SIZE = 10_000  # most real images that KID and precision/recall use
# Yang et al. 2023, Table 1: COCOEE, CLIP ViT-B/32 features, real images of COCO test2017.
PAPER_NETWORK = "CLIP ViT-B/32"
PAPER = {"fid": 3.18, "qs": 77.80, "clip-paper": 84.97}
PER_ITEM = ("qs", "clip", "dino")  # keys whose values per item are recorded, beside `identification`
DEFAULT_METRICS = ("fid", "clip", "identification", "background")


@dataclass(frozen=True)
class Metric:
    """One measured number."""

    name: str  # exact, with the feature network
    value: float
    n: int  # items or images behind it
    how: str  # preprocessing and reference, one phrase
    better: str  # "higher" | "lower"
    low: float | None = None  # 95 % interval
    high: float | None = None
    paper: float | None = None  # the paper's number for the same measurement on COCOEE


@dataclass(frozen=True)
class Run:
    """The images of one run, by id, and the settings and times that it wrote beside them."""

    name: str  # in the table
    folder: Path | None  # None stands for the benchmark's own true images
    settings: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, name: str = "") -> Run:
        """Read a run's OUTDIR, or the folder of images itself."""
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; scripts/inference_test_bench.py writes it")
        root = path.parent if path.name == "results" and (path.parent / "settings.json").is_file() else path
        folder = root / "results" if (root / "results").is_dir() else root
        settings, timing = (read_json(root / f"{name}.json", {}) for name in ("settings", "timing"))
        return cls(name or root.name, folder, settings, timing, images_by_id(folder))

    def image(self, bench: Bench, id_: str) -> Path:
        if self.folder is None:
            return bench.paths(id_)[0]
        if id_ not in self.images:
            raise UserError(f"{id_}: without a result in {self.folder}")
        return self.images[id_]


@dataclass(eq=False)
class Evaluation:
    """Runs x metrics => numbers, on the items that all runs hold; `measure` fills in `metrics` and `per_item`.

    An item is left out if a file of it or a result is missing or unreadable, or differs from its scene in size; so are
    real images that cannot be read.

    Raises:
        UserError, OSError: a metric lacks its input, or a figure is not finite; runs share fewer than two items or have
            equal names; with `strict`, an item would be left out or a result is a JPEG.
    """

    bench: Bench
    runs: list[Run]  # the first is the run of interest; the benchmark's true images become the last
    network: FeatureNetwork  # of all metrics but `dino` and `inception`
    names: Sequence[str] = DEFAULT_METRICS  # of metrics, from METRICS
    other_seeds: Sequence[Run] = ()  # the first run's items edited with other seeds, for the diversity
    real: Path | None = None  # folder of real images, or their statistics (.npz); None: the benchmark's true images
    gmm: GaussianMixture | None = None  # of the quality score
    dino: FeatureNetwork | None = None
    inception: FeatureNetwork | None = None
    focus: Sequence[str] = ()  # cut-outs of the benchmark's items.csv whose identification is also measured alone
    num_resamples: int = 1000  # of the bootstraps
    seed: int = 0
    strict: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of `iter_features`
    metrics: dict[str, dict[str, Metric]] = field(init=False)  # by run and key
    per_item: dict[str, dict[str, list[float]]] = field(init=False)  # by run and key, in the order of `ids`

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.names) - METRICS.keys()):
            raise UserError(f"metrics: got {', '.join(unknown)}, expected some of {', '.join(METRICS)}")
        for option, name in {"gmm": "qs", "other_seeds": "diversity", "dino": "dino", "inception": "inception"}.items():
            if name in self.names and not getattr(self, option):
                raise UserError(f"{name}: give --{option.replace('_', '-')}")
        if self.focus and "identification" not in self.names:
            raise UserError("--focus: add identification to --metrics")
        edited = [*self.runs, *self.other_seeds]
        self.runs = [*self.runs, Run(TRUE_IMAGE, None)]
        self.metrics = {run.name: {} for run in self.runs}
        self.per_item = {run.name: {} for run in self.runs}
        if len(self.metrics) < len(self.runs):
            raise UserError(f"two of {', '.join(run.name for run in self.runs)} are equal; name runs: NAME=FOLDER")
        self.boxes: dict[str, Box] = {}
        self.paper_boxes: dict[str, Box] = {}  # without the holes that the paper's rule cannot crop
        self.left_out = Skipped(strict=self.strict)  # items
        self.lossy = Skipped(strict=self.strict)  # results
        self.unreadable: dict[Path, str] = {}  # real images, with the reasons
        self._real_options = {"label": "real images", "unreadable": None if self.strict else self.unreadable}
        with ThreadPoolExecutor(max(self.options.get("num_workers", 0), 1)) as pool:
            checks = pool.map(lambda id_: self._check(id_, edited), self.bench.ids)
            for id_, check in zip(self.bench.ids, tqdm(checks, desc="items", disable=None, leave=False), strict=True):
                if isinstance(check, UserError):
                    place, _, reason = str(check).partition(": ")
                    self.left_out.add(reason, place)
                    continue
                self.boxes[id_], paper_box, lossy = check
                if paper_box:
                    self.paper_boxes[id_] = paper_box
                for path in lossy:
                    self.lossy.add("JPEG, whose losses count as the edit's", path)
        self.ids = list(self.boxes)
        if len(self.ids) < 2:
            raise UserError(f"{len(self.ids)} items can be measured, expected at least 2; left out: {self.left_out}")
        self.labels = exemplar_labels(self.bench.root, self.ids)
        self._exemplars: dict[FeatureNetwork, np.ndarray] = {}

    def _check(self, id_: str, edited: Sequence[Run]) -> tuple[Box, Box | None, list[Path]] | UserError:
        """Return the boxes of an item's hole and which of its results are JPEGs, or else what is wrong with it."""
        try:
            item, lossy = self.bench.item(id_), []
            for path in [run.image(self.bench, id_) for run in edited]:
                if (size := open_image(path).size) != item.scene.size:
                    got, expected = (f"{width}x{height}" for width, height in (size, item.scene.size))
                    raise UserError(f"{path} with {got} instead of {expected}: of another size")
                with Image.open(path) as image:
                    lossy += [path] * (image.format == "JPEG")
            return metrics.hole_box(item.scene, item.hole_mask), metrics.paper_box(item.hole_mask), lossy
        except UserError as error:
            return error

    def measure(self) -> None:
        """Measure every metric of every run."""
        how = "against all other exemplars; {squash}"
        focus = [Row("identification", f"identification: {x}", "identification of {label}", how) for x in self.focus]
        for run in self.runs:
            subject = Subject(self, run, self.network)
            for name in (name for name in METRICS if name in self.names):
                network = {"dino": self.dino, "inception": self.inception}.get(name)
                seen = Subject(self, run, network) if network else subject
                rows = (row for row in (*ROWS, *focus) if row.metric == name)
                found = zip(rows, METRICS[name](seen), strict=True)
                self.metrics[run.name] |= {row.key: seen.metric(row, x) for row, x in found if x is not None}

    def exemplars(self, network: FeatureNetwork) -> np.ndarray:
        """Return the features of the exemplars, (N, D)."""
        if network not in self._exemplars:
            views = [View(self.bench.paths(id_)[2], SQUASH) for id_ in self.ids]
            self._exemplars[network] = extract(network, views, **self.options, label="exemplars")
        return self._exemplars[network]

    @cached_property
    def real_views(self) -> list[View]:
        if self.real is not None and self.real.suffix == ".npz":
            raise UserError(f"{self.real}: only fid takes statistics; give --real FOLDER, or leave other metrics out")
        paths = find_images(self.real) if self.real else [self.bench.paths(id_)[0] for id_ in self.bench.ids]
        return [View(path, WHOLE) for path in paths]

    @cached_property
    def real_statistics(self) -> frechet.Statistics:
        if self.real is not None and self.real.suffix == ".npz":
            statistics = frechet.Statistics.load(self.real)
            if statistics.network not in ("", self.network.name):
                text = f'{self.real}: of features of "{statistics.network}", the results\' are of "{self.network.name}"'
                if self.strict:
                    raise UserError(text)
                warnings.warn(text, stacklevel=2)
            return statistics
        return self._statistics(self.network, slice(None))[0]

    @cached_property
    def inception_statistics(self) -> list[frechet.Statistics]:
        """Statistics of the real images: of the pooled and of the spatial features."""
        assert self.inception is not None
        return self._statistics(self.inception, POOLED, SPATIAL)

    def _statistics(self, network: FeatureNetwork, *columns: slice) -> list[frechet.Statistics]:
        """Read the real images once, without keeping all features in memory."""
        running = [frechet.RunningStatistics(network.name) for _ in columns]
        for features in iter_features(network, self.real_views, **self.options, **self._real_options):
            for statistics, part in zip(running, columns, strict=True):
                statistics.add(features[:, part])
        return [statistics.result() for statistics in running]

    @cached_property
    def real_sample(self) -> np.ndarray:
        """Features of at most MANIFOLD_SIZE real images, drawn at random, (M, D)."""
        drawn = np.random.default_rng(self.seed).permutation(len(self.real_views))[:MANIFOLD_SIZE]
        return extract(self.network, [self.real_views[k] for k in np.sort(drawn)], **self.options, **self._real_options)

    @cached_property
    def reference_corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Corner colours of the exemplars, and of the true images' hole boxes."""
        exemplars = [metrics.corner_colors(open_image(self.bench.paths(id_)[2])) for id_ in self.ids]
        return np.stack(exemplars), self.corners(self.runs[-1])

    def corners(self, run: Run) -> np.ndarray:
        """Return the corner colours of a run's hole boxes, (N, 4, 3)."""
        images = ((id_, open_image(run.image(self.bench, id_))) for id_ in self.ids)
        return np.stack([metrics.corner_colors(image.crop(self.boxes[id_])) for id_, image in images])

    def mean(self, values: np.ndarray) -> Estimate:
        groups = self.labels if len(values) == len(self.ids) else None
        return metrics.mean_interval(values, groups=groups, num_resamples=self.num_resamples, seed=self.seed)


@dataclass(frozen=True)
class Subject:
    """A run as a network sees it; features are computed when a metric asks for them."""

    ev: Evaluation
    run: Run
    network: FeatureNetwork

    def features(self, resize_mode: str, boxes: Mapping[str, Box | None]) -> np.ndarray:
        """Return the features of boxes of the run's images by id; None stands for the whole image."""
        views = [View(self.run.image(self.ev.bench, id_), resize_mode, box) for id_, box in boxes.items()]
        return extract(self.network, views, **self.ev.options, label=f"{self.run.name}: {resize_mode}")

    @cached_property
    def images(self) -> np.ndarray:
        """Features of the whole images, (N, D)."""
        return self.features(WHOLE, dict.fromkeys(self.ev.ids))

    @cached_property
    def regions(self) -> np.ndarray:
        """Features of the hole boxes, (N, D)."""
        return self.features(SQUASH, self.ev.boxes)

    def distance(self, features: np.ndarray, real: frechet.Statistics) -> Estimate:
        resamples = min(self.ev.num_resamples, FRECHET_RESAMPLES)
        return frechet.frechet_estimate(features, real, num_resamples=resamples, seed=self.ev.seed)

    def metric(self, row: Row, values: np.ndarray | Estimate) -> Metric:
        """Fill in the templates of a row."""
        ev, gmm, modes = self.ev, self.ev.gmm, self.network.preprocessing
        if isinstance(values, np.ndarray):
            if row.key in PER_ITEM:
                ev.per_item[self.run.name][row.key] = values.tolist()
            values = ev.mean(values)
        is_refitted = gmm is not None and "refitted" in gmm.provenance
        is_comparable = {"fid": ev.real is not None, "qs": not is_refitted}.get(row.key, True)
        words = {
            "net": self.network.name,
            "label": row.key.partition(": ")[2],
            "whole": modes[WHOLE],
            "squash": modes[SQUASH],
            "paper": modes.get(PAPER_REGION),
            "real": ev.real.name if ev.real else "the bench's true pictures",
            "clip": "CLIP score" if self.network.name.startswith("CLIP ") else "region similarity",
            "qs": "QS (refitted GMM: not comparable with the paper; " if is_refitted else "QS (",
            "gmm": gmm and f"{gmm.estimator.n_components} components, {gmm.estimator.covariance_type}",
            "seeds": 1 + len(ev.other_seeds),
        }
        low, high = (None if math.isnan(end) else end for end in (values.low, values.high))
        # The paper measures all items.
        is_comparable = is_comparable and self.network.name.startswith(PAPER_NETWORK) and values.n == len(ev.bench)
        paper = PAPER.get(row.key) if is_comparable else None
        name, how = row.name.format(**words), row.how.format(**words) + values.note
        if not math.isfinite(values.value):
            raise UserError(f"{name} of {self.run.name}: got {values.value}; check images and weights")
        return Metric(name, values.value, values.n, how, row.better, low, high, paper)


def exemplar_labels(root: Path, ids: Sequence[str]) -> list[str] | None:
    """Return the cut-out that each item shows, if ROOT/items.csv lists them."""
    path = root / "items.csv"
    if not path.is_file():
        return None
    cutouts = dict[str, str]()
    for number, row in read_table(path):
        try:
            cutouts[f"{whole(row['ID']):012d}"] = row["Cutout"]
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}, row {number}: lacks {error}; expected columns ID and Cutout") from None
    if missing := [id_ for id_ in ids if id_ not in cutouts]:
        raise UserError(f"{path}: lists no item {missing[0]}; compose the bench again")
    return [cutouts[id_] for id_ in ids]


# What a metric yields, in the order of its rows: values of items, or an estimate; None: there is nothing to measure.
Values = Sequence[np.ndarray | Estimate | None]


def _kid(s: Subject) -> Values:
    value, error = frechet.kid(s.ev.real_sample, s.images, seed=s.ev.seed)
    return [Estimate(1000 * value, 1000 * (value - 1.96 * error), 1000 * (value + 1.96 * error), len(s.images))]


def _similarity(s: Subject) -> Values:
    return [cosine_scores(s.regions, s.ev.exemplars(s.network))]


def _clip(s: Subject) -> Values:
    boxes = s.ev.paper_boxes
    exemplars = s.ev.exemplars(s.network)[[id_ in boxes for id_ in s.ev.ids]]
    return [cosine_scores(s.features(PAPER_REGION, boxes), exemplars) if boxes else None, *_similarity(s)]


def _identification(s: Subject) -> Values:
    ev, labels = s.ev, np.array(s.ev.labels or [""] * len(s.ev.ids))
    estimate, shares = metrics.identification(
        s.regions, s.ev.exemplars(s.network), s.ev.labels, num_resamples=ev.num_resamples, seed=ev.seed
    )
    s.ev.per_item[s.run.name]["identification"] = shares.tolist()
    if unknown := set(ev.focus) - set(labels):
        raise UserError(f"--focus: no measured item shows {unknown.pop()}; items.csv of the bench lists the cut-outs")
    return [estimate, *(shares[labels == label] for label in ev.focus)]


def _inception(s: Subject) -> Values:
    fid, sfid = s.ev.inception_statistics
    score = inception_score(s.images[:, LOGITS], splits=min(10, len(s.images) // 2), seed=s.ev.seed)
    return [s.distance(s.images[:, POOLED], fid), s.distance(s.images[:, SPATIAL], sfid), score]


def _background(s: Subject) -> Values:
    errors = []
    for id_ in tqdm(s.ev.ids if s.run.folder else [], desc=f"{s.run.name}: background", disable=None, leave=False):
        item = s.ev.bench.item(id_)
        errors.append(metrics.background(open_image(s.run.image(s.ev.bench, id_)), item.scene, item.hole_mask))
    kept = [error for error in errors if not math.isnan(error.psnr)]  # a hole may leave no background
    if not kept:
        return [None, None, None]
    ssim, psnr, largest = np.array(kept).T
    squares, ssim = s.ev.mean(255**2 / 10 ** (psnr / 10)), ssim[~np.isnan(ssim)]
    value, low, high = (10 * math.log10(255**2 / max(x, 1e-9)) for x in (squares.value, squares.high, squares.low))
    return [
        ssim if len(ssim) else None,
        Estimate(value, low, high, len(psnr)) if squares.value > 0 else None,  # equal backgrounds have no PSNR
        Estimate(float(largest.max()), math.nan, math.nan, len(psnr)),
    ]


def _copying(s: Subject) -> Values:
    exemplars, true_images = s.ev.reference_corners
    if s.run.folder is None or np.array_equal(exemplars, true_images):  # every exemplar is the true region itself
        return [None]
    return [metrics.copied_background(s.ev.corners(s.run), exemplars, true_images)]


def _diversity(s: Subject) -> Values:
    if s.run is not s.ev.runs[0]:
        return [None]
    features = [s.regions, *(Subject(s.ev, run, s.network).regions for run in s.ev.other_seeds)]
    return [np.mean([100 - cosine_scores(a, b) for a, b in combinations(features, 2)], axis=0)]


METRICS: dict[str, Callable[[Subject], Values]] = {
    "fid": lambda s: [s.distance(s.images, s.ev.real_statistics)],
    "kid": _kid,
    "precision-recall": lambda s: frechet.neighbours(s.ev.real_sample, s.images),
    "qs": lambda s: [s.ev.gmm and quality_scores(s.ev.gmm.log_density(s.images))],
    "clip": _clip,
    "identification": _identification,
    "foreground-fid": lambda s: [s.distance(s.regions, frechet.statistics_of(s.ev.exemplars(s.network)))],
    "dino": _similarity,
    "inception": _inception,
    "background": _background,
    "copying": _copying,
    "diversity": _diversity,
}


class Row(NamedTuple):
    """How a value of a metric is printed; `name` and `how` are templates, which `Subject.metric` fills in."""

    metric: str
    key: str
    name: str
    how: str
    better: str = "higher"


_REAL, _COSINE, _OUTSIDE = "{whole}; real: {real}", "cosine x 100; {squash}", "pixels outside the hole"
_CORNERS = "corners of the region inside the hole's box: 0 as in the true picture, 1 as in the exemplar"
_SEEDS = "100 - cosine x 100 between seeds, {seeds} seeds; {squash}"
ROWS = [
    Row("fid", "fid", "FID ({net})", _REAL, "lower"),
    Row("kid", "kid", "KID x 1000 ({net})", _REAL, "lower"),
    Row("precision-recall", "precision", "precision ({net})", f"{_REAL}; k-NN, k = 3"),
    Row("precision-recall", "recall", "recall ({net})", f"{_REAL}; k-NN, k = 3"),
    Row("qs", "qs", "{qs}{net})", "{whole}; GMM of {gmm}"),
    Row("clip", "clip-paper", "{clip} ({net}, the paper's crop)", "cosine x 100, region: {paper}; exemplar: {squash}"),
    Row("clip", "clip", "{clip} ({net}, exact crop)", _COSINE),
    Row("identification", "identification", "identification ({net})", "all ordered pairs, chance is 0.5; {squash}"),
    Row("foreground-fid", "foreground-fid", "foreground FID ({net})", "regions against exemplars; {squash}", "lower"),
    Row("dino", "dino", "DINO score ({net})", _COSINE),
    Row("inception", "inception-fid", "FID ({net})", _REAL, "lower"),
    Row("inception", "inception-sfid", "sFID ({net})", _REAL, "lower"),
    Row("inception", "inception-is", "IS ({net})", "{whole}"),
    Row("background", "background-ssim", "background SSIM", _OUTSIDE),
    Row("background", "background-psnr", "background PSNR, dB", f"{_OUTSIDE}; of the mean squared error"),
    Row("background", "background-max", "background max |Δ|, grey levels", f"{_OUTSIDE}; of all items", "lower"),
    Row("copying", "copying", "copied background", _CORNERS, "lower"),
    Row("diversity", "diversity", "diversity ({net})", _SEEDS),
]


Record = Mapping[str, Any]
ARROWS = {"higher": "↑", "lower": "↓"}  # the direction of better values


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
