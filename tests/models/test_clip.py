"""CLIP's towers against those of transformers, with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config import ConfigError, ExemplarEncoderConfig, TextEncoderConfig
from ldm.models.clip import ImageTower, TextTower

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4}
IMAGE = ExemplarEncoderConfig(image_size=28, patch_size=7, **SIZES)
TEXT = TextEncoderConfig(vocab_size=50, max_length=9, **SIZES)

Pair = tuple[nn.Module, Any, Tensor]  # our tower, theirs, an input


def theirs(config: ExemplarEncoderConfig | TextEncoderConfig) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
    }
    if isinstance(config, TextEncoderConfig):
        sizes |= {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_length}
        return CLIPTextModel(CLIPTextConfig(**sizes, eos_token_id=49))
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=config.image_size, patch_size=config.patch_size))


@pytest.fixture(params=["image", "text"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "image":
            ours, model, x = ImageTower(IMAGE), theirs(IMAGE), torch.randn(2, 3, 28, 28)
        else:
            ours, model, x = TextTower(TEXT), theirs(TEXT), torch.randint(50, (2, 9))
        for parameter in model.parameters():  # no bias of 0, no norm without effect
            nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(model.state_dict())
    yield ours.eval(), model.eval(), x


def normed(model: Any, x: Tensor) -> Tensor:
    hidden = model(x).last_hidden_state
    return model.post_layernorm(hidden) if hasattr(model, "post_layernorm") else hidden


def test_names_shapes_and_order(pair: Pair) -> None:
    ours, model, _ = pair
    layouts = [[(name, x.shape) for name, x in network.state_dict().items()] for network in (ours, model)]
    assert layouts[0] == layouts[1]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_numbers_and_gradients(pair: Pair) -> None:
    """In float64, where another order of operations moves nothing that float32 could show."""
    ours, model, x = pair
    x = x.double() if x.is_floating_point() else x
    results = ours.double()(x), normed(model.double(), x)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    for result in results:
        result.square().sum().backward()
    for (name, got), expected in zip(ours.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast"])
@torch.no_grad()
def test_types(pair: Pair, way: str) -> None:
    ours, model, x = pair
    weights = torch.bfloat16 if way == "bfloat16" else torch.float32
    with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext():
        got, expected = ours.to(weights)(x), normed(model.to(weights), x)
    assert got.dtype == expected.dtype
    # float32: a few units in the last place of values about 1; otherwise the same operations, rounded to 8 bits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 if way == "float32" else 0.02)


@torch.no_grad()
def test_shorter_texts(pair: Pair) -> None:
    ours, _, ids = pair
    if isinstance(ours, TextTower):
        torch.testing.assert_close(ours(ids[:, :4]), ours(ids)[:, :4], rtol=0, atol=1e-6)


def test_refusals() -> None:
    for shape in ((1, 3, 28, 35), (1, 3, 30, 30), (1, 3, 14, 56)):
        with pytest.raises(ValueError, match="28"):
            ImageTower(IMAGE)(torch.zeros(shape))
    with pytest.raises(ConfigError, match="num_heads"):
        TextTower(TextEncoderConfig(hidden_size=30, num_heads=4, num_layers=1))
