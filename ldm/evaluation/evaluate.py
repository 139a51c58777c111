"""Evaluation of edited benchmarks: runs x metrics => a table of numbers with their conditions.

Every metric states its exact name, the network and preprocessing of its features, the number of items it was
measured on, and its 95 % interval. The paper's number stands beside ours only if the same thing was measured.

Dimension key: N items · D feature channels · M real images.
"""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.evaluation.cache import FeatureCache
from ldm.evaluation.cocoee import Bench
from ldm.evaluation.features import PAPER_REGION, SQUASH, WHOLE, FeatureNetwork, View, cropped, iter_features
from ldm.evaluation.frechet import RunningStatistics, Statistics, frechet_distance, frechet_interval, kid, neighbours
from ldm.evaluation.inception import fid_features, inception_score, is_logits, sfid_features
from ldm.evaluation.metrics import (
    Estimate,
    background,
    copied_background,
    corner_colors,
    cosine_scores,
    hole_box,
    identification,
    identified_shares,
    mean_interval,
    paper_box,
)
from ldm.evaluation.quality import GaussianMixture, quality_scores
from ldm.files import UserError
from ldm.images import find_images, load_mask, open_image

TRUE_IMAGE = "true picture"  # the run that consists of the benchmark's own scenes; a key of metrics.json
FRECHET_RESAMPLES = 100  # each is an eigenvalue problem
MANIFOLD_SIZE = 10_000  # most real images that KID and precision/recall use
# Yang et al. 2023, Table 1: COCOEE, CLIP ViT-B/32 features, real images of COCO test2017.
PAPER_NETWORK = "CLIP ViT-B/32"
PAPER = {"fid": 3.18, "qs": 77.80, "clip-paper": 84.97}
DEFAULT_METRICS = ("fid", "clip", "identification", "background")

Part = Callable[[np.ndarray], np.ndarray]  # (N, D) => (N, some of D)
INCEPTION_PARTS: dict[str, Part] = {"FID": fid_features, "sFID": sfid_features}


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        name: exact, with the feature network.
        value: the number.
        n: number of items or images behind it.
        how: preprocessing and reference, one phrase.
        better: "higher" | "lower".
        low, high: 95 % interval; None where there is none.
        paper: the paper's number for the same measurement on COCOEE.
    """

    name: str
    value: float
    n: int
    how: str
    better: str
    low: float | None = None
    high: float | None = None
    paper: float | None = None


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Run:
    """The images of one run.

    Attributes:
        name: in the table.
        folder: with ID.png; None stands for the benchmark's own true images.
        settings, timing: what the run wrote beside its images; empty for images from elsewhere.
    """

    name: str
    folder: Path | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, name: str = "") -> Run:
        """Read a run's OUTDIR, or the folder of images itself.

        Raises:
            UserError: there is no such folder.
        """
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; scripts/inference_test_bench.py writes it")
        root = path.parent if path.name == "results" and (path.parent / "settings.json").is_file() else path
        folder = root / "results" if (root / "results").is_dir() else root
        return cls(name or root.name, folder, *(_read_json(root / f"{part}.json") for part in ("settings", "timing")))

    def image(self, bench: Bench, id_: str) -> Path:
        return bench.paths(id_)[0] if self.folder is None else self.folder / f"{id_}.png"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: damaged; delete it, or edit the benchmark again") from None


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, and with what.

    Attributes:
        network: features of all metrics but `dino` and `inception`.
        metrics: names from METRICS.
        real: folder of real images, or their statistics (.npz); None takes the benchmark's true images.
        gmm: mixture of the quality score.
        dino: network of the DINO score.
        inception: network of plain FID, sFID and Inception score, from `load_inception`.
        cache: features by content; None computes all.
        focus: cut-outs of the benchmark's items.csv whose identification is also measured alone.
        batch_size, num_workers: of the networks' input.
        num_resamples, seed: of the bootstraps.
    """

    network: FeatureNetwork
    metrics: Sequence[str] = DEFAULT_METRICS
    real: Path | None = None
    gmm: GaussianMixture | None = None
    dino: FeatureNetwork | None = None
    inception: FeatureNetwork | None = None
    cache: FeatureCache | None = None
    focus: Sequence[str] = ()
    batch_size: int = 32
    num_workers: int = 0
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.metrics) - METRICS.keys()):
            raise UserError(f"metrics: got {', '.join(unknown)}, expected some of {', '.join(METRICS)}")
        needed = {
            "qs": (self.gmm, "--gmm FILE (scripts/fit_quality_gmm.py fits one)"),
            "dino": (self.dino, "--dino FOLDER_OR_NAME"),
            "inception": (self.inception, "--inception FILE"),
        }
        for name, (value, remedy) in needed.items():
            if name in self.metrics and value is None:
                raise UserError(f"{name}: give {remedy}")
        if self.focus and "identification" not in self.metrics:
            raise UserError("--focus: add identification to --metrics")


