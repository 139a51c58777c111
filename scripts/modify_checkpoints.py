"""Make Stable Diffusion v1-4 a starting point for training: nine input channels, CLIP's image tower.

    python scripts/modify_checkpoints.py --clip openai/clip-vit-large-patch14

reads pretrained_models/sd-v1-4.ckpt and writes pretrained_models/sd-v1-4-modified-9channel.ckpt. The new
input channels (masked image, mask) are zero, so the network starts as the one it was; `--init FILE` takes them from
another checkpoint. Stable Diffusion holds no image tower; without `--clip` the result lacks it, as the original's did.

Any number of channels (`--in-channels 8` for IC-Light), files in CompVis' names, a diffusers UNet's file, or a folder:
of a UNet, or of a whole pipeline, whose other parts are copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.checkpoint import keys
from ldm.checkpoint.convert import STEMS, read_component, weight_files
from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors, write_torch
from ldm.checkpoint.keys import EMA, FILE_TOWER, INPUT_CONV, TEXT_TOWER, State, drop_ema, swap_in_ema
from ldm.checkpoint.merge import inflate_input_conv, input_conv
from ldm.files import read_json, write_text
from scripts.checkpoint_cli import atomic_directory, check_output, one_line_errors, prefix_errors, provenance

_CLIP_FILES = ("model.safetensors", "pytorch_model.bin")
_VIT_L_14 = 257, 1024, 24  # positions, width, layers
_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.layers.", "post_layernorm.")


def clip_file(source: str) -> Path:
    """Find CLIP's weights: a file, the file in a transformers folder, or a download from the Hugging Face hub."""
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in _CLIP_FILES if (path / name).exists()]
        if not found:
            raise CheckpointError(f"{path}: got a folder without {' or '.join(_CLIP_FILES)}; pass the file itself")
        return found[0]
    if path.exists() or path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") or source.count("/") != 1:
        return path
    from transformers.utils.hub import cached_file  # a second of import that only this branch needs

    try:
        downloaded = cached_file(source, _CLIP_FILES[0])
    except OSError as error:
        raise CheckpointError(
            f"{source}: neither a local path nor available from the Hugging Face hub "
            f"({str(error).splitlines()[0]}); download it elsewhere and pass its folder"
        ) from error
    return Path(str(downloaded))


def modified(args: argparse.Namespace, clip: Path | None) -> dict[str, Tensor]:
    """Return the input's tensors with what the command line asks for; print each step."""
    state = read_component(unet_folder(args.input))
    print(f"read {args.input}: {len(state)} tensors")

    num_ema = sum(name.startswith(EMA) for name in state)
    with prefix_errors(args.input):
        state = swap_in_ema(state) if args.use_ema else drop_ema(state)
    if num_ema:
        print(f"{'took the averaged weights from' if args.use_ema else 'left out'} {num_ema} tensors {EMA}*")

    init = read_checkpoint(args.init) if args.init else None
    with prefix_errors(args.input):
        old_channels = state[key := input_conv(state)].shape[1]
        state = inflate_input_conv(state, args.in_channels, init)
    new = f"the new ones {f'from {args.init}' if args.init else 'zero'}"
    print(f"{key}: {old_channels} -> {args.in_channels} input channels, {new}")

    if clip is not None:
        if key != INPUT_CONV:
            raise CheckpointError(f"{args.input}: a UNet by itself has no place for --clip; leave it out")
        num_text = sum(name.startswith(TEXT_TOWER) for name in state)
        state = add_clip_tower(state, read_checkpoint(clip))
        num_image = sum(name.startswith(FILE_TOWER) for name in state)
        print(f"{FILE_TOWER}*: {num_image} tensors from {args.clip}; {num_text} tensors of the text tower left out")
    elif key == INPUT_CONV:
        print("no --clip: the result holds no image tower (training Paint by Example needs CLIP's: docs/training.md)")
    return state


