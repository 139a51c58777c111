"""Conversion between the published layout and a folder of diffusers, in both directions.

`_rows` is one table for both: what a module is called in the published file, and in which component of the folder under
which names. Names below a row's module are the same on either side. The folder does not hold the noise schedule's
buffers and `position_ids`; they follow from its configs, bit for bit. The JSON files are the published ones
(`diffusers.json`), with the values filled in that vary.

Dimensions: D channels · N positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import (
    CONDITION_ENCODER,
    EMA,
    FILE_TOWER,
    FIRST_STAGE,
    NEW_PARTS,
    POSITION_IDS,
    SCHEDULE_BUFFERS,
    TEXT_MODULE,
    TEXT_POSITION_IDS,
    TEXT_TOWER,
    UNET,
    listing,
    merge_lora,
    to_file_keys,
)
from ldm.config import (
    AutoencoderConfig,
    ExemplarEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldm.diffusion import make_schedule
from ldm.files import write_text

Components = dict[str, dict[str, Tensor]]  # component of the folder => its tensors
Json = dict[str, Any]

# --- the table of names ----------------------------------------------------------------------------

_UNET_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_UNET_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
_VAE_ENDS = (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"))
_VAE_RESNET = (*((name, name) for name in ("norm1", "conv1", "norm2", "conv2")), ("nin_shortcut", "conv_shortcut"))
_VAE_ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
_MAPPER_BLOCK = (
    ("attn.c_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn.c_proj", ("attn1.to_out.0",)),
    ("ln_1", ("norm1",)),
    ("mlp.c_fc", ("ff.net.0.proj",)),
    ("mlp.c_proj", ("ff.net.2",)),
    ("ln_2", ("norm3",)),
)
_WHOLE_MODULES = (
    (FILE_TOWER[:-1], "image_encoder", "model.vision_model"),
    ("cond_stage_model.final_ln", "image_encoder", "final_layer_norm"),
    ("proj_out", "image_encoder", "proj_out"),
    ("learnable_vector", "image_encoder", "uncond_vector"),
    (TEXT_TOWER[:-1], "text_encoder", "text_model"),
)
# Names of other versions of diffusers and transformers => the table's: (component, pattern, replacement).
_SYNONYMS = (
    ("vae", r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    ("vae", r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    ("vae", r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    ("vae", r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ("image_encoder", r"^model\.(?!vision_model\.)", r"model.vision_model."),
    ("text_encoder", r"^(?!text_model\.)", r"text_model."),
)


class Row(NamedTuple):
    """A module on either side; with several names it is divided among them, one below the other."""

    original: str
    component: str
    names: tuple[str, ...]


class Layout(NamedTuple):
    """The numbers of repeated modules, on which the table depends."""

    unet_levels: int
    unet_blocks: int  # per level
    unet_attended: frozenset[int]  # levels with attention
    vae_levels: int
    vae_blocks: int  # per level of the encoder or decoder, whichever has more
    mapper_blocks: int


def to_diffusers(state: Mapping[str, Tensor]) -> Components:
    """Convert a checkpoint under published names to those components of a diffusers folder that it holds.

    The noise schedule and position numbers are left out, since a folder has them in its configs, and so are averaged
    weights.

    Raises:
        CheckpointError: the table lacks some of the names.
    """
    state = to_file_keys(merge_lora(state))
    derived = {POSITION_IDS, TEXT_POSITION_IDS, *SCHEDULE_BUFFERS}
    state = {name: tensor for name, tensor in state.items() if name not in derived and not name.startswith(EMA)}
    table = {row.original: row for row in _rows(_layout(state))}
    components: Components = {}
    _check_known([name for name in state if _split(name, table)[0] not in table])
    for name, tensor in state.items():
        module, rest = _split(name, table)
        row = table[module]
        if _is_attention_of_vae(row) and tensor.ndim == 4:  # (D, D, 1, 1) => (D, D)
            tensor = tensor[:, :, 0, 0]
        parts = tensor.chunk(len(row.names)) if len(row.names) > 1 else [tensor]
        for part_name, part in zip(row.names, parts, strict=True):
            components.setdefault(row.component, {})[part_name + rest] = part
    return components


def to_original(
    components: Mapping[str, Mapping[str, Tensor]], schedule: ScheduleConfig | None = None
) -> dict[str, Tensor]:
    """Convert the components of a diffusers folder to one checkpoint under published names.

    Args:
        components: as `to_diffusers` returns them; names of older and newer diffusers and transformers are known too.
        schedule: the noise schedule whose buffers are added; None: none are.

    Raises:
        CheckpointError: the table lacks some of the names, or a part of a divided module is missing.
    """
    state = {_current(kind, name): tensor for kind, part in components.items() for name, tensor in part.items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    table = {f"{row.component}/{name}": row for row in _rows(_layout(state)) for name in row.names}
    _check_known([name for name in state if _split(name, table)[0] not in table])
    original: dict[str, Tensor] = {}
    for name in state:
        module, rest = _split(name, table)
        row = table[module]
        names = [f"{row.component}/{part}{rest}" for part in row.names]
        if missing := [part for part in names if part not in state]:
            raise CheckpointError(f"the folder lacks {', '.join(missing)}; it is incomplete, copy it again")
        if name != names[0]:
            continue  # comes with the first
        tensor = state[name] if len(names) == 1 else torch.cat([state[part] for part in names])
        if _is_attention_of_vae(row) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        original[row.original + rest] = tensor
    return to_file_keys(original) | (make_schedule(schedule).buffers() if schedule is not None else {})


# What trainers and the authors' files hold besides: losses, discriminators, and layers that no image goes through.
_UNUSED_IN_VAE = ("loss.", "discriminator.", "decoder.up_layers.")


def autoencoder_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an autoencoder's tensors under the names of `AutoencoderKL`, which are CompVis'.

    Args:
        state: the tensors of a file by the authors, of a `diffusers` component, of a whole model or of a training run.

    Raises:
        CheckpointError: a `diffusers` component holds something else, too.
    """
    if any(".mid_block." in name for name in state):
        state = to_original({"vae": state})
    if any(name.startswith(FIRST_STAGE) for name in state):
        state = {name.removeprefix(FIRST_STAGE): x for name, x in state.items() if name.startswith(FIRST_STAGE)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED_IN_VAE)}


