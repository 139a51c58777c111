"""What tensors are called: in files, and in the modules of this project.

The published model's names are the file format. Modules use the same names but for the differences
declared at the top of this file, and `to_module_keys` and `to_file_keys` translate in either direction.
Files that this project's trainer wrote hold module names; `to_module_keys` leaves those as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.checkpoint.io import CheckpointError

UNET = "model.diffusion_model."
INPUT_CONV = UNET + "input_blocks.0.0.weight"
DIFFUSERS_INPUT_CONV = "conv_in.weight"  # of a UNet by itself
OUTPUT_CONVS = (UNET + "out.2.weight", "conv_out.weight")  # in either layout
FIRST_STAGE = "first_stage_model."
TOWER = "cond_stage_model.transformer."  # CLIP: the image tower here, the text tower in Stable Diffusion
FILE_TOWER = TOWER + "vision_model."
TEXT_TOWER = TOWER + "text_model."
TEXT_MODULE = "text_encoder.transformer."

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
    """A file's tensors under the names that the modules use.

    Args:
        state: what `read_checkpoint` gave.
        use_ema: take the UNet's averaged weights (`model_ema.*`) in place of the last ones; they are
            left out otherwise.

    Raises:
        CheckpointError: `use_ema`, and the file holds no complete set of averaged weights.
    """
    state = _with_text_level(merge_lora(swap_in_ema(state) if use_ema else state))
    unused = (POSITION_IDS, TEXT_POSITION_IDS)
    kept = {name: tensor for name, tensor in state.items() if name not in unused and not name.startswith(EMA)}
    return {_renamed(name, RENAMED): tensor for name, tensor in kept.items()}


def to_file_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors under the published names, with `position_ids` (1, N) int64 made anew."""
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
    """The same file with the averaged UNet weights in place of the last ones, and no `model_ema.*` left.

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
    """Weights that were trained through low-rank additions (`peft`), added up: W + B A, under the plain names.

    Raises:
        CheckpointError: an addition is missing.

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
    """Compare the schedule buffers that a checkpoint holds with the config's.

    Args:
        expected: of `NoiseSchedule.buffers`.
        got: the checkpoint's tensors, by any names; buffers that are missing are no fault.
        source: the file, for the message.

    Raises:
        CheckpointError: one differs by more than half precision may change it.
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
    """Compare a checkpoint (under module names) with what the model has, both ways.

    Args:
        expected: shape of every tensor of the model.
        got: the checkpoint's tensors.
        source: the file, for the message.
        allow_missing: prefixes of names that may be missing (`NEW_PARTS` when training starts).

    Returns:
        The names that are missing and may be.

    Raises:
        CheckpointError: lists the first ten names that are missing, unexpected or of another shape, and
            says what the file seems to be.
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


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _with_text_level(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {_renamed(name, [(TOWER, TEXT_TOWER)]): x for name, x in state.items()} if _BARE_TEXT in state else state


def listing(what: str, names: Sequence[str], limit: int = 10) -> str:
    """An indented line for each of the first names, below how many there are."""
    more = [f"… and {len(names) - limit} more"] if len(names) > limit else []
    return "\n    ".join([f"  {len(names)} {what}:", *names[:limit], *more])


def _remedy(expected: Mapping[str, Sequence[int]], got: Mapping[str, Tensor], num_mismatched: int) -> str:
    """What to do about a file that does not fit, by what it seems to be."""

    def holds(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in got)

    text = holds(TEXT_MODULE, TEXT_TOWER)
    channels = got[INPUT_CONV].shape[1] if INPUT_CONV in got else 0
    four_channels = channels == 4 != expected.get(INPUT_CONV, (0, 0))[1]
    if any(name.startswith(TEXT_MODULE) for name in expected):
        if four_channels:
            return (
                "this is Stable Diffusion; give it the input channels of inpainting with "
                "`python scripts/modify_checkpoints.py IN OUT --in-channels 9`, and train those"
            )
        if holds("proj_out.") and not text:
            return "this model reads exemplars, not text; use its own config, such as configs/v1.yaml"
    elif text and channels == 9:
        return "this is Stable Diffusion inpainting, which reads text; use it with configs/inpaint-text.yaml"
    elif text or four_channels:
        return (
            "this is Stable Diffusion; make it a starting point for training with "
            "`python scripts/modify_checkpoints.py IN OUT --clip openai/clip-vit-large-patch14`"
        )
    if holds("down_blocks.", "mid_block.", "conv_in.", "unet.down_blocks."):
        return (
            "this is a part of a diffusers pipeline; make a checkpoint of its folder with "
            "`python scripts/convert_checkpoint.py FOLDER OUT.safetensors --to original`"
        )
    if holds("vision_model.", "text_model."):
        return "this is CLIP by itself; pass a complete checkpoint (scripts/modify_checkpoints.py --clip makes one)"
    if INPUT_CONV in expected and not holds(UNET) and holds(FIRST_STAGE, "encoder.", "decoder."):
        return "this is an autoencoder by itself; pass a checkpoint of the whole model"
    if num_mismatched > len(expected) // 10:
        return "the config describes a model of another size; pass the config that belongs to this checkpoint"
    return "pass the checkpoint that belongs to this config"
