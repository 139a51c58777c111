"""Turning Stable Diffusion into a starting point for other models: pure functions on named tensors.

All names are file names (see `ldm.checkpoint.keys`); the given mappings are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoint.identify import CONTROL, latent_channels
from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import (
    DIFFUSERS_INPUT_CONV,
    FILE_TOWER,
    INPUT_CONV,
    TEXT_TOWER,
    TOWER,
    to_file_keys,
)

_FULL_SIZE_CHANNELS = 320  # of the UNet of Stable Diffusion v1, whose exemplar encoder is CLIP ViT-L/14
_VIT_L_14 = {"width": 1024, "layers": 24, "patch": 14, "positions": 257}
_LAYER_PARTS = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)


def input_conv(state: Mapping[str, Tensor]) -> str:
    """The name of the UNet's first convolution (D, C, 3, 3), in the published layout or diffusers'.

    Raises:
        CheckpointError: there is none, or it is a ControlNet's.
    """
    if any(name.startswith(CONTROL) for name in state):
        raise CheckpointError(
            "this is a ControlNet, which sees the four channels of the noisy latent alone beside a UNet of any width; "
            "pass the UNet's checkpoint"
        )
    for key in (INPUT_CONV, DIFFUSERS_INPUT_CONV):
        if key in state and state[key].ndim == 4:
            return key
    raise CheckpointError(
        f"no convolution {INPUT_CONV} or {DIFFUSERS_INPUT_CONV}; pass Stable Diffusion in CompVis' names, "
        "or the UNet of a diffusers folder"
    )


def inflate_input_conv(
    state: Mapping[str, Tensor], in_channels: int = 9, init: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Give the UNet's first convolution more input channels, which count for nothing until trained.

    Args:
        state: a checkpoint, or a UNet of diffusers; its convolution is (D, C, 3, 3), C = 4 in Stable Diffusion: x_t.
        in_channels: channels afterwards; the new ones (for inpainting z_masked, keep_mask) follow the existing.
        init: a checkpoint with (D, in_channels, 3, 3), whose last channels the new ones are to be; None: zero.

    Returns:
        The checkpoint with that one weight (D, in_channels, 3, 3).

    Raises:
        CheckpointError: there is no such weight, it has been inflated already or has as many channels, or `init` has
            another shape.

    Source: Yang et al. 2023 (Paint by Example), section 3.1: the network is initialised from Stable Diffusion.
    """
    key = input_conv(state)
    weight = state[key]
    old, latent = weight.shape[1], latent_channels(state)
    if old > latent:
        raise CheckpointError(
            f"{key}: got {old} input channels, expected {latent}; the checkpoint is inflated already, use it as it is"
        )
    if in_channels <= old:
        raise CheckpointError(f"{key}: has {old} input channels, and {in_channels} are asked for; ask for more")
    inflated = weight.new_zeros(weight.shape[0], in_channels, *weight.shape[2:])
    if init is not None:
        given = init[input_conv(init)]
        if given.shape != inflated.shape:
            raise CheckpointError(
                f"the checkpoint for the new channels: got an input convolution {list(given.shape)}, "
                f"expected {list(inflated.shape)}; pass one of the wanted width"
            )
        inflated[:, old:] = given[:, old:]
    inflated[:, :old] = weight
    return {**state, key: inflated}


def add_clip_tower(state: Mapping[str, Tensor], clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the weights of CLIP's image tower where the exemplar encoder expects them; the text tower goes.

    Args:
        state: a checkpoint. When its UNet has the full size, the tower must be ViT-L/14.
        clip_state: `CLIPModel` or `CLIPVisionModel` of transformers, with or without the `vision_model.` level.

    Raises:
        CheckpointError: `clip_state` holds no complete image tower, or one of another size.
    """
    tower = _image_tower(clip_state)
    size = _tower_size(tower)
    if INPUT_CONV in state and state[INPUT_CONV].shape[0] == _FULL_SIZE_CHANNELS and size != _VIT_L_14:
        raise CheckpointError(
            f"the CLIP image tower has {_described(size)}, expected ViT-L/14 with {_described(_VIT_L_14)}; "
            "pass openai/clip-vit-large-patch14"
        )
    kept = {name: tensor for name, tensor in state.items() if not name.startswith((FILE_TOWER, TEXT_TOWER))}
    return kept | to_file_keys({TOWER + name: tensor for name, tensor in tower.items()})


def _image_tower(clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors under bare names (`embeddings.…`, `encoder.layers.0.…`), known to be complete."""
    level = "vision_model." if any(name.startswith("vision_model.") for name in clip_state) else ""
    bare = {name.removeprefix(level): tensor for name, tensor in clip_state.items() if name.startswith(level)}
    layers = {int(found[1]) for name in bare if (found := re.match(r"encoder\.layers\.(\d+)\.", name))}
    modules = ["pre_layrnorm", "post_layernorm"]
    modules += [f"encoder.layers.{index}.{part}" for index in range(len(layers)) for part in _LAYER_PARTS]
    names = [
        f"embeddings.{part}" for part in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    ]
    names += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    missing = [name for name in names if name not in bare]
    if missing or not layers:
        raise CheckpointError(
            f"no complete CLIP image tower: {', '.join(missing[:3])} missing; pass CLIPModel or CLIPVisionModel weights"
        )
    return {name: bare[name] for name in names}


def _tower_size(tower: Mapping[str, Tensor]) -> dict[str, int]:
    patches = tower["embeddings.patch_embedding.weight"]
    return {
        "width": patches.shape[0],
        "layers": sum(name.endswith("layer_norm1.weight") for name in tower),
        "patch": patches.shape[-1],
        "positions": tower["embeddings.position_embedding.weight"].shape[0],
    }


def _described(size: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {value}" for what, value in size.items())
