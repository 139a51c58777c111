"""Merging checkpoints: what changes in one, from others. Pure functions on named tensors.

Every merge is A + change, tensor by tensor; a change is made when it is asked for, so that of memory-mapped
checkpoints one tensor at a time is in memory. Sums are in float32, results in A's type.

Dimensions: D channels · C input channels (4 in Stable Diffusion; 9 for inpainting, 8 and 12 for IC-Light).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.convert import to_diffusers, to_original
from ldm.checkpoint.identify import context_width, family
from ldm.checkpoint.io import CheckpointError, Deferred
from ldm.checkpoint.keys import DIFFUSERS_INPUT_CONV, EMA, EMA_COUNTERS, INPUT_CONV, SCHEDULE_BUFFERS, UNET, listing

State = Mapping[str, Tensor]
Changes = dict[str, Callable[[], Tensor]]  # name => what is added to that tensor, float32; (D, C', 3, 3), C' <= C

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
    _check_families(a, b, c)
    b, c = _named_like(a, b), _named_like(a, c)
    _check_roles(a, b, c)
    names = _common_names(a, b, c)

    def change(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            difference = b.state[name].to(torch.float32, copy=True)
            return difference.sub_(c.state[name].float()).mul_(factor(name))

        return make

    return {name: change(name) for name in names}


def weighted_sum(a: Source, b: Source, factor: Callable[[str], float]) -> Changes:
    """What (1 - M) A + M B changes in A.

    Raises:
        CheckpointError: the two do not belong together.
    """
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
            other = b.state[name]
            own = a.state[name][:, : other.shape[1]] if other.ndim == 4 else a.state[name]
            return other.to(torch.float32, copy=True).sub_(own.float()).mul_(factor(name))

        return make

    return {name: change(name) for name in names}


def offset(base: Source, delta: Source, factor: Callable[[str], float]) -> Changes:
    """What BASE + M DELTA changes in the base, as IC-Light's files are applied.

    Raises:
        CheckpointError: the two do not belong together.

    Source: Zhang et al. 2025 (IC-Light), whose published weights are differences to Stable Diffusion 1.5.
    """
    _check_families(base, delta)
    delta = _named_like(base, delta)
    if (base.in_channels or 0) < (delta.in_channels or 0):
        raise CheckpointError(
            f"{delta.label} has {delta.in_channels} input channels, {base.label} has {base.in_channels}: inflate the "
            f"base first, `python scripts/modify_checkpoints.py BASE OUT --in-channels {delta.in_channels}`"
        )
    names = _common_names(base, delta)
    return {name: lambda name=name: delta.state[name].to(torch.float32, copy=True).mul_(factor(name)) for name in names}


def merged(a: State, changes: Changes) -> dict[str, Tensor | Deferred]:
    """A with the changes added, each when it is written; everything else is A's.

    The deferred tensors raise CheckpointError where a sum does not fit into A's type.
    """

    def added(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            change, own = changes[name](), a[name]
            if change.shape == own.shape:
                result = change.add_(own.float()).to(own.dtype)
            else:  # the input convolution: further channels stay
                result = own.clone()
                first = result[:, : change.shape[1]]
                first.copy_(change.add_(first.float()))
            if result.numel() and not all(bound.isfinite() for bound in result.aminmax()):  # makes no second copy
                raise CheckpointError(
                    f"{name}: the sum does not fit into {str(own.dtype).removeprefix('torch.')}, or an input is not "
                    "finite; `python scripts/inspect_checkpoint.py --scan FILE…` tells which"
                )
            return result

        return make

    return {n: Deferred(t.dtype, t.shape, added(n)) if n in changes else t for n, t in a.items()}


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
        norms = [torch.linalg.vector_norm(tensor.float()).item() ** 2 for tensor in (changes[name](), a[name])]
        sums[block_of(name)] = (tensors + 1, change + norms[0], before + norms[1])
    ordered = sorted(sums, key=lambda block: [int(part) if part.isdigit() else part for part in block.split(".")])
    return {block: BlockNorm(sums[block][0], sums[block][1] ** 0.5, sums[block][2] ** 0.5) for block in ordered}


def block_of(name: str) -> str:
    """The block that a tensor is reported under: `input_blocks.3`, `middle_block`, `first_stage_model.encoder`, …"""
    parts = name.removeprefix(UNET).split(".")
    divided = len(parts) > 2 and (parts[1].isdigit() or parts[0].endswith("_model"))
    return ".".join(parts[: 2 if divided else 1])


def factors(multiplier: float, blocks: Mapping[str, float], names: Iterable[str]) -> Callable[[str], float]:
    """M by tensor name, from one for all and others for blocks.

    Args:
        multiplier: where no block is given.
        blocks: beginnings of names, whole parts between dots, with or without `model.diffusion_model.`; the longest
            that fits a name counts.
        names: of the tensors that there are.

    Raises:
        CheckpointError: a block fits no name.
    """
    names = list(names)

    def fits(block: str, name: str) -> bool:
        return any(f"{candidate}.".startswith(f"{block}.") for candidate in (name, name.removeprefix(UNET)))

    for block in blocks:
        if not any(fits(block, name) for name in names):
            known = ", ".join(dict.fromkeys(block_of(name) for name in names))
            raise CheckpointError(f"block {block}: no tensor's name begins with it; expected one of {known}, or longer")

    def factor(name: str) -> float:
        return blocks[max(fitting, key=len)] if (fitting := [b for b in blocks if fits(b, name)]) else multiplier

    return factor


# --- what belongs together -------------------------------------------------------------------------


def _named_like(a: Source, other: Source) -> Source:
    """Another checkpoint under A's names, where one is a UNet of diffusers and the other holds the published names."""
    if INPUT_CONV in a.state and DIFFUSERS_INPUT_CONV in other.state:
        return Source(other.label, to_original({"unet": dict(other.state)}))
    if DIFFUSERS_INPUT_CONV in a.state and INPUT_CONV in other.state:
        unet = {name: tensor for name, tensor in other.state.items() if name.startswith(UNET)}
        return Source(other.label, to_diffusers(unet)["unet"])
    return other


def _check_families(*sources: Source) -> None:
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
        if families[0] != families[1] or (None not in widths and widths[0] != widths[1]):
            raise CheckpointError(
                f"{other.label} is {families[1]} (context of {widths[1]} channels), {first.label} is {families[0]} "
                f"({widths[0]}): weights of one mean nothing in the other; pass checkpoints of one family"
            )
    widths = [source.in_channels for source in sources]
    for source in sources:
        if source.in_channels == 5 and len(set(widths)) > 1:
            raise CheckpointError(
                f"{source.label} has 5 input channels: a depth model (noisy latent 4 + depth 1), "
                "no inpainting model (9); pass the one with 9"
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
