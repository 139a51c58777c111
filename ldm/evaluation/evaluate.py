"""Evaluation of edited benchmarks: runs x metrics => a table of numbers with their conditions.

Dimension key: N items · D feature channels · M real images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.evaluation import frechet, metrics
from ldm.evaluation.cocoee import Bench, images_by_id
from ldm.evaluation.features import PAPER_REGION, SQUASH, WHOLE, FeatureNetwork, View, extract, iter_features
from ldm.evaluation.inception import LOGITS, POOLED, SPATIAL, inception_score
from ldm.evaluation.metrics import Estimate, cosine_scores
from ldm.evaluation.quality import GaussianMixture, quality_scores
from ldm.files import Skipped, UserError, read_json, read_table, whole
from ldm.images import Box, find_images, open_image

TRUE_IMAGES = "the bench's true pictures"
TRUE_IMAGE = "true picture"  # the run that consists of the benchmark's own scenes; a key of metrics.json
FRECHET_RESAMPLES = 100  # each is an eigenvalue problem
MANIFOLD_SIZE = 10_000  # most real images that KID and precision/recall use
PAPER_NETWORK = "CLIP ViT-B/32"
# Yang et al. 2023, Table 1: all items of COCOEE, features of PAPER_NETWORK, real images of COCO test2017.
PAPER = {"fid": 3.18, "qs": 77.80, "clip-paper": 84.97}
PER_ITEM = ("qs", "clip", "dino")  # keys whose values per item are recorded, beside `identification`
# Methods of `Subject`, which may record several numbers each.
METRICS = ("fid", "kid", "precision-recall", "qs", "clip", "identification", "foreground-fid", "dino", "inception")
METRICS += ("background", "copying", "diversity")
DEFAULT_METRICS = ("fid", "clip", "identification", "background")
OF_EDITS = ("background", "copying", "diversity")  # not of the true images
NEEDS = {"qs": "gmm", "dino": "dino", "inception": "inception", "diversity": "other_seeds"}  # the input of a metric


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
    paper: float | None = None  # the paper's number on COCOEE, if the same thing was measured


@dataclass(frozen=True)
class Run:
    """The images of one run, by id, and the settings and times that it wrote beside them."""

    name: str  # in the table
    folder: Path | None  # None: the benchmark's own true images
    images: Mapping[str, Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, name: str = "") -> Run:
        """Read a run's OUTDIR, or the folder of images itself."""
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; scripts/inference_test_bench.py writes it")
        root = path.parent if path.name == "results" and (path.parent / "settings.json").is_file() else path
        folder = root / "results" if (root / "results").is_dir() else root
        settings, timing = (read_json(root / f"{name}.json", {}) for name in ("settings", "timing"))
        return cls(name or root.name, folder, images_by_id(folder), settings, timing)


@dataclass(eq=False)
class Evaluation:
    """Runs x metrics => numbers, on the items that all runs hold; `measure` fills in `metrics` and `per_item`.

    An item is left out if a file of it or a result is missing or unreadable, or differs from its scene in size; so are
    real images that cannot be read. With `strict` these, and results that are JPEG, are errors.
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
        if unknown := sorted(set(self.names) - set(METRICS)):
            raise UserError(f"metrics: got {', '.join(unknown)}, expected some of {', '.join(METRICS)}")
        for name, option in NEEDS.items():
            if name in self.names and not getattr(self, option):
                raise UserError(f"{name}: give --{option.replace('_', '-')}")
        if self.focus and "identification" not in self.names:
            raise UserError("--focus: add identification to --metrics")
        edited = [*self.runs, *self.other_seeds]
        self.runs = [*self.runs, Run(TRUE_IMAGE, None, {id_: self.bench.paths(id_)[0] for id_ in self.bench.ids})]
        self.metrics, self.per_item = {run.name: {} for run in self.runs}, {run.name: {} for run in self.runs}
        if len(self.metrics) < len(self.runs):
            raise UserError(f"two of {', '.join(run.name for run in self.runs)} are equal; name runs: NAME=FOLDER")
        self.boxes: dict[str, Box] = {}
        self.paper_boxes: dict[str, Box] = {}  # without the holes that the paper's rule cannot crop
        self.left_out, self.lossy = Skipped(strict=self.strict), Skipped(strict=self.strict)  # items, results
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
        if unknown := set(self.focus).difference(self.labels or ()):
            raise UserError(f"--focus: no measured item shows {unknown.pop()}; items.csv of the bench lists cut-outs")
        self.exemplars: dict[FeatureNetwork, np.ndarray] = {}  # their features

    def _check(self, id_: str, edited: Sequence[Run]) -> tuple[Box, Box | None, list[Path]] | UserError:
        """Return the boxes of an item's hole and which of its results are JPEGs, or else what is wrong with it."""
        try:
            item, lossy = self.bench.item(id_), []
            for run in edited:
                if (path := run.images.get(id_)) is None:
                    raise UserError(f"{id_}: without a result in {run.folder}")
                if (size := open_image(path).size) != item.scene.size:
                    got, expected = (f"{width}x{height}" for width, height in (size, item.scene.size))
                    raise UserError(f"{path} with {got} instead of {expected}: of another size")
                with Image.open(path) as image:
                    lossy += [path] * (image.format == "JPEG")
            return metrics.hole_box(item.hole_mask), metrics.paper_box(item.hole_mask), lossy
        except UserError as error:
            return error

    def measure(self) -> None:
        """Measure every metric of every run."""
        for run in self.runs:
            subject = Subject(self, run, self.network)
            for name in METRICS:
                if name in self.names and (run.folder or name not in OF_EDITS):
                    network = {"dino": self.dino, "inception": self.inception}.get(name)
                    seen = Subject(self, run, network) if network else subject
                    getattr(seen, name.replace("-", "_"))()

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
        regions = (open_image(run.images[id_]).crop(self.boxes[id_]) for id_ in self.ids)
        return np.stack([metrics.corner_colors(region) for region in regions])

    def mean(self, values: np.ndarray) -> Estimate:
        groups = self.labels if len(values) == len(self.ids) else None
        return metrics.mean_interval(values, groups=groups, num_resamples=self.num_resamples, seed=self.seed)


