#!/usr/bin/env python
"""Turn a training checkpoint into a file to share: weights alone, published names, half the size, no pickle.

Of a run with EMA the averaged weights are taken. The noise schedule stays float32. The model's config goes beside the
file as config.yaml, where editing looks for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ldm.checkpoint.command import provenance
from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import SCHEDULE_BUFFERS, to_file_keys
from ldm.files import write_text

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def model_config(run_config: Path) -> str:
    """The model section of a run's config, which is all that editing needs."""
    model = OmegaConf.load(run_config).model
    return "# The model's config, every default written out.\n" + OmegaConf.to_yaml(OmegaConf.create({"model": model}))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="checkpoint of a run, such as logs/…/checkpoints/last.ckpt")
    parser.add_argument("output", type=Path, help="file to write, ending in .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the weights (default: float16)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    try:
        if args.output.suffix != ".safetensors":
            raise CheckpointError(f"{args.output}: got extension {args.output.suffix!r}, expected .safetensors")
        run_config = args.input.resolve().parent.parent / "config.yaml"  # of the run that the checkpoint lies in
        config = args.output.parent / "config.yaml" if run_config.is_file() else None
        for path in filter(None, (args.output, config)):
            if path.exists() and not args.overwrite:
                raise CheckpointError(f"{path}: exists already; pass --overwrite to replace it")
        state = to_file_keys(read_checkpoint(args.input))
        for name, tensor in state.items():
            if tensor.is_floating_point() and name not in SCHEDULE_BUFFERS:
                state[name] = tensor.to(DTYPES[args.dtype])
                if not state[name].isfinite().all():
                    raise CheckpointError(f"{args.input}: {name} does not fit into {args.dtype}; use --dtype float32")
        if config is not None:
            write_text(config, model_config(run_config))
        write_safetensors(args.output, state, provenance("export_checkpoint", argv, {"input": args.input}))
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}: {len(state)} tensors, {args.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
