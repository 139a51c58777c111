"""What tensors are called in files and in the modules of this project, and what their names tell about a file.

The published model's names are the file format. Modules use the same names except for the differences declared at the
top of this file; `to_module_keys` and `to_file_keys` translate in either direction. Files that this project's trainer
wrote hold module names; `to_module_keys` leaves those as they are. `identify` answers for the loader, the merger, the
converter and `scripts/inspect_checkpoint.py` alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.checkpoint.io import CheckpointError

UNET = "model.diffusion_model."
INPUT_CONV = UNET + "input_blocks.0.0.weight"
DIFFUSERS_INPUT_CONV = "conv_in.weight"  # of a UNet by itself
FIRST_STAGE = "first_stage_model."
TOWER = "cond_stage_model.transformer."  # CLIP: the image tower here, the text tower in Stable Diffusion
FILE_TOWER = TOWER + "vision_model."
TEXT_TOWER = TOWER + "text_model."
TEXT_MODULE = "text_encoder.transformer."
CONDITION_ENCODER = "decoder.encoder."  # of the asymmetric decoder alone

# (prefix in files, prefix in modules): transformers 5 has no `vision_model` and `text_model` level in its CLIP towers,
# and here the text tower has a module of its own, so that a model can have both.
RENAMED = ((FILE_TOWER, TOWER), (TEXT_TOWER, TEXT_MODULE))

# Files also hold the towers' position numbers, 0 … N, which no module keeps any more.
POSITION_IDS, TEXT_POSITION_IDS = (tower + "embeddings.position_ids" for tower in (FILE_TOWER, TEXT_TOWER))

# A second copy of the UNet, averaged over training, its names without dots; with two counters.
EMA = "model_ema."
EMA_COUNTERS = (EMA + "decay", EMA + "num_updates")

# Low-rank additions as `peft` names them beside the weight that they are added to: A, then B.
LORA_BASE = ".base_layer.weight"
LORA_PARTS = (".lora_A.default.weight", ".lora_B.default.weight")

SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)

# In files of 2022 the text tower's names lack the level `text_model`; this one tells them from an image tower's.
_BARE_TEXT = TOWER + "embeddings.token_embedding.weight"

# What Paint by Example adds to Stable Diffusion and CLIP, hence what starts at random in training.
NEW_PARTS = (
    *("cond_stage_model.reduce.", "cond_stage_model.mapper.", "cond_stage_model.final_ln."),
    *("proj_out.", "learnable_vector"),
)


def to_module_keys(state: Mapping[str, Tensor], *, use_ema: bool = False) -> dict[str, Tensor]:
    """Rename a file's tensors to the names that the modules use.

    Args:
        state: as `read_checkpoint` returns it.
        use_ema: take the UNet's averaged weights (`model_ema.*`) instead of the last ones; otherwise they are left out.

    Raises:
        CheckpointError: `use_ema` is set and an averaged weight is missing.
    """
    state = _with_text_level(merge_lora(swap_in_ema(state) if use_ema else state))
    # Averaged weights stay where they are alone, for `check_keys` to tell.
    averaged = EMA if any(name.startswith(UNET) for name in state) else EMA_COUNTERS
    unused = (POSITION_IDS, TEXT_POSITION_IDS)
    kept = {name: tensor for name, tensor in state.items() if name not in unused and not name.startswith(averaged)}
    return {_renamed(name, RENAMED): tensor for name, tensor in kept.items()}


def to_file_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a module's tensors to the published names and add `position_ids` (1, N) int64."""
    renames = [(module, file) for file, module in RENAMED]
    kept = (FILE_TOWER, TEXT_TOWER)
    state = _with_text_level(state)
    renamed = {name if name.startswith(kept) else _renamed(name, renames): tensor for name, tensor in state.items()}
    for name in (POSITION_IDS, TEXT_POSITION_IDS):
        table = renamed.get(name.replace("position_ids", "position_embedding.weight"))
        if table is not None:
            renamed[name] = torch.arange(len(table), device=table.device)[None]
    return renamed


