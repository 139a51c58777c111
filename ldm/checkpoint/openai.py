"""Files of improved-diffusion and guided-diffusion: the architecture is read off names and shapes.

What shapes do not tell (noise schedule, heads, order of attention channels, image size) is known for the published
files by their number of parameters, and comes from the config for others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

State = Mapping[str, Tensor]
PUBLISHED = {  # parameters => names, image size, schedule, T, heads or channels of each
    121_063_942: ("imagenet64_uncond_100M_1500K.pt, imagenet64_uncond_vlb_100M_1500K.pt", 64, "cosine", 4000, 4, None),
    52_546_438: ("cifar10_uncond_50M_500K.pt, cifar10_uncond_vlb_50M_500K.pt", 32, "cosine", 4000, 4, None),
    273_049_350: ("imagenet64_cond_270M_250K.pt", 64, "cosine", 4000, 4, None),
    279_792_390: ("upsample_cond_500K.pt", 256, "linear", 4000, 4, None),
    113_676_678: ("lsun_uncond_100M_1200K_bs128.pt, lsun_uncond_100M_2400K_bs64.pt", 256, "linear", 1000, 1, None),
    295_904_454: ("64x64_diffusion.pt", 64, "cosine", 1000, 4, 64),
    421_529_606: ("128x128_diffusion.pt", 128, "linear", 1000, 4, None),
    553_838_086: ("256x256_diffusion.pt", 256, "linear", 1000, 4, 64),
    552_814_086: ("256x256_diffusion_uncond.pt, lsun_*.pt", 256, "linear", 1000, 4, 64),
    558_997_638: ("512x512_diffusion.pt", 512, "linear", 1000, 4, 64),
    311_795_910: ("64_256_upsampler.pt", 256, "linear", 1000, 4, None),
    308_835_270: ("128_512_upsampler.pt", 512, "linear", 1000, 4, 64),
    65_438_568: ("64x64_classifier.pt", 64, "cosine", 1000, 4, 64),
    42_568_040: ("128x128_classifier.pt", 128, "linear", 1000, 4, 64),
    54_096_360: ("256x256_classifier.pt", 256, "linear", 1000, 4, 64),
    54_448_360: ("512x512_classifier.pt", 512, "linear", 1000, 4, 64),
}
SMALL_SIZES = {279_792_390: 64, 311_795_910: 64, 308_835_270: 128}  # of upsamplers' low_res
RESCALED = (121_063_942, 52_546_438)  # timesteps were multiplied by 1000 / T
NEW_ORDER = (295_904_454,)  # of attention channels: queries of all heads, then keys, then values
POOLS = {  # pool => its last weight and that one's axes
    "attention": ("out.2.c_proj.weight", 3),
    "adaptive": ("out.3.weight", 4),
    "spatial_v2": ("out.3.weight", 2),
    "spatial": ("out.2.weight", 2),
}


@dataclass(frozen=True)
class Found:
    """What a file holds: a config, which may be incomplete, and a line that says it."""

    config: dict[str, Any]
    summary: str
    is_published: bool


def is_openai(state: State) -> bool:
    """Tell whether a file is a UNet or classifier of the two projects."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight"} <= state.keys() and not any("attn2" in n for n in state)


def examine(state: State) -> Found:
    """Read the architecture of a file off its names and shapes."""
    rows = {name: tensor.shape[0] for name, tensor in state.items()}
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("input_blocks.")}
    blocks, is_classifier = 1 + max(numbers), not any(name.startswith("output_blocks.") for name in state)
    strided = sum(name.endswith("op.weight") for name in state)
    gaps = blocks - len(numbers)  # resampling without weights
    upward = sum(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight", name) is not None for name in state)
    resample = "conv" if strided else "pool" if gaps else "res_block"
    levels = 1 + (strided or gaps or upward)
    if is_classifier and resample == "res_block":
        levels = _classifier_levels(state, blocks)
    depth = blocks // levels - 1
    firsts = [1 + level * (depth + 1) for level in range(levels)]
    width = state["time_embed.0.weight"].shape[1]
    widths = [rows[f"input_blocks.{i}.0.out_layers.3.weight"] for i in firsts]
    inputs = state["input_blocks.0.0.weight"].shape[1]
    unet: dict[str, Any] = {
        "in_channels": inputs,
        "model_channels": width,
        "channel_mult": [level / width for level in widths],
        "num_res_blocks": depth,
        "attention_resolutions": [2**i for i, k in enumerate(firsts) if f"input_blocks.{k}.1.qkv.weight" in state],
        "context_dim": 0,
        "scale_shift": rows["input_blocks.1.0.emb_layers.1.weight"] == 2 * widths[0],
        "resample": resample,
    }
    model: dict[str, Any] = {"kind": "pixel", "unet": unet, "input_channels": ["x_t"]}
    if is_classifier:
        pool, head = next(
            (pool, name) for pool, (name, axes) in POOLS.items() if name in state and state[name].ndim == axes
        )
        model |= {"kind": "classifier", "classifier": {"pool": pool, "num_classes": rows[head]}}
    else:
        channels = inputs if inputs in (1, 3, 4) else inputs // 2
        unet |= {"out_channels": rows["out.2.weight"], "num_classes": rows.get("label_emb.weight")}
        model["variance"] = "learned_range" if rows["out.2.weight"] == 2 * channels else "posterior"
        model["input_channels"] += ["low_res"] * (inputs == 2 * channels)
    count = sum(tensor.numel() for tensor in state.values())
    what = f"{'classifier' if is_classifier else 'pixel diffusion model'}, {count:,} parameters"
    if known := PUBLISHED.get(count):
        names, size, name, T, heads, head_channels = known
        time_scale = 1000 / T if count in RESCALED else 1.0
        unet |= {"num_heads": heads, "head_channels": head_channels, "time_scale": time_scale}
        schedule = {"name": name, "num_timesteps": T, "linear_start": 0.1 / T, "linear_end": 20 / T}
        model |= {"image_size": size, "schedule": schedule, "small_size": SMALL_SIZES.get(count)}
        model["attention_layout"] = "qkv_head" if count in NEW_ORDER else "head_qkv"
        what += f", as {names}: {size} px, {name} schedule of {T} steps"
    return Found({"model": model}, what, known is not None)


def _classifier_levels(state: State, blocks: int) -> int:
    """Count the levels of an encoder that resamples by residual blocks: only a split that fits has one width and one
    answer about attention in each level, and no attention where it resamples."""
    widths = [0] + [state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in range(1, blocks)]
    attends = [f"input_blocks.{i}.1.qkv.weight" in state for i in range(blocks)]
    for depth in range(1, blocks):
        if blocks % (depth + 1):
            continue
        starts = range(1, blocks, depth + 1)
        same = all(len({(widths[i], attends[i]) for i in range(s, s + depth)}) == 1 for s in starts)
        if same and not any(attends[s + depth] for s in starts[:-1]):
            return len(starts)
    return 1


def to_module_layout(
    state: State, prefix: str, layout: str, num_heads: int, head_channels: int | None
) -> dict[str, Tensor]:
    """Return the tensors under the module's names, attention channels in its order: queries, keys, values."""
    result = {}
    for name, tensor in state.items():
        if layout == "head_qkv" and re.search(r"\.qkv\.(weight|bias)$", name):
            heads = tensor.shape[0] // 3 // head_channels if head_channels else num_heads
            tensor = rearrange(tensor, "(h three d) ... -> (three h d) ...", three=3, h=heads)
        result[prefix + name] = tensor
    return result
