"""Merging checkpoints while they are written, and making Stable Diffusion a starting point for other models.

Sums are in float32, a few rows at a time, so that mapped checkpoints stay out of memory; results are in A's type.
Dimensions: D channels · C input channels (4 in Stable Diffusion; 9 for inpainting, 8 and 12 for IC-Light).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint import keys
from ldm.checkpoint.convert import to_diffusers, to_original
from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import DIFFUSERS_INPUT_CONV, INPUT_CONV, INPUT_CONVS, UNET, State

_PIECE = 2**20  # numbers that are merged at a time
_NO_WEIGHTS = (*keys.SCHEDULE_BUFFERS, *keys.EMA_COUNTERS, "position_ids")


class Source(NamedTuple):
    """A checkpoint and its name in messages."""

    label: str
    state: State


class Merge(NamedTuple):
    """A checked merge."""

    sources: tuple[Source, ...]  # A and the others, under A's names
    names: list[str]  # of the tensors that change, in A's order
    formula: Callable[..., Tensor]  # (M, A's tensor, the others' tensors) => float32

    def pieces(self, name: str, m: float, own: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield A's tensor `own` in slices of a few rows, each with what it becomes: float32 copies stay small."""
        a, *others = (torch.atleast_1d(x) for x in (own, *(source.state[name] for source in self.sources[1:])))
        if a.shape != others[0].shape:  # a wider input convolution: its further channels stay
            a = a[:, : others[0].shape[1]]
        rows = max(1, len(a) * _PIECE // max(1, a.numel()))
        try:
            for one, *rest in zip(*(x.split(rows) for x in (a, *others)), strict=True):
                yield one, self.formula(m, one, *rest)
        except RuntimeError as error:  # of a type that torch cannot compute with, or without memory
            raise CheckpointError(f"{name}: cannot be merged, nothing was changed: {error}") from error


def add_difference(a: Source, b: Source, c: Source) -> Merge:
    """Prepare A + M (B - C): an inpainting model A takes on what a custom model B learnt beyond its base C.

    A's first input channels are merged if it has more than B and C.
    """
    merge = _prepared(_added, a, b, c)
    custom, base = (keys.input_channels(source.state) for source in (b, c))
    if custom and base and custom != base:
        wrong, wanted = (c, "B's base as C") if custom < base else (b, "a custom model as B")
        raise CheckpointError(f"{wrong.label} looks like an inpainting model (B {custom}, C {base}); pass {wanted}")
    return merge


def weighted_sum(a: Source, b: Source) -> Merge:
    """Prepare (1 - M) A + M B; with M = 1 it is B, number by number."""
    return _prepared(lambda m, a, b: a.to(torch.float32, copy=True).lerp_(b.float(), m), a, b)


def offset(base: Source, delta: Source) -> Merge:
    """Prepare BASE + M DELTA, as IC-Light's files are applied.

    Source: Zhang et al. 2025 (IC-Light), whose published weights are differences to Stable Diffusion 1.5.
    """
    if keys.is_difference(delta.state) is False:
        raise CheckpointError(f"{delta.label} is a whole network, not a difference like IC-Light's; use weighted-sum")
    return _prepared(_added, base, delta, differences=True)


def _added(m: float, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Compute A + M (B - C) in float32."""
    difference = b.to(torch.float32, copy=True)
    return (difference if c is None else difference.sub_(c.float())).mul_(m).add_(a.float())


def merged(merge: Merge, multipliers: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the result, in A's order and types; refuse a sum that does not fit into A's type."""
    names = set(merge.names)
    for name, own in merge.sources[0].state.items():
        if name in names:
            own, largest = own.clone(), torch.finfo(own.dtype).max  # beyond it some types have Inf, some NaN
            for piece, value in merge.pieces(name, multipliers[name], own):
                if value.numel() and not all(abs(bound.item()) <= largest for bound in value.aminmax()):
                    kind = str(own.dtype).removeprefix("torch.")
                    raise CheckpointError(f"{name}: the sum does not fit into {kind} (inspect_checkpoint.py --scan)")
                piece.copy_(value)
        yield name, own


def _prepared(formula: Callable[..., Tensor], first: Source, *others: Source, differences: bool = False) -> Merge:
    """Refuse what does not belong together; rename the others to the first one's layout, published or diffusers'."""
    sources = (first, *others)
    kinds = [keys.identify(source.state) for source in sources]
    additions = [next((what for what in keys.ADDITIONS if kind.startswith(what)), "") for kind in kinds]
    for (label, state), kind, addition in zip(sources, kinds, additions, strict=True):
        if keys.is_difference(state) and not (differences and state is not first.state):
            raise CheckpointError(f"{label} is a difference of two networks; add it to one (offset BASE DELTA OUT)")
        if addition and len(set(additions)) > 1 and INPUT_CONV not in state:  # a ControlNet's file may hold both
            raise CheckpointError(f"{label} is a {addition}, no model by itself; pass the checkpoint of a model")
        if "averaged" in kind:
            raise CheckpointError(f"{label}: {keys.misfit(state, 'choose weights of its UNet with --ema')}")
    own = keys.family(first.state)
    for label, state in others:
        if own and (theirs := keys.family(state)) and theirs != own:
            raise CheckpointError(f"{label} is {theirs}, {first.label} is {own}; pass checkpoints of one family")
    counts = {label: count for label, state in sources if (count := keys.input_channels(state))}
    own, latent = counts.get(first.label), keys.latent_channels(first.state)
    if own and set(counts.values()) - {own, latent}:
        listed = ", ".join(f"{label} {count}" for label, count in counts.items())
        remedy = f"pass checkpoints of one width, or with {latent}"
        if own == latent:
            inflate = f"modify_checkpoints.py IN OUT --in-channels {max(counts.values())}"
            remedy = f"exchange them if swapped, or inflate {first.label} with `{inflate}`"
        raise CheckpointError(f"{INPUT_CONV}: got input channels {listed}; {remedy}")
    sources = (first, *(_named_like(first, other) for other in others))
    return Merge(sources, _common_names(*sources), formula)


def _named_like(first: Source, other: Source) -> Source:
    state = keys.with_text_level(other.state, like=first.state)
    if INPUT_CONV in first.state and DIFFUSERS_INPUT_CONV in state:
        state = to_original({"unet": state})
    elif DIFFUSERS_INPUT_CONV in first.state and INPUT_CONV in state:
        state = to_diffusers({name: x for name, x in state.items() if name.startswith(UNET)})["unet"]
    return Source(other.label, state)


def _common_names(a: Source, *others: Source) -> list[str]:
    """Return the weights that all have, in A's order; A alone may have more, or a wider input convolution."""
    sources = (a, *others)
    weights = [{name for name, x in state.items() if x.is_floating_point()} for _, state in sources]
    weights = [{n for n in own if not (n.endswith(_NO_WEIGHTS) or n.startswith(keys.EXTRAS))} for own in weights]
    names = [name for name in a.state if all(name in own for own in weights)]
    problems: dict[str, list[str]] = {}
    for (label, _), own in zip(sources, weights, strict=True):
        if missing := sorted(set.union(*weights[1:]) - own):
            having = " and ".join(other for other, state in others if missing[0] in state)
            problems[f"not in {label} but in {having}"] = missing
    for label, state in others:
        shapes = {name: (state[name].shape, a.state[name].shape) for name in names}
        problems[f"of another shape in {label}"] = [
            f"{name}: {list(theirs)}, {list(own)} in {a.label}"
            for name, (theirs, own) in shapes.items()
            if theirs != own and not (name in INPUT_CONVS and theirs == (own[0], min(own[1], theirs[1]), *own[2:]))
        ]
    lines = [keys.listing(what, wrong) for what, wrong in problems.items() if wrong]
    if lines or not names:
        what = "\n".join(lines) or "  no weight has the same name in all"
        kinds = ", ".join(f"{label} is {keys.identify(state)}" for label, state in sources)
        remedy = f"do: pass checkpoints of one model, or merge a part alone (--only unet); {kinds}"
        raise CheckpointError(f"the checkpoints do not fit each other\n{what}\n{remedy}")
    return names


def input_conv(state: State) -> str:
    """Return the name of the UNet's first convolution (D, C, 3, 3), in the published layout or diffusers'."""
    if keys.identify(state).startswith("ControlNet"):
        raise CheckpointError("a ControlNet reads four channels beside any UNet; pass the checkpoint of the UNet")
    if not keys.input_channels(state):
        raise CheckpointError(f"no convolution {' or '.join(INPUT_CONVS)}; {keys.misfit(state)}")
    return next(key for key in INPUT_CONVS if key in state)


def inflate_input_conv(state: State, in_channels: int = 9, init: State | None = None) -> dict[str, Tensor]:
    """Give the UNet's first convolution (D, C, 3, 3) more input channels: zero, or the last of `init`, of that width.

    Source: Yang et al. 2023 (Paint by Example), section 3.1: the network is initialised from Stable Diffusion.
    """
    key = input_conv(state)
    weight = state[key]
    old, latent = weight.shape[1], keys.latent_channels(state)
    if old > latent:
        raise CheckpointError(f"{key}: got {old} input channels, expected {latent}; it is inflated already")
    if in_channels <= old:
        raise CheckpointError(f"{key}: has {old} input channels, and {in_channels} are asked for; ask for more")
    inflated = weight.new_zeros(weight.shape[0], in_channels, *weight.shape[2:])
    if init is not None:
        source = init[input_conv(init)]
        if source.shape != inflated.shape:
            got, expected = list(source.shape), list(inflated.shape)
            raise CheckpointError(f"the new channels' checkpoint: got an input convolution {got}, expected {expected}")
        inflated[:, old:] = source[:, old:]
    inflated[:, :old] = weight
    return {**state, key: inflated}
