"""Merging checkpoints: what changes in one, from others. Pure functions on named tensors.

Every merge goes tensor by tensor; a sum is made when it is asked for, so that of memory-mapped checkpoints one tensor
at a time is in memory. Sums are in float32, results in A's type.

Dimensions: D channels · C input channels (4 in Stable Diffusion; 9 for inpainting, 8 and 12 for IC-Light).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.convert import to_diffusers, to_original
from ldm.checkpoint.identify import context_width, family, identify, is_difference, latent_channels
from ldm.checkpoint.io import CheckpointError, Deferred
from ldm.checkpoint.keys import DIFFUSERS_INPUT_CONV, EMA, EMA_COUNTERS, INPUT_CONV, SCHEDULE_BUFFERS, UNET, listing

State = Mapping[str, Tensor]
Changes = dict[str, Callable[[], Tensor]]  # name => what that tensor becomes, float32; (D, C', 3, 3), C' <= C

INPUT_CONVS = (INPUT_CONV, DIFFUSERS_INPUT_CONV)


class Source(NamedTuple):
    """A checkpoint and what messages call it."""

    label: str
    state: State

    @property
    def in_channels(self) -> int | None:
        """C; None: no UNet."""
        return next((self.state[key].shape[1] for key in INPUT_CONVS if key in self.state), None)


def add_difference(a: Source, b: Source, c: Source, factor: Callable[[str], float]) -> Changes:
    """What A + M (B - C) changes in A: an inpainting model A takes on what a custom model B learnt beyond its base C.

    Where A's input convolution has more channels than those of B and C, the first ones are merged: the noisy latent's.

    Args:
        a, b, c: in either layout; B and C are renamed where A's is the other.
        factor: M by tensor name.

    Raises:
        CheckpointError: the three do not belong together; the message says which mistake it looks like.
    """
    _check_networks(a, b, c)
    _check_families(a, b, c)
    b, c = _named_like(a, b), _named_like(a, c)
    _check_roles(a, b, c)
    names = _common_names(a, b, c)

    def change(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            difference = b.state[name].to(torch.float32, copy=True).sub_(c.state[name].float())
            return difference.mul_(factor(name)).add_(_shared(a.state[name], difference).float())

        return make

    return {name: change(name) for name in names}


def weighted_sum(a: Source, b: Source, factor: Callable[[str], float]) -> Changes:
    """What (1 - M) A + M B changes in A; with M = 1 it is B, number by number.

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
    names = _common_names(a, b)

    def change(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            other = b.state[name].float()
            return _shared(a.state[name], other).to(torch.float32, copy=True).lerp_(other, factor(name))

        return make

    return {name: change(name) for name in names}


def offset(base: Source, delta: Source, factor: Callable[[str], float]) -> Changes:
    """What BASE + M DELTA changes in the base, as IC-Light's files are applied.

    Raises:
        CheckpointError: the two do not belong together.

    Source: Zhang et al. 2025 (IC-Light), whose published weights are differences to Stable Diffusion 1.5.
    """
    _check_networks(base)
    if is_difference(delta.state) is False:
        raise CheckpointError(
            f"{delta.label} is a whole network, no difference of two: added, it would double the weights; pass a file "
            "of differences such as IC-Light's, or use add-difference or weighted-sum"
        )
    _check_families(base, delta)
    delta = _named_like(base, delta)
    if (base.in_channels or 0) < (delta.in_channels or 0):
        raise CheckpointError(
            f"{delta.label} has {delta.in_channels} input channels, {base.label} has {base.in_channels}: inflate the "
            f"base first, `python scripts/modify_checkpoints.py BASE OUT --in-channels {delta.in_channels}`"
        )
    names = _common_names(base, delta)

    def change(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            difference = delta.state[name].to(torch.float32, copy=True).mul_(factor(name))
            return difference.add_(_shared(base.state[name], difference).float())

        return make

    return {name: change(name) for name in names}


def _shared(own: Tensor, other: Tensor) -> Tensor:
    """A's tensor; of a wider input convolution the first channels, as many as the other has."""
    return own if own.shape == other.shape else own[:, : other.shape[1]]


def merged(a: State, changes: Changes) -> dict[str, Tensor | Deferred]:
    """A with the changes, each made when it is written; everything else is A's.

    The deferred tensors raise CheckpointError where a sum does not fit into A's type.
    """

    def changed(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            value, own = changes[name](), a[name]
            largest = torch.finfo(own.dtype).max  # beyond it some types have Inf, some NaN, and some stay there
            if value.numel() and not all(abs(bound.item()) <= largest for bound in value.aminmax()):
                raise CheckpointError(
                    f"{name}: the sum does not fit into {str(own.dtype).removeprefix('torch.')}, or an input is not "
                    "finite; `python scripts/inspect_checkpoint.py --scan FILE…` tells which"
                )
            if value.shape == own.shape:
                result = value.to(own.dtype)
            else:  # the input convolution: further channels stay
                result = own.clone()
                _shared(result, value).copy_(value)
            return result

        return make

    return {n: Deferred(t.dtype, t.shape, changed(n)) if n in changes else t for n, t in a.items()}


class BlockNorm(NamedTuple):
    """How far a merge moves a block: Euclidean norms over all its tensors that change."""

    tensors: int
    change: float
    before: float


def block_norms(a: State, changes: Changes) -> dict[str, BlockNorm]:
    """Norms of the change and of what is changed by block, ordered by names and numbers."""
    sums: dict[str, tuple[int, float, float]] = {}
    for name in tqdm([name for name in a if name in changes], desc="comparing", unit="tensor", delay=3):
        tensors, change, before = sums.get(block_of(name), (0, 0.0, 0.0))
        own, value = a[name].float(), changes[name]()
        norms = [torch.linalg.vector_norm(part).item() ** 2 for part in (value.sub_(_shared(own, value)), own)]
        sums[block_of(name)] = (tensors + 1, change + norms[0], before + norms[1])
    ordered = sorted(sums, key=lambda block: [int(part) if part.isdigit() else part for part in block.split(".")])
    return {block: BlockNorm(sums[block][0], sums[block][1] ** 0.5, sums[block][2] ** 0.5) for block in ordered}


def block_of(name: str) -> str:
    """The block that a tensor is reported under: `input_blocks.3`, `middle_block`, `first_stage_model.encoder`, …"""
    parts = name.removeprefix(UNET).split(".")
    divided = len(parts) > 2 and (parts[1].isdigit() or parts[0].endswith("_model"))
    return ".".join(parts[: 2 if divided else 1])


def factors(multiplier: float, blocks: Mapping[str, float]) -> Callable[[str], float]:
    """M by tensor name, from one for all and others for blocks.

    Args:
        multiplier: where no block is given.
        blocks: beginnings of names, whole parts between dots, with or without `model.diffusion_model.`; the longest
            that fits a name counts.
    """

    def factor(name: str) -> float:
        return blocks[max(fitting, key=len)] if (fitting := [b for b in blocks if _fits(b, name)]) else multiplier

    return factor


def check_blocks(blocks: Iterable[str], changes: Changes) -> None:
    """Raise CheckpointError where a block fits no name of what is merged."""
    for block in blocks:
        if not any(_fits(block, name) for name in changes):
            known = ", ".join(dict.fromkeys(block_of(name) for name in changes))
            raise CheckpointError(f"block {block}: no merged tensor's name begins with it; expected {known}, or longer")


def _fits(block: str, name: str) -> bool:
    return any(f"{candidate}.".startswith(f"{block}.") for candidate in (name, name.removeprefix(UNET)))


# --- what belongs together -------------------------------------------------------------------------


def _named_like(a: Source, other: Source) -> Source:
    """Another checkpoint under A's names, where one is a UNet of diffusers and the other holds the published names."""
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
                f"{source.label} is a difference of two networks (the gains of its last norm are about 0), no network; "
                "add it to one with `python scripts/merge_checkpoints.py offset BASE DELTA OUT`"
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
                "say which is meant: --ema last, or --ema averaged"
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
            f"{b.label} is an inpainting model already {counts}: pass the custom model that is none, or as C the "
            "inpainting model that B was made from"
        )


def _common_names(a: Source, *others: Source) -> list[str]:
    """The names to merge, in A's order: weights that all have; A may have more, the others may not.

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
