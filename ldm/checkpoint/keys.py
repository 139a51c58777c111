"""What tensors are called in files, as in the published model, and in modules; what their names tell about a file.

Modules use the same names except for `RENAMED`; files that this project's trainer wrote hold module names.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.checkpoint.io import CheckpointError
from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]
Shapes = Mapping[str, Sequence[int]]

UNET = "model.diffusion_model."
INPUT_CONV = UNET + "input_blocks.0.0.weight"
DIFFUSERS_INPUT_CONV = "conv_in.weight"  # of a UNet by itself
INPUT_CONVS = (INPUT_CONV, DIFFUSERS_INPUT_CONV)
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

SCHEDULE_BUFFERS = tuple(make_schedule(ScheduleConfig()).buffers())

# What other trainers and programs put beside the weights without effect on them, as a marker or for themselves.
EXTRAS = ("embedding_manager.", "denoiser.", "v_pred", "ztsnr", "edm_", "logvar")

# In files of 2022 the text tower's names lack the level `text_model`; this one tells them from an image tower's.
_BARE_TEXT = TOWER + "embeddings.token_embedding.weight"

# What Paint by Example adds to Stable Diffusion and CLIP, hence what starts at random in training.
_NEW_MODULES = ("cond_stage_model.reduce.", "cond_stage_model.mapper.", "cond_stage_model.final_ln.")
NEW_PARTS = (*_NEW_MODULES, "proj_out.", "learnable_vector")


def to_module_keys(state: State, *, use_ema: bool = False, expected: Iterable[str] = ()) -> dict[str, Tensor]:
    """Rename a file's tensors to the names that the modules use; `use_ema` as in `swap_in_ema`.

    Averaged weights that are there alone become the weights if all the names `expected` by the modules are among them.
    """
    state = with_text_level(merge_lora(swap_in_ema(state) if use_ema else state))
    if not holds(state, UNET):
        dotless = {_averaged(name): name for name in expected if name.startswith(UNET)}
        if dotless and dotless.keys() <= state.keys():
            log.warning("took the averaged weights (%s*): the file holds no others of the UNet", EMA)
            state = {dotless.get(name, name): tensor for name, tensor in state.items()}
    if extras := [name for name in state if name.startswith(EXTRAS)]:
        log.warning("left out what this model has no use for: %s", ", ".join(extras[:5]))
    unused = (POSITION_IDS, TEXT_POSITION_IDS, *EXTRAS)
    return _renamed({name: x for name, x in drop_ema(state).items() if not name.startswith(unused)}, *RENAMED)


def to_file_keys(state: State) -> dict[str, Tensor]:
    """Rename a module's tensors to the published names and add `position_ids` (1, N) int64."""
    renames = [*((file, file) for file, _ in RENAMED), *((module, file) for file, module in RENAMED)]
    renamed = _renamed(with_text_level(state), *renames)
    for name in (POSITION_IDS, TEXT_POSITION_IDS):
        if (table := renamed.get(name.replace("position_ids", "position_embedding.weight"))) is not None:
            renamed[name] = torch.arange(len(table), device=table.device)[None]
    return renamed


def _renamed(state: State, *renames: tuple[str, str]) -> dict[str, Tensor]:
    """Replace the beginning of each name by the first of `renames`, (old, new), that fits."""

    def new_name(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)

    return {new_name(name): tensor for name, tensor in state.items()}


def _averaged(name: str) -> str:
    return EMA + name.removeprefix("model.").replace(".", "")


def with_text_level(state: State, like: State | None = None) -> State:
    """Rename the text tower of a file of 2022 to today's names; with `like`, to those of that file."""
    if _BARE_TEXT in (like or {}):
        return _renamed(state, (TEXT_TOWER, TOWER))
    return _renamed(state, (TOWER, TEXT_TOWER)) if _BARE_TEXT in state else state


def drop_ema(state: State) -> dict[str, Tensor]:
    """Leave out averaged weights, unless they are the UNet's only ones."""
    unused = (EMA,) if holds(state, UNET) else EMA_COUNTERS
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


