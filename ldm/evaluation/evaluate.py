"""The figures of edited benchmarks: which pictures, which features, which measure, in one place.

Every figure says its exact name, the network and preprocessing of its features, how many items it was measured on, and
its 95 % interval. The paper's three figures stand beside ours only where the same thing was measured.

Dimension key: N items · D feature channels.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.evaluation.background import background
from ldm.evaluation.cache import FeatureCache
from ldm.evaluation.cocoee import Bench
from ldm.evaluation.copying import copied_background, corner_colours
from ldm.evaluation.features import PAPER_REGION, SQUASH, WHOLE, FeatureNetwork, View, cropped, iter_features
from ldm.evaluation.frechet import (
    RunningStatistics,
    Statistics,
    frechet_distance,
    frechet_interval,
    kid,
    neighbours,
)
from ldm.evaluation.identification import Estimate, identification, identified_shares
from ldm.evaluation.inception import fid_features, inception_score, is_logits, sfid_features
from ldm.evaluation.quality import GaussianMixture, quality_scores
from ldm.evaluation.regions import hole_box
from ldm.evaluation.report import TRUE_PICTURE
from ldm.evaluation.similarity import cosine_scores, mean_interval, paper_box
from ldm.files import UserError
from ldm.images import find_images, load_mask, open_image

METRICS = (
    *("fid", "qs", "clip", "identification", "background", "copying"),  # the paper's, and what they leave open
    *("dino", "foreground-fid", "kid", "precision-recall", "diversity", "inception"),
)
DEFAULT_METRICS = ("fid", "clip", "identification", "background")
FRECHET_RESAMPLES = 100  # each is an eigenvalue problem
MANIFOLD_SIZE = 10_000  # real pictures that KID and precision/recall look at, at most
# Yang et al. 2023, Table 1: COCOEE, CLIP ViT-B/32 features, real pictures of COCO test2017.
PAPER_NETWORK = "CLIP ViT-B/32"
PAPER = {"fid": 3.18, "qs": 77.80, "clip-paper": 84.97}


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: exact, with the feature network.
        value: the number.
        n: items, or pictures, it was measured on.
        how: preprocessing and reference, one phrase.
        better: "higher" | "lower".
        low, high: its 95 % interval; None where there is none.
        paper: what the paper reports for the same measure on COCOEE.
    """

    name: str
    value: float
    n: int
    how: str
    better: str
    low: float | None = None
    high: float | None = None
    paper: float | None = None


Figures = dict[str, Figure]
Part = Callable[[np.ndarray], np.ndarray]  # (N, D) => (N, some of D)

INCEPTION_PARTS: dict[str, Part] = {"FID": fid_features, "sFID": sfid_features}


@dataclass(frozen=True)
class Results:
    """The pictures of one run.

    Attributes:
        name: for the table.
        folder: with ID.png; None stands for the bench's own true pictures.
        settings, timing: what the run wrote beside them; empty where it is not ours.
    """

    name: str
    folder: Path | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, name: str = "") -> Results:
        """A run's OUTDIR, or the folder of pictures itself.

        Raises:
            UserError: there is no such folder.
        """
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; scripts/inference_test_bench.py writes it")
        root = path.parent if path.name == "results" and (path.parent / "settings.json").is_file() else path
        folder = root / "results" if (root / "results").is_dir() else root
        return cls(name or root.name, folder, *(_read_json(root / f"{part}.json") for part in ("settings", "timing")))

    def picture(self, bench: Bench, id_: str) -> Path:
        return bench.paths(id_)[0] if self.folder is None else self.folder / f"{id_}.png"