def _rows(layout: Layout) -> Iterator[Row]:
    for original, name in _unet_names(layout):
        yield Row(UNET + original, "unet", (name,))
    for original, name in _vae_names(layout):
        yield Row(FIRST_STAGE + original, "vae", (name,))
    for i in range(layout.mapper_blocks):
        for original, names in _MAPPER_BLOCK:
            names = tuple(f"mapper.blocks.{i}.{name}" for name in names)
            yield Row(f"cond_stage_model.mapper.resblocks.{i}.{original}", "image_encoder", names)
    for original, component, name in _WHOLE_MODULES:
        yield Row(original, component, (name,))


def _inside(original: str, name: str, parts: Collection[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((f"{original}.{ours}", f"{name}.{theirs}") for ours, theirs in parts)


def _unet_names(layout: Layout) -> Iterator[tuple[str, str]]:
    levels, blocks = layout.unet_levels, layout.unet_blocks
    yield from _UNET_ENDS
    for level in range(levels):
        first = level * (blocks + 1)
        for j in range(blocks):
            yield from _inside(f"input_blocks.{first + j + 1}.0", f"down_blocks.{level}.resnets.{j}", _UNET_RESNET)
            yield f"input_blocks.{first + j + 1}.1", f"down_blocks.{level}.attentions.{j}"
        yield f"input_blocks.{first + blocks + 1}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        attended = levels - 1 - level in layout.unet_attended  # output blocks begin with the last level
        for j in range(blocks + 1):
            yield from _inside(f"output_blocks.{first + j}.0", f"up_blocks.{level}.resnets.{j}", _UNET_RESNET)
            if attended:
                yield f"output_blocks.{first + j}.1", f"up_blocks.{level}.attentions.{j}"
        upsampler = f"output_blocks.{first + blocks}.{2 if attended else 1}.conv"
        yield upsampler, f"up_blocks.{level}.upsamplers.0.conv"
    for i in range(2):
        yield from _inside(f"middle_block.{2 * i}", f"mid_block.resnets.{i}", _UNET_RESNET)
    yield "middle_block.1", "mid_block.attentions.0"


def _vae_names(layout: Layout) -> Iterator[tuple[str, str]]:
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))
    for coder in ("encoder", "decoder"):
        yield from _inside(coder, coder, _VAE_ENDS)
        for i in range(2):
            yield from _inside(f"{coder}.mid.block_{i + 1}", f"{coder}.mid_block.resnets.{i}", _VAE_RESNET)
        yield from _inside(f"{coder}.mid.attn_1", f"{coder}.mid_block.attentions.0", _VAE_ATTENTION)
    yield CONDITION_ENCODER[:-1], "decoder.condition_encoder"
    for level in range(layout.vae_levels):
        up = layout.vae_levels - 1 - level  # diffusers counts from the latent's side, CompVis from the pixels'
        for j in range(layout.vae_blocks):
            yield from _inside(
                f"encoder.down.{level}.block.{j}", f"encoder.down_blocks.{level}.resnets.{j}", _VAE_RESNET
            )
            yield from _inside(f"decoder.up.{up}.block.{j}", f"decoder.up_blocks.{level}.resnets.{j}", _VAE_RESNET)
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        yield f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv"