def swap_in_ema(state: State) -> dict[str, Tensor]:
    """Replace the UNet's last weights by its averaged ones and drop `model_ema.*`; refuse if one is missing."""
    if not holds(state, UNET) and holds(state, EMA):
        raise CheckpointError(misfit(state))
    averaged = {name: _averaged(name) for name in state if name.startswith("model.")}
    if missing := [name for name in averaged.values() if name not in state]:
        raise CheckpointError(f"the checkpoint has no averaged (EMA) weight {missing[0]}; load it without EMA")
    return {name: state[averaged.get(name, name)] for name in state if not name.startswith(EMA)}


def merge_lora(state: State) -> State:
    """Add low-rank additions, as `peft` names them, to the weights that they belong to: W + B A, under the plain names.

    Source: Hu et al. 2022, Eq. 3, with alpha = r.
    """
    merged, base = dict(state), ".base_layer.weight"
    for name in [name for name in state if name.endswith(base)]:
        try:
            down, up = (merged.pop(f"{name.removesuffix(base)}.lora_{part}.default.weight").float() for part in "AB")
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has a low-rank addition without {error}; it is incomplete") from None
        merged[name] = (state[name].float() + up @ down).to(state[name].dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in merged.items()}


def check_prediction(state: State, parameterization: str, *, source: object) -> None:
    """Compare what a checkpoint says that its model predicts, if it does, with the config's `parameterization`."""
    if "v_pred" in state and parameterization != "v":
        remedy = "set model.parameterization: v"
        raise CheckpointError(f"{source}: predicts v, as its v_pred says, the config {parameterization}; {remedy}")


def check_schedule(expected: State, got: State, *, source: object) -> None:
    """Compare the schedule buffers that a checkpoint holds with the config's (`NoiseSchedule.buffers`)."""
    for name in set(SCHEDULE_BUFFERS) & got.keys():
        rtol = 1e-2 if got[name].dtype == torch.bfloat16 else 1e-3  # files in half precision hold it so, too
        buffer, ours = got[name].float(), expected[name]
        if buffer.shape != ours.shape or not torch.allclose(buffer, ours, rtol=rtol, atol=1e-6):
            raise CheckpointError(f"{source}: its noise schedule ({name}) is not the config's; set model.schedule")


def check_keys(
    expected: Shapes, got: State, *, source: object = "checkpoint", allow_missing: Sequence[str] = ()
) -> list[str]:
    """Compare a checkpoint (under module names) with the shapes of a model's tensors, both ways.

    Returns the missing names that may be: those with the prefixes `allow_missing` (`NEW_PARTS` when training starts).
    """
    missing = [name for name in expected if name not in got]
    tolerated = [name for name in missing if name.startswith(tuple(allow_missing))]
    shapes = {name: (list(got[name].shape), list(shape)) for name, shape in expected.items() if name in got}
    problems = {
        "missing": [name for name in missing if name not in set(tolerated)],
        "unexpected": [name for name in got if name not in expected],
        "of another shape": [f"{name}: got {own}, expected {its}" for name, (own, its) in shapes.items() if own != its],
    }
    if any(problems.values()):
        lines = [listing(what, names) for what, names in problems.items() if names]
        remedy = _remedy(expected, got, len(problems["of another shape"]))
        raise CheckpointError("\n".join([f"{source}: does not fit this model", *lines, f"do: {remedy}"]))
    return tolerated


def listing(what: str, names: Sequence[str], limit: int = 10) -> str:
    """Return a count and, indented below it, the first names."""
    more = [f"… and {len(names) - limit} more"] if len(names) > limit else []
    return "\n    ".join([f"  {len(names)} {what}:", *names[:limit], *more])


def _remedy(expected: Shapes, got: State, num_mismatched: int) -> str:
    """Say what a file is that does not fit, and what to do about it."""
    kind, whole = identify(to_file_keys(got)), INPUT_CONV in expected
    channels = input_channels(got)
    narrow = whole and channels == 4 != expected[INPUT_CONV][1]
    text, reads_text = whole and holds(got, TEXT_MODULE, TEXT_TOWER), holds(expected, TEXT_MODULE)
    modify = "python scripts/modify_checkpoints.py IN OUT"
    remedies = {  # the first that applies counts
        next_step(kind): whole,
        f"give it nine input channels with `{modify} --in-channels 9`, and train those": narrow and reads_text,
        "this model reads text; use the file's own config (configs/v1.yaml)": reads_text and kind == "Paint by Example",
        "it reads text, so use it with configs/inpaint-text.yaml": text and not reads_text and channels == 9,
        f"train it further: `{modify} --clip openai/clip-vit-large-patch14`": (text or narrow) and not reads_text,
        "the config describes a model of another size; pass the file's own": num_mismatched > len(expected) // 10,
        "pass the checkpoint that belongs to this config": True,
    }
    remedy = next(remedy for remedy, applies in remedies.items() if applies and remedy)
    return remedy if kind == "unknown" else f"this is {kind}; {remedy}"