def swap_in_ema(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the UNet's last weights by its averaged ones and drop `model_ema.*`.

    Raises:
        CheckpointError: an averaged weight is missing.
    """
    swapped = {name: tensor for name, tensor in state.items() if not name.startswith(EMA)}
    for name in swapped:
        if name.startswith("model."):
            ema_name = EMA + name.removeprefix("model.").replace(".", "")
            if ema_name not in state:
                raise CheckpointError(f"the checkpoint has no averaged (EMA) weight {ema_name}; load it without EMA")
            swapped[name] = state[ema_name]
    return swapped


def merge_lora(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Add low-rank additions (`peft`) to the weights they belong to: W + B A, under the plain names.

    Raises:
        CheckpointError: an addition is incomplete.

    Source: Hu et al. 2022, Eq. 3, with alpha = r.
    """
    stems = [name.removesuffix(LORA_BASE) for name in state if name.endswith(LORA_BASE)]
    if not stems:
        return state
    merged = dict(state)
    for stem in stems:
        weight = merged.pop(stem + LORA_BASE)
        try:
            down, up = (merged.pop(stem + part).float() for part in LORA_PARTS)
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has a low-rank addition without {error}; it is incomplete") from None
        merged[f"{stem}.weight"] = (weight.float() + up @ down).to(weight.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in merged.items()}


def check_schedule(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], *, source: object) -> None:
    """Compare the schedule buffers in a checkpoint with the config's.

    Args:
        expected: as `NoiseSchedule.buffers` returns them.
        got: the checkpoint's tensors; missing buffers are no fault.
        source: the file, for the message.

    Raises:
        CheckpointError: a buffer differs by more than half precision explains.
    """
    for name in set(SCHEDULE_BUFFERS) & got.keys():
        rtol = 1e-2 if got[name].dtype == torch.bfloat16 else 1e-3  # files in half precision hold it so, too
        if got[name].shape != expected[name].shape or not torch.allclose(
            got[name].float(), expected[name], rtol=rtol, atol=1e-6
        ):
            raise CheckpointError(
                f"{source}: its noise schedule ({name}) is not the config's; "
                "set model.schedule to what it was trained with"
            )


def check_keys(
    expected: Mapping[str, Sequence[int]],
    got: Mapping[str, Tensor],
    *,
    source: object = "checkpoint",
    allow_missing: Collection[str] = (),
) -> list[str]:
    """Compare a checkpoint (under module names) with the tensors of a model, both ways.

    Args:
        expected: shape of every tensor of the model.
        got: the checkpoint's tensors.
        source: the file, for the message.
        allow_missing: prefixes of names that may be missing (`NEW_PARTS` when training starts).

    Returns:
        The missing names that `allow_missing` covers.

    Raises:
        CheckpointError: lists the first ten names that are missing, unexpected or of another shape, and says what the
            file is.
    """
    missing = [name for name in expected if name not in got]
    tolerated = [name for name in missing if name.startswith(tuple(allow_missing))]
    mismatched = [
        f"{name}: got {list(got[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in got and tuple(got[name].shape) != tuple(shape)
    ]
    problems = {
        "missing": [name for name in missing if name not in set(tolerated)],
        "unexpected": [name for name in got if name not in expected],
        "of another shape": mismatched,
    }
    if any(problems.values()):
        lines = [f"{source}: does not fit this model"]
        lines += [listing(what, names) for what, names in problems.items() if names]
        raise CheckpointError("\n".join([*lines, f"do: {_remedy(expected, got, len(mismatched))}"]))
    return tolerated


def listing(what: str, names: Sequence[str], limit: int = 10) -> str:
    """Return a count and, indented below it, the first names."""
    more = [f"… and {len(names) - limit} more"] if len(names) > limit else []
    return "\n    ".join([f"  {len(names)} {what}:", *names[:limit], *more])


_MODIFY = "python scripts/modify_checkpoints.py IN OUT"
_REMEDIES = {  # by the beginning of what the file is
    "IC-Light": "add it to Stable Diffusion with `python scripts/merge_checkpoints.py offset BASE DELTA OUT`",
    "diffusers component": "convert its folder: `python scripts/convert_checkpoint.py FOLDER OUT --to original`",
    "CLIP": "pass a complete checkpoint (scripts/modify_checkpoints.py --clip makes one)",
    "VAE": "pass a checkpoint of the whole model",
}


def _remedy(expected: Mapping[str, Sequence[int]], got: Mapping[str, Tensor], num_mismatched: int) -> str:
    """Say what a file is that does not fit, and what to do about it."""
    if any(name.startswith(EMA) for name in got):
        return f"the UNet's weights are there averaged alone ({EMA}*); pass the file with both kinds"
    for wrapper in ("_orig_mod.", "module."):  # torch.compile's and DistributedDataParallel's
        if any(name.startswith(wrapper) or f".{wrapper}" in name for name in got):
            return f"its names have the part {wrapper} of a wrapper; save the state_dict() of the module inside"
    kind = identify(to_file_keys(got))
    remedy = _remedy_of_kind(kind, expected, got) if INPUT_CONV in expected else ""
    if not remedy and num_mismatched > len(expected) // 10:
        remedy = "the config describes a model of another size; pass the config that belongs to this checkpoint"
    known = "" if kind.startswith("unknown") else f"this is {kind}; "
    return known + (remedy or "pass the checkpoint that belongs to this config")


