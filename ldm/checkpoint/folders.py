"""A diffusers folder: which files hold its weights, and its configs from and to ours.

Sizes that tensors show are read off the tensors; what they do not show (heads, image size, schedule) is the config's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.convert import Components
from ldm.checkpoint.first_stage import CONDITION_ENCODER
from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import FIRST_STAGE, NEW_PARTS, TEXT_MODULE, TEXT_TOWER
from ldm.config import (
    AutoencoderConfig,
    ExemplarEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldm.files import write_text

Json = dict[str, Any]

_FAMILY_ALONE = "only Stable Diffusion 1 and what is made from it can be converted"

# Component => its file of weights, as the libraries call it, without the ending.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "image_encoder": "model",
    "text_encoder": "model",
}
_VERSION = "0.42.0"  # of diffusers, whose folders these are; pipelines look for it
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# What pipelines feed the UNet, in this order: Paint by Example's, and those with text by the UNet's input channels.
_EXEMPLAR_INPUTS = ["x_t", "z_masked", "keep_mask"]
_TEXT_INPUTS = {
    4: ["x_t"],
    9: ["x_t", "hole_mask", "z_masked"],
    8: ["x_t", "z_foreground"],  # IC-Light's are of a StableDiffusionPipeline whose calls are intercepted
    12: ["x_t", "z_foreground", "z_background"],
}
# What is not in a config of ours, because all of Stable Diffusion 1 has it so.
_FAMILY = {
    "unet": {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "use_linear_projection": False},
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu"},
    "image_encoder": {"hidden_act": "quick_gelu"},
    "text_encoder": {"hidden_act": "quick_gelu"},
}
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def read_json(path: Path) -> Json:
    """A mapping from a JSON file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a {type(content).__name__}, expected a mapping; copy the folder again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files with a component's weights: one, or the shards that its index names.

    Full precision goes before half, as in diffusers, and weights from before averaging come last; of each variant
    safetensors goes before pickles, and one file before shards.

    Raises:
        CheckpointError: there are none.
    """
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for variant, kind, stem in product(("", ".fp16", ".non_ema"), ("safetensors", "bin"), stems):
        if (path := folder / f"{stem}{variant}.{kind}").is_file():
            return [path]
        for name in (f"{stem}.{kind}.index{variant}.json", f"{stem}.{kind}{variant}.index.json"):
            if (index := folder / name).is_file():
                return sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    raise CheckpointError(f"{folder}: no weights in this folder; pass a folder that diffusers or transformers saved")


def read_component(folder: Path) -> dict[str, Tensor]:
    """The named tensors of a component, memory-mapped."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_checkpoint(path).items()}