def evaluate_runs(bench: Bench, runs: Sequence[Run], config: EvalConfig, other_seeds: Sequence[Run] = ()) -> Evaluation:
    """Measure every run, and the benchmark's true images, on the items that all runs hold.

    Args:
        bench: the items.
        runs: the first is the run of interest.
        config: what is measured, and with what.
        other_seeds: the first run's items edited with other seeds, for the diversity.

    Raises:
        UserError: runs share fewer than two items or have equal names, or an image differs from its scene in size.
        UserError, OSError: a file cannot be read.
    """
    evaluation = Evaluation(bench, runs, config, other_seeds)
    for run in evaluation.runs:
        for name in METRICS:
            if name in config.metrics:
                evaluation.metrics[run.name] |= METRICS[name](evaluation, run)
    return evaluation


class Evaluation:
    """The inputs of the metrics, computed once and shared; see `evaluate_runs` for the arguments.

    Attributes:
        ids: the measured items.
        metrics: by run and key.
        per_item: by run and key, values in the order of `ids`.
        labels: the cut-out that each item shows, where items.csv of the benchmark lists them.
        boxes, paper_boxes: `hole_box` and `paper_box` by id; holes that the paper's rule cannot crop have no paper box.
    """

    def __init__(self, bench: Bench, runs: Sequence[Run], config: EvalConfig, other_seeds: Sequence[Run] = ()) -> None:
        self.bench, self.config, self.other_seeds = bench, config, other_seeds
        self.runs = [*runs, Run(TRUE_IMAGE, None)]
        names = [run.name for run in self.runs]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two runs are called {repeated.pop()}; name them: NAME=FOLDER")
        if "diversity" in config.metrics and not other_seeds:
            raise UserError("diversity: give --other-seeds FOLDER …, the same items edited with other seeds")
        self.ids = common_ids(bench, [*runs, *other_seeds])
        self.labels = exemplar_labels(bench.root, self.ids)
        self.metrics: dict[str, Metrics] = {name: {} for name in names}
        self.per_item: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        self.boxes: dict[str, tuple[int, int, int, int]] = {}
        self.paper_boxes: dict[str, tuple[int, int, int, int]] = {}
        for id_ in tqdm(self.ids, desc="masks", unit="item", disable=None, leave=False):
            self._read_hole(id_, [*runs, *other_seeds])
        if "clip" in config.metrics and (dropped := len(self.ids) - len(self.paper_boxes)):
            warnings.warn(
                f"the paper's crop is empty for {dropped} of {len(self.ids)} items; its CLIP score leaves them out",
                stacklevel=2,
            )
        self._features: dict[tuple[str, str, str], np.ndarray] = {}

    def _read_hole(self, id_: str, runs: Sequence[Run]) -> None:
        """Note where an item's hole is, and check the sizes of its images."""
        scene_path, mask_path, _ = self.bench.paths(id_)
        hole_mask = load_mask(mask_path)
        with Image.open(scene_path) as scene:
            self.boxes[id_] = hole_box(scene, hole_mask)
            if box := paper_box(hole_mask):
                self.paper_boxes[id_] = box
            for run in runs:
                path = run.image(self.bench, id_)
                with Image.open(path) as image:
                    if image.size != scene.size:
                        raise UserError(
                            f"{path}: got {image.size} pixels, expected the scene's {scene.size}; "
                            "is it of another benchmark?"
                        )

    # ---- features ----

    def _stream(self, network: FeatureNetwork, views: Sequence[View], label: str) -> Iterator[np.ndarray]:
        config = self.config
        return iter_features(
            network,
            views,
            cache=config.cache,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            label=label,
        )

    def extract(self, network: FeatureNetwork, views: Sequence[View], label: str) -> np.ndarray:
        """Return the features of views, (N, D)."""
        return np.concatenate([*self._stream(network, views, label)])

    def _kept(self, network: FeatureNetwork, run: Run | None, kind: str, views: Callable[[], list[View]]) -> np.ndarray:
        """Return features, kept while they are needed again: the exemplars', and those of the current run."""
        name = run.name if run else "exemplars"
        key = (network.key, name, kind)
        if key not in self._features:
            self._features = {old: x for old, x in self._features.items() if old[1] in (name, "exemplars")}
            self._features[key] = self.extract(network, views(), f"{name}: {kind}" if run else name)
        return self._features[key]

    def image_features(self, run: Run, network: FeatureNetwork) -> np.ndarray:
        """Return the features of whole images, (N, D)."""
        return self._kept(network, run, "images", lambda: [View(run.image(self.bench, id_), WHOLE) for id_ in self.ids])

    def region_features(self, run: Run, network: FeatureNetwork) -> np.ndarray:
        """Return the features of the hole boxes, squashed to the network's square, (N, D)."""
        return self._kept(
            network,
            run,
            "regions",
            lambda: [View(run.image(self.bench, id_), SQUASH, self.boxes[id_]) for id_ in self.ids],
        )

    def exemplar_features(self, network: FeatureNetwork) -> np.ndarray:
        """Return the features of the exemplars, squashed to the network's square, (N, D)."""
        return self._kept(
            network, None, "exemplars", lambda: [View(self.bench.paths(id_)[2], SQUASH) for id_ in self.ids]
        )

    @cached_property
    def real_views(self) -> list[View]:
        """The real images, as views."""
        if self.config.real is None:
            return [View(self.bench.paths(id_)[0], WHOLE) for id_ in self.bench.ids]
        if self.config.real.suffix == ".npz":
            raise UserError(
                f"{self.config.real}: KID, precision/recall and the Inception metrics need the real images, not their "
                "statistics; give --real FOLDER or leave those metrics out"
            )
        return [View(path, WHOLE) for path in find_images(self.config.real)]

    @cached_property
    def real_statistics(self) -> Statistics:
        """Statistics of the real images, which are read once and never all in memory."""
        real, network = self.config.real, self.config.network
        if real is not None and real.suffix == ".npz":
            return Statistics.load(real)
        return self._statistics(network, {"all": lambda features: features})["all"]

    @cached_property
    def inception_statistics(self) -> dict[str, Statistics]:
        assert self.config.inception is not None
        return self._statistics(self.config.inception, INCEPTION_PARTS)

    def _statistics(self, network: FeatureNetwork, parts: Mapping[str, Part]) -> dict[str, Statistics]:
        running = {key: RunningStatistics(network.name) for key in parts}
        for features in self._stream(network, self.real_views, "real images"):
            for key, part in parts.items():
                running[key].add(part(features))
        return {key: statistics.result() for key, statistics in running.items()}

    @cached_property
    def real_sample(self) -> np.ndarray:
        """Features of at most MANIFOLD_SIZE real images, drawn at random, (M, D)."""
        views = self.real_views
        drawn = np.random.default_rng(self.config.seed).permutation(len(views))[:MANIFOLD_SIZE]
        return self.extract(self.config.network, [views[k] for k in np.sort(drawn)], "real images")

    @property
    def real_name(self) -> str:
        real = self.config.real
        return "the bench's true pictures" if real is None else real.name

    @property
    def is_paper_network(self) -> bool:
        return self.config.network.name.startswith(PAPER_NETWORK)

    # ---- numbers ----

    def mean(self, values: np.ndarray, run: Run | None = None, key: str = "") -> Estimate:
        """Return the mean with its interval; with a run and a key the values are kept in `per_item`."""
        if run is not None:
            self.per_item[run.name][key] = [float(value) for value in values]
        groups = self.labels if len(values) == len(self.ids) else None
        return mean_interval(values, groups=groups, num_resamples=self.config.num_resamples, seed=self.config.seed)

    def frechet(
        self, name: str, features: np.ndarray, real: Statistics, how: str, paper: float | None = None
    ) -> Metric:
        """Return the Fréchet distance between features and the statistics of real ones."""
        running = RunningStatistics(real.network)
        running.add(features)
        resamples = min(self.config.num_resamples, FRECHET_RESAMPLES)
        low, high = frechet_interval(features, real, num_resamples=resamples, seed=self.config.seed)
        return Metric(name, frechet_distance(running.result(), real), len(features), how, "lower", low, high, paper)

    def corners(self, run: Run) -> np.ndarray:
        """Return the corner colours of the hole boxes, (N, 4, 3)."""
        return np.stack([corner_colors(cropped(open_image(run.image(self.bench, i)), self.boxes[i])) for i in self.ids])

    @cached_property
    def reference_corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Corner colours of the exemplars, and of the true images' hole boxes."""
        exemplars = [corner_colors(open_image(self.bench.paths(id_)[2])) for id_ in self.ids]
        return np.stack(exemplars), self.corners(Run(TRUE_IMAGE, None))