def _layout(names: Collection[str]) -> Layout:
    """Count the repeated modules among published names or among `component/name` of a folder."""

    def numbers(pattern: str) -> set[int]:
        return {int(found[1]) for name in names if (found := re.match(pattern, name))}

    unet = re.escape(UNET)
    if inputs := numbers(unet + r"input_blocks\.(\d+)\."):
        stride = min(numbers(unet + r"input_blocks\.(\d+)\.0\.op\."), default=len(inputs))  # a level ends there
        levels, blocks = len(inputs) // stride, stride - 1
        attended = {(block - 1) // stride for block in numbers(unet + r"input_blocks\.(\d+)\.1\.norm\.")}
    else:
        levels = len(numbers(r"unet/down_blocks\.(\d+)\."))
        blocks = len(numbers(r"unet/down_blocks\.0\.resnets\.(\d+)\."))
        attended = numbers(r"unet/down_blocks\.(\d+)\.attentions\.")
    return Layout(
        unet_levels=levels,
        unet_blocks=blocks,
        unet_attended=frozenset(attended),
        vae_levels=len(numbers(r"(?:first_stage_model\.encoder\.down|vae/encoder\.down_blocks)\.(\d+)\.")),
        vae_blocks=len(
            numbers(r"(?:first_stage_model\.|vae/)..coder\.(?:down|up)\w*\.\d+\.(?:block|resnets)\.(\d+)\.")
        ),
        mapper_blocks=len(numbers(r"(?:cond_stage_model\.mapper\.res|image_encoder/mapper\.)blocks\.(\d+)\.")),
    )


def _split(name: str, table: Collection[str]) -> tuple[str, str]:
    """Split a tensor's name into a module of the table and the rest; without such a module, ("", name)."""
    module = name
    while module and module not in table:
        module = module.rpartition(".")[0]
    return module, name.removeprefix(module)


def _is_attention_of_vae(row: Row) -> bool:
    return ".attn_1." in row.original  # a 1x1 convolution there, a linear layer in diffusers


def _current(kind: str, name: str) -> str:
    """Return `component/name` with the name as the table has it."""
    for component, old, new in _SYNONYMS:
        if kind == component and (replaced := re.sub(old, new, name)) != name:
            return f"{kind}/{replaced}"
    return f"{kind}/{name}"


def _check_known(unknown: list[str]) -> None:
    if unknown:
        raise CheckpointError(
            f"cannot be converted\n{listing('names without a counterpart', unknown)}"
            "\ndo: pass Paint by Example or Stable Diffusion 1; scripts/inspect_checkpoint.py says what a file is"
        )


# --- the folder ------------------------------------------------------------------------------------

# Component => its file of weights, as the libraries call it, without the ending.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "image_encoder": "model",
    "text_encoder": "model",
}


def read_json(path: Path) -> Json:
    """Read a mapping from a JSON file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a {type(content).__name__}, expected a mapping; copy the folder again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Find the files with a component's weights: one, or the shards that its index names.

    Full precision goes before half, as in diffusers, and weights from before averaging come last; of each variant
    safetensors goes before pickles, and one file before shards.

    Raises:
        CheckpointError: the folder has none, or an index names none.
    """
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for variant, kind, stem in product(("", ".fp16", ".non_ema"), ("safetensors", "bin"), stems):
        if (path := folder / f"{stem}{variant}.{kind}").is_file():
            return [path]
        for name in (f"{stem}.{kind}.index{variant}.json", f"{stem}.{kind}{variant}.index.json"):
            if (index := folder / name).is_file():
                if shards := sorted({folder / name for name in read_json(index).get("weight_map", {}).values()}):
                    return shards
                raise CheckpointError(f"{index}: names no files in weight_map; copy the folder again")
    raise CheckpointError(f"{folder}: no weights in this folder; pass a folder that diffusers or transformers saved")