def add_clip_tower(state: State, clip_state: State) -> dict[str, Tensor]:
    """Put the weights of CLIP's image tower where the exemplar encoder expects them; drop the text tower.

    `clip_state` is `CLIPModel` or `CLIPVisionModel` of transformers. A UNet of the full size needs ViT-L/14.
    """
    if step := keys.next_step(kind := keys.identify(state)):
        raise CheckpointError(f"an image tower has no place in it: this is {kind}; {step}")
    level = "vision_model." if keys.holds(clip_state, "vision_model.") else ""
    bare = {name.removeprefix(level): tensor for name, tensor in clip_state.items() if name.startswith(level)}
    tower = {name: bare[name] for name in bare if name.startswith(_TOWER_PARTS) and not name.endswith("position_ids")}
    layers = len({name.split(".")[2] for name in tower if name.startswith("encoder.layers.")})
    if not layers or len(tower) != 7 + 16 * layers:
        what = f"{len(tower)} tensors, {layers} layers, in {keys.identify(clip_state)}"
        raise CheckpointError(f"no complete CLIP image tower: {what}; pass a CLIPModel")
    size = (*tower["embeddings.position_embedding.weight"].shape, layers)
    if INPUT_CONV in state and len(state[INPUT_CONV]) == 320 and size != _VIT_L_14:
        expected = f"those of ViT-L/14: {_VIT_L_14}"
        raise CheckpointError(f"the CLIP image tower has positions, width and layers {size}, expected {expected}")
    kept = {name: x for name, x in state.items() if not name.startswith((FILE_TOWER, TEXT_TOWER))}
    return kept | keys.to_file_keys({keys.TOWER + name: tensor for name, tensor in tower.items()})


def unet_folder(folder: Path) -> Path:
    """Return the folder of the UNet in a diffusers folder: `unet` below it, or the folder itself."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def write_copy(source: Path, target: Path, state: dict[str, Tensor], record: dict[str, str]) -> None:
    """Copy a diffusers folder with another UNet; only its weights and `in_channels` change."""
    unet = unet_folder(source)
    config = read_json(unet / "config.json") | {"in_channels": state[input_conv(state)].shape[1]}
    old = {path.resolve() for path in unet.iterdir() if path.suffix in (".safetensors", ".bin", ".msgpack", ".onnx")}
    old |= {path.resolve() for path in unet.glob("*.index*.json")}

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(folder) / name).resolve() in old]

    with atomic_directory(target) as partial:
        shutil.copytree(source, partial, ignore=left_out, dirs_exist_ok=True)
        inside = partial / unet.relative_to(source)
        write_text(inside / "config.json", json.dumps(config, indent=2) + "\n")
        write_safetensors(inside / f"{STEMS['unet']}.safetensors", state, record)


@one_line_errors
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
        help=".safetensors, or .ckpt as torch.save writes it; a folder if the input is one",
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
    parser.add_argument("--init", type=Path, metavar="FILE", help="checkpoint whose input channels the new ones become")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; show what would change")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    folder = args.input.is_dir()
    inputs = {"input": args.input} | ({"init": args.init} if args.init else {})
    endings = [] if folder else [".safetensors", ".ckpt"]
    check_output(args.output, inputs.values(), overwrite=args.overwrite or args.dry_run, endings=endings)
    if args.clip is not None:  # perhaps a download, so not before the first check
        inputs["clip"] = clip_file(args.clip)
        check_output(args.output, [inputs["clip"]], overwrite=args.overwrite or args.dry_run, endings=endings)
    state = modified(args, inputs.get("clip"))
    if args.dry_run:
        print(f"dry run: {args.output} not written")
        return 0
    record = provenance("modify_checkpoints", argv, inputs) | {"clip": args.clip or ""}
    print(f"writing {args.output} …", flush=True)
    if folder:
        write_copy(args.input, args.output, state, record)
    else:
        (write_safetensors if args.output.suffix == ".safetensors" else write_torch)(args.output, state, record)
    written = args.output if not folder else weight_files(unet_folder(args.output))[0]
    print(f"wrote {args.output}: {len(state)} tensors, {written.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
