"""Stable Diffusion + CLIP = the published layout without its new parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import EMA, FILE_TOWER, INPUT_CONV, NEW_PARTS, POSITION_IDS, to_module_keys
from ldm.checkpoint.surgery import add_clip_tower, inflate_input_conv


@settings(max_examples=20, deadline=None)
@given(new=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_inflated_conv_ignores_the_new_channels(new: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 4, 3, 3, generator=generator)
    state = {INPUT_CONV: weight, "other": torch.ones(1)}
    inflated = inflate_input_conv(state, in_channels=4 + new)
    assert state[INPUT_CONV] is weight
    assert inflated["other"] is state["other"]
    x = torch.randn(2, 4, 6, 5, generator=generator)
    anything = 1e3 * torch.randn(2, new, 6, 5, generator=generator)
    got = F.conv2d(torch.cat([x, anything], dim=1), inflated[INPUT_CONV], padding=1)
    # Sums of the same 36 products, perhaps in another order: a few ulp of float32 at values up to 20.
    torch.testing.assert_close(got, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-5)


def test_inflation_keeps_dtype() -> None:
    inflated = inflate_input_conv({INPUT_CONV: torch.ones(2, 4, 3, 3).half()})
    assert inflated[INPUT_CONV].dtype == torch.float16
    assert inflated[INPUT_CONV].shape == (2, 9, 3, 3)


def test_inflation_refuses() -> None:
    inflated = inflate_input_conv({INPUT_CONV: torch.ones(2, 4, 3, 3)})
    with pytest.raises(CheckpointError, match="inflated already"):
        inflate_input_conv(inflated)
    with pytest.raises(CheckpointError, match="no convolution"):
        inflate_input_conv({"encoder.conv_in.weight": torch.ones(2, 4, 3, 3)})
    wide = {INPUT_CONV: torch.ones(2, 9, 3, 3), "model.diffusion_model.out.2.weight": torch.ones(4, 2, 3, 3)}
    with pytest.raises(CheckpointError, match=r"got 9 input channels, expected 4.*inflated already"):
        inflate_input_conv(wide, 12)  # wider still, but not from four
    for name in ("control_model.input_blocks.0.0.weight", "controlnet_cond_embedding.conv_in.weight"):
        with pytest.raises(CheckpointError, match="this is a ControlNet, which sees the four channels"):
            inflate_input_conv({"conv_in.weight": torch.ones(2, 4, 3, 3), name: torch.ones(1)})


@pytest.mark.parametrize("key", [INPUT_CONV, "conv_in.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_channels", [8, 9, 12])
def test_new_channels_are_those_given(key: str, dtype: torch.dtype, in_channels: int) -> None:
    state = {key: torch.randn(2, 4, 3, 3).to(dtype)}
    init = {INPUT_CONV: torch.randn(2, in_channels, 3, 3)}
    inflated = inflate_input_conv(state, in_channels, init)[key]
    assert inflated.dtype == dtype
    assert torch.equal(inflated[:, :4], state[key])
    assert torch.equal(inflated[:, 4:], init[INPUT_CONV][:, 4:].to(dtype))
    with pytest.raises(CheckpointError, match=rf"expected \[2, {in_channels}, 3, 3\]"):
        inflate_input_conv(state, in_channels, {INPUT_CONV: torch.randn(2, 5, 3, 3)})


@pytest.mark.parametrize("level", ["", "vision_model."])
def test_stable_diffusion_and_clip_make_the_published_layout(
    official: dict[str, Tensor], sd_full_ema: dict[str, Tensor], level: str
) -> None:
    sd = {name: tensor for name, tensor in sd_full_ema.items() if not name.startswith(EMA)}
    clip = {level + n.removeprefix(FILE_TOWER): t for n, t in official.items() if n.startswith(FILE_TOWER)}
    made = add_clip_tower(inflate_input_conv(sd), clip)
    expected = {name: tensor for name, tensor in official.items() if not name.startswith(NEW_PARTS)}
    assert {name: (t.shape, t.dtype) for name, t in made.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }


@pytest.fixture(scope="module")
def transformers_clip() -> dict[str, dict[str, Tensor]]:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    sizes: dict[str, Any] = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    both = CLIPConfig(vision_config=vision.to_dict(), text_config={**sizes, "vocab_size": 99})
    return {"CLIPVisionModel": CLIPVisionModel(vision).state_dict(), "CLIPModel": CLIPModel(both).state_dict()}


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel"])
def test_towers_of_transformers(transformers_clip: dict[str, dict[str, Tensor]], kind: str) -> None:
    tower = to_module_keys(add_clip_tower({"betas": torch.ones(2)}, transformers_clip[kind]))
    assert tower.pop("betas").shape == (2,)
    names = {"cond_stage_model.transformer." + name for name in transformers_clip["CLIPVisionModel"]}
    assert set(tower) == names


def test_a_new_tower_replaces_the_old_and_the_text_tower(transformers_clip: dict[str, dict[str, Tensor]]) -> None:
    old = {
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(2),
        FILE_TOWER + "encoder.layers.7.layer_norm1.weight": torch.ones(2),
        "cond_stage_model.mapper.resblocks.0.ln_1.weight": torch.ones(2),
    }
    made = add_clip_tower(old, transformers_clip["CLIPVisionModel"])
    assert [name for name in old if name in made] == ["cond_stage_model.mapper.resblocks.0.ln_1.weight"]
    assert torch.equal(made[POSITION_IDS], torch.arange(5)[None])


def test_wrong_towers(transformers_clip: dict[str, dict[str, Tensor]]) -> None:
    clip = transformers_clip["CLIPVisionModel"]
    full_size = {INPUT_CONV: torch.empty(320, 9, 3, 3, device="meta")}
    with pytest.raises(CheckpointError, match=r"has width 8.*ViT-L/14"):
        add_clip_tower(full_size, clip)
    with pytest.raises(CheckpointError, match="no complete CLIP image tower"):
        add_clip_tower({}, {name: t for name, t in clip.items() if "layers.0.mlp" not in name})
    text = {n: t for n, t in transformers_clip["CLIPModel"].items() if not n.startswith("vision_model.")}
    with pytest.raises(CheckpointError, match="no complete CLIP image tower"):
        add_clip_tower({}, text)