def common_ids(bench: Bench, runs: Sequence[Run]) -> list[str]:
    """Return the ids of which every run has an image.

    Raises:
        UserError: there are fewer than two.
    """
    common = [id_ for id_ in bench.ids if all(run.image(bench, id_).is_file() for run in runs)]
    if len(common) < 2:
        names = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"{names}: got {len(common)} items of the benchmark in common, expected at least 2")
    return common


def exemplar_labels(root: Path, ids: Sequence[str]) -> list[str] | None:
    """Return the cut-out that each item shows, if ROOT/items.csv lists them.

    Raises:
        UserError: the list lacks an item.
    """
    path = root / "items.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        cutouts = {f"{int(row['ID']):012d}": row["Cutout"] for row in csv.DictReader(file)}
    if missing := [id_ for id_ in ids if id_ not in cutouts]:
        raise UserError(f"{path}: lists no item {missing[0]}; compose the bench again")
    return [cutouts[id_] for id_ in ids]


# ---- metrics: (evaluation, run) => numbers by key ----


def _mean_metric(name: str, estimate: Estimate, how: str, better: str, paper: float | None = None) -> Metric:
    return Metric(name, estimate.value, estimate.n, how, better, estimate.low, estimate.high, paper)


def _how_whole(ev: Evaluation) -> str:
    return f"{ev.config.network.preprocessing[WHOLE]}; real: {ev.real_name}"


