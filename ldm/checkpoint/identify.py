"""What a checkpoint is, by its names and shapes; of one small tensor by its numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoint.keys import (
    DIFFUSERS_INPUT_CONV,
    EMA,
    EMA_COUNTERS,
    FILE_TOWER,
    FIRST_STAGE,
    INPUT_CONV,
    OUTPUT_CONVS,
    SCHEDULE_BUFFERS,
    UNET,
)

# By the channels of their text tokens.
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_WIDE = {
    5: "with depth (5 input channels)",
    8: "with 8 input channels (InstructPix2Pix, IC-Light fc)",
    9: "inpainting (9 input channels)",
    12: "with 12 input channels (IC-Light fbc)",
}
_LORA = re.compile(r"\.lora_(?:down|up|A|B)\b|[._]lora\.(?:down|up)\.|^lora_(?:unet|te)")
CONTROL = ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")  # what names of ControlNets begin with
_LAST_GAINS = (UNET + "out.0.weight", "conv_norm_out.weight")  # of the last norm, in either layout

# (pattern of names, part), the first that fits counts.
_PARTS = (
    (re.escape(EMA), "averaged UNet (EMA)"),
    (
        re.escape(UNET)
        + r"|(?:down_blocks|mid_block|up_blocks|time_embedding|conv_(?:in|out|norm_out)|add_embedding)\.",
        "UNet",
    ),
    (r"control_model\.|controlnet_|input_hint_block\.|zero_convs\.|middle_block_out\.", "ControlNet"),
    (rf"(?:{re.escape(FIRST_STAGE)})?decoder\.(?:encoder|condition_encoder)\.", "condition branch of the decoder"),
    (r"embeddings\.|encoder\.layers\.|pre_layrnorm\.|post_layernorm\.", "CLIP tower"),
    (r"final_layer_norm\.", "norm behind the tower"),
    (rf"(?:{re.escape(FIRST_STAGE)})?(?:encoder|decoder|quant_conv|post_quant_conv)\.", "first stage"),
    (
        r"(?:cond_stage_model\.transformer\.|model\.)?vision_model\.|cond_stage_model\.transformer\.network\.",
        "image tower",
    ),
    (
        r"cond_stage_model\.(?:mapper|final_ln|reduce)\.|mapper\.|proj_out\.|learnable_vector|uncond_vector",
        "mapper and null token",
    ),
    (r"(?:cond_stage_model\.transformer\.)?text_model\.|cond_stage_model\.model\.|conditioner\.", "text encoder"),
    (rf"(?:{'|'.join(SCHEDULE_BUFFERS)})$", "noise schedule"),
)


def context_width(state: Mapping[str, Tensor]) -> int | None:
    """Channels of the tokens that the UNet's cross-attention reads; None: there is no such attention."""
    return next((t.shape[1] for name, t in state.items() if name.endswith("attn2.to_k.weight")), None)


def latent_channels(state: Mapping[str, Tensor]) -> int:
    """Channels of the noisy latent: as many as leave the UNet; without its last convolution the 4 of most."""
    return next((state[name].shape[0] for name in OUTPUT_CONVS if name in state), 4)


def family(state: Mapping[str, Tensor]) -> str | None:
    """`SDXL`, or what the width of the UNet's context tells; None: nothing tells."""
    if any(name.startswith(("conditioner.embedders.", "add_embedding.", f"{UNET}label_emb.")) for name in state):
        return "SDXL"
    width = context_width(state)
    return None if width is None else _FAMILIES.get(width, "another UNet")


def is_difference(state: Mapping[str, Tensor]) -> bool | None:
    """Whether a UNet is the difference of two: their names are the same, but the last norm's gains are about 0, not 1.

    Long training with weight decay makes gains smaller; what fine-tuning changes in them is hundredths.

    Returns:
        None where there is no such norm.
    """
    gains = next((state[name] for name in _LAST_GAINS if name in state), None)
    return None if gains is None else bool(gains.float().abs().mean() < 0.1)


def identify(state: Mapping[str, Tensor]) -> str:
    """What a checkpoint is, in a few words; `unknown` where its names say nothing."""
    kind = _identify(state)
    if any(name.startswith(EMA) and name not in EMA_COUNTERS for name in state):  # pruned files may keep the counters
        kind += ", training checkpoint with averaged weights (EMA)"
    return kind


def parts(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """How many tensors and numbers a checkpoint has by part."""
    counts: dict[str, tuple[int, int]] = {}
    for name, tensor in state.items():
        part = next((part for pattern, part in _PARTS if re.match(pattern, name)), "other")
        tensors, numbers = counts.get(part, (0, 0))
        counts[part] = (tensors + 1, numbers + tensor.numel())
    return counts


def _identify(state: Mapping[str, Tensor]) -> str:
    def holds(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in state)

    if holds(*CONTROL):
        layout = "diffusers" if holds("controlnet_cond_embedding.") else "CompVis' names"
        return f"ControlNet, {layout}" + (", with the model that it controls" if holds(UNET) else "")
    if INPUT_CONV in state or holds(UNET):
        return _identify_whole(state)
    if any(_LORA.search(name) for name in state):
        return "LoRA (low-rank additions, not a model by itself)"
    if any(re.match(r"(?:first_stage_model\.)?decoder\.(?:encoder|condition_encoder)\.", name) for name in state):
        return "asymmetric VAE (its decoder sees the unmasked pixels)"
    if DIFFUSERS_INPUT_CONV in state and holds("down_blocks."):
        return _identify_unet(state)
    if holds("encoder.down_blocks."):
        return "diffusers component: VAE"
    if holds("encoder.down.", f"{FIRST_STAGE}encoder."):
        return "VAE only, CompVis' names"
    if "uncond_vector" in state:
        return "diffusers component: image encoder of Paint by Example"
    if holds("text_model.", "embeddings.token_embedding.") and not holds("vision_model."):
        return "diffusers component: text encoder"
    if holds("vision_model.", "embeddings.patch_embedding."):
        return "CLIP" if holds("text_model.") else "CLIP's image tower"
    if holds("down_blocks.", "mid_block.", "up_blocks."):
        return "diffusers component: part of a UNet (one of several files)"
    return "unknown"


def _identify_whole(state: Mapping[str, Tensor]) -> str:
    if any(name.startswith(("cond_stage_model.mapper.", FILE_TOWER)) or name == "learnable_vector" for name in state):
        return "Paint by Example"
    kind = family(state)
    if INPUT_CONV not in state:  # Flux and SD3 also call theirs `model.diffusion_model`
        return kind or "unknown (another architecture)"
    return _with_width(kind or "another UNet", state[INPUT_CONV].shape[1])


def _identify_unet(state: Mapping[str, Tensor]) -> str:
    channels = state[DIFFUSERS_INPUT_CONV].shape[1]
    if channels in (8, 12) and is_difference(state):
        return f"IC-Light offset, {'fc' if channels == 8 else 'fbc'} ({channels} input channels; to be added to a UNet)"
    kind = family(state)
    return _with_width(f"diffusers component: UNet of {kind}" if kind else "diffusers component: UNet", channels)


def _with_width(kind: str, channels: int) -> str:
    return kind if channels == 4 else f"{kind}, {_WIDE.get(channels, f'with {channels} input channels')}"