@dataclass(frozen=True)
class Options:
    """What is measured, with what.

    Attributes:
        network: features of all figures but the DINO score.
        metrics: of METRICS.
        real: folder of real pictures, or statistics of one (.npz); None takes the bench's true pictures.
        gmm: for QS.
        dino: network of the DINO score.
        inception: network of the plain FID, sFID and Inception score, from `load_inception`.
        cache: features by content; None computes all.
        focus: cut-outs of the bench's items.csv whose identification is also measured alone.
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
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise UserError(f"metrics: got {', '.join(unknown)}, expected some of {', '.join(METRICS)}")
        if "qs" in self.metrics and self.gmm is None:
            raise UserError("qs: needs a Gaussian mixture; give --gmm FILE (scripts/fit_quality_gmm.py fits one)")
        if "dino" in self.metrics and self.dino is None:
            raise UserError("dino: needs a DINOv2 network; give --dino FOLDER_OR_NAME")
        if self.focus and "identification" not in self.metrics:
            raise UserError("--focus: is about the identification; add it to --metrics")
        if "inception" in self.metrics and self.inception is None:
            raise UserError("inception: needs the network's weights; give --inception FILE")


class Measurement:
    """A bench, the runs on it, and their figures.

    Args:
        bench: the items.
        runs: what is measured, on the items that all of them hold; the first is the one of interest.
        options: what is measured, with what.
        other_seeds: the first run's items edited with other seeds, for the diversity.

    Attributes:
        ids: of the measured items.
        per_item: by run and figure, values in the order of `ids`; filled by `figures`.

    Raises:
        UserError: fewer than two items in common, or a picture has not its scene's size.
        ValueError, OSError: a file cannot be read.
    """

    def __init__(
        self, bench: Bench, runs: Sequence[Results], options: Options, other_seeds: Sequence[Results] = ()
    ) -> None:
        self.bench, self.options, self.other_seeds = bench, options, other_seeds
        self.runs = [*runs, Results(TRUE_PICTURE, None)]
        if repeated := {run.name for run in self.runs if [other.name for other in self.runs].count(run.name) > 1}:
            raise UserError(f"two runs are called {repeated.pop()}; name them: NAME=FOLDER")
        if "diversity" in options.metrics and not other_seeds:
            raise UserError("diversity: needs the same items edited with other seeds; give --other-seeds FOLDER …")
        self.ids = common_ids(bench, [*runs, *other_seeds])
        self.per_item: dict[str, dict[str, list[float]]] = {run.name: {} for run in self.runs}
        self.boxes: dict[str, tuple[int, int, int, int]] = {}
        self.paper_boxes: dict[str, tuple[int, int, int, int]] = {}
        for id_ in tqdm(self.ids, desc="masks", unit="item", disable=None, leave=False):
            self._look_at(id_, [*runs, *other_seeds])

    def _look_at(self, id_: str, runs: Sequence[Results]) -> None:
        """Note where an item's hole is, and check the sizes of its pictures."""
        scene_path, mask_path, _ = self.bench.paths(id_)
        hole_mask = load_mask(mask_path)
        with Image.open(scene_path) as scene:
            self.boxes[id_] = hole_box(scene, hole_mask)
            with suppress(ValueError):  # it is made for filled rectangles, and leaves nothing of some other shapes
                self.paper_boxes[id_] = paper_box(hole_mask)
            for run in runs:
                path = run.picture(self.bench, id_)
                with Image.open(path) as picture:
                    if picture.size != scene.size:
                        raise UserError(
                            f"{path}: got {picture.size} pixels, expected the scene's {scene.size}; "
                            "is it of another benchmark?"
                        )

    def figures(self) -> dict[str, Figures]:
        """The figures of every run, by the run's name and the figure's key."""
        measured = {run.name: self._figures(run) for run in self.runs}
        if "diversity" in self.options.metrics:
            measured[self.runs[0].name]["diversity"] = self._diversity()
        return measured

    def _figures(self, run: Results) -> Figures:
        wanted, figures = set(self.options.metrics), Figures()
        if wanted & {"fid", "qs", "kid", "precision-recall"}:
            figures |= self._whole_pictures(run)
        if wanted & {"clip", "identification", "foreground-fid"}:
            figures |= self._regions(run)
        if "dino" in wanted:
            figures |= self._dino(run)
        if "inception" in wanted:
            figures |= self._inception(run)
        if "background" in wanted and run.folder is not None:
            figures |= self._background(run)
        if "copying" in wanted and run.folder is not None:
            figures |= self._copying(run)
        return figures

    # ---- features ----

    def _stream(self, network: FeatureNetwork, views: Sequence[View], label: str) -> Iterator[np.ndarray]:
        options = self.options
        return iter_features(
            network,
            views,
            cache=options.cache,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            label=label,
        )

    def _extract(self, network: FeatureNetwork, views: Sequence[View], label: str) -> np.ndarray:
        return np.concatenate([*self._stream(network, views, label)])

    def region_features(self, run: Results, network: FeatureNetwork) -> np.ndarray:
        """(N, D): what is inside the holes' bounding boxes, squashed to the network's square."""
        views = [View(run.picture(self.bench, id_), SQUASH, self.boxes[id_]) for id_ in self.ids]
        return self._extract(network, views, f"{run.name}: regions")

    def exemplar_features(self, network: FeatureNetwork) -> np.ndarray:
        """(N, D): the exemplars, squashed to the network's square."""
        return self._extract(network, [View(self.bench.paths(id_)[2], SQUASH) for id_ in self.ids], "exemplars")

    @cached_property
    def _exemplars(self) -> np.ndarray:
        return self.exemplar_features(self.options.network)

    @cached_property
    def _real_views(self) -> list[View]:
        if self.options.real is None:
            return [View(self.bench.paths(id_)[0], WHOLE) for id_ in self.bench.ids]
        if self.options.real.suffix == ".npz":
            raise UserError(
                f"{self.options.real}: KID, precision/recall and Inception's figures need the real pictures, not their "
                "statistics; give --real FOLDER or leave those metrics out"
            )
        return [View(path, WHOLE) for path in find_images(self.options.real)]

    @cached_property
    def real_statistics(self) -> Statistics:
        """Of the real pictures, which are read once and not kept."""
        real, network = self.options.real, self.options.network
        if real is not None and real.suffix == ".npz":
            return Statistics.load(real)
        return self._statistics(network, {"all": lambda features: features})["all"]

    def _statistics(self, network: FeatureNetwork, parts: Mapping[str, Part]) -> dict[str, Statistics]:
        """Of parts of the real pictures' features, which are never all in memory."""
        running = {key: RunningStatistics(network.name) for key in parts}
        for features in self._stream(network, self._real_views, "real pictures"):
            for key, part in parts.items():
                running[key].add(part(features))
        return {key: statistics.result() for key, statistics in running.items()}

    @cached_property
    def _real_sample(self) -> np.ndarray:
        """(M, D): features of at most MANIFOLD_SIZE real pictures, drawn at random."""
        views = self._real_views
        drawn = np.random.default_rng(self.options.seed).permutation(len(views))[:MANIFOLD_SIZE]
        return self._extract(self.options.network, [views[k] for k in np.sort(drawn)], "real pictures")

    # ---- figures ----

    def _whole_pictures(self, run: Results) -> Figures:
        options, network = self.options, self.options.network
        views = [View(run.picture(self.bench, id_), WHOLE) for id_ in self.ids]
        features = self._extract(network, views, f"{run.name}: pictures")
        how = f"{network.preprocessing[WHOLE]}; real: {self._real_name()}"
        n, figures = len(features), Figures()
        if "fid" in options.metrics:
            paper = PAPER["fid"] if self._of_paper and options.real is not None else None
            figures["fid"] = self._frechet(f"FID ({network.name})", features, self.real_statistics, how, paper)
        if "kid" in options.metrics:
            value, error = kid(self._real_sample, features, seed=options.seed)
            low, high = 1000 * (value - 1.96 * error), 1000 * (value + 1.96 * error)
            figures["kid"] = Figure(f"KID x 1000 ({network.name})", 1000 * value, n, how, "lower", low, high)
        if "precision-recall" in options.metrics:
            inside = dict(zip(("precision", "recall"), neighbours(self._real_sample, features), strict=True))
            for key, among in inside.items():
                figures[key] = _mean_figure(
                    f"{key} ({network.name})", self._mean(among), f"{how}; k-NN, k = 3", "higher"
                )
        if "qs" in options.metrics and options.gmm is not None:
            figures["qs"] = self._quality(run, options.gmm, features)
        return figures

    def _quality(self, run: Results, gmm: GaussianMixture, features: np.ndarray) -> Figure:
        network = self.options.network
        estimate = self._mean(quality_scores(gmm.log_density(features)), run, "qs")
        name, paper = f"QS ({network.name})", PAPER["qs"] if self._of_paper else None
        if gmm.provenance.get("refitted"):
            name, paper = f"QS (refitted GMM: not comparable with the paper; {network.name})", None
        how = f"{network.preprocessing[WHOLE]}; GMM of {len(gmm.weights)} components, {gmm.covariance_type}"
        return _mean_figure(name, estimate, how, "higher", paper)

    def _regions(self, run: Results) -> Figures:
        options, network = self.options, self.options.network
        regions, figures = self.region_features(run, network), Figures()
        how = network.preprocessing[SQUASH]
        if "clip" in options.metrics:
            name = "CLIP score" if network.name.startswith("CLIP ") else "region similarity"
            if with_box := [k for k, id_ in enumerate(self.ids) if id_ in self.paper_boxes]:
                ids = [self.ids[k] for k in with_box]
                views = [View(run.picture(self.bench, id_), PAPER_REGION, self.paper_boxes[id_]) for id_ in ids]
                cut = self._extract(network, views, f"{run.name}: regions as in the paper")
                figures["clip-paper"] = _mean_figure(
                    f"{name} ({network.name}, the paper's crop)",
                    self._mean(cosine_scores(cut, self._exemplars[with_box])),
                    f"cosine x 100, region: {network.preprocessing[PAPER_REGION]}; exemplar: {how}",
                    "higher",
                    PAPER["clip-paper"] if self._of_paper else None,
                )
            scores = self._mean(cosine_scores(regions, self._exemplars), run, "clip")
            figures["clip"] = _mean_figure(
                f"{name} ({network.name}, exact crop)", scores, f"cosine x 100; {how}", "higher"
            )
        if "identification" in options.metrics:
            estimate = identification(
                regions, self._exemplars, self._labels, num_resamples=options.num_resamples, seed=options.seed
            )
            figures["identification"] = _mean_figure(
                f"identification ({network.name})", estimate, f"all ordered pairs, chance is 0.5; {how}", "higher"
            )
            shares = identified_shares(regions, self._exemplars, self._labels)
            self.per_item[run.name]["identification"] = shares.tolist()
            for label in options.focus:
                rows = [k for k, other in enumerate(self._labels or ()) if other == label]
                if not rows:
                    raise UserError(
                        f"--focus: no measured item shows {label}; items.csv of the bench lists what they do"
                    )
                figures[f"identification: {label}"] = _mean_figure(
                    f"identification of {label}",
                    self._mean(shares[rows]),
                    f"against all other exemplars; {how}",
                    "higher",
                )
        if "foreground-fid" in options.metrics:
            wanted = RunningStatistics(network.name)
            wanted.add(self._exemplars)
            figures["foreground-fid"] = self._frechet(
                f"foreground FID ({network.name})", regions, wanted.result(), f"regions against exemplars; {how}"
            )
        return figures

    def _dino(self, run: Results) -> Figures:
        network = self.options.dino
        assert network is not None
        scores = cosine_scores(self.region_features(run, network), self._dino_exemplars)
        how = f"cosine x 100; {network.preprocessing[SQUASH]}"
        return {"dino": _mean_figure(f"DINO score ({network.name})", self._mean(scores, run, "dino"), how, "higher")}

    @cached_property
    def _dino_exemplars(self) -> np.ndarray:
        assert self.options.dino is not None
        return self.exemplar_features(self.options.dino)

    def _inception(self, run: Results) -> Figures:
        network = self.options.inception
        assert network is not None
        views = [View(run.picture(self.bench, id_), WHOLE) for id_ in self.ids]
        features = self._extract(network, views, f"{run.name}: pictures")
        how, n, figures = f"{network.preprocessing[WHOLE]}; real: {self._real_name()}", len(features), Figures()
        for key, part in INCEPTION_PARTS.items():
            real = self._inception_real[key]
            figures[f"inception-{key.lower()}"] = self._frechet(f"{key} ({network.name})", part(features), real, how)
        value, spread = inception_score(is_logits(features), splits=min(10, n // 2), seed=self.options.seed)
        figures["inception-is"] = Figure(
            f"IS ({network.name})",
            value,
            n,
            f"{network.preprocessing[WHOLE]}; spread of the parts {spread:.2f}",
            "higher",
        )
        return figures

    @cached_property
    def _inception_real(self) -> dict[str, Statistics]:
        network = self.options.inception
        assert network is not None
        return self._statistics(network, INCEPTION_PARTS)

    def _background(self, run: Results) -> Figures:
        found = []
        for id_ in tqdm(self.ids, desc=f"{run.name}: background", unit="item", disable=None, leave=False):
            scene_path, mask_path, _ = self.bench.paths(id_)
            result = open_image(run.picture(self.bench, id_))
            found.append(background(result, open_image(scene_path), load_mask(mask_path)))
        seen = [error for error in found if not math.isnan(error.psnr)]  # a hole may leave no background
        if not seen:
            return {}
        how, figures = "pixels outside the hole", Figures()
        if windows := [error.ssim for error in seen if not math.isnan(error.ssim)]:
            figures["background-ssim"] = _mean_figure("background SSIM", self._mean(np.array(windows)), how, "higher")
        squares = self._mean(255**2 / 10 ** (np.array([error.psnr for error in seen]) / 10))
        if squares.value > 0:  # equal backgrounds have no PSNR
            low, value, high = (
                10 * math.log10(255**2 / max(x, 1e-9)) for x in (squares.high, squares.value, squares.low)
            )
            name, of = "background PSNR, dB", f"{how}; of the mean squared error"
            figures["background-psnr"] = Figure(name, value, len(seen), of, "higher", low, high)
        worst, name = max(error.max_abs for error in seen), "background max |Δ|, grey levels"
        figures["background-max"] = Figure(name, worst, len(seen), f"{how}; of all items", "lower")
        return figures

    def _copying(self, run: Results) -> Figures:
        exemplars, true_pictures = self._corners_to_compare
        if np.array_equal(exemplars, true_pictures):  # every exemplar is the true region itself
            return {}
        shares = copied_background(self._corners(run), exemplars, true_pictures)
        how = "corners of the region inside the hole's box: 0 as in the true picture, 1 as in the exemplar"
        return {"copying": _mean_figure("copied background", self._mean(shares), how, "lower")}

    def _corners(self, run: Results) -> np.ndarray:
        return np.stack(
            [corner_colours(cropped(open_image(run.picture(self.bench, i)), self.boxes[i])) for i in self.ids]
        )

    @cached_property
    def _corners_to_compare(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the exemplars and of the true pictures."""
        exemplars = [corner_colours(open_image(self.bench.paths(id_)[2])) for id_ in self.ids]
        return np.stack(exemplars), self._corners(Results(TRUE_PICTURE, None))

    def _diversity(self) -> Figure:
        network = self.options.network
        features = [self.region_features(run, network) for run in (self.runs[0], *self.other_seeds)]
        distances = np.mean([100 - cosine_scores(a, b) for a, b in combinations(features, 2)], axis=0)
        how = f"100 - cosine x 100 between seeds, {len(features)} seeds; {network.preprocessing[SQUASH]}"
        return _mean_figure(f"diversity ({network.name})", self._mean(distances), how, "higher")

    @property
    def _of_paper(self) -> bool:
        return self.options.network.name.startswith(PAPER_NETWORK)

    @cached_property
    def _labels(self) -> list[str] | None:
        return exemplar_labels(self.bench.root, self.ids)

    def _real_name(self) -> str:
        real = self.options.real
        return "the bench's true pictures" if real is None else real.name

    def _frechet(
        self, name: str, features: np.ndarray, real: Statistics, how: str, paper: float | None = None
    ) -> Figure:
        running = RunningStatistics(real.network)
        running.add(features)
        resamples = min(self.options.num_resamples, FRECHET_RESAMPLES)
        low, high = frechet_interval(features, real, num_resamples=resamples, seed=self.options.seed)
        return Figure(name, frechet_distance(running.result(), real), len(features), how, "lower", low, high, paper)

    def _mean(self, values: np.ndarray, run: Results | None = None, key: str = "") -> Estimate:
        if run is not None:
            self.per_item[run.name][key] = [float(value) for value in values]
        groups = self._labels if len(values) == len(self.ids) else None
        return mean_interval(values, groups=groups, num_resamples=self.options.num_resamples, seed=self.options.seed)


def common_ids(bench: Bench, runs: Sequence[Results]) -> list[str]:
    """The ids of which every run has a picture.

    Raises:
        UserError: there are fewer than two.
    """
    common = [id_ for id_ in bench.ids if all(run.picture(bench, id_).is_file() for run in runs)]
    if len(common) < 2:
        names = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"{names}: got {len(common)} items of the benchmark in common, expected at least 2")
    return common


def exemplar_labels(root: Path, ids: Sequence[str]) -> list[str] | None:
    """Which cut-out each item shows, where the bench says so (items.csv of scripts/scenes/compose.py).

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


def _mean_figure(name: str, estimate: Estimate, how: str, better: str, paper: float | None = None) -> Figure:
    return Figure(name, estimate.value, estimate.n, how, better, estimate.low, estimate.high, paper)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: damaged; delete it, or edit the benchmark again") from None