def _fid(ev: Evaluation, run: Run) -> Metrics:
    network = ev.config.network
    paper = PAPER["fid"] if ev.is_paper_network and ev.config.real is not None else None
    features = ev.image_features(run, network)
    return {"fid": ev.frechet(f"FID ({network.name})", features, ev.real_statistics, _how_whole(ev), paper)}


def _kid(ev: Evaluation, run: Run) -> Metrics:
    network = ev.config.network
    features = ev.image_features(run, network)
    value, error = kid(ev.real_sample, features, seed=ev.config.seed)
    low, high = 1000 * (value - 1.96 * error), 1000 * (value + 1.96 * error)
    name = f"KID x 1000 ({network.name})"
    return {"kid": Metric(name, 1000 * value, len(features), _how_whole(ev), "lower", low, high)}


def _precision_recall(ev: Evaluation, run: Run) -> Metrics:
    network = ev.config.network
    how = f"{_how_whole(ev)}; k-NN, k = 3"
    inside = neighbours(ev.real_sample, ev.image_features(run, network))
    return {
        key: _mean_metric(f"{key} ({network.name})", ev.mean(among), how, "higher")
        for key, among in zip(("precision", "recall"), inside, strict=True)
    }


def _quality(ev: Evaluation, run: Run) -> Metrics:
    network, gmm = ev.config.network, ev.config.gmm
    assert gmm is not None
    estimate = ev.mean(quality_scores(gmm.log_density(ev.image_features(run, network))), run, "qs")
    name, paper = f"QS ({network.name})", PAPER["qs"] if ev.is_paper_network else None
    if gmm.provenance.get("refitted"):
        name, paper = f"QS (refitted GMM: not comparable with the paper; {network.name})", None
    how = f"{network.preprocessing[WHOLE]}; GMM of {len(gmm.weights)} components, {gmm.covariance_type}"
    return {"qs": _mean_metric(name, estimate, how, "higher", paper)}


