"""Merging checkpoints, and making Stable Diffusion a starting point for other models: pure functions on named tensors.

A merge is checked first and computed tensor by tensor when it is written, so that of memory-mapped checkpoints one
tensor at a time is in memory. Sums are in float32, results in A's type.

Dimensions: D channels · C input channels (4 in Stable Diffusion; 9 for inpainting, 8 and 12 for IC-Light).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.convert import to_diffusers, to_original
from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import (
    CONTROL,
    DIFFUSERS_INPUT_CONV,
    EMA,
    EMA_COUNTERS,
    FILE_TOWER,
    INPUT_CONV,
    SCHEDULE_BUFFERS,
    TEXT_TOWER,
    TOWER,
    UNET,
    context_width,
    family,
    identify,
    is_difference,
    latent_channels,
    listing,
    to_file_keys,
)

State = Mapping[str, Tensor]
Factor = Callable[[str], float]  # tensor name => M

INPUT_CONVS = (INPUT_CONV, DIFFUSERS_INPUT_CONV)


class Source(NamedTuple):
    """A checkpoint and its name in messages."""

    label: str
    state: State

    @property
    def in_channels(self) -> int | None:
        """C, or None without a UNet."""
        return next((self.state[key].shape[1] for key in INPUT_CONVS if key in self.state), None)


class Merge(NamedTuple):
    """A checked merge.

    Attributes:
        sources: A and the others, under A's names.
        names: the tensors that change, in A's order.
        formula: (M, A's tensor, the others' tensors) => float32. Of a wider input convolution A's tensor is cut to the
            first channels, as many as the others have.
    """

    sources: tuple[Source, ...]
    names: list[str]
    formula: Callable[..., Tensor]

    def changed(self, name: str, factor: Factor) -> Tensor:
        """Compute what a tensor of A becomes, in float32.

        Raises:
            CheckpointError: torch cannot compute with the type, or has no memory.
        """
        own, *others = (source.state[name] for source in self.sources)
        try:
            return self.formula(factor(name), _shared(own, others[0]), *others)
        except RuntimeError as error:
            raise CheckpointError(f"{name}: cannot be merged, nothing was changed: {error}") from error


def add_difference(a: Source, b: Source, c: Source) -> Merge:
    """Prepare A + M (B - C): an inpainting model A takes on what a custom model B learnt beyond its base C.

    Where A's input convolution has more channels than those of B and C, the first ones are merged: the noisy latent's.

    Args:
        a, b, c: in either layout; B and C are renamed where A's is the other.

    Raises:
        CheckpointError: the three do not belong together; the message says which mistake it looks like.
    """
    _check_networks(a, b, c)
    _check_families(a, b, c)
    b, c = _named_like(a, b), _named_like(a, c)
    _check_roles(a, b, c)

    def formula(m: float, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return b.to(torch.float32, copy=True).sub_(c.float()).mul_(m).add_(a.float())

    return Merge((a, b, c), _common_names(a, b, c), formula)


def weighted_sum(a: Source, b: Source) -> Merge:
    """Prepare (1 - M) A + M B; with M = 1 it is B, number by number.

    Raises:
        CheckpointError: the two do not belong together.
    """
    _check_networks(a, b)
    _check_families(a, b)
    b = _named_like(a, b)
    if (a.in_channels or 0) < (b.in_channels or 0):
        raise CheckpointError(
            f"{b.label} has {b.in_channels} input channels, {a.label} has {a.in_channels}: "
            "pass the wider one first, or inflate the other (scripts/modify_checkpoints.py --in-channels)"
        )

    def formula(m: float, a: Tensor, b: Tensor) -> Tensor:
        return a.to(torch.float32, copy=True).lerp_(b.float(), m)

    return Merge((a, b), _common_names(a, b), formula)


def offset(base: Source, delta: Source) -> Merge:
    """Prepare BASE + M DELTA, as IC-Light's files are applied.

    Raises:
        CheckpointError: the two do not belong together.

    Source: Zhang et al. 2025 (IC-Light), whose published weights are differences to Stable Diffusion 1.5.
    """
    _check_networks(base)
    if is_difference(delta.state) is False:
        raise CheckpointError(
            f"{delta.label} is a whole network, not a difference of two: adding it would double the weights; pass a "
            "file of differences such as IC-Light's, or use add-difference or weighted-sum"
        )
    _check_families(base, delta)
    delta = _named_like(base, delta)
    if (base.in_channels or 0) < (delta.in_channels or 0):
        raise CheckpointError(
            f"{delta.label} has {delta.in_channels} input channels, {base.label} has {base.in_channels}: inflate the "
            f"base first, `python scripts/modify_checkpoints.py BASE OUT --in-channels {delta.in_channels}`"
        )

    def formula(m: float, base: Tensor, delta: Tensor) -> Tensor:
        return delta.to(torch.float32, copy=True).mul_(m).add_(base.float())

    return Merge((base, delta), _common_names(base, delta), formula)


def merged(merge: Merge, factor: Factor) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the result, in A's order and types; what does not change is A's.

    Raises:
        CheckpointError: a sum does not fit into A's type.
    """
    names = set(merge.names)
    for name, own in merge.sources[0].state.items():
        yield name, _rounded(name, merge.changed(name, factor), own) if name in names else own


