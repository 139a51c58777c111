"""EfficientNet-Lite0 as the exemplar encoder's tower."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.config import ExemplarEncoderConfig
from ldm.images import exemplar_to_tensor
from ldm.models.efficientnet import EfficientNetTower
from ldm.models.exemplar_encoder import ExemplarEncoder

BENCH = Path(__file__).parents[2] / "pretrained_models" / "mini" / "bench"


@pytest.fixture(scope="module")
def efficientnet_encoder() -> ExemplarEncoder:
    """With its ImageNet weights and a random mapper, all tokens passed on."""
    torch.manual_seed(0)
    config = ExemplarEncoderConfig(
        tower="efficientnet-lite0", image_size=64, hidden_size=32, mapper_layers=1, tokens="all"
    )
    encoder = ExemplarEncoder(config).eval().requires_grad_(False)
    encoder.transformer.load_state_dict(encoder.transformer.imagenet_state())
    return encoder


def test_efficientnet_tower_keeps_colour_and_place(efficientnet_encoder: ExemplarEncoder) -> None:
    """What a classifier discards: the first features are the quarters' mean colours, as the network is shown them."""
    x = torch.zeros(1, 3, 64, 64)
    x[:, 0, :32] = 1.0  # the upper half redder
    features = efficientnet_encoder.features(x)
    assert features.shape == (1, 1 + 16, EfficientNetTower.NUM_FEATURES)
    red, green = features[0, 0, :4], features[0, 0, 4:8]  # upper left, upper right, lower left, lower right
    assert red[0] == pytest.approx(red[1].item(), abs=1e-3)
    # one standard deviation of CLIP's normalisation, in the network's units (255 / 128), in halves
    assert (red[0] - red[2]).item() == pytest.approx(0.26862954 * 255 / 128 / 0.5, rel=0.02)
    assert (green[0] - green[2]).abs().item() < 1e-3


def test_efficientnet_tower_has_unit_scale_and_tells_pictures_apart(efficientnet_encoder: ExemplarEncoder) -> None:
    pictures = [exemplar_to_tensor(Image.open(path), 64) for path in sorted((BENCH / "Ref_200").iterdir())[:24]]
    features = efficientnet_encoder.features(torch.stack(pictures))[:, 0]
    assert 0.5 < features[:, : 4 * 515].std(0).square().mean().sqrt().item() < 2.0
    tokens = efficientnet_encoder.tokens(features[:, None].expand(-1, 2, -1))
    assert (torch.cdist(tokens[:, 0], tokens[:, 0]) + 9 * torch.eye(24)).min() > 0.1


def test_efficientnet_tower_in_half_precision(efficientnet_encoder: ExemplarEncoder) -> None:
    x = torch.rand(1, 3, 64, 64)
    expected = efficientnet_encoder.features(x)
    got = copy.deepcopy(efficientnet_encoder).bfloat16().features(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert torch.cosine_similarity(got.float(), expected, dim=-1).min() > 0.99  # 8 bits through seventeen blocks


def test_cached_features_of_all_tokens_serve_for_one(efficientnet_encoder: ExemplarEncoder) -> None:
    pooled = ExemplarEncoder(replace(efficientnet_encoder.config, tokens="pooled")).eval().requires_grad_(False)
    pooled.load_state_dict(efficientnet_encoder.state_dict())  # the number of tokens changes no names
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = efficientnet_encoder.features(x)
    torch.testing.assert_close(pooled.features(x), features[:, :1])
    torch.testing.assert_close(pooled.tokens(features), pooled(x))
    with pytest.raises(ValueError, match="cache_latents"):
        efficientnet_encoder.tokens(features[:, :1])
