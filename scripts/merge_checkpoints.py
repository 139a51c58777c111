#!/usr/bin/env python
"""Merge checkpoints, tensor by tensor: A + M (B - C), (1 - M) A + M B, or BASE + M DELTA.

    python scripts/merge_checkpoints.py add-difference sd-inpainting.ckpt custom.safetensors sd.ckpt OUT.safetensors

makes a custom model an inpainting model without training. `--dry-run` writes nothing and shows how far each block
moves.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import DIFFUSERS_INPUT_CONV, EMA, FIRST_STAGE, UNET, drop_ema, identify, swap_in_ema
from ldm.checkpoint.merge import Merge, Source, add_difference, merged, offset, weighted_sum
from scripts.checkpoint_cli import check_output, one_line_errors, provenance

MERGES = {
    "add-difference": (add_difference, {"A": "model to change", "B": "custom model", "C": "base that B was made from"}),
    "weighted-sum": (weighted_sum, {"A": "model with weight 1 - M", "B": "model with weight M"}),
    "offset": (offset, {"BASE": "a model", "DELTA": "differences, such as IC-Light's"}),
}
PARTS = {"unet": UNET, "first-stage": FIRST_STAGE, "encoder": "cond_stage_model."}


def read_source(label: str, path: Path, *, ema: str | None, only: list[str] | None) -> Source:
    """Read an input and keep the parts to merge."""
    if path.is_dir():
        raise CheckpointError(
            f"{path}: got a folder, expected a file; pass its unet/diffusion_pytorch_model.safetensors"
        )
    state = read_checkpoint(path)
    print(f"{label} {path}: {identify(state)}, {len(state)} tensors")
    if ema is not None and any(name.startswith(EMA) for name in state):
        state = swap_in_ema(state) if ema == "averaged" else drop_ema(state)
    if only is not None:
        level = UNET if DIFFUSERS_INPUT_CONV in state else ""  # a UNet by itself
        wanted = tuple(PARTS[part] for part in only)
        state = {name: tensor for name, tensor in state.items() if (level + name).startswith(wanted)}
        if not state:
            raise CheckpointError(
                f"{path}: holds nothing of {', '.join(only)}; pass a file that does, or another --only"
            )
    return Source(f"{label} ({path.name})", state)


def block_of(name: str) -> str:
    """Return the block of a tensor in reports: `input_blocks.3`, `middle_block`, `first_stage_model.encoder`, …"""
    parts = name.removeprefix(UNET).split(".")
    divided = len(parts) > 2 and (parts[1].isdigit() or parts[0].endswith("_model"))
    return ".".join(parts[: 2 if divided else 1])


def multipliers_of(names: Collection[str], multiplier: float, blocks: Mapping[str, float]) -> dict[str, float]:
    """Return M of each name: that of the longest of `blocks` that fits it, or `multiplier`; blocks must fit a name.

    A block is the beginning of names, whole parts between dots, with or without `model.diffusion_model.`.
    """
    multipliers = dict.fromkeys(names, multiplier)
    for block in sorted(blocks, key=len):
        start = f"{block}."
        fitting = [name for name in names if f"{name}.".startswith((start, UNET + start))]
        if not fitting:
            known = ", ".join(dict.fromkeys(map(block_of, names)))
            raise CheckpointError(f"block {block}: no merged tensor's name begins with it; expected {known}, or longer")
        multipliers |= dict.fromkeys(fitting, blocks[block])
    return multipliers


def block_norms(merge: Merge, multipliers: Mapping[str, float]) -> Iterator[tuple[str, int, float, float]]:
    """Yield each block, the number of its tensors, and the norms of their change and of what is changed."""
    sums: dict[str, list[float]] = {}  # block => number of tensors, squared change, squared size
    for name in tqdm(merge.names, desc="comparing", unit="tensor", delay=3):
        block = sums.setdefault(block_of(name), [0, 0, 0])
        block[0] += 1
        for piece, value in merge.pieces(name, multipliers[name], merge.sources[0].state[name]):
            block[1] += torch.linalg.vector_norm(value.sub_(piece)).item() ** 2
            block[2] += torch.linalg.vector_norm(piece.float()).item() ** 2
    ordered = sorted(sums, key=lambda block: [int(part) if part.isdigit() else part for part in block.split(".")])
    yield from ((block, int(sums[block][0]), sums[block][1] ** 0.5, sums[block][2] ** 0.5) for block in ordered)


def finite(text: str) -> float:
    """Parse a number that is neither NaN nor infinite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number, such as 0.5")
    return number


def block_factor(text: str) -> tuple[str, float]:
    """Parse `input_blocks=0.5` to a pair."""
    block, equals, value = text.partition("=")
    if not (block and equals):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected BLOCK=NUMBER, such as input_blocks=0.5")
    return block, finite(value)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="merge", required=True)
    for name, (_, roles) in MERGES.items():
        command = commands.add_parser(name)
        for role, what in roles.items():
            command.add_argument(role.lower(), metavar=role, type=Path, help=f"{what}; .ckpt or .safetensors")
        command.add_argument("output", metavar="OUT", type=Path, help="file to write, ending in .safetensors")
        default = 0.5 if name == "weighted-sum" else 1.0
        command.add_argument("--multiplier", type=finite, default=default, metavar="M", help="default: %(default)s")
        command.add_argument(
            "--block",
            action="append",
            type=block_factor,
            default=[],
            metavar="BLOCK=M",
            help="M for the names that begin with BLOCK, such as input_blocks or first_stage_model.decoder",
        )
        command.add_argument("--only", nargs="+", choices=PARTS, help="merge these parts and leave the others")
        command.add_argument(
            "--ema", choices=("last", "averaged"), help="which weights to take from inputs that hold both"
        )
        command.add_argument("--dry-run", action="store_true", help="write nothing; show how far each block moves")
        command.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    prepare, roles = MERGES[args.merge]
    paths: dict[str, Path] = {role: getattr(args, role.lower()) for role in roles}
    check_output(args.output, paths.values(), overwrite=args.overwrite or args.dry_run, endings=[".safetensors"])
    first, *others = (
        read_source(role, path, ema=args.ema, only=None if role in ("A", "BASE") else args.only)
        for role, path in paths.items()
    )
    merge = prepare(first, *others)
    multipliers = multipliers_of(merge.names, args.multiplier, dict(args.block))
    print(f"{len(merge.names)} of {len(first.state)} tensors change, the others are those of {first.label}")
    if args.dry_run:
        print(f"{'block':32} tensors   |change|   |before|   share")
        for block, tensors, change, before in block_norms(merge, multipliers):
            share = change / before if before else math.inf
            print(f"{block:32} {tensors:7} {change:10.4g} {before:10.4g} {share:7.2%}")
        print(f"dry run: {args.output} not written")
        return 0
    record = provenance("merge_checkpoints", argv, paths)
    write_safetensors(args.output, first.state, record, pieces=merged(merge, multipliers))
    print(f"wrote {args.output}: {len(first.state)} tensors, {args.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