def _rounded(name: str, value: Tensor, own: Tensor) -> Tensor:
    largest = torch.finfo(own.dtype).max  # beyond it some types have Inf, some NaN, and some stay there
    if value.numel() and not all(abs(bound.item()) <= largest for bound in value.aminmax()):
        raise CheckpointError(
            f"{name}: the sum does not fit into {str(own.dtype).removeprefix('torch.')}, or an input is not finite; "
            "`python scripts/inspect_checkpoint.py --scan FILE…` tells which"
        )
    if value.shape == own.shape:
        return value.to(own.dtype)
    result = own.clone()  # the input convolution: further channels stay
    _shared(result, value).copy_(value)
    return result


def _shared(own: Tensor, other: Tensor) -> Tensor:
    """Return A's tensor; of a wider input convolution the first channels, as many as the other has."""
    return own if own.shape == other.shape else own[:, : other.shape[1]]


class BlockNorm(NamedTuple):
    """How far a merge moves a block: Euclidean norms over all its tensors that change."""

    tensors: int
    change: float
    before: float


def block_norms(merge: Merge, factor: Factor) -> dict[str, BlockNorm]:
    """Compute the norms of the change and of what is changed by block, ordered by names and numbers."""
    sums: dict[str, tuple[int, float, float]] = {}
    for name in tqdm(merge.names, desc="comparing", unit="tensor", delay=3):
        tensors, change, before = sums.get(block_of(name), (0, 0.0, 0.0))
        own, value = merge.sources[0].state[name].float(), merge.changed(name, factor)
        norms = [torch.linalg.vector_norm(part).item() ** 2 for part in (value.sub_(_shared(own, value)), own)]
        sums[block_of(name)] = (tensors + 1, change + norms[0], before + norms[1])
    ordered = sorted(sums, key=lambda block: [int(part) if part.isdigit() else part for part in block.split(".")])
    return {block: BlockNorm(sums[block][0], sums[block][1] ** 0.5, sums[block][2] ** 0.5) for block in ordered}


def block_of(name: str) -> str:
    """Return the block of a tensor in reports: `input_blocks.3`, `middle_block`, `first_stage_model.encoder`, …"""
    parts = name.removeprefix(UNET).split(".")
    divided = len(parts) > 2 and (parts[1].isdigit() or parts[0].endswith("_model"))
    return ".".join(parts[: 2 if divided else 1])


def factors(multiplier: float, blocks: Mapping[str, float]) -> Factor:
    """Return M by tensor name.

    Args:
        multiplier: M of the names that no block fits.
        blocks: M by the beginning of names, whole parts between dots, with or without `model.diffusion_model.`; the
            longest that fits a name counts.
    """

    def factor(name: str) -> float:
        return blocks[max(fitting, key=len)] if (fitting := [b for b in blocks if _fits(b, name)]) else multiplier

    return factor


def check_blocks(blocks: Iterable[str], names: Iterable[str]) -> None:
    """Raise CheckpointError where a block fits none of the merged names."""
    for block in blocks:
        if not any(_fits(block, name) for name in names):
            known = ", ".join(dict.fromkeys(block_of(name) for name in names))
            raise CheckpointError(f"block {block}: no merged tensor's name begins with it; expected {known}, or longer")


def _fits(block: str, name: str) -> bool:
    return any(f"{candidate}.".startswith(f"{block}.") for candidate in (name, name.removeprefix(UNET)))


# --- what belongs together -------------------------------------------------------------------------


def _named_like(a: Source, other: Source) -> Source:
    """Rename another checkpoint to A's names, where one is a UNet of diffusers and the other has published names."""
    if INPUT_CONV in a.state and DIFFUSERS_INPUT_CONV in other.state:
        return Source(other.label, to_original({"unet": dict(other.state)}))
    if DIFFUSERS_INPUT_CONV in a.state and INPUT_CONV in other.state:
        unet = {name: tensor for name, tensor in other.state.items() if name.startswith(UNET)}
        return Source(other.label, to_diffusers(unet)["unet"])
    return other


