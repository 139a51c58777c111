"""The published layout and that of a diffusers folder, either from the other, by one table.

`_rows` is the table: what a module is called in the published file, and in which component of the folder under which
names. Both directions read it; names below a row's module are the same on either side. What the folder does not hold
(noise schedule, `position_ids`) follows from its configs, bit for bit.

Dimensions: D channels · N positions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import (
    EMA,
    FILE_TOWER,
    FIRST_STAGE,
    POSITION_IDS,
    SCHEDULE_BUFFERS,
    TEXT_TOWER,
    UNET,
    listing,
    merge_lora,
    to_file_keys,
)
from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule

Components = dict[str, dict[str, Tensor]]  # component of the folder => its tensors

_MAPPER = "cond_stage_model.mapper."
_TEXT_POSITION_IDS = TEXT_TOWER + "embeddings.position_ids"
_DERIVED = {POSITION_IDS, _TEXT_POSITION_IDS, *SCHEDULE_BUFFERS}
_TEXT_POSITIONS = TEXT_TOWER + "embeddings.position_embedding.weight"  # (N, D)

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
_VAE_RESNET = (*((name, name) for name in ("norm1", "conv1", "norm2", "conv2")), ("nin_shortcut", "conv_shortcut"))
_VAE_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
_MAPPER_BLOCK = (
    ("attn.c_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn.c_proj", ("attn1.to_out.0",)),
    ("ln_1", ("norm1",)),
    ("mlp.c_fc", ("ff.net.0.proj",)),
    ("mlp.c_proj", ("ff.net.2",)),
    ("ln_2", ("norm3",)),
)

# What libraries of other years call it => what the table says: a pattern in one component.
_SYNONYMS = (
    ("vae", r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    ("vae", r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    ("vae", r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    ("vae", r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ("image_encoder", r"^model\.(?!vision_model\.)", r"model.vision_model."),
    ("text_encoder", r"^(?!text_model\.)", r"text_model."),
)


class Row(NamedTuple):
    """A module on either side; one that is several on the other has their rows one below the other."""

    original: str
    component: str
    names: tuple[str, ...]
    pointwise: bool = False  # the original's matrices (D, D) are convolutions, (D, D, 1, 1)


class Layout(NamedTuple):
    """What the table depends on: the numbers of repeated modules."""

    unet_levels: int
    unet_blocks: int  # per level
    unet_attended: frozenset[int]  # levels with attention
    vae_levels: int
    vae_blocks: int  # per level of the encoder
    vae_up_blocks: int  # of the decoder
    mapper_blocks: int


def to_diffusers(state: Mapping[str, Tensor]) -> Components:
    """A checkpoint under published names as the components of a diffusers folder; those that it holds.

    Left out: the noise schedule and position numbers, which a folder has in its configs, and averaged weights.

    Raises:
        CheckpointError: there are names that the table does not know.
    """
    state = to_file_keys(merge_lora(state))
    kept = {name: tensor for name, tensor in state.items() if name not in _DERIVED and not name.startswith(EMA)}
    table = {row.original: row for row in _rows(_layout(kept))}
    components: Components = {}
    unknown = []
    for name, tensor in kept.items():
        module, rest = _split(name, table)
        if module is None:
            unknown.append(name)
            continue
        row = table[module]
        parts = tensor.chunk(len(row.names)) if len(row.names) > 1 else [tensor]
        for part_name, part in zip(row.names, parts, strict=True):
            part = part[:, :, 0, 0] if row.pointwise and rest == ".weight" else part
            components.setdefault(row.component, {})[part_name + rest] = part
    _refuse_unknown(unknown)
    return components


def to_original(
    components: Mapping[str, Mapping[str, Tensor]], schedule: ScheduleConfig | None = None
) -> dict[str, Tensor]:
    """The components of a diffusers folder as one checkpoint under published names.

    Args:
        components: as `to_diffusers` gives them; names of older and newer diffusers and transformers are known too.
        schedule: of which noise schedule to add the buffers; None: of none.

    Raises:
        CheckpointError: there are names that the table does not know, or a part of a divided module is missing.
    """
    found = {(kind, _current(kind, name)): t for kind, part in components.items() for name, t in part.items()}
    found = {key: tensor for key, tensor in found.items() if not key[1].endswith("position_ids")}
    table = {
        f"{row.component}/{name}": (row, index)
        for row in _rows(_layout_of_components(found))
        for index, name in enumerate(row.names)
    }
    state: dict[str, Tensor] = {}
    unknown = []
    for (kind, name), tensor in found.items():
        module, rest = _split(f"{kind}/{name}", table)
        if module is None:
            unknown.append(f"{kind}/{name}")
            continue
        row, index = table[module]
        if index > 0:
            continue  # comes with the first
        missing = [part + rest for part in row.names if (kind, part + rest) not in found]
        if missing:
            raise CheckpointError(f"{kind} lacks {', '.join(missing)}; the folder is incomplete, copy it again")
        parts = [found[kind, part + rest] for part in row.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if row.pointwise and rest == ".weight" and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        state[row.original + rest] = tensor
    _refuse_unknown(unknown)
    state = to_file_keys(state)
    if _TEXT_POSITIONS in state:
        state[_TEXT_POSITION_IDS] = torch.arange(state[_TEXT_POSITIONS].shape[0])[None]
    return state | (make_schedule(schedule).buffers() if schedule is not None else {})


# --- the table -------------------------------------------------------------------------------------


def _rows(layout: Layout) -> Iterator[Row]:
    yield from _unet_rows(layout)
    yield from _vae_rows(layout)
    yield Row(FILE_TOWER[:-1], "image_encoder", ("model.vision_model",))
    for i in range(layout.mapper_blocks):
        for ours, theirs in _MAPPER_BLOCK:
            names = tuple(f"mapper.blocks.{i}.{name}" for name in theirs)
            yield Row(f"{_MAPPER}resblocks.{i}.{ours}", "image_encoder", names)
    yield Row("cond_stage_model.final_ln", "image_encoder", ("final_layer_norm",))
    yield Row("proj_out", "image_encoder", ("proj_out",))
    yield Row("learnable_vector", "image_encoder", ("uncond_vector",))
    yield Row(TEXT_TOWER[:-1], "text_encoder", ("text_model",))


def _unet_rows(layout: Layout) -> Iterator[Row]:
    levels, blocks = layout.unet_levels, layout.unet_blocks

    def row(original: str, name: str) -> Row:
        return Row(UNET + original, "unet", (name,))

    def resnet(original: str, name: str) -> Iterator[Row]:
        return (row(f"{original}.{ours}", f"{name}.{theirs}") for ours, theirs in _UNET_RESNET)

    for ours, theirs in _UNET_ENDS:
        yield row(ours, theirs)
    for level in range(levels):
        for j in range(blocks):
            block = f"input_blocks.{level * (blocks + 1) + j + 1}"
            yield from resnet(f"{block}.0", f"down_blocks.{level}.resnets.{j}")
            yield row(f"{block}.1", f"down_blocks.{level}.attentions.{j}")
        yield row(f"input_blocks.{(level + 1) * (blocks + 1)}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
    yield from resnet("middle_block.0", "mid_block.resnets.0")
    yield row("middle_block.1", "mid_block.attentions.0")
    yield from resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(levels):  # upwards: the last level first
        attended = levels - 1 - level in layout.unet_attended
        for j in range(blocks + 1):
            block = f"output_blocks.{level * (blocks + 1) + j}"
            yield from resnet(f"{block}.0", f"up_blocks.{level}.resnets.{j}")
            if attended:
                yield row(f"{block}.1", f"up_blocks.{level}.attentions.{j}")
        upsampler = f"output_blocks.{level * (blocks + 1) + blocks}.{2 if attended else 1}.conv"
        yield row(upsampler, f"up_blocks.{level}.upsamplers.0.conv")


def _vae_rows(layout: Layout) -> Iterator[Row]:
    levels = layout.vae_levels

    def row(original: str, name: str, pointwise: bool = False) -> Row:
        return Row(FIRST_STAGE + original, "vae", (name,), pointwise)

    def resnet(original: str, name: str) -> Iterator[Row]:
        return (row(f"{original}.{ours}", f"{name}.{theirs}") for ours, theirs in _VAE_RESNET)

    for name in ("quant_conv", "post_quant_conv"):
        yield row(name, name)
    for coder in ("encoder", "decoder"):
        middle, middle_block = f"{coder}.mid", f"{coder}.mid_block"
        yield row(f"{coder}.conv_in", f"{coder}.conv_in")
        yield row(f"{coder}.norm_out", f"{coder}.conv_norm_out")
        yield row(f"{coder}.conv_out", f"{coder}.conv_out")
        yield from resnet(f"{middle}.block_1", f"{middle_block}.resnets.0")
        yield from resnet(f"{middle}.block_2", f"{middle_block}.resnets.1")
        yield row(f"{middle}.attn_1.norm", f"{middle_block}.attentions.0.group_norm")
        for ours, theirs in _VAE_ATTENTION:
            yield row(f"{middle}.attn_1.{ours}", f"{middle_block}.attentions.0.{theirs}", pointwise=True)
    yield row("decoder.encoder", "decoder.condition_encoder")  # of an asymmetric decoder
    for level in range(levels):
        for j in range(layout.vae_blocks):
            yield from resnet(f"encoder.down.{level}.block.{j}", f"encoder.down_blocks.{level}.resnets.{j}")
        yield row(f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
        up = levels - 1 - level  # numbered from the picture's side there, from the latent's here
        for j in range(layout.vae_up_blocks):
            yield from resnet(f"decoder.up.{up}.block.{j}", f"decoder.up_blocks.{level}.resnets.{j}")
        yield row(f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv")


def _layout(names: Collection[str]) -> Layout:
    """What a checkpoint under published names repeats."""
    inputs = _numbers(names, re.escape(UNET) + r"input_blocks\.(\d+)\.")
    ends = sorted(_numbers(names, re.escape(UNET) + r"input_blocks\.(\d+)\.0\.op\."))  # of levels
    stride = ends[0] if ends else max(len(inputs), 1)
    attended = _numbers(names, re.escape(UNET) + r"input_blocks\.(\d+)\.1\.norm\.")
    return Layout(
        unet_levels=len(inputs) // stride,
        unet_blocks=stride - 1,
        unet_attended=frozenset((block - 1) // stride for block in attended),
        vae_levels=len(_numbers(names, re.escape(FIRST_STAGE) + r"encoder\.down\.(\d+)\.")),
        vae_blocks=len(_numbers(names, re.escape(FIRST_STAGE) + r"encoder\.down\.0\.block\.(\d+)\.")),
        vae_up_blocks=len(_numbers(names, re.escape(FIRST_STAGE) + r"decoder\.up\.0\.block\.(\d+)\.")),
        mapper_blocks=len(_numbers(names, re.escape(_MAPPER) + r"resblocks\.(\d+)\.")),
    )


def _layout_of_components(found: Collection[tuple[str, str]]) -> Layout:
    names = [f"{kind}/{name}" for kind, name in found]
    return Layout(
        unet_levels=len(_numbers(names, r"unet/down_blocks\.(\d+)\.")),
        unet_blocks=len(_numbers(names, r"unet/down_blocks\.0\.resnets\.(\d+)\.")),
        unet_attended=frozenset(_numbers(names, r"unet/down_blocks\.(\d+)\.attentions\.")),
        vae_levels=len(_numbers(names, r"vae/encoder\.down_blocks\.(\d+)\.")),
        vae_blocks=len(_numbers(names, r"vae/encoder\.down_blocks\.0\.resnets\.(\d+)\.")),
        vae_up_blocks=len(_numbers(names, r"vae/decoder\.up_blocks\.0\.resnets\.(\d+)\.")),
        mapper_blocks=len(_numbers(names, r"image_encoder/mapper\.blocks\.(\d+)\.")),
    )


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(pattern, name))}


def _split(name: str, table: Collection[str]) -> tuple[str | None, str]:
    """A tensor's name as a module in the table and the rest, which starts with a dot; None: there is no such module."""
    module = name
    while module not in table:
        module, dot, _ = module.rpartition(".")
        if not dot:
            return None, name
    return module, name.removeprefix(module)


def _current(kind: str, name: str) -> str:
    for component, old, new in _SYNONYMS:
        if kind == component and (replaced := re.sub(old, new, name)) != name:
            return replaced
    return name


def _refuse_unknown(names: list[str]) -> None:
    if names:
        raise CheckpointError(
            f"cannot be converted\n{listing('names without a counterpart', names)}"
            "\ndo: pass Paint by Example or Stable Diffusion 1; scripts/inspect_checkpoint.py says what a file is"
        )