@dataclass(eq=False)
class Subject:
    """A run as a network sees it, and its metrics; features are computed when a metric asks for them."""

    ev: Evaluation
    run: Run
    network: FeatureNetwork

    def __post_init__(self) -> None:
        self.whole, self.squash = (self.network.preprocessing[mode] for mode in (WHOLE, SQUASH))
        self.against_real = f"{self.whole}; real: {self.ev.real.name if self.ev.real else TRUE_IMAGES}"

    def add(self, key: str, name: str, how: str, values: np.ndarray | Estimate, better: str = "higher") -> None:
        """Record a metric: an estimate, or the mean of the items' values."""
        ev = self.ev
        if isinstance(values, np.ndarray):
            if key in PER_ITEM:
                ev.per_item[self.run.name][key] = values.tolist()
            values = ev.mean(values)
        if not math.isfinite(values.value):
            raise UserError(f"{name} of {self.run.name}: got {values.value}; check images and weights")
        is_papers = self.network.name.startswith(PAPER_NETWORK) and values.n == len(ev.bench)
        is_papers = is_papers and {"fid": ev.real is not None, "qs": "refitted" not in name}.get(key, True)
        paper = PAPER.get(key) if is_papers else None
        low, high = (None if math.isnan(end) else end for end in (values.low, values.high))
        figure = Metric(name, values.value, values.n, how + values.note, better, low, high, paper)
        ev.metrics[self.run.name][key] = figure

    def features(self, resize_mode: str, boxes: Mapping[str, Box | None]) -> np.ndarray:
        """Return the features of boxes of the run's images by id; None stands for the whole image."""
        views = [View(self.run.images[id_], resize_mode, box) for id_, box in boxes.items()]
        return extract(self.network, views, **self.ev.options, label=f"{self.run.name}: {resize_mode}")

    @cached_property
    def images(self) -> np.ndarray:
        """Features of the whole images, (N, D)."""
        return self.features(WHOLE, dict.fromkeys(self.ev.ids))

    @cached_property
    def regions(self) -> np.ndarray:
        """Features of the hole boxes, (N, D)."""
        return self.features(SQUASH, self.ev.boxes)

    @property
    def exemplars(self) -> np.ndarray:
        """Features of the exemplars, (N, D), computed once for all runs."""
        ev, known = self.ev, self.ev.exemplars
        if self.network not in known:
            views = [View(ev.bench.paths(id_)[2], SQUASH) for id_ in ev.ids]
            known[self.network] = extract(self.network, views, **ev.options, label="exemplars")
        return known[self.network]

    def distance(self, features: np.ndarray, real: frechet.Statistics) -> Estimate:
        resamples = min(self.ev.num_resamples, FRECHET_RESAMPLES)
        return frechet.frechet_estimate(features, real, num_resamples=resamples, seed=self.ev.seed)

    def fid(self) -> None:
        value = self.distance(self.images, self.ev.real_statistics)
        self.add("fid", f"FID ({self.network.name})", self.against_real, value, "lower")

    def kid(self) -> None:
        value = frechet.kid(self.ev.real_sample, self.images, seed=self.ev.seed)
        self.add("kid", f"KID x 1000 ({self.network.name})", self.against_real, value, "lower")

    def precision_recall(self) -> None:
        found = frechet.neighbours(self.ev.real_sample, self.images)
        for key, values in zip(("precision", "recall"), found, strict=True):
            self.add(key, f"{key} ({self.network.name})", f"{self.against_real}; k-NN, k = 3", values)

    def qs(self) -> None:
        gmm = self.ev.gmm
        assert gmm is not None
        note = "refitted GMM: not comparable with the paper; " * ("refitted" in gmm.provenance)
        kind = f"{gmm.estimator.n_components} components, {gmm.estimator.covariance_type}"
        values, how = quality_scores(gmm.log_density(self.images)), f"{self.whole}; GMM of {kind}"
        self.add("qs", f"QS ({note}{self.network.name})", how, values)

    def clip(self) -> None:
        kind = "CLIP score" if self.network.name.startswith("CLIP ") else "region similarity"
        if boxes := self.ev.paper_boxes:
            exemplars = self.exemplars[[id_ in boxes for id_ in self.ev.ids]]
            values = cosine_scores(self.features(PAPER_REGION, boxes), exemplars)
            how = f"cosine x 100, region: {self.network.preprocessing[PAPER_REGION]}; exemplar: {self.squash}"
            self.add("clip-paper", f"{kind} ({self.network.name}, the paper's crop)", how, values)
        self.similarity("clip", f"{kind} ({self.network.name}, exact crop)")

    def similarity(self, key: str, name: str) -> None:
        self.add(key, name, f"cosine x 100; {self.squash}", cosine_scores(self.regions, self.exemplars))

    def dino(self) -> None:
        self.similarity("dino", f"DINO score ({self.network.name})")

    def identification(self) -> None:
        ev, key = self.ev, "identification"
        options = {"num_resamples": ev.num_resamples, "seed": ev.seed}
        estimate, shares = metrics.identification(self.regions, self.exemplars, ev.labels, **options)
        ev.per_item[self.run.name][key] = shares.tolist()
        self.add(key, f"{key} ({self.network.name})", f"all ordered pairs, chance is 0.5; {self.squash}", estimate)
        for label in ev.focus:
            values, how = shares[np.array(ev.labels) == label], f"against all other exemplars; {self.squash}"
            self.add(f"{key}: {label}", f"{key} of {label}", how, values)

    def foreground_fid(self) -> None:
        name, how = f"foreground FID ({self.network.name})", f"regions against exemplars; {self.squash}"
        value = self.distance(self.regions, frechet.statistics_of(self.exemplars))
        self.add("foreground-fid", name, how, value, "lower")

    def inception(self) -> None:
        parts = {"FID": POOLED, "sFID": SPATIAL}
        for (name, part), real in zip(parts.items(), self.ev.inception_statistics, strict=True):
            value, key = self.distance(self.images[:, part], real), f"inception-{name.lower()}"
            self.add(key, f"{name} ({self.network.name})", self.against_real, value, "lower")
        score = inception_score(self.images[:, LOGITS], splits=min(10, len(self.images) // 2), seed=self.ev.seed)
        self.add("inception-is", f"IS ({self.network.name})", self.whole, score)

    def background(self) -> None:
        errors, how = [], "pixels outside the hole"
        for id_ in tqdm(self.ev.ids, desc=f"{self.run.name}: background", disable=None, leave=False):
            item = self.ev.bench.item(id_)
            errors.append(metrics.background(open_image(self.run.images[id_]), item.scene, item.hole_mask))
        ssim, psnr, largest = np.array([error for error in errors if not math.isnan(error.psnr)]).reshape(-1, 3).T
        if not len(psnr):  # holes may leave no background
            return
        if len(ssim := ssim[~np.isnan(ssim)]):
            self.add("background-ssim", "background SSIM", how, ssim)
        squares = self.ev.mean(255**2 / 10 ** (psnr / 10))
        if squares.value > 0:  # equal backgrounds have no PSNR
            ends = squares.value, squares.high, squares.low
            value, low, high = (10 * math.log10(255**2 / max(x, 1e-9)) for x in ends)
            name, estimate = "background PSNR, dB", Estimate(value, low, high, len(psnr))
            self.add("background-psnr", name, f"{how}; of the mean squared error", estimate)
        name, estimate = "background max |Δ|, grey levels", Estimate(largest.max(), math.nan, math.nan, len(psnr))
        self.add("background-max", name, f"{how}; of all items", estimate, "lower")

    def copying(self) -> None:
        exemplars, true_images = self.ev.reference_corners
        if not np.array_equal(exemplars, true_images):  # every exemplar is the true region itself
            how = "corners of the region inside the hole's box: 0 as in the true picture, 1 as in the exemplar"
            shares = metrics.copied_background(self.ev.corners(self.run), exemplars, true_images)
            self.add("copying", "copied background", how, shares, "lower")

    def diversity(self) -> None:
        if self.run is self.ev.runs[0]:
            seeds = [self.regions, *(Subject(self.ev, run, self.network).regions for run in self.ev.other_seeds)]
            how = f"100 - cosine x 100 between seeds, {len(seeds)} seeds; {self.squash}"
            values = np.mean([100 - cosine_scores(a, b) for a, b in combinations(seeds, 2)], axis=0)
            self.add("diversity", f"diversity ({self.network.name})", how, values)


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