def _check_networks(*sources: Source) -> None:
    for source in sources:
        if is_difference(source.state):
            raise CheckpointError(
                f"{source.label} is a difference of two networks (the gains of its last norm are about 0), not a "
                "network; add it to one with `python scripts/merge_checkpoints.py offset BASE DELTA OUT`"
            )


def _check_families(*sources: Source) -> None:
    additions = [next((k for k in ("LoRA", "ControlNet") if identify(s.state).startswith(k)), "") for s in sources]
    for source, kind in zip(sources, additions, strict=True):
        if kind and len(set(additions)) > 1 and INPUT_CONV not in source.state:  # a ControlNet's file may hold both
            raise CheckpointError(f"{source.label} is a {kind}, no model by itself; pass the checkpoint of a model")
    for source in sources:
        if averaged := sum(name.startswith(EMA) and name not in EMA_COUNTERS for name in source.state):
            raise CheckpointError(
                f"{source.label} holds its UNet twice, the second time averaged ({averaged} tensors {EMA}*); "
                "choose with --ema last, or --ema averaged"
            )
    first, *others = sources
    for other in others:
        widths = [context_width(source.state) for source in (first, other)]
        families = [family(source.state) for source in (first, other)]
        if any(None not in pair and pair[0] != pair[1] for pair in (families, widths)):
            raise CheckpointError(
                f"{other.label} is {families[1]} (context of {widths[1]} channels), {first.label} is {families[0]} "
                f"({widths[0]}): weights of one mean nothing in the other; pass checkpoints of one family"
            )
    widths = {source.in_channels for source in sources} - {None}
    for source in sources:
        if source.in_channels == 5 and len(widths) > 1:
            raise CheckpointError(
                f"{source.label} has 5 input channels: a depth model (noisy latent 4 + depth 1), "
                "no inpainting model (9); pass the one with 9"
            )
    latent = latent_channels(first.state)
    if len(widths - {latent}) > 1:
        key = INPUT_CONV if INPUT_CONV in first.state else DIFFUSERS_INPUT_CONV
        counts = ", ".join(f"{source.label} {source.in_channels}" for source in sources)
        raise CheckpointError(
            f"{key}: channels beyond the noisy latent's {latent} mean something else at every width (input channels: "
            f"{counts}); pass checkpoints of one width, or with {latent} channels beside it"
        )


def _check_roles(a: Source, b: Source, c: Source) -> None:
    if not (a.in_channels and b.in_channels and c.in_channels):
        return  # a part without UNet
    counts = f"(input channels: A {a.in_channels}, B {b.in_channels}, C {c.in_channels})"
    if b.in_channels > a.in_channels:
        raise CheckpointError(
            f"{a.label} and {b.label} look swapped {counts}: A is the inpainting model, B the custom one; exchange them"
        )
    if c.in_channels > b.in_channels:
        raise CheckpointError(
            f"{c.label} looks like an inpainting model {counts}: C is the base that B was made from; "
            "pass Stable Diffusion itself, with 4 channels"
        )
    if b.in_channels > c.in_channels:
        raise CheckpointError(
            f"{b.label} is an inpainting model already {counts}: pass a custom model without inpainting, or as C the "
            "inpainting model that B was made from"
        )


def _common_names(a: Source, *others: Source) -> list[str]:
    """Return the weights that all have, in A's order; A may have more, the others may not.

    Raises:
        CheckpointError: a name is missing, or a shape differs beyond the input convolution's channels.
    """
    weights = [{n for n, t in source.state.items() if _is_weight(n, t)} for source in (a, *others)]
    wanted = set.union(*weights[1:])
    lines = []
    for source, own in zip((a, *others), weights, strict=True):
        if missing := sorted(wanted - own):
            having = " and ".join(other.label for other in others if other is not source and missing[0] in other.state)
            lines.append(listing(f"not in {source.label} but in {having}", missing))
    names = [name for name in a.state if all(name in own for own in weights)]
    for other in others:
        differing = [
            f"{name}: {list(other.state[name].shape)}, {list(a.state[name].shape)} in {a.label}"
            for name in names
            if not _shape_fits(name, other.state[name].shape, a.state[name].shape)
        ]
        if differing:
            lines.append(listing(f"of another shape in {other.label}", differing))
    if lines or not names:
        what = "\n".join(lines) or "  no weight has the same name in all"
        raise CheckpointError(
            f"the checkpoints do not fit each other\n{what}\n"
            "do: pass checkpoints of one model, or merge a part alone (--only unet)"
        )
    return names


def _shape_fits(name: str, shape: torch.Size, own: torch.Size) -> bool:
    if name in INPUT_CONVS and len(shape) == len(own) == 4:
        return (shape[0], *shape[2:]) == (own[0], *own[2:]) and shape[1] <= own[1]
    return shape == own


