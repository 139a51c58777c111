#!/usr/bin/env python
"""Show kind, parts, types, metadata and hash of checkpoints, without running anything in them.

Only the header of a safetensors file or the tensor table of a .ckpt is read; the hash and --scan read all numbers. For
a folder, every file of weights in it is shown.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.checkpoint.io import CheckpointError, read_checkpoint, read_metadata, sha256_file
from ldm.checkpoint.keys import EMA, FIRST_STAGE, SCHEDULE_BUFFERS, TOWER, UNET, identify, is_finite, next_step
from ldm.files import verify_zip

_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")

# (pattern of names, part); the first that fits counts.
_PARTS = (
    (EMA, "averaged UNet (EMA)"),
    (rf"{UNET}|(?:down_blocks|mid_block|up_blocks|time_embedding|conv_(?:in|out|norm_out)|add_embedding)\.", "UNet"),
    (r"control_model\.|controlnet_|input_hint_block\.|zero_convs\.|middle_block_out\.", "ControlNet"),
    (rf"(?:{FIRST_STAGE})?decoder\.(?:encoder|condition_encoder)\.", "condition branch of the decoder"),
    (r"embeddings\.|encoder\.layers\.|pre_layrnorm\.|post_layernorm\.", "CLIP tower"),
    (r"final_layer_norm\.", "norm behind the tower"),
    (rf"(?:{FIRST_STAGE})?(?:encoder|decoder|quant_conv|post_quant_conv)\.", "first stage"),
    (rf"(?:{TOWER}|model\.)?vision_model\.|{TOWER}network\.", "image tower"),
    (r"cond_stage_model\.(?:mapper|final_ln|reduce)\.|mapper\.|proj_out\.", "mapper and null token"),
    (r"learnable_vector|uncond_vector", "mapper and null token"),
    (rf"(?:{TOWER})?text_model\.|cond_stage_model\.model\.|conditioner\.", "text encoder"),
    (rf"(?:{'|'.join(SCHEDULE_BUFFERS)})$", "noise schedule"),
)


def files_of(path: Path) -> list[Path]:
    """Return the file itself, or a folder's files of weights; CheckpointError if it has none."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in _ENDINGS)
    if not found:
        raise CheckpointError(f"{path}: got a folder without {', '.join(_ENDINGS)}; pass a file")
    return found


def printable(text: str) -> str:
    """Escape line breaks and control characters in text from a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, limit: int = 300) -> str:
    """Cut a long text."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Return a line for each tensor that holds NaN or Inf."""
    lines = []
    for name, tensor in tqdm(state.items(), desc="scanning", unit="tensor", delay=3):
        if not is_finite(tensor):
            numbers = tensor.double()  # float8 has no arithmetic
            nan = int(numbers.isnan().sum())
            lines.append(f"{printable(name)}: {nan} NaN, {int(numbers.isinf().sum())} Inf of {numbers.numel()}")
    return lines


def parts(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Count a checkpoint's tensors and numbers by part."""
    counts: dict[str, tuple[int, int]] = {}
    for name, tensor in state.items():
        part = next((part for pattern, part in _PARTS if re.match(pattern, name)), "other")
        counts[part] = counts.get(part, (0, 0))[0] + 1, counts.get(part, (0, 0))[1] + tensor.numel()
    return counts


def describe(path: Path, *, header_only: bool, scan: bool) -> str:
    """Describe a file in a few lines; CheckpointError if it cannot be read."""
    state = read_checkpoint(path)
    lines = [f"{path}: {(kind := identify(state))}", f"  {path.stat().st_size:,} bytes, {len(state)} tensors"]
    lines += [f"  to use it: {step}" for step in [next_step(kind)] if step]
    lines += [
        f"  {part}: {numbers:,} numbers in {tensors} tensors" for part, (tensors, numbers) in parts(state).items()
    ]
    types = Counter(tensor.dtype for tensor in state.values())
    lines.append(
        "  types: " + ", ".join(f"{str(dtype).removeprefix('torch.')} {n}" for dtype, n in types.most_common())
    )
    metadata = sorted(read_metadata(path).items())
    lines += [f"  metadata {printable(shortened(key))}: {printable(shortened(value))}" for key, value in metadata]
    if not header_only:
        lines.append(f"  sha256: {sha256_file(path)}")
    if scan:
        if zipfile.is_zipfile(path) and (damage := verify_zip(path)):
            raise CheckpointError(f"{path}: damaged, its checksums do not fit ({damage}); download or copy it again")
        found = not_finite(state)
        lines.append(f"  {len(found)} tensors with NaN or Inf" if found else "  all numbers are finite")
        lines += [f"    {line}" for line in found[:10]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--scan", action="store_true", help="read every number and look for NaN and Inf")
    parser.add_argument(
        "--header-only", "--dry-run", action="store_true", help="read no numbers: no hash, no scan; at once on any size"
    )
    args = parser.parse_args(argv)
    if args.scan and args.header_only:
        parser.error("--scan reads what --header-only leaves alone; pass one of them")
    logging.basicConfig(format="%(message)s")
    failed = False
    for given in args.files:
        try:
            paths = files_of(given)
        except CheckpointError as error:
            paths, failed = [], True
            print(f"error: {error}", file=sys.stderr)
        for path in paths:
            try:
                print(describe(path, header_only=args.header_only, scan=args.scan), flush=True)
            except (CheckpointError, OSError) as error:
                failed = True
                print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            except RuntimeError as error:  # a type that torch stores, but cannot compute with
                failed = True
                print(f"error: {path}: cannot be scanned: {printable(str(error))}", file=sys.stderr, flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