def _clip(ev: Evaluation, run: Run) -> Metrics:
    network, metrics = ev.config.network, Metrics()
    exemplars, how = ev.exemplar_features(network), network.preprocessing[SQUASH]
    name = "CLIP score" if network.name.startswith("CLIP ") else "region similarity"
    if rows := [k for k, id_ in enumerate(ev.ids) if id_ in ev.paper_boxes]:
        ids = [ev.ids[k] for k in rows]
        views = [View(run.image(ev.bench, id_), PAPER_REGION, ev.paper_boxes[id_]) for id_ in ids]
        regions = ev.extract(network, views, f"{run.name}: regions as in the paper")
        metrics["clip-paper"] = _mean_metric(
            f"{name} ({network.name}, the paper's crop)",
            ev.mean(cosine_scores(regions, exemplars[rows])),
            f"cosine x 100, region: {network.preprocessing[PAPER_REGION]}; exemplar: {how}",
            "higher",
            PAPER["clip-paper"] if ev.is_paper_network else None,
        )
    scores = ev.mean(cosine_scores(ev.region_features(run, network), exemplars), run, "clip")
    name = f"{name} ({network.name}, exact crop)"
    return metrics | {"clip": _mean_metric(name, scores, f"cosine x 100; {how}", "higher")}


def _identification(ev: Evaluation, run: Run) -> Metrics:
    network, config = ev.config.network, ev.config
    regions, exemplars = ev.region_features(run, network), ev.exemplar_features(network)
    how = network.preprocessing[SQUASH]
    estimate = identification(regions, exemplars, ev.labels, num_resamples=config.num_resamples, seed=config.seed)
    name = f"identification ({network.name})"
    metrics = {"identification": _mean_metric(name, estimate, f"all ordered pairs, chance is 0.5; {how}", "higher")}
    shares = identified_shares(regions, exemplars, ev.labels)
    ev.per_item[run.name]["identification"] = shares.tolist()
    for label in config.focus:
        rows = [k for k, other in enumerate(ev.labels or ()) if other == label]
        if not rows:
            raise UserError(f"--focus: no measured item shows {label}; items.csv of the bench lists their cut-outs")
        metrics[f"identification: {label}"] = _mean_metric(
            f"identification of {label}", ev.mean(shares[rows]), f"against all other exemplars; {how}", "higher"
        )
    return metrics


def _foreground_fid(ev: Evaluation, run: Run) -> Metrics:
    network = ev.config.network
    exemplars = RunningStatistics(network.name)
    exemplars.add(ev.exemplar_features(network))
    name, how = f"foreground FID ({network.name})", f"regions against exemplars; {network.preprocessing[SQUASH]}"
    return {"foreground-fid": ev.frechet(name, ev.region_features(run, network), exemplars.result(), how)}


def _dino(ev: Evaluation, run: Run) -> Metrics:
    network = ev.config.dino
    assert network is not None
    scores = cosine_scores(ev.region_features(run, network), ev.exemplar_features(network))
    how = f"cosine x 100; {network.preprocessing[SQUASH]}"
    return {"dino": _mean_metric(f"DINO score ({network.name})", ev.mean(scores, run, "dino"), how, "higher")}