def _is_weight(name: str, tensor: Tensor) -> bool:
    counted = name in SCHEDULE_BUFFERS or name in EMA_COUNTERS or name.endswith("position_ids")
    return tensor.is_floating_point() and not counted


# --- starting points for training ------------------------------------------------------------------

_FULL_SIZE_CHANNELS = 320  # of the UNet of Stable Diffusion v1, whose exemplar encoder is CLIP ViT-L/14
_VIT_L_14 = {"width": 1024, "layers": 24, "patch": 14, "positions": 257}
_EMBEDDINGS = [
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
]
_LAYER = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"] + [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]


def input_conv(state: State) -> str:
    """Return the name of the UNet's first convolution (D, C, 3, 3), in the published layout or diffusers'.

    Raises:
        CheckpointError: there is none, or it is a ControlNet's.
    """
    if any(name.startswith(CONTROL) for name in state):
        raise CheckpointError(
            "this is a ControlNet, which sees only the noisy latent's four channels beside a UNet of any width; pass "
            "the UNet's checkpoint"
        )
    for key in INPUT_CONVS:
        if key in state and state[key].ndim == 4:
            return key
    raise CheckpointError(
        f"no convolution {INPUT_CONV} or {DIFFUSERS_INPUT_CONV}; pass Stable Diffusion in CompVis' names, "
        "or the UNet of a diffusers folder"
    )


def inflate_input_conv(state: State, in_channels: int = 9, init: State | None = None) -> dict[str, Tensor]:
    """Give the UNet's first convolution more input channels, which have no effect until they are trained.

    Args:
        state: a checkpoint, or a UNet of diffusers; its convolution is (D, C, 3, 3), C = 4 in Stable Diffusion: x_t.
        in_channels: channels afterwards; the new ones (for inpainting z_masked, keep_mask) follow the existing.
        init: a checkpoint with (D, in_channels, 3, 3), from whose last channels the new ones are taken; None: zero.

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
        source = init[input_conv(init)]
        if source.shape != inflated.shape:
            raise CheckpointError(
                f"the checkpoint for the new channels: got an input convolution {list(source.shape)}, "
                f"expected {list(inflated.shape)}; pass one of the wanted width"
            )
        inflated[:, old:] = source[:, old:]
    inflated[:, :old] = weight
    return {**state, key: inflated}


def add_clip_tower(state: State, clip_state: State) -> dict[str, Tensor]:
    """Put the weights of CLIP's image tower where the exemplar encoder expects them; drop the text tower.

    Args:
        state: a checkpoint. When its UNet has the full size, the tower must be ViT-L/14.
        clip_state: `CLIPModel` or `CLIPVisionModel` of transformers, with or without the `vision_model.` level.

    Raises:
        CheckpointError: `clip_state` holds no complete image tower, or one of another size.
    """
    tower = _image_tower(clip_state)
    patches = tower["embeddings.patch_embedding.weight"]
    size = {
        "width": patches.shape[0],
        "layers": sum(name.endswith("layer_norm1.weight") for name in tower),
        "patch": patches.shape[-1],
        "positions": tower["embeddings.position_embedding.weight"].shape[0],
    }
    if INPUT_CONV in state and state[INPUT_CONV].shape[0] == _FULL_SIZE_CHANNELS and size != _VIT_L_14:
        got, expected = (", ".join(f"{what} {value}" for what, value in sizes.items()) for sizes in (size, _VIT_L_14))
        raise CheckpointError(
            f"the CLIP image tower has {got}, expected ViT-L/14 with {expected}; pass openai/clip-vit-large-patch14"
        )
    kept = {name: tensor for name, tensor in state.items() if not name.startswith((FILE_TOWER, TEXT_TOWER))}
    return kept | to_file_keys({TOWER + name: tensor for name, tensor in tower.items()})


def _image_tower(clip_state: State) -> dict[str, Tensor]:
    """Return the complete tower's tensors under bare names (`embeddings.…`, `encoder.layers.0.…`)."""
    level = "vision_model." if any(name.startswith("vision_model.") for name in clip_state) else ""
    bare = {name.removeprefix(level): tensor for name, tensor in clip_state.items() if name.startswith(level)}
    layers = len({name.split(".")[2] for name in bare if name.startswith("encoder.layers.")})
    modules = [
        "pre_layrnorm",
        "post_layernorm",
        *(f"encoder.layers.{i}.{part}" for i in range(layers) for part in _LAYER),
    ]
    names = [*_EMBEDDINGS, *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))]
    missing = [name for name in names if name not in bare]
    if missing or not layers:
        raise CheckpointError(
            f"no complete CLIP image tower: {', '.join(missing[:3])} missing; pass CLIPModel or CLIPVisionModel weights"
        )
    return {name: bare[name] for name in names}
