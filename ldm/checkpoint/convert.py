"""Conversion between the published layout and a folder of diffusers, in both directions.

`diffusers.json` holds the names of both sides (below a module they are the same) and the JSON files of a folder. A
folder lacks the noise schedule's buffers and `position_ids`, which follow from its configs bit for bit.
"""

import json
from collections.abc import Collection, Mapping, Set
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import keys
from ldm.checkpoint.io import CheckpointError, read_checkpoint
from ldm.checkpoint.keys import FIRST_STAGE, UNET, State
from ldm.config import ModelConfig, ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.files import read_json

Components = dict[str, dict[str, Tensor]]  # component of the folder => its tensors
Json = dict[str, Any]

# JSON files by path and the two pipelines' indexes; `${section.field}` stands for a field of `ModelConfig`.
_TEMPLATES: dict[str, Json] = json.loads(Path(__file__).with_name("diffusers.json").read_text(encoding="utf-8"))
# component => published module => its name in the component; the rows of a module are divided among several names.
_NAMES: dict[str, dict[str, list[str]]] = _TEMPLATES.pop("names")
# `component/name` in other versions of diffusers and transformers => published module
_SYNONYMS: dict[str, str] = _TEMPLATES.pop("names of other versions")
_NEEDED: dict[str, str] = _TEMPLATES.pop("needed weights")  # component => a name that it must have
_MOST = 20  # levels or blocks, where their number does not matter
# What trainers and the authors' files hold besides: losses, discriminators, and layers without use.
_UNUSED_IN_VAE = ("loss.", "discriminator.", "decoder.up_layers.")


def to_diffusers(state: State) -> Components:
    """Convert a checkpoint under published names to those components of a diffusers folder that it holds.

    Leave out the noise schedule, position numbers and averaged weights; refuse names that the table lacks.
    """
    unused = (keys.EMA, *keys.EXTRAS, *keys.SCHEDULE_BUFFERS, keys.POSITION_IDS, keys.TEXT_POSITION_IDS)
    state = keys.to_file_keys(keys.merge_lora(state))
    state = {name: x for name, x in state.items() if not name.startswith(unused)}
    table = _table(state.keys())
    components: Components = {}
    for name, (module, rest) in _located(state, table, state).items():
        tensor = state[name]
        if ".attn_1." in module and tensor.ndim == 4:  # 1x1 convolution (D, D, 1, 1) => linear layer (D, D)
            tensor = tensor[:, :, 0, 0]
        for target, part in zip(table[module], tensor.chunk(len(table[module])), strict=True):
            component, _, theirs = target.partition("/")
            components.setdefault(component, {})[theirs + rest] = part
    return components


def to_original(components: Mapping[str, State], schedule: ScheduleConfig | None = None) -> dict[str, Tensor]:
    """Convert the components of a diffusers folder to one checkpoint under published names, with a schedule's buffers.

    Names of older and newer diffusers and transformers are known too; others are refused.
    """
    state = {f"{kind}/{name}": tensor for kind, part in components.items() for name, tensor in part.items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    table = _table(state.keys())
    modules = _SYNONYMS | {name: module for module, names in table.items() for name in names}
    original: dict[str, Tensor] = {}
    for name, (theirs, rest) in _located(state, modules, components.get("unet", state)).items():
        module = modules[theirs]
        if len(parts := [part + rest for part in table.get(module, ())]) > 1:
            if missing := [part for part in parts if part not in state]:
                raise CheckpointError(f"the folder lacks {', '.join(missing)}; it is incomplete, copy it again")
            if name == parts[0]:
                original[module + rest] = torch.cat([state[part] for part in parts])
        else:
            square = ".attn_1." in module and state[name].ndim == 2
            original[module + rest] = state[name][:, :, None, None] if square else state[name]
    return keys.to_file_keys(original) | (make_schedule(schedule).buffers() if schedule is not None else {})


def autoencoder_keys(state: State) -> dict[str, Tensor]:
    """Return the tensors of an autoencoder, from whatever file, under the names of `AutoencoderKL`: CompVis'."""
    if any(".mid_block." in name for name in state):
        state = to_original({"vae": state})
    if keys.holds(state, FIRST_STAGE):
        state = {name.removeprefix(FIRST_STAGE): x for name, x in state.items() if name.startswith(FIRST_STAGE)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED_IN_VAE)}


