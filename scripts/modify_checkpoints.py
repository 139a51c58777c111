"""Make Stable Diffusion v1-4 a starting point for training: nine input channels, CLIP's image tower.

    python scripts/modify_checkpoints.py --clip openai/clip-vit-large-patch14

reads pretrained_models/sd-v1-4.ckpt and writes pretrained_models/sd-v1-4-modified-9channel.ckpt. The new
input channels (masked image, mask) are zero, so the network starts as the one it was. Stable Diffusion holds
no image tower; without `--clip` the result lacks it, as the original's did.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.checkpoint.io import CheckpointError, read_checkpoint, sha256_file, write_safetensors, write_torch
from ldm.checkpoint.keys import EMA, FILE_TOWER, INPUT_CONV, TEXT_TOWER, swap_in_ema
from ldm.checkpoint.surgery import add_clip_tower, inflate_input_conv

_CLIP_FILES = ("model.safetensors", "pytorch_model.bin")


def read_clip(source: str) -> dict[str, Tensor]:
    """CLIP's weights from a file, a transformers folder, or the Hugging Face hub."""
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in _CLIP_FILES if (path / name).exists()]
        if not found:
            raise CheckpointError(f"{path}: got a folder without {' or '.join(_CLIP_FILES)}; pass the file itself")
        return read_checkpoint(found[0])
    if path.exists() or path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") or source.count("/") != 1:
        return read_checkpoint(path)
    from transformers.utils.hub import cached_file  # a second of import that only this branch needs

    try:
        downloaded = cached_file(source, _CLIP_FILES[0])
    except OSError as error:
        raise CheckpointError(
            f"{source}: neither a local path nor available from the Hugging Face hub "
            f"({str(error).splitlines()[0]}); download it elsewhere and pass its folder"
        ) from error
    return read_checkpoint(str(downloaded))


def modify(source: Path, target: Path, *, in_channels: int, clip: str | None, use_ema: bool, command: str) -> None:
    """Read, modify and write; prints each step."""
    state = read_checkpoint(source)
    print(f"read {source}: {len(state)} tensors")

    num_ema = sum(name.startswith(EMA) for name in state)
    state = swap_in_ema(state) if use_ema else {n: tensor for n, tensor in state.items() if not n.startswith(EMA)}
    if num_ema:
        print(f"{'took the averaged weights from' if use_ema else 'left out'} {num_ema} tensors {EMA}*")

    old_channels = state[INPUT_CONV].shape[1] if INPUT_CONV in state else 0
    state = inflate_input_conv(state, in_channels)
    print(f"{INPUT_CONV}: {old_channels} -> {in_channels} input channels, the new ones zero")

    if clip is not None:
        num_text = sum(name.startswith(TEXT_TOWER) for name in state)
        state = add_clip_tower(state, read_clip(clip))
        num_image = sum(name.startswith(FILE_TOWER) for name in state)
        print(f"{FILE_TOWER}*: {num_image} tensors from {clip}; {num_text} tensors of the text tower left out")
    else:
        print("no --clip: the result holds no image tower; training needs one (--clip openai/clip-vit-large-patch14)")

    provenance = {
        "input": source.name,
        "input_sha256": sha256_file(source),
        "clip": clip or "",
        "command": command,
        "versions": json.dumps({"python": platform.python_version(), "torch": torch.__version__}),
    }
    print(f"writing {target} …", flush=True)
    if target.suffix == ".safetensors":
        write_safetensors(target, state, provenance)
    else:
        write_torch(target, state, provenance)
    print(f"wrote {target}: {len(state)} tensors, {target.stat().st_size / 2**20:.1f} MiB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("input", nargs="?", type=Path, default=Path("pretrained_models/sd-v1-4.ckpt"))
    parser.add_argument(
        "output",
        nargs="?",
        type=Path,
        default=Path("pretrained_models/sd-v1-4-modified-9channel.ckpt"),
        help=".safetensors, or .ckpt as torch.save writes it",
    )
    parser.add_argument("--in-channels", type=int, default=9, help="input channels of the UNet afterwards")
    parser.add_argument(
        "--clip",
        metavar="PATH_OR_HUB_ID",
        help="CLIP ViT-L/14 of transformers: folder, .safetensors, .bin, or a name on the hub",
    )
    parser.add_argument(
        "--use-ema", action="store_true", help="take the averaged UNet weights (sd-v1-4-full-ema.ckpt holds them)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    try:
        if args.output.suffix not in (".safetensors", ".ckpt"):
            raise CheckpointError(
                f"{args.output}: got extension {args.output.suffix!r}, expected .safetensors or .ckpt"
            )
        if args.output.resolve() == args.input.resolve():
            raise CheckpointError(f"{args.output}: the output would replace the input; choose another name")
        if args.output.exists() and not args.overwrite:
            raise CheckpointError(f"{args.output}: exists already; pass --overwrite to replace it")
        command = shlex.join(["scripts/modify_checkpoints.py", *(sys.argv[1:] if argv is None else argv)])
        modify(
            args.input,
            args.output,
            in_channels=args.in_channels,
            clip=args.clip,
            use_ema=args.use_ema,
            command=command,
        )
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
