"""The bundled pixel model: its file, its default grid, and labels and guidance that lead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.pixel_diffusion import Classifier, Guidance, PixelDiffusion, load_pixel_model
from scripts import sample_images

FOLDER = sample_images.BUNDLED.parent
CLASSES = 8


@pytest.fixture(scope="module")
def model() -> PixelDiffusion:
    return cast(PixelDiffusion, load_pixel_model(sample_images.BUNDLED, FOLDER / "config.yaml"))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    folder = FOLDER / "classifier"
    return cast(Classifier, load_pixel_model(folder / "model.safetensors", folder / "config.yaml"))


def accuracy(model: PixelDiffusion, classifier: Classifier, guidance: Guidance, labels: torch.Tensor) -> float:
    """The share of 32 samples that the classifier takes for one of a class each in turn."""
    asked = torch.arange(32) % CLASSES
    generators = [torch.Generator().manual_seed(i) for i in range(32)]
    x_T = torch.stack([torch.randn(3, 32, 32, generator=g) for g in generators])
    samples = model.sample(x_T, labels, sampler="ddpm", steps="10", guidance=guidance, generator=generators)
    with torch.no_grad():
        return (classifier(samples, torch.zeros(32)).argmax(1) == asked).float().mean().item()


def test_the_files_are_small_and_fit_together(model: PixelDiffusion, classifier: Classifier) -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 6_000_000
    names = json.loads((FOLDER / "classes.json").read_text())
    assert len(names) == model.config.unet.num_classes == classifier.config.classifier.num_classes == CLASSES
    assert torch.equal(model.schedule.betas, classifier.schedule.betas)


def test_without_arguments_its_grid_has_a_column_for_each_class(tmp_path: Path) -> None:
    words = ["--outdir", str(tmp_path), "--num", "9", "--timesteps", "2", "--npz", "--device", "cpu"]
    assert sample_images.main(words) == 0
    assert Image.open(tmp_path / "grid.png").size == (96, 96)
    with np.load(tmp_path / "samples_9x32x32x3.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.slow
def test_labels_and_guidance_lead(model: PixelDiffusion, classifier: Classifier) -> None:
    """Without a label one sample of eight is right by chance: 10 or more of 32 in one draw of 250."""
    labels = torch.arange(32) % CLASSES
    by_chance = accuracy(model, classifier, Guidance(), torch.full_like(labels, -1))
    by_label = accuracy(model, classifier, Guidance(), labels)
    guided = Guidance(scale=0.0, classifier=classifier, classifier_scale=8.0)  # of the model without labels
    by_classifier = accuracy(model, classifier, guided, labels)
    assert by_chance < 0.3 and by_label > 0.4 and by_classifier > 0.6
