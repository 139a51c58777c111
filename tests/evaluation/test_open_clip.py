"""open_clip's models by `open_clip:ARCH/TAG`: here a small one with random weights, registered with open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation.features import View, extract, load_network
from ldm.files import UserError

try:
    import open_clip
except (ImportError, RuntimeError):  # torchvision raises RuntimeError beside another build of torch
    open_clip: Any = None

needs_open_clip = pytest.mark.skipif(open_clip is None, reason="needs the extra clip")

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def small_model(tmp_path: Path) -> tuple[str, Any]:
    """The spec of a small model whose weights are a file, and the model itself."""
    (tmp_path / "ViT-T-8-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "ViT-T-8-test.json")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-T-8-test").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return f"open_clip:ViT-T-8-test/{tmp_path / 'weights.pt'}", model


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@needs_open_clip
@torch.no_grad()
def test_image_features_are_those_of_open_clip(small_model: tuple[str, Any], image_path: Path) -> None:
    spec, model = small_model
    network = load_network(spec)
    assert (network.name, network.dim) == ("CLIP ViT-T/8-test (open_clip weights.pt)", 24)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    image = Image.open(image_path)
    transform = open_clip.image_transform(32, is_train=False)
    squashed = open_clip.image_transform(32, is_train=False, resize_mode="squash")
    box = (10, 5, 60, 45)
    views = [View(image_path, "whole"), View(image_path, "squash", box), View(image_path, "paper region", box)]
    features = extract(network, views)
    for feature, x in zip(features, (transform(image), squashed(image.crop(box))), strict=False):
        # A batch of one and a batch of three: rounding in another order.
        np.testing.assert_allclose(feature, model.encode_image(x[None])[0].numpy(), rtol=1e-4, atol=1e-5)
    assert features.shape == (3, 24)
    assert np.isfinite(features).all()


@needs_open_clip
@torch.no_grad()
def test_text_features_are_those_of_open_clip(small_model: tuple[str, Any]) -> None:
    spec, model = small_model
    texts = ["a red ball on the lawn", "a cup"]
    expected = model.encode_text(open_clip.get_tokenizer("ViT-T-8-test")(texts)).numpy()
    np.testing.assert_array_equal(load_network(spec).text_features(texts), expected)


@needs_open_clip
def test_equal_weights_have_equal_keys(small_model: tuple[str, Any], tmp_path: Path) -> None:
    spec, model = small_model
    key = load_network(spec).key
    assert key == load_network(spec).key
    with torch.no_grad():
        model.visual.proj[0, 0] += 1e-6
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert key != load_network(spec).key


@needs_open_clip
def test_unknown_models_are_named() -> None:
    for spec in ("open_clip:ViT-X/y", "open_clip:ViT-B-32/no-such-tag"):
        with pytest.raises(UserError, match=spec) as error:
            load_network(spec)
        assert "\n" not in str(error.value)


def test_a_spec_names_architecture_and_weights() -> None:
    with pytest.raises(UserError, match="open_clip:ViT-B-32,"):
        load_network("open_clip:ViT-B-32")


@pytest.mark.skipif(open_clip is not None, reason="is about its absence")
def test_without_open_clip_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"\[clip\]"):
        load_network("open_clip:ViT-B-32/openai")


def test_networks_without_text_say_so() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    with pytest.raises(UserError, match="EfficientNet-Lite0"):
        load_network("efficientnet-lite0").text_features(["a ball"])