def _table(names: Set[str]) -> dict[str, list[str]]:
    """Map published modules to `component/name`; the names of either side tell how many levels and blocks there are."""
    resnets = f"{UNET}input_blocks.{{}}.0.in_layers.2.weight", "unet/down_blocks.0.resnets.{}.conv1.weight"
    per_level = next(i for i in range(1, 100) if not {resnets[0].format(i), resnets[1].format(i - 1)} & names)
    scales = f"{FIRST_STAGE}decoder.up.{{}}.block.0.conv1.weight", "vae/decoder.up_blocks.{}.resnets.0.conv1.weight"
    num_scales = sum(scale.format(i) in names for scale in scales for i in range(_MOST))
    sizes = {"unet": (_MOST, per_level), "vae": (num_scales, _MOST), "image_encoder": (1, _MOST)}  # levels, blocks
    table: dict[str, list[str]] = {}
    for component, rows in _NAMES.items():
        levels, blocks = sizes.get(component, (1, 1))
        for level, block in product(range(max(levels, 1)), range(blocks)):
            index, last = level * blocks + block, level * blocks + blocks - 1  # the downsampler is behind the last
            attended = f"output_blocks.{level * blocks}.1.norm.weight", f"up_blocks.{level}.attentions.0.norm.weight"
            upsampler = 2 if UNET + attended[0] in names or f"unet/{attended[1]}" in names else 1
            values = {"level": level, "coarser": levels - 1 - level, "block": block}
            values |= {"input": index + 1, "downsampler": last + 1}
            values |= {"output": index, "upsampled": last, "upsampler": upsampler}
            for ours, theirs in rows.items():
                table[ours.format(**values)] = [f"{component}/{name.format(**values)}" for name in theirs]
    return table


def _located(names: Collection[str], modules: Collection[str], state: State) -> dict[str, tuple[str, str]]:
    """Split each name into the longest module that it lies in, and the rest; an error tells what `state` is."""
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        module = name
        while module and module not in modules:
            module = module.rpartition(".")[0]
        found[name] = module, name.removeprefix(module)
    if unknown := [name for name, (module, _) in found.items() if not module]:
        listed = keys.listing("names without a counterpart", unknown)
        remedy = keys.misfit(state, "pass Paint by Example or Stable Diffusion 1")
        raise CheckpointError(f"cannot be converted\n{listed}\ndo: {remedy}")
    return found


# Component => its file of weights, as the libraries call it, without the ending.
_STEM = "diffusion_pytorch_model"
STEMS = {"unet": _STEM, "vae": _STEM, "image_encoder": "model", "text_encoder": "model"}


def weight_files(folder: Path) -> list[Path]:
    """Find the files with a component's weights: one, or the shards that its index names; or a file itself.

    Full precision comes before half, as in diffusers, and weights from before averaging last; of each variant
    safetensors come before pickles, and one file before shards.
    """
    if not folder.is_dir():
        return [folder]
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for variant, kind, stem in product(("", ".fp16", ".non_ema"), ("safetensors", "bin"), stems):
        if (path := folder / f"{stem}{variant}.{kind}").is_file():
            return [path]
        for name in (f"{stem}.{kind}.index{variant}.json", f"{stem}.{kind}{variant}.index.json"):
            if (index := folder / name).is_file():
                if isinstance(shards := read_json(index, {}).get("weight_map"), dict) and shards:
                    return sorted({folder / str(name) for name in shards.values()})
                raise CheckpointError(f"{index}: names no files in weight_map; copy the folder again")
    raise CheckpointError(f"{folder}: no weights in this folder; pass a folder that diffusers or transformers saved")


