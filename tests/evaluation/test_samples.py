"""Figures of models in pixel space."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.config import dump_config
from ldm.evaluation import samples
from ldm.evaluation.features import WHOLE, FeatureNetwork
from ldm.evaluation.frechet import frechet_distance, statistics_of
from ldm.evaluation.samples import compare_batches, read_images
from ldm.files import UserError
from ldm.pixel_diffusion import PixelDiffusion
from scripts import evaluate
from tests.pixel import tiny_config, write_digits

POOLED, SPATIAL, LOGITS = slice(0, 20), slice(20, 36), slice(36, 50)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FeatureNetwork:
    """In place of Inception, which needs a download and has a hundred times as many features: random projections."""
    for name, columns in {"POOLED": POOLED, "SPATIAL": SPATIAL, "LOGITS": LOGITS}.items():
        monkeypatch.setattr(samples, name, columns)
    weights = torch.randn(4 * 4 * 3, LOGITS.stop, generator=torch.Generator().manual_seed(0)) / 7
    modes = {WHOLE: ("as they are", lambda image: torch.from_numpy(np.array(image)).float() / 255)}
    return FeatureNetwork("projection", torch.nn.Linear(1, 1), lambda x: x.flatten(1) @ weights, LOGITS.stop, modes)


def write_batch(path: Path, seed: int, count: int = 30, **more: np.ndarray) -> Path:
    images = np.random.default_rng(seed).integers(256, size=(count, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(path, arr_0=images, **more)
    return path


def test_batches_are_read_in_pieces(tmp_path: Path) -> None:
    path = write_batch(tmp_path / "a.npz", 0, 7)
    pieces = [*read_images(path, 3)]
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    assert np.array_equal(np.concatenate(pieces), np.load(path)["arr_0"])


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.uint8), np.zeros((2, 4, 4, 3), np.float32), None])
def test_other_files_are_refused(tmp_path: Path, array: np.ndarray | None) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **({"arr_0": array} if array is not None else {"x": np.zeros(1)}))
    with pytest.raises(UserError, match=r"a\.npz"):
        next(read_images(path, 3))


def test_figures_of_a_batch(network: FeatureNetwork, tmp_path: Path) -> None:
    ours, reference = (write_batch(tmp_path / f"{seed}.npz", seed) for seed in (1, 2))
    figures = compare_batches(ours, reference, network, batch_size=8)
    assert list(figures) == ["fid", "sfid", "is", "precision", "recall"]
    features = [network(torch.from_numpy(np.load(path)["arr_0"]).float() / 255).numpy() for path in (ours, reference)]
    for name, columns in (("fid", POOLED), ("sfid", SPATIAL)):
        parts = [statistics_of(x[:, columns].astype(np.float64)) for x in features]
        assert figures[name].value == pytest.approx(frechet_distance(*parts), rel=1e-6)
    p = torch.from_numpy(features[0][:, LOGITS]).double().softmax(1)
    score = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    assert figures["is"].value == pytest.approx(float(score), rel=1e-6)
    same = compare_batches(ours, ours, network)
    assert same["fid"].value == pytest.approx(0, abs=1e-4) and same["precision"].value == same["recall"].value == 1


def test_a_references_own_statistics_count(network: FeatureNetwork, tmp_path: Path) -> None:
    ours = write_batch(tmp_path / "a.npz", 1)
    far = {"mu": np.full(20, 9.0), "sigma": np.eye(20), "mu_s": np.full(16, 9.0), "sigma_s": np.eye(16)}
    figures = compare_batches(ours, write_batch(tmp_path / "b.npz", 2, **far), network)
    plain = compare_batches(ours, write_batch(tmp_path / "c.npz", 2), network)
    assert figures["fid"].value > 1000 > plain["fid"].value and figures["recall"] == plain["recall"]


def test_bits_per_dim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = tiny_config(data := write_digits(tmp_path / "digits.npz"))
    torch.save({"state_dict": PixelDiffusion(config.model).state_dict()}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(dump_config(config))
    words = ["bpd", tmp_path / "model.ckpt", data, "--config", tmp_path / "model.yaml", "--json", tmp_path / "bpd.json"]
    words += ["--npz", tmp_path / "terms.npz", "--timesteps", "10", "--max-samples", "4"]
    assert evaluate.main([str(word) for word in words]) == 0
    figure, terms = json.loads((tmp_path / "bpd.json").read_text())["bits per dim"], np.load(tmp_path / "terms.npz")
    assert figure["n"] == 4 and terms["vb"].shape == terms["mse"].shape == (10,)
    # the prior of a cosine schedule is about 0, so the terms are the bound
    assert figure["value"] == pytest.approx(float(terms["vb"].sum()), abs=1e-2) and math.isfinite(figure["value"])
    assert evaluate.main(["bpd", str(tmp_path / "none.ckpt"), str(data)]) == 2


def test_features_without_a_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_batch(tmp_path / "a.npz", 1, 5))
    assert evaluate.main(["npz", path, path]) == 0
    shown = capsys.readouterr().out
    assert "EfficientNet-Lite0" in shown and "sfid" not in shown
    assert evaluate.main(["npz", path, str(tmp_path / "b.npz")]) == 2