def _inception(ev: Evaluation, run: Run) -> Metrics:
    network = ev.config.inception
    assert network is not None
    features = ev.image_features(run, network)
    how, n = f"{network.preprocessing[WHOLE]}; real: {ev.real_name}", len(features)
    metrics = {
        f"inception-{key.lower()}": ev.frechet(
            f"{key} ({network.name})", part(features), ev.inception_statistics[key], how
        )
        for key, part in INCEPTION_PARTS.items()
    }
    value, spread = inception_score(is_logits(features), splits=min(10, n // 2), seed=ev.config.seed)
    how = f"{network.preprocessing[WHOLE]}; spread of the parts {spread:.2f}"
    return metrics | {"inception-is": Metric(f"IS ({network.name})", value, n, how, "higher")}


def _background(ev: Evaluation, run: Run) -> Metrics:
    if run.folder is None:
        return {}
    errors = []
    for id_ in tqdm(ev.ids, desc=f"{run.name}: background", unit="item", disable=None, leave=False):
        scene_path, mask_path, _ = ev.bench.paths(id_)
        errors.append(background(open_image(run.image(ev.bench, id_)), open_image(scene_path), load_mask(mask_path)))
    errors = [error for error in errors if not math.isnan(error.psnr)]  # a hole may leave no background
    if not errors:
        return {}
    how, metrics = "pixels outside the hole", Metrics()
    if ssims := [error.ssim for error in errors if not math.isnan(error.ssim)]:
        metrics["background-ssim"] = _mean_metric("background SSIM", ev.mean(np.array(ssims)), how, "higher")
    squares = ev.mean(255**2 / 10 ** (np.array([error.psnr for error in errors]) / 10))
    if squares.value > 0:  # equal backgrounds have no PSNR
        low, value, high = (10 * math.log10(255**2 / max(x, 1e-9)) for x in (squares.high, squares.value, squares.low))
        name = "background PSNR, dB"
        metrics["background-psnr"] = Metric(
            name, value, len(errors), f"{how}; of the mean squared error", "higher", low, high
        )
    worst, name = max(error.max_abs for error in errors), "background max |Δ|, grey levels"
    return metrics | {"background-max": Metric(name, worst, len(errors), f"{how}; of all items", "lower")}


def _copying(ev: Evaluation, run: Run) -> Metrics:
    exemplars, true_images = ev.reference_corners
    if run.folder is None or np.array_equal(exemplars, true_images):  # every exemplar is the true region itself
        return {}
    shares = copied_background(ev.corners(run), exemplars, true_images)
    how = "corners of the region inside the hole's box: 0 as in the true picture, 1 as in the exemplar"
    return {"copying": _mean_metric("copied background", ev.mean(shares), how, "lower")}


def _diversity(ev: Evaluation, run: Run) -> Metrics:
    if run is not ev.runs[0]:
        return {}
    network = ev.config.network
    features = [ev.region_features(each, network) for each in (run, *ev.other_seeds)]
    distances = np.mean([100 - cosine_scores(a, b) for a, b in combinations(features, 2)], axis=0)
    how = f"100 - cosine x 100 between seeds, {len(features)} seeds; {network.preprocessing[SQUASH]}"
    return {"diversity": _mean_metric(f"diversity ({network.name})", ev.mean(distances), how, "higher")}


METRICS: dict[str, Callable[[Evaluation, Run], Metrics]] = {
    "fid": _fid,
    "kid": _kid,
    "precision-recall": _precision_recall,
    "qs": _quality,
    "clip": _clip,
    "identification": _identification,
    "foreground-fid": _foreground_fid,
    "dino": _dino,
    "inception": _inception,
    "background": _background,
    "copying": _copying,
    "diversity": _diversity,
}


# ---- how records of scripts/evaluate.py are shown ----

Record = Mapping[str, Any]


def metric_rows(record: Record) -> dict[str, Record]:
    """Return every metric once, by its key, as the first run that has it describes it."""
    rows: dict[str, Record] = {}
    for run in record["runs"].values():
        rows = {**run["figures"], **rows}
    return {key: rows[key] for run in record["runs"].values() for key in run["figures"]}


def format_value(metric: Record, value: float) -> str:
    """Format with two digits after the point, or with four if the metric lies within 0 and 1."""
    return f"{value:.{2 if abs(metric['value']) > 1.5 else 4}f}"


def format_interval(metric: Record) -> str:
    """Return `(low to high)`, or nothing."""
    if metric["low"] is None:
        return ""
    return f"({format_value(metric, metric['low'])} to {format_value(metric, metric['high'])})"


def arrow(metric: Record) -> str:
    """Return the direction of better values."""
    return {"higher": "↑", "lower": "↓"}[metric["better"]]