def read_component(folder: Path) -> dict[str, Tensor]:
    """Read the named tensors of a component, a folder or its file, memory-mapped."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_checkpoint(path).items()}


_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SCHEDULERS = {  # what we have of a scheduler's settings, first the default
    "prediction_type": list(_PREDICTIONS.values()),
    "beta_schedule": ["scaled_linear", "linear"],
    "trained_betas": [None],
}
# What older folders leave out, with the defaults then; of a scheduler's config, what Stable Diffusion's says.
_OMITTED = {"norm_num_groups": 32, "transformer_layers_per_block": 1, "rescale_betas_zero_snr": False}
_OMITTED |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
# What pipelines feed the UNet, in this order: Paint by Example's, and those with text by the UNet's input channels.
EXEMPLAR_INPUTS = ["x_t", "z_masked", "keep_mask"]
TEXT_INPUTS = {
    4: ["x_t"],
    9: ["x_t", "hole_mask", "z_masked"],
    8: ["x_t", "z_foreground"],  # IC-Light's are of a StableDiffusionPipeline whose calls are intercepted
    12: ["x_t", "z_foreground", "z_background"],
}
# All of Stable Diffusion 1 has these as in the templates.
_FAMILY_KEYS = ("_class_name", "act_fn", "hidden_act", "use_linear_projection")
_FAMILY_ALONE = "only Stable Diffusion 1 and what is made from it can be converted"


def diffusers_configs(components: Components, model: ModelConfig) -> dict[str, Json]:
    """Return the JSON files that a folder needs beside the weights: path in the folder => content.

    The components decide the pipeline, Paint by Example or Stable Diffusion; they must be complete and fit the config.
    """
    check_family(components, {})
    unet, stage, text = model.unet, model.first_stage, model.text_encoder
    channels = keys.input_channels(components["unet"])
    types = ["CrossAttn" * (2**i in unet.attention_resolutions) for i in range(len(unet.level_channels))]
    values = asdict(model)  # what the templates refer to
    values["prediction_type"] = _PREDICTIONS[model.parameterization]
    values["latent_size"] = model.image_size // 2 ** (len(stage.ch_mult) - 1)
    values["pipeline"] = "StableDiffusionInpaintPipeline" if channels == 9 else "StableDiffusionPipeline"
    values["unet"] |= {
        "in_channels": channels,
        "widths": unet.level_channels,
        "down_types": [f"{kind}DownBlock2D" for kind in types],
        "up_types": [f"{kind}UpBlock2D" for kind in reversed(types)],
    }
    values["first_stage"] |= {
        "widths": [stage.ch * factor for factor in stage.ch_mult],
        "down_types": ["DownEncoderBlock2D"] * len(stage.ch_mult),
        "up_types": ["UpDecoderBlock2D"] * len(stage.ch_mult),
    }
    files: Any = OmegaConf.to_container(OmegaConf.create(_TEMPLATES | values), resolve=True)
    for name, weight, expected in (
        ("unet", "down_blocks.{}.resnets.0.conv1.weight", values["unet"]["widths"]),
        ("vae", "encoder.down_blocks.{}.resnets.0.conv1.weight", values["first_stage"]["widths"]),
        ("text_encoder", "text_model.encoder.layers.{}.layer_norm1.weight", [text.hidden_size] * text.num_layers),
    ):
        part = components.get(name, {})
        widths = [len(part[weight.format(i)]) for i in range(100) if weight.format(i) in part]
        if part and widths != expected:
            raise CheckpointError(f"got a {name} of widths {widths}, expected {expected}; pass its --config")
    condition = "exemplar" if "image_encoder" in components else "text"
    index = {key: value for key, value in files[condition].items() if key not in STEMS or key in components}
    parts = {"scheduler", *components} | ({"feature_extractor"} if condition == "exemplar" else set())
    wanted = [path for path in _TEMPLATES if path.partition("/")[0] in parts]
    return {path: files[path] for path in wanted} | {"model_index.json": index}


def check_family(components: Components, configs: Mapping[str, Json]) -> None:
    """Refuse components that are incomplete or of another family than Stable Diffusion 1: their tensors mean others."""
    for name, tensor in _NEEDED.items():
        if name in components and tensor not in components[name]:
            raise CheckpointError(f"incomplete: its {name} lacks {tensor!r}; pass a whole model")
    known = {part: _TEMPLATES[f"{part}/config.json"] | {"use_linear_projection": False} for part in components}
    for part, key in product(known, _FAMILY_KEYS):
        got, expected = (config.get(key) for config in (known[part] | configs.get(part, {}), known[part]))
        if got != expected:
            raise CheckpointError(f"{part}: got {key} {got!r}, expected {expected!r}; {_FAMILY_ALONE}")
    if any(name.endswith(".proj_in.weight") and tensor.ndim == 2 for name, tensor in components["unet"].items()):
        raise CheckpointError(f"unet: got linear projections around its attention, not convolutions; {_FAMILY_ALONE}")


def schedule_config(scheduler: Json) -> ScheduleConfig:
    """Return our noise schedule for a scheduler's config; refuse settings that we lack."""
    for setting, known in _SCHEDULERS.items():
        if (got := scheduler.get(setting, known[0])) not in known:
            raise CheckpointError(f"scheduler: got {setting} {got!r}, expected {' or '.join(map(str, known))}")
    return _section("scheduler/scheduler_config.json", scheduler, ScheduleConfig())