def read_component(folder: Path) -> dict[str, Tensor]:
    """Read the named tensors of a component, memory-mapped."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_checkpoint(path).items()}


def read_folder(folder: Path) -> tuple[Components, dict[str, Json]]:
    """Read the known components of a pipeline, and all its configs by component, its index as `pipeline`.

    Raises:
        CheckpointError: the folder has no UNet or no scheduler, or a file cannot be read.
    """
    found = [name for name in STEMS if (folder / name).is_dir()]
    if "unet" not in found:
        raise CheckpointError(
            f"{folder}: got no folder unet in it, expected a diffusers pipeline (model_index.json, …)"
        )
    configs = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/*config.json"))}
    if "scheduler" not in configs:
        raise CheckpointError(f"{folder}: got no scheduler/scheduler_config.json, expected a diffusers pipeline")
    if (index := folder / "model_index.json").is_file():
        configs["pipeline"] = read_json(index)
    return {name: read_component(folder / name) for name in found}, configs


def write_folder(folder: Path, components: Components, files: Mapping[str, Json], metadata: Mapping[str, str]) -> None:
    """Write weights, as safetensors with `metadata`, and JSON files into an existing folder.

    Raises:
        CheckpointError: the disk is full or the folder is not writable.
    """
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    for name, part in components.items():
        write_safetensors(folder / name / f"{STEMS[name]}.safetensors", part, metadata)


# --- configs ---------------------------------------------------------------------------------------

# JSON files by path; "$section.field" stands for a field of `ModelConfig`, in either direction. With them the index of
# a pipeline with exemplars and of one with text.
_TEMPLATES: dict[str, Json] = json.loads(Path(__file__).with_name("diffusers.json").read_text(encoding="utf-8"))
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_OMITTED = {"norm_num_groups": 32, "transformer_layers_per_block": 1}  # defaults that older folders leave out
# What pipelines feed the UNet, in this order: Paint by Example's, and those with text by the UNet's input channels.
_EXEMPLAR_INPUTS = ["x_t", "z_masked", "keep_mask"]
_TEXT_INPUTS = {
    4: ["x_t"],
    9: ["x_t", "hole_mask", "z_masked"],
    8: ["x_t", "z_foreground"],  # IC-Light's are of a StableDiffusionPipeline whose calls are intercepted
    12: ["x_t", "z_foreground", "z_background"],
}
_FAMILY_KEYS = ("_class_name", "act_fn", "hidden_act")  # all of Stable Diffusion 1 has them as in the templates
_NEEDED = {
    "unet": "conv_in.weight",
    "vae": "decoder.conv_out.weight",
    "image_encoder": "proj_out.weight",
    "text_encoder": "text_model.embeddings.token_embedding.weight",
}
_FAMILY_ALONE = "only Stable Diffusion 1 and what is made from it can be converted"


def diffusers_configs(components: Components, model: ModelConfig) -> dict[str, Json]:
    """Return the JSON files that a folder needs beside the weights: path in the folder => content.

    Args:
        components: as `to_diffusers` returns them; they decide the pipeline: Paint by Example, or Stable Diffusion.
        model: the checkpoint's config.

    Raises:
        CheckpointError: the config describes another model, or a component is incomplete.
    """
    _check_projections(components["unet"])
    _check_widths("unet", components, "down_blocks", model.unet.model_channels, model.unet.channel_mult)
    _check_widths("vae", components, "encoder.down_blocks", model.first_stage.ch, model.first_stage.ch_mult)
    for name, tensor in _NEEDED.items():
        if name in components and tensor not in components[name]:
            raise CheckpointError(f"incomplete: its {name} lacks {tensor!r}; pass a whole model")
    condition = "exemplar" if "image_encoder" in components else "text"
    parts = {"scheduler", "feature_extractor", *components} - ({"feature_extractor"} if condition == "text" else set())
    values = _values(_completed(model, components))
    files = {path: _filled(file, values) for path, file in _TEMPLATES.items() if path.partition("/")[0] in parts}
    index = _filled(_TEMPLATES[condition], values)
    absent = STEMS.keys() - components.keys() - {"image_encoder"}
    return files | {"model_index.json": {key: value for key, value in index.items() if key not in absent}}


def _filled(template: Any, values: Json) -> Any:
    if isinstance(template, dict):
        return {key: _filled(value, values) for key, value in template.items()}
    if isinstance(template, str) and template.startswith("$"):
        section, _, field = template[1:].rpartition(".")
        return (values[section] if section else values)[field]
    return template


def _values(model: ModelConfig) -> Json:
    """Return the config as nested dicts, with what the templates need beyond its fields."""
    levels = len(model.first_stage.ch_mult)
    attended = [2**level in model.unet.attention_resolutions for level in range(len(model.unet.channel_mult))]
    values = asdict(model)
    values["prediction_type"] = _PREDICTIONS[model.parameterization]
    values["latent_size"] = model.image_size // 2 ** (levels - 1)
    inpaints = model.unet.in_channels == 9
    values["pipeline"] = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    values["unet"] |= {
        "widths": [model.unet.model_channels * multiplier for multiplier in model.unet.channel_mult],
        "down_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attended],
        "up_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attended)],
    }
    values["first_stage"] |= {
        "widths": [model.first_stage.ch * multiplier for multiplier in model.first_stage.ch_mult],
        "out_channels": model.first_stage.in_channels,
        "down_types": ["DownEncoderBlock2D"] * levels,
        "up_types": ["UpDecoderBlock2D"] * levels,
    }
    values["text_encoder"]["width"] = model.text_encoder.hidden_size
    return values


def _completed(model: ModelConfig, components: Components) -> ModelConfig:
    """Take what the tensors tell: Stable Diffusion may come with the published model's config, which has no text."""
    unet = replace(model.unet, in_channels=components["unet"]["conv_in.weight"].shape[1])
    text = components.get("text_encoder")
    if text is None:
        return replace(model, unet=unet)
    vocabulary, width = text["text_model.embeddings.token_embedding.weight"].shape
    tower = TextEncoderConfig(
        vocab_size=vocabulary,
        max_length=text["text_model.embeddings.position_embedding.weight"].shape[0],
        hidden_size=width,
        intermediate_size=text["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_layers=len({name.split(".")[3] for name in text if ".layers." in name}),
        num_heads=width // 64 if model.condition == "exemplar" else model.text_encoder.num_heads,  # as in all of CLIP's
    )
    return replace(model, unet=unet, text_encoder=tower)


def _check_widths(name: str, components: Components, blocks: str, base: int, multipliers: list[int]) -> None:
    """Compare the channels of a component's levels with the config's."""
    part = components.get(name, {})
    levels = {key.removeprefix(blocks).split(".")[1] for key in part if key.startswith(blocks)}
    widths = [part[f"{blocks}.{level}.resnets.0.conv1.weight"].shape[0] for level in range(len(levels))]
    expected = [base * multiplier for multiplier in multipliers]
    if part and widths != expected:
        raise CheckpointError(
            f"got a {name} of {widths} channels, expected {expected} by the config; pass the checkpoint's own config "
            "with --config"
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

    exemplar, text = holds(*NEW_PARTS), model.condition == "text"
    feeds = ", ".join(_TEXT_INPUTS[9] if text else _EXEMPLAR_INPUTS)
    blocks = (encoder.num_layers + 1) // 5  # as diffusers fixes it
    lacking = {
        "condition both": model.condition == "both" or (exemplar and holds(TEXT_TOWER, TEXT_MODULE)),
        f"input_channels {inputs} (its pipeline with {'text' if text else 'exemplars'} feeds {feeds})": (
            (exemplar and model.input_channels != _EXEMPLAR_INPUTS)
            or (text and model.input_channels not in _TEXT_INPUTS.values())
        ),
        f"exemplar_encoder.tower {encoder.tower}": exemplar and encoder.tower != "clip",
        f"exemplar_encoder.tokens {encoder.tokens}": exemplar and encoder.tokens != "pooled",
        f"exemplar_encoder.mapper_layers {encoder.mapper_layers} (it fixes {blocks})": (
            exemplar and encoder.mapper_layers != blocks
        ),
        "first_stage.decoder asymmetric in a pipeline": (
            stage.decoder == "asymmetric" or holds(FIRST_STAGE + CONDITION_ENCODER)
        ),
        f"first_stage.patch_size {stage.patch_size}": stage.patch_size != 1,
        "a first stage without norms": stage.norm_groups == 0,
        "first_stage.embed_dim other than z_channels": stage.embed_dim != stage.z_channels,
        "schedule.name cosine as published (its own cosine differs)": model.schedule.name == "cosine",
    }
    if what := next((what for what, absent in lacking.items() if absent), ""):
        raise CheckpointError(f"diffusers has no counterpart of {what}; this model runs here alone")


def check_family(components: Components, configs: Mapping[str, Json]) -> None:
    """Refuse a folder whose tensors would mean something else here.

    Raises:
        CheckpointError: names the setting that Stable Diffusion 1 has otherwise.
    """
    for part in components:
        family = {key: value for key, value in _TEMPLATES[f"{part}/config.json"].items() if key in _FAMILY_KEYS}
        for key, value in (family | {"use_linear_projection": False}).items():
            if (got := configs.get(part, {}).get(key, value)) != value:
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


def schedule_config(scheduler: Json) -> ScheduleConfig:
    """Return our noise schedule for a scheduler's config.

    Raises:
        CheckpointError: we lack that schedule.
    """
    fields = _fields("scheduler/scheduler_config.json", ScheduleConfig)
    settings = {field: scheduler[key] for field, key in fields.items() if key in scheduler}
    name = settings.get("name", "scaled_linear")
    if name not in ("scaled_linear", "linear") or scheduler.get("trained_betas") is not None:
        raise CheckpointError(
            f"scheduler: got beta_schedule {name!r} or trained betas, expected scaled_linear or linear"
        )
    return ScheduleConfig(**settings)


def model_config(components: Components, configs: Mapping[str, Json]) -> ModelConfig | None:
    """Return our config of a folder; fields that diffusers does not know keep their defaults.

    Returns:
        None if the folder lacks a part of a model or does not say what its UNet's input channels are.

    Raises:
        CheckpointError: a config lacks a needed key.
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
    block_types, widths, vae_widths = unet["down_block_types"], unet["block_out_channels"], vae["block_out_channels"]
    tower: Json
    if "image_encoder" in components:
        blocks = {name.split(".")[2] for name in components["image_encoder"] if name.startswith("mapper.blocks.")}
        settings = _from_json("image_encoder", configs, ExemplarEncoderConfig)
        tower = {"exemplar_encoder": ExemplarEncoderConfig(**settings, mapper_layers=len(blocks))}
    else:
        settings = _from_json("text_encoder", configs, TextEncoderConfig)
        tower = {"condition": "text", "text_encoder": TextEncoderConfig(**settings)}
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    return ModelConfig(
        image_size=unet.get("sample_size", 64) * 2 ** (len(vae_widths) - 1),
        scale_factor=vae.get("scaling_factor", 0.18215),
        parameterization=predictions[configs["scheduler"].get("prediction_type", "epsilon")],
        schedule=schedule_config(configs["scheduler"]),
        input_channels=inputs,
        unet=UNetConfig(
            **_from_json("unet", configs, UNetConfig),
            model_channels=widths[0],
            channel_mult=[width // widths[0] for width in widths],
            attention_resolutions=[2**i for i in reversed(range(len(block_types))) if "CrossAttn" in block_types[i]],
        ),
        first_stage=AutoencoderConfig(
            **_from_json("vae", configs, AutoencoderConfig),
            ch=vae_widths[0],
            ch_mult=[width // vae_widths[0] for width in vae_widths],
            embed_dim=vae["latent_channels"],
        ),
        **tower,
    )


def _fields(path: str, config: type) -> dict[str, str]:
    """Return field of our config => key in a JSON file."""
    own = {field.name for field in dataclass_fields(config)}
    items = [(value.rpartition(".")[2], key) for key, value in _TEMPLATES[path].items() if str(value).startswith("$")]
    return {field: key for field, key in items if field in own}


def _from_json(name: str, configs: Mapping[str, Json], config: type) -> dict[str, Any]:
    source = _OMITTED | configs[name]
    return {field: _same(key, source[key]) for field, key in _fields(f"{name}/config.json", config).items()}


def _same(key: str, value: int | list[int]) -> int:
    """Return a number that diffusers can choose by level, and this project cannot."""
    numbers = {value} if isinstance(value, int) else set(value)
    if len(numbers) != 1:
        raise CheckpointError(f"unet: got {key} {value}, expected the same at every level; {_FAMILY_ALONE}")
    return numbers.pop()
