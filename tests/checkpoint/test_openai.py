"""Every published file of improved- and guided-diffusion: its architecture is found, and has its names and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint.openai import PUBLISHED, examine, is_openai, to_module_layout
from ldm.config import ModelConfig, load_config
from ldm.models.classifier import ClassifierModel
from ldm.pixel_diffusion import PixelDiffusion
from tests.lineage import by_head, facts, manifests, reorder, unet_config

INDEX = {name: entry for name, entry in manifests()["index"].items() if "file" in entry}
NAMES = {entry["file"].removesuffix(".pt"): name for name, entry in INDEX.items()}


def manifest_of(name: str) -> str:
    """The manifest of a published file, or of the one with the same."""
    same = INDEX[name].get("same_manifest_as", "").split(" ")[0]
    return NAMES[same] if same else name


def state_of(name: str) -> dict[str, Tensor]:
    rows = [line.split("\t") for line in manifests()["manifests"][manifest_of(name)].splitlines()]
    return {row[0]: torch.empty([int(n) for n in row[1].split("x")], device="meta") for row in rows}


def read(state: dict[str, Tensor]) -> ModelConfig:
    return load_config(OmegaConf.create(examine(state).config)).model


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", INDEX)
def test_published_files(name: str) -> None:
    entry, state = INDEX[name], state_of(name)
    details = INDEX[manifest_of(name)]
    flags: dict[str, Any] = details["flags"]
    found = examine(state)
    assert is_openai(state)
    assert found.is_published
    config = read(state)
    with torch.device("meta"):
        if config.kind == "classifier":
            network: torch.nn.Module = ClassifierModel(config.unet, config.classifier, config.image_size)
        else:
            network = PixelDiffusion(config).unet
    assert shapes(network.state_dict()) == shapes(state)
    assert (len(state), sum(x.numel() for x in state.values())) == (details["entries"], details["parameters"])
    family = entry["file"].split("_")[0]  # lsun_*: four files have one architecture
    assert entry["file"] in found.summary or f"{family}_*.pt" in found.summary
    # what shapes do not tell
    size = flags.get("image_size", flags.get("large_size", 256))
    T = flags.get("diffusion_steps", 1000)
    cosine = flags.get("noise_schedule", "cosine" if name == "guided_64x64_classifier" else "linear")
    assert (config.image_size, config.schedule.num_timesteps, config.schedule.name) == (size, T, cosine)
    if config.kind == "classifier":
        assert config.unet.head_channels == 64
        return
    assert (config.variance == "learned_range") == flags["learn_sigma"]
    assert (config.unet.num_classes is not None) == flags.get("class_cond", False)
    assert config.attention_layout == ("qkv_head" if flags.get("use_new_attention_order") else "head_qkv")
    if "num_head_channels" in flags:
        assert config.unet.head_channels == flags["num_head_channels"]
    else:
        assert (config.unet.head_channels, config.unet.num_heads) == (None, flags.get("num_heads", 4))
    rescale = flags.get("rescale_timesteps", name.startswith("improved"))
    assert config.unet.time_scale == (1000 / T if rescale else 1)
    assert config.unet.num_res_blocks == flags["num_res_blocks"]
    assert config.unet.model_channels == flags["num_channels"]
    sides = [size // factor for factor in config.unet.attention_resolutions]
    assert sorted(sides) == sorted(int(s) for s in flags.get("attention_resolutions", "16,8").split(","))
    assert config.small_size == flags.get("small_size", 64 if "upsample" in name else None)


def test_the_table_of_published_files_is_complete() -> None:
    listed = {INDEX[manifest_of(name)]["parameters"] for name in INDEX}
    assert listed == PUBLISHED.keys()


@pytest.mark.parametrize(("project", "name"), [("improved", n) for n in "abc"] + [("guided", n) for n in "abcd"])
def test_shapes_tell_the_architecture_of_other_files(project: str, name: str) -> None:
    expected = unet_config(facts(f"{project}_unet")["configs"][name])
    with torch.device("meta"):
        state = PixelDiffusion(
            ModelConfig(
                kind="pixel",
                input_channels=["x_t"],
                variance="learned_range" if expected.out_channels == 2 * expected.in_channels else "posterior",
                unet=expected,
            )
        ).unet.state_dict()
    found = examine(state)
    assert not found.is_published
    got = read(state).unet
    for key in (
        "in_channels",
        "out_channels",
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "attention_resolutions",
        "num_classes",
        "scale_shift",
        "resample",
    ):
        assert getattr(got, key) == getattr(expected, key), key


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_pools_of_classifiers(pool: str) -> None:
    flags = facts("guided_classifier")["configs"][pool]
    with torch.device("meta"):
        from ldm.config import ClassifierConfig

        config = ClassifierConfig(pool=pool, num_classes=flags["out_channels"])
        state = ClassifierModel(unet_config(flags), config, flags["image_size"]).state_dict()
    got = read(state)
    assert (got.kind, got.classifier.pool, got.classifier.num_classes) == ("classifier", pool, 10)


def test_attention_channels_change_their_order_and_nothing_else() -> None:
    weight, bias, other = torch.randn(24, 8, 1), torch.randn(24), torch.randn(24, 8)
    state = {"middle_block.1.qkv.weight": weight, "middle_block.1.qkv.bias": bias, "time_embed.0.weight": other}
    for heads, width in ((2, None), (5, 4)):  # the width of heads wins
        moved = to_module_layout(state, "p.", "head_qkv", heads, width)
        assert torch.equal(moved["p.middle_block.1.qkv.weight"], reorder(weight, 2))
        assert torch.equal(by_head(moved["p.middle_block.1.qkv.bias"], 2), bias)
        assert moved["p.time_embed.0.weight"] is other
    same = to_module_layout(state, "p.", "qkv_head", 2, None)
    assert all(same[f"p.{name}"] is tensor for name, tensor in state.items())


def test_other_files_are_not_taken_for_theirs() -> None:
    assert not is_openai({"model.time_embed.0.weight": torch.empty(1)})
    assert not is_openai({"init_conv.weight": torch.empty(1)})