def misfit(state: State, otherwise: str = "pass a checkpoint of the whole model") -> str:
    """Say in a line what a file is that cannot be used in some place, and the next step."""
    kind = identify(state)
    return f"this is {kind}; {next_step(kind) or otherwise}"


def next_step(kind: str) -> str:
    """Return what to do with a file of a kind (`identify`) that is no model of this project, or ""."""
    return next((step for pattern, step in _STEPS.items() if re.match(pattern, kind)), "")


_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by the channels of text tokens
# By input channels, 0 without a first convolution.
_WIDTHS = {0: "", 4: "", 5: ", with depth ({})", 8: ", with {} (InstructPix2Pix, IC-Light fc)", 9: ", inpainting ({})"}
_LORA = "LoRA (low-rank additions, not a model by itself)"
_KINDS = {  # beginning of a name => kind of file; the first whose name is there counts
    r"controlnet_cond_embedding\.": "ControlNet, diffusers",
    r"control_model\.|input_hint_block\.": "ControlNet, CompVis' names",
    rf"(?:{UNET})?double_blocks\.\d+\.img_attn|single_transformer_blocks\.": "Flux",
    rf"(?:{UNET})?joint_blocks\.|transformer_blocks\.\d+\.attn\.add_q_proj": "Stable Diffusion 3",
    r"image_proj(?:_model)?\.|ip_adapter\.": "IP-Adapter",
    r"(?:adapter\.)?body\.\d+\.(?:block1|in_conv|resnets)\b": "T2I adapter",
    r"string_to_param\.|emb_params$|clip_[lg]$|<[^>]*>$": "textual inversion (embeddings of words)",
    r"(?:model\.)?1\.sub\.\d+\.|conv_first\.|RRDB_trunk\.|body\.\d+\.(?:rdb1|weight)": "ESRGAN, an upscaler",
    r".*\.motion_modules\.": "AnimateDiff's motion modules",
    r"middle_block\.1\.qkv\.": "a UNet or classifier of improved-diffusion or guided-diffusion",
    r"(?:ema_model\.|online_model\.)?(?:model\.)?(?:init_conv|downs\.0\.0)\.": "denoising-diffusion-pytorch",
    UNET: "Paint by Example",
    r".*(?:\.lora_(?:down|up|A|B)\b|[._]lora\.(?:down|up)\.|\.(?:hada|lokr)_w)|lora_(?:unet|te|transformer)": _LORA,
    rf"(?:{FIRST_STAGE})?decoder\.(?:condition_)?encoder\.": "asymmetric VAE (its decoder sees the unmasked pixels)",
    r"down_blocks\.": "diffusers component: UNet",
    r"encoder\.down_blocks\.": "diffusers component: VAE",
    rf"encoder\.(?:down|conv_in)\.|{FIRST_STAGE}encoder\.": "VAE only, CompVis' names",
    "uncond_vector": "diffusers component: image encoder of Paint by Example",
    r"(?:vision_model|embeddings\.patch_embedding|visual)\.": "CLIP's image tower",
    r"text_model\.|embeddings\.token_embedding\.": "diffusers component: text encoder",
    r"(?:mid_block|up_blocks|conv_in)\.": "diffusers component: part of a UNet",
}
ADDITIONS = ("LoRA", "ControlNet", "IP-Adapter", "T2I adapter", "textual inversion", "AnimateDiff")  # to a model
_FOREIGN = "no model here is of this kind; pass Paint by Example, or Stable Diffusion 1 and what is made from it"
_STEPS = {  # beginning of a kind that is no model here => what to do with such a file; the first counts
    r"(diffusers component: UNet of )?(SDXL|Stable Diffusion [23])|Flux|unknown \(another": _FOREIGN,
    "a UNet or classifier of improved": "sample it with scripts/sample_images.py",
    "denoising-diffusion-pytorch": "it fits no UNet here; its objectives are in configs/pixel/ddpm-pytorch.yaml",
    "LoRA": "merge it into its model with the program that made it, and pass the result",
    "ControlNet, CompVis' names, with": "take the model's own file; this one goes beside it, as --control",
    "ControlNet": "pass it as --control, beside a model that reads text",
    "IC-Light": "add it to a model: `python scripts/merge_checkpoints.py offset BASE DELTA OUT`",
    "averaged": f"the UNet's weights are there averaged alone ({EMA}*); pass the file with both kinds",
    "asymmetric VAE": "pass it as --decoder, beside a checkpoint of the whole model",
    "diffusers": "convert its folder: `python scripts/convert_checkpoint.py IN OUT --to original`",
    "|".join((*ADDITIONS, "ESRGAN", "CLIP", "VAE")): "it is not used by itself; pass a checkpoint of the whole model",
}
_OUTPUT_CONVS = (UNET + "out.2.weight", "conv_out.weight")  # in either layout
_LAST_GAINS = (UNET + "out.0.weight", "conv_norm_out.weight")  # of the last norm, in either layout


