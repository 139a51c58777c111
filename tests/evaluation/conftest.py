"""A benchmark of coloured squares, runs of it, and a feature network that takes no time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.evaluation import features
from ldm.evaluation.features import FeatureNetwork, normalised_square

COLOURS = ((200, 40, 30), (30, 180, 60), (40, 60, 220), (230, 220, 50), (220, 60, 210))
IDS = [f"{k:012d}" for k in range(1, len(COLOURS) + 1)]
# Two steps of the fastest sampler: these tests are about which images are made, not about their looks.
FAST = ["--steps", "2", "--sampler", "dpm_solver_pp", "--device", "cpu"]


class MeanColours(nn.Module):
    """The mean grey levels of the channels in 2 x 2 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(255.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.adaptive_avg_pool2d(x, 2).flatten(1)


def colours(_: str) -> FeatureNetwork:
    tower = MeanColours()
    return FeatureNetwork("mean colours", tower, tower, 12, normalised_square(8, (0.0,) * 3, (1.0,) * 3))


@pytest.fixture(scope="session", autouse=True)
def colour_network() -> Iterator[None]:
    """Make `colours` the name of a feature network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(features._LOADERS, "colours", colours)
        yield


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of different colours on noise; each exemplar is its square, cut out."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("made") / "bench"
    for folder in ("GT_5", "Ref_5", "Mask_bbox_5"):
        (root / folder).mkdir(parents=True)
    np.save(root / "id_list.npy", np.arange(1, len(IDS) + 1))
    for id_, colour in zip(IDS, COLOURS, strict=True):
        scene = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        scene[8:24, 8:24] = colour
        mask = Image.new("L", (32, 32))
        mask.paste(255, (8, 8, 24, 24))
        Image.fromarray(scene).save(root / "GT_5" / f"{id_}_GT.png")
        Image.new("RGB", (20, 20), colour).save(root / "Ref_5" / f"{id_}_ref.png")
        mask.save(root / "Mask_bbox_5" / f"{id_}_mask.png")
    return root


def edit(bench: Path, outdir: Path, *options: str) -> int:
    return importlib.import_module("scripts.inference_test_bench").main([str(bench), "--outdir", str(outdir), *options])


def evaluate(bench: Path, *words: object) -> int:
    options = ["--features", "colours", "--cache", "none", "--device", "cpu", "--resamples", "20"]
    return importlib.import_module("scripts.evaluate").main([str(bench), *options, *map(str, words)])


@pytest.fixture(scope="session")
def one_by_one(bench: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny model at batch size 1."""
    outdir = tmp_path_factory.mktemp("one")
    assert edit(bench, outdir, "--checkpoint", str(tiny_folder), *FAST, "--batch-size", "1") == 0
    return outdir


@pytest.fixture(scope="session")
def pasted(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outdir = tmp_path_factory.mktemp("pasted") / "copy-paste"
    assert edit(bench, outdir, "--method", "copy-paste", "--device", "cpu") == 0
    return outdir


@pytest.fixture(scope="session")
def record(bench: Path, pasted: Path, one_by_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """metrics.json of a model's run, of pasting, and of the true images, beside metrics.md and real.npz."""
    path = tmp_path_factory.mktemp("figures") / "new" / "metrics.json"
    metrics = ["fid", "clip", "identification", "background", "copying", "foreground-fid", "kid", "precision-recall"]
    files = ["--json", path, "--markdown", path.with_suffix(".md"), "--write-real", path.with_name("real.npz")]
    runs = [f"tiny={one_by_one}", pasted, "--other-seeds", pasted, "--cache", path.with_name("cache")]
    assert evaluate(bench, *runs, "--metrics", *metrics, "diversity", *files) == 0
    return path