def _remedy_of_kind(kind: str, expected: Mapping[str, Sequence[int]], got: Mapping[str, Tensor]) -> str:
    text = any(name.startswith((TEXT_MODULE, TEXT_TOWER)) for name in got)
    channels = got[INPUT_CONV].shape[1] if INPUT_CONV in got else 0
    stable_diffusion_1 = not kind.startswith(("Stable Diffusion 2", "SDXL"))
    four_channels = stable_diffusion_1 and channels == 4 != expected[INPUT_CONV][1]
    if any(name.startswith(TEXT_MODULE) for name in expected):
        if four_channels:
            return f"give it the input channels of inpainting with `{_MODIFY} --in-channels 9`, and train those"
        if kind == "Paint by Example":
            return "this model reads text; use the file's own config, such as configs/v1.yaml"
    elif text and stable_diffusion_1 and channels == 9:
        return "it reads text, so use it with configs/inpaint-text.yaml"
    elif (text and stable_diffusion_1) or four_channels:
        return f"make it a starting point for training: `{_MODIFY} --clip openai/clip-vit-large-patch14`"
    return next((remedy for start, remedy in _REMEDIES.items() if kind.startswith(start)), "")


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _with_text_level(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {_renamed(name, [(TOWER, TEXT_TOWER)]): x for name, x in state.items()} if _BARE_TEXT in state else state


# --- what a file is --------------------------------------------------------------------------------

CONTROL = ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")  # names of ControlNets begin so
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by the channels of text tokens
_WIDE = {
    5: "with depth (5 input channels)",
    8: "with 8 input channels (InstructPix2Pix, IC-Light fc)",
    9: "inpainting (9 input channels)",
    12: "with 12 input channels (IC-Light fbc)",
}
_LORA = re.compile(r"\.lora_(?:down|up|A|B)\b|[._]lora\.(?:down|up)\.|^lora_(?:unet|te)")
_OUTPUT_CONVS = (UNET + "out.2.weight", "conv_out.weight")  # in either layout
_LAST_GAINS = (UNET + "out.0.weight", "conv_norm_out.weight")  # of the last norm, in either layout
_CONDITION_BRANCH = rf"(?:{FIRST_STAGE})?decoder\.(?:encoder|condition_encoder)\."

# (pattern of names, part); the first that fits counts.
_PARTS = (
    (EMA, "averaged UNet (EMA)"),
    (rf"{UNET}|(?:down_blocks|mid_block|up_blocks|time_embedding|conv_(?:in|out|norm_out)|add_embedding)\.", "UNet"),
    (r"control_model\.|controlnet_|input_hint_block\.|zero_convs\.|middle_block_out\.", "ControlNet"),
    (_CONDITION_BRANCH, "condition branch of the decoder"),
    (r"embeddings\.|encoder\.layers\.|pre_layrnorm\.|post_layernorm\.", "CLIP tower"),
    (r"final_layer_norm\.", "norm behind the tower"),
    (rf"(?:{FIRST_STAGE})?(?:encoder|decoder|quant_conv|post_quant_conv)\.", "first stage"),
    (rf"(?:{TOWER}|model\.)?vision_model\.|{TOWER}network\.", "image tower"),
    (r"cond_stage_model\.(?:mapper|final_ln|reduce)\.|mapper\.|proj_out\.", "mapper and null token"),
    (r"learnable_vector|uncond_vector", "mapper and null token"),
    (rf"(?:{TOWER})?text_model\.|cond_stage_model\.model\.|conditioner\.", "text encoder"),
    (rf"(?:{'|'.join(SCHEDULE_BUFFERS)})$", "noise schedule"),
)


def identify(state: Mapping[str, Tensor]) -> str:
    """Say what a checkpoint is in a few words, by names and shapes; `unknown` where they tell nothing."""
    kind = _kind(state)
    if any(name.startswith(EMA) and name not in EMA_COUNTERS for name in state):  # pruned files may keep the counters
        kind += ", training checkpoint with averaged weights (EMA)"
    return kind


def parts(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Count a checkpoint's tensors and numbers by part."""
    counts: dict[str, tuple[int, int]] = {}
    for name, tensor in state.items():
        part = next((part for pattern, part in _PARTS if re.match(pattern, name)), "other")
        tensors, numbers = counts.get(part, (0, 0))
        counts[part] = (tensors + 1, numbers + tensor.numel())
    return counts


def context_width(state: Mapping[str, Tensor]) -> int | None:
    """Return the channels of the tokens that the UNet's cross-attention reads; None without such attention."""
    return next((t.shape[1] for name, t in state.items() if name.endswith("attn2.to_k.weight")), None)


def latent_channels(state: Mapping[str, Tensor]) -> int:
    """Return the channels of the noisy latent, as many as leave the UNet; 4 without its last convolution."""
    return next((state[name].shape[0] for name in _OUTPUT_CONVS if name in state), 4)


def family(state: Mapping[str, Tensor]) -> str | None:
    """Return `SDXL` or what the width of the UNet's context tells; None without a UNet with context."""
    if any(name.startswith(("conditioner.embedders.", "add_embedding.", f"{UNET}label_emb.")) for name in state):
        return "SDXL"
    width = context_width(state)
    return None if width is None else _FAMILIES.get(width, "another UNet")


def is_difference(state: Mapping[str, Tensor]) -> bool | None:
    """Tell whether a UNet is the difference of two: names are the same, but its last norm's gains are about 0, not 1.

    Long training with weight decay makes gains smaller; fine-tuning changes them by hundredths.

    Returns:
        None without such a norm.
    """
    gains = next((state[name] for name in _LAST_GAINS if name in state), None)
    return None if gains is None else bool(gains.float().abs().mean() < 0.1)


def _kind(state: Mapping[str, Tensor]) -> str:
    def holds(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in state)

    if holds(*CONTROL):
        layout = "diffusers" if holds("controlnet_cond_embedding.") else "CompVis' names"
        return f"ControlNet, {layout}" + (", with the model that it controls" if holds(UNET) else "")
    if INPUT_CONV in state or holds(UNET):
        return _kind_of_model(state)
    if any(_LORA.search(name) for name in state):
        return "LoRA (low-rank additions, not a model by itself)"
    if any(re.match(_CONDITION_BRANCH, name) for name in state):
        return "asymmetric VAE (its decoder sees the unmasked pixels)"
    if DIFFUSERS_INPUT_CONV in state and holds("down_blocks."):
        return _kind_of_unet(state)
    clip = "CLIP" if holds("text_model.") else "CLIP's image tower"
    kinds = (  # the first whose names are there
        (("encoder.down_blocks.",), "diffusers component: VAE"),
        (("encoder.down.", f"{FIRST_STAGE}encoder.", "encoder.conv_in."), "VAE only, CompVis' names"),
        (("uncond_vector",), "diffusers component: image encoder of Paint by Example"),
        (("vision_model.", "embeddings.patch_embedding."), clip),
        (("text_model.", "embeddings.token_embedding."), "diffusers component: text encoder"),
        (
            ("down_blocks.", "mid_block.", "up_blocks.", "conv_in."),
            "diffusers component: part of a UNet (one of several files)",
        ),
    )
    return next((kind for prefixes, kind in kinds if holds(*prefixes)), "unknown")


def _kind_of_model(state: Mapping[str, Tensor]) -> str:
    if any(name.startswith(("cond_stage_model.mapper.", FILE_TOWER)) or name == "learnable_vector" for name in state):
        return "Paint by Example"
    kind = family(state)
    if INPUT_CONV not in state:  # Flux and SD3 also call theirs `model.diffusion_model`
        return kind or "unknown (another architecture)"
    return _with_width(kind or "another UNet", state[INPUT_CONV].shape[1])


def _kind_of_unet(state: Mapping[str, Tensor]) -> str:
    channels = state[DIFFUSERS_INPUT_CONV].shape[1]
    if channels in (8, 12) and is_difference(state):
        return f"IC-Light offset, {'fc' if channels == 8 else 'fbc'} ({channels} input channels; to be added to a UNet)"
    kind = family(state)
    return _with_width(f"diffusers component: UNet of {kind}" if kind else "diffusers component: UNet", channels)


def _with_width(kind: str, channels: int) -> str:
    return kind if channels == 4 else f"{kind}, {_WIDE.get(channels, f'with {channels} input channels')}"