def model_config(components: Components, configs: Mapping[str, Json]) -> ModelConfig | None:
    """Return our config of a folder; None if a part of a model is missing or the UNet's input channels are unknown."""
    channels = keys.input_channels(components["unet"])
    pipeline = configs.get("pipeline", {}).get("_class_name")
    known = channels in (4, 9) or pipeline == "StableDiffusionPipeline"  # InstructPix2Pix has 8, of something else
    inputs = EXEMPLAR_INPUTS if "image_encoder" in components else TEXT_INPUTS.get(channels) if known else None
    if inputs is None or "vae" not in components or not components.keys() & {"image_encoder", "text_encoder"}:
        return None
    prediction = configs["scheduler"].get("prediction_type", "epsilon")
    model = ModelConfig(
        input_channels=inputs,
        schedule=schedule_config(configs["scheduler"]),
        parameterization=next(ours for ours, theirs in _PREDICTIONS.items() if theirs == prediction),
    )
    try:
        unet, vae = configs["unet"], configs["vae"]
        types, widths, vae_widths = unet["down_block_types"], unet["block_out_channels"], vae["block_out_channels"]
        model.image_size = unet.get("sample_size", 64) * 2 ** (len(vae_widths) - 1)
        model.scale_factor = vae.get("scaling_factor", 0.18215)
        model.unet = replace(
            _section("unet/config.json", configs["unet"], model.unet),
            model_channels=widths[0],
            channel_mult=[width // widths[0] for width in widths],
            attention_resolutions=[2**i for i in reversed(range(len(types))) if "CrossAttn" in types[i]],
        )
        model.first_stage = replace(
            _section("vae/config.json", configs["vae"], model.first_stage),
            ch=vae_widths[0],
            ch_mult=[width // vae_widths[0] for width in vae_widths],
            embed_dim=vae["latent_channels"],
        )
        if image_encoder := components.get("image_encoder"):
            blocks = len({name.split(".")[2] for name in image_encoder if name.startswith("mapper.blocks.")})
            encoder = _section("image_encoder/config.json", configs["image_encoder"], model.exemplar_encoder)
            model.exemplar_encoder = replace(encoder, mapper_layers=blocks)
        else:
            model.condition = "text"
            model.text_encoder = _section("text_encoder/config.json", configs["text_encoder"], model.text_encoder)
    except KeyError as error:
        raise CheckpointError(f"the folder's configs lack {error}; copy the folder again") from None
    return model


def _section(path: str, config: Json, section: Any) -> Any:
    """Fill a section of our config: each field from the first key that the template at `path` gives it.

    Refuses numbers that vary by level, which ours cannot.
    """
    source: Json = _OMITTED | config
    found: Json = {}
    for key, reference in _TEMPLATES[path].items():
        field = str(reference).strip("${}").rpartition(".")[2]
        if field in found or not hasattr(section, field):
            continue
        numbers = set(source[key]) if isinstance(source[key], list) else {source[key]}
        if len(numbers) != 1:
            raise CheckpointError(f"{path}: got {key} {source[key]}, expected one for all levels; {_FAMILY_ALONE}")
        found[field] = numbers.pop()
    return replace(section, **found)