def read_folder(folder: Path) -> tuple[Components, dict[str, Json]]:
    """The components of a pipeline that we know, and all its configs by component, its index as `pipeline`.

    Raises:
        CheckpointError: there is no such component, or a file of one cannot be read.
    """
    found = [name for name in STEMS if (folder / name).is_dir()]
    if "unet" not in found:
        raise CheckpointError(
            f"{folder}: got no folder unet in it, expected a diffusers pipeline (model_index.json, …)"
        )
    configs = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/*config.json"))}
    if (index := folder / "model_index.json").is_file():
        configs["pipeline"] = read_json(index)
    return {name: read_component(folder / name) for name in found}, configs


def write_folder(folder: Path, components: Components, files: Mapping[str, Json], metadata: Mapping[str, str]) -> None:
    """Write weights, as safetensors with `metadata`, and JSON files into a folder that is there.

    Raises:
        CheckpointError: the disk is full or the folder is not writable.
    """
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
    for name, part in components.items():
        write_safetensors(folder / name / f"{STEMS[name]}.safetensors", part, metadata)


def diffusers_configs(components: Components, model: ModelConfig) -> dict[str, Json]:
    """What a folder needs beside the weights: path in the folder => content.

    Args:
        components: what `to_diffusers` gave; decides the pipeline: Paint by Example, or Stable Diffusion.
        model: what the tensors do not show.

    Raises:
        CheckpointError: the config is that of another model.
    """
    shown = components["unet"]["conv_in.weight"].shape[0]
    if shown != model.unet.model_channels:
        raise CheckpointError(
            f"got a UNet of {shown} channels and a config with {model.unet.model_channels}; pass the checkpoint's own "
            "config with --config"
        )
    _check_projections(components["unet"])
    files = {}
    for name, part in components.items():
        try:
            files[f"{name}/config.json"] = _DESCRIBED[name](part, model)
        except KeyError as error:
            raise CheckpointError(f"incomplete: its {name} lacks {error}; pass a whole model") from None
    files["scheduler/scheduler_config.json"] = _scheduler(model)
    index: Json = {
        "_diffusers_version": _VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    if "vae" in components:
        index["vae"] = ["diffusers", "AutoencoderKL"]
    if "image_encoder" in components:
        index["_class_name"] = "PaintByExamplePipeline"
        index["image_encoder"] = ["paint_by_example", "PaintByExampleImageEncoder"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        files["feature_extractor/preprocessor_config.json"] = _preprocessor(model.exemplar_encoder.image_size)
    else:
        inpainting = components["unet"]["conv_in.weight"].shape[1] == 9
        index["_class_name"] = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
        index["image_encoder"] = [None, None]
        if "text_encoder" in components:
            index["text_encoder"] = ["transformers", "CLIPTextModel"]
    return {**files, "model_index.json": dict(sorted(index.items()))}


def check_family(components: Components, configs: Mapping[str, Json]) -> None:
    """Refuse a folder whose tensors would mean something else here.

    Raises:
        CheckpointError: names what Stable Diffusion 1 has otherwise.
    """
    expected = [(part, key, value) for part, fixed in _FAMILY.items() for key, value in fixed.items()]
    for part, key, value in expected:
        if part in components and (got := configs.get(part, {}).get(key, value)) != value:
            raise CheckpointError(f"{part}: got {key} {got!r}, expected {value!r}; {_FAMILY_ALONE}")
    prediction, known = configs["scheduler"].get("prediction_type", "epsilon"), _PREDICTIONS.values()
    if prediction not in known:
        raise CheckpointError(f"scheduler: got prediction_type {prediction!r}, expected one of {', '.join(known)}")
    _check_projections(components["unet"])


def _check_projections(unet: Mapping[str, Tensor]) -> None:
    if any(name.endswith(".proj_in.weight") and tensor.ndim == 2 for name, tensor in unet.items()):
        raise CheckpointError(
            f"unet: got linear projections around its attention, expected convolutions; {_FAMILY_ALONE}"
        )


def model_config(components: Components, configs: Mapping[str, Json]) -> ModelConfig | None:
    """Our config of a folder; fields of ours that diffusers does not know keep their defaults.

    Returns:
        None of a folder that lacks a part of a model, or does not say what its UNet's input channels are.

    Raises:
        CheckpointError: a config lacks what is needed.
    """
    width = components["unet"]["conv_in.weight"].shape[1]
    pipeline = configs.get("pipeline", {}).get("_class_name")
    known = width in (4, 9) or pipeline == "StableDiffusionPipeline"  # InstructPix2Pix has 8, of something else
    inputs = _EXEMPLAR_INPUTS if "image_encoder" in components else _TEXT_INPUTS.get(width) if known else None
    if inputs is None or "vae" not in components or not components.keys() & {"image_encoder", "text_encoder"}:
        return None
    try:
        return _model_config(components, configs, inputs)
    except KeyError as error:
        raise CheckpointError(f"the folder's configs lack {error}; copy the folder again") from None


def _model_config(components: Components, configs: Mapping[str, Json], inputs: list[str]) -> ModelConfig:
    unet, vae = configs["unet"], configs["vae"]
    levels, channels = len(unet["down_block_types"]), unet["block_out_channels"]
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    tower: Json
    if "image_encoder" in components:
        tower = {"exemplar_encoder": _exemplar_tower(components["image_encoder"], configs["image_encoder"])}
    else:
        tower = {"condition": "text", "text_encoder": _text_tower(configs["text_encoder"])}
    return ModelConfig(
        image_size=unet.get("sample_size", 64) * 2 ** (len(vae["block_out_channels"]) - 1),
        scale_factor=vae.get("scaling_factor", 0.18215),
        parameterization=predictions[configs["scheduler"].get("prediction_type", "epsilon")],
        schedule=schedule_config(configs["scheduler"]),
        input_channels=inputs,
        unet=UNetConfig(
            in_channels=unet["in_channels"],
            out_channels=unet["out_channels"],
            model_channels=channels[0],
            channel_mult=[width // channels[0] for width in channels],
            num_res_blocks=_same("layers_per_block", unet["layers_per_block"]),
            attention_resolutions=[2**i for i in reversed(range(levels)) if "CrossAttn" in unet["down_block_types"][i]],
            num_heads=_same("attention_head_dim", unet["attention_head_dim"]),  # so called, but numbers of heads
            transformer_depth=_same("transformer_layers_per_block", unet.get("transformer_layers_per_block", 1)),
            context_dim=unet["cross_attention_dim"],
            norm_groups=unet.get("norm_num_groups", 32),
        ),
        first_stage=AutoencoderConfig(
            in_channels=vae["in_channels"],
            ch=vae["block_out_channels"][0],
            ch_mult=[width // vae["block_out_channels"][0] for width in vae["block_out_channels"]],
            num_res_blocks=vae["layers_per_block"],
            z_channels=vae["latent_channels"],
            embed_dim=vae["latent_channels"],
            norm_groups=vae.get("norm_num_groups", 32),
        ),
        **tower,
    )


def _exemplar_tower(part: Mapping[str, Tensor], config: Json) -> ExemplarEncoderConfig:
    return ExemplarEncoderConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mapper_layers=len({name.split(".")[2] for name in part if name.startswith("mapper.blocks.")}),
    )


def _text_tower(config: Json) -> TextEncoderConfig:
    return TextEncoderConfig(
        vocab_size=config["vocab_size"],
        max_length=config["max_position_embeddings"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
    )


def _same(key: str, given: int | list[int]) -> int:
    """A number that diffusers can tell apart by level, and this project cannot."""
    numbers = {given} if isinstance(given, int) else set(given)
    if len(numbers) != 1:
        raise CheckpointError(f"unet: got {key} {given}, expected the same at every level; {_FAMILY_ALONE}")
    return numbers.pop()


def schedule_config(scheduler: Json) -> ScheduleConfig:
    """Our noise schedule for a scheduler's config.

    Raises:
        CheckpointError: it is one that we lack.
    """
    name = scheduler.get("beta_schedule", "scaled_linear")
    if name not in ("scaled_linear", "linear") or scheduler.get("trained_betas") is not None:
        raise CheckpointError(
            f"scheduler: got beta_schedule {name!r} or trained betas, expected scaled_linear or linear"
        )
    return ScheduleConfig(
        name=name,
        num_timesteps=scheduler.get("num_train_timesteps", 1000),
        linear_start=scheduler.get("beta_start", 0.00085),
        linear_end=scheduler.get("beta_end", 0.012),
        zero_terminal_snr=scheduler.get("rescale_betas_zero_snr", False),
    )


def check_counterpart(model: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that diffusers cannot build, or whose pipelines would feed it something else.

    Args:
        model: the checkpoint's config, or the published model's, which any Stable Diffusion 1 may come with.
        state: the checkpoint.

    Raises:
        CheckpointError: names what diffusers lacks.
    """
    encoder, stage, inputs = model.exemplar_encoder, model.first_stage, ", ".join(model.input_channels)

    def holds(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in state)

    exemplar = holds(*NEW_PARTS)
    for absent, what in (
        (model.condition == "both" or (exemplar and holds(TEXT_TOWER, TEXT_MODULE)), "condition both"),
        (
            exemplar and model.input_channels != _EXEMPLAR_INPUTS,
            f"input_channels {inputs} (its pipeline with exemplars feeds {', '.join(_EXEMPLAR_INPUTS)})",
        ),
        (
            model.condition == "text" and model.input_channels not in _TEXT_INPUTS.values(),
            f"input_channels {inputs} with text (its inpainting pipeline feeds {', '.join(_TEXT_INPUTS[9])}: another "
            "order, and a mask with 1 = paint)",
        ),
        (exemplar and encoder.tower != "clip", f"exemplar_encoder.tower {encoder.tower}"),
        (exemplar and encoder.tokens != "pooled", f"exemplar_encoder.tokens {encoder.tokens}"),
        (
            exemplar and encoder.mapper_layers != (encoder.num_layers + 1) // 5,
            f"{encoder.mapper_layers} mapper blocks beside {encoder.num_layers} layers (it fixes (layers + 1) // 5)",
        ),
        (
            stage.decoder == "asymmetric" or holds(FIRST_STAGE + CONDITION_ENCODER),
            "first_stage.decoder asymmetric in a pipeline (AutoencoderKL drops its branch)",
        ),
        (stage.patch_size != 1, f"first_stage.patch_size {stage.patch_size}"),
        (stage.norm_groups == 0, "a first stage without norms"),
        (stage.embed_dim != stage.z_channels, "first_stage.embed_dim other than z_channels"),
        (model.schedule.name == "cosine", "schedule.name cosine as published (its own cosine differs)"),
    ):
        if absent:
            raise CheckpointError(f"diffusers has no counterpart of {what}; this model runs here alone")


def _unet(part: Mapping[str, Tensor], model: ModelConfig) -> Json:
    levels = len({name.split(".")[1] for name in part if name.startswith("down_blocks.")})
    blocks = len({name.split(".")[3] for name in part if name.startswith("down_blocks.0.resnets.")})
    attended = [f"down_blocks.{level}.attentions.0.norm.weight" in part for level in range(levels)]
    context = part["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": model.unet.num_heads,  # so called in diffusers; it is the number of heads
        "block_out_channels": [part[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)],
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attended],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": part["conv_in.weight"].shape[1],
        "layers_per_block": blocks,
        "norm_eps": 1e-5,
        "norm_num_groups": model.unet.norm_groups,
        "out_channels": part["conv_out.weight"].shape[0],
        "sample_size": model.image_size // 2 ** (len(model.first_stage.ch_mult) - 1),
        "transformer_layers_per_block": model.unet.transformer_depth,
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attended)],
    }


def _vae(part: Mapping[str, Tensor], model: ModelConfig) -> Json:
    levels = len({name.split(".")[2] for name in part if name.startswith("encoder.down_blocks.")})
    blocks = len({name.split(".")[4] for name in part if name.startswith("encoder.down_blocks.0.resnets.")})
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [part[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": part["encoder.conv_in.weight"].shape[1],
        "latent_channels": part["decoder.conv_in.weight"].shape[1],
        "layers_per_block": blocks,
        "norm_num_groups": model.first_stage.norm_groups,
        "out_channels": part["decoder.conv_out.weight"].shape[0],
        "sample_size": model.image_size,
        "scaling_factor": model.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _image_encoder(part: Mapping[str, Tensor], model: ModelConfig) -> Json:
    config = model.exemplar_encoder
    return {  # with the defaults: transformers 5 reads this as the config of a whole CLIP, which has no such fields
        "architectures": ["PaintByExampleImageEncoder"],
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": config.hidden_size,
        "image_size": config.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
        "projection_dim": part["proj_out.weight"].shape[0],
    }


def _text_encoder(part: Mapping[str, Tensor], model: ModelConfig) -> Json:
    vocabulary, width = part["text_model.embeddings.token_embedding.weight"].shape
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,  # as published; transformers looks for the end's position by the largest number then
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": part["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "max_position_embeddings": part["text_model.embeddings.position_embedding.weight"].shape[0],
        "model_type": "clip_text_model",
        # without a config of its own: as in all of CLIP's
        "num_attention_heads": width // 64 if model.condition == "exemplar" else model.text_encoder.num_heads,
        "num_hidden_layers": len({name.split(".")[3] for name in part if ".layers." in name}),
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": vocabulary,
    }


_DESCRIBED = {"unet": _unet, "vae": _vae, "image_encoder": _image_encoder, "text_encoder": _text_encoder}


def _scheduler(model: ModelConfig) -> Json:
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": model.schedule.linear_end,
        "beta_schedule": model.schedule.name,
        "beta_start": model.schedule.linear_start,
        "clip_sample": False,
        "num_train_timesteps": model.schedule.num_timesteps,
        "prediction_type": _PREDICTIONS[model.parameterization],
        "rescale_betas_zero_snr": model.schedule.zero_terminal_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _preprocessor(side: int) -> Json:
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": _CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": _CLIP_STD,
        "resample": 3,
        "size": {"shortest_edge": side},
    }
