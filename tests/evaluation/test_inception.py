"""What is ours around torch-fidelity's network: here a small stand-in of the same shape takes its place.

With torch-fidelity installed the last test runs its network too, with random weights.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.evaluation.features import View, extract
from ldm.evaluation.inception import LOGITS, POOLED, SPATIAL, inception_score, load_inception
from ldm.files import UserError


class StandIn(nn.Module):
    """Takes bytes of any size and has a 17x17 map of the name that sFID looks at."""

    def __init__(self, name: str, features_list: list[str], weights: str) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 1)
        self.fc = nn.Linear(2048, 1008)
        self.load_state_dict(torch.load(weights, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        maps = self.Mixed_6d.branch1x1(F.interpolate(x.float() / 255, (17, 17)))
        pooled = maps.mean((2, 3)).repeat(1, 11)[:, :2048]
        return pooled, pooled @ self.fc.weight.T


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module: Any = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    state = {
        "Mixed_6d.branch1x1.weight": torch.randn(192, 3, 1, 1),
        "Mixed_6d.branch1x1.bias": torch.randn(192),
        "fc.weight": torch.randn(1008, 2048),
        "fc.bias": torch.randn(1008),
    }
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_three_kinds_of_features_of_pictures_of_any_size(tmp_path: Path, weights: Path) -> None:
    rng = np.random.default_rng(0)
    views = []
    for k, size in enumerate([(30, 40), (30, 40), (17, 17)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        views.append(View(tmp_path / f"{k}.png", "whole"))
    network = load_inception(weights)
    features = extract(network, views)
    assert features.shape == (3, network.dim)
    assert features[:, POOLED].shape == (3, 2048)
    assert features[:, SPATIAL].shape == (3, 2023)
    assert features[:, LOGITS].shape == (3, 1008)
    x = torch.from_numpy(np.array(Image.open(tmp_path / "2.png"))).permute(2, 0, 1)[None]
    tower: Any = network.tower
    spatial = tower.Mixed_6d.branch1x1(x.float() / 255)[:, :7].flatten().numpy()
    # The same operations, in a batch of one.
    np.testing.assert_allclose(features[:, SPATIAL][2], spatial, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features[:, LOGITS], features[:, POOLED] @ tower.fc.weight.numpy().T, atol=1e-2)


def test_weights_that_cannot_be_used_are_named(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"missing\.pth.*https"):
        load_inception(tmp_path / "missing.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        load_inception(tmp_path / "other.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        load_inception(weights)


def test_inception_score_of_known_answers() -> None:
    sure = 100 * np.eye(5)[np.arange(500) % 5]
    # Certain answers, spread evenly over five classes: each part of 50 shuffled pictures has nearly all evenly.
    score = inception_score(sure, splits=1)
    assert (score.value, score.n) == (pytest.approx(5, abs=1e-9), 500) and score.note.endswith("0.00")
    assert 4.3 < inception_score(sure, splits=10).value < 5
    assert inception_score(np.ones((20, 5))).value == pytest.approx(1, abs=1e-12)  # never sure


def test_sfid_looks_at_the_map_of_the_real_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not importlib.util.find_spec("torch_fidelity") or not importlib.util.find_spec("torchvision"):
        pytest.skip("needs torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"], "").state_dict(), tmp_path / "weights.pth")
    network = load_inception(tmp_path / "weights.pth")
    tower: Any = network.tower
    inputs: list[Tensor] = []
    tower.Mixed_6c.register_forward_hook(lambda _, __, x: inputs.append(x))
    x = torch.randint(0, 256, (1, 3, 50, 60), dtype=torch.uint8)
    features = network(x).numpy()
    spatial = tower.Mixed_6d.branch1x1(inputs[0])[:, :7]
    assert spatial.shape[2:] == (17, 17)
    np.testing.assert_allclose(features[:, SPATIAL][0], spatial.flatten().numpy(), rtol=1e-5, atol=1e-6)