def identify(state: State) -> str:
    """Say what a checkpoint is in a few words, by names and shapes; `unknown` where they tell nothing."""
    kind = next((kind for start, kind in _KINDS.items() if any(re.match(start, name) for name in state)), "unknown")
    unet, channels, whole = family(state), input_channels(state), holds(state, UNET)
    width = _WIDTHS.get(channels, ", with {}").format(f"{channels} input channels")
    averaged = holds(state.keys() - set(EMA_COUNTERS), EMA)  # pruned files may keep the counters
    if averaged and not whole:
        return "averaged weights (EMA) alone, without those of the last step"
    if kind.startswith("ControlNet") and whole:
        kind += ", with the model that it controls"
    elif kind == "Paint by Example" and not holds(state, "cond_stage_model.mapper.", FILE_TOWER, "learnable_vector"):
        # others also call theirs `model.diffusion_model`
        kind = (unet or ("another UNet" if channels else "unknown (another architecture)")) + width
    elif kind == "diffusers component: UNet":
        if (variant := {8: "fc", 12: "fbc"}.get(channels)) and is_difference(state):
            return f"IC-Light offset, {variant} ({channels} input channels; to be added to a UNet)"
        kind += (f" of {unet}" if unet else "") + width
    elif kind.startswith("CLIP") and holds(state, "text_model.", "token_embedding."):
        kind = "CLIP"
    return kind + (", training checkpoint with averaged weights (EMA)" if averaged else "")


def input_channels(state: State) -> int:
    """Return the input channels of the UNet, in the published layout or diffusers'; 0 without one."""
    weights = (state[name] for name in INPUT_CONVS if name in state)
    return next((weight.shape[1] for weight in weights if weight.ndim == 4), 0)


def latent_channels(state: State) -> int:
    """Return the channels of the noisy latent, as many as leave the UNet; 4 without its last convolution."""
    return next((state[name].shape[0] for name in _OUTPUT_CONVS if name in state), 4)


def family(state: State) -> str | None:
    """Return `SDXL`, or what the channels of the UNet's context tell; None without a UNet with context."""
    if holds(state, "conditioner.embedders.", "add_embedding.", f"{UNET}label_emb."):
        return "SDXL"
    width = next((x.shape[1] for name, x in state.items() if name.endswith("attn2.to_k.weight")), None)
    return None if width is None else _FAMILIES.get(width, f"another UNet (context of {width} channels)")


def is_difference(state: State) -> bool | None:
    """Tell whether a UNet is the difference of two: its last norm's gains are about 0, not 1; None without them."""
    gains = next((state[name] for name in _LAST_GAINS if name in state), None)
    return None if gains is None else bool(gains.float().abs().mean() < 0.1)  # fine-tuning changes them by hundredths


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or infinite; needs no memory of the tensor's size, but for float8."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no arithmetic
    return all(bound.isfinite() for bound in numbers.aminmax())  # NaN is the bounds' too


def holds(state: Iterable[str], *prefixes: str) -> bool:
    """Return whether a name begins with one of the prefixes."""
    return any(name.startswith(prefixes) for name in state)
