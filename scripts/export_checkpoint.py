#!/usr/bin/env python
"""Turn a training checkpoint into a file to share: weights alone, published names, half the size, no pickle.

A run with EMA gives its averaged weights. The noise schedule stays float32. The model's config is written beside the
file as config.yaml, where editing looks for it; a model that reads text also gets its tokenizer (folder `tokenizer`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import SCHEDULE_BUFFERS, is_finite, to_file_keys
from ldm.files import write_text
from ldm.models.text_encoder import TOKENIZER_FILES
from scripts.checkpoint_cli import one_line_errors, provenance

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def write_config(run_config: Path, config: Path) -> None:
    """Write the model section of a run's config, which is all that editing needs, and copy its tokenizer."""
    model = OmegaConf.load(run_config).model
    if tokenizer := OmegaConf.select(model, "text_encoder.tokenizer"):
        (config.parent / "tokenizer").mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            shutil.copyfile(Path(tokenizer) / name, config.parent / "tokenizer" / name)
        model.text_encoder.tokenizer = None
    text = OmegaConf.to_yaml(OmegaConf.create({"model": model}))
    write_text(config, "# The model's config, every default written out.\n" + text)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="checkpoint of a run, such as logs/…/checkpoints/last.ckpt")
    parser.add_argument("output", type=Path, help="file to write, ending in .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the weights (default: float16)")
    parser.add_argument(
        "--ema-decay", metavar="DECAY", help="take this one of the averages of training.more_ema_decays"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    if args.output.suffix != ".safetensors":
        raise CheckpointError(f"{args.output}: got extension {args.output.suffix!r}, expected .safetensors")
    run_config = args.input.resolve().parent.parent / "config.yaml"  # of the run that the checkpoint lies in
    config = args.output.parent / "config.yaml" if run_config.is_file() else None
    for path in filter(None, (args.output, config)):
        if path.exists() and not args.overwrite:
            raise CheckpointError(f"{path}: exists already; pass --overwrite to replace it")
    state = read_checkpoint(args.input)
    if args.ema_decay:
        saved = torch.load(args.input, map_location="cpu", weights_only=True)
        if (name := f"ema.{float(args.ema_decay)}") not in saved:
            found = ", ".join(key.removeprefix("ema.") for key in saved if key.startswith("ema.")) or "none"
            raise CheckpointError(f"{args.input}: got --ema-decay {args.ema_decay}, expected one of its own: {found}")
        state |= saved[name]["average"]
    state = to_file_keys(state)
    for name, tensor in state.items():
        if tensor.is_floating_point() and name not in SCHEDULE_BUFFERS:
            state[name] = tensor.to(DTYPES[args.dtype])
            if not is_finite(state[name]):
                raise CheckpointError(f"{args.input}: {name} does not fit into {args.dtype}; use --dtype float32")
    if config is not None:
        write_config(run_config, config)
    write_safetensors(args.output, state, provenance("export_checkpoint", argv, {"input": args.input}))
    print(f"wrote {args.output}: {len(state)} tensors, {args.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
