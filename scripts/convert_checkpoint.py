#!/usr/bin/env python
"""Convert a checkpoint of the published layout to a folder for diffusers, or back.

    python scripts/convert_checkpoint.py model.safetensors FOLDER --to diffusers
    python scripts/convert_checkpoint.py FOLDER model.safetensors --to original

Paint by Example becomes a PaintByExamplePipeline, Stable Diffusion 1 a StableDiffusionPipeline or, with nine input
channels, a StableDiffusionInpaintPipeline. A checkpoint holds no tokenizer: `--tokenizer FOLDER` copies one into the
result; without it, pass `tokenizer=` to `from_pretrained`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.checkpoint import keys
from ldm.checkpoint.convert import (
    EXEMPLAR_INPUTS,
    STEMS,
    TEXT_INPUTS,
    Components,
    Json,
    check_family,
    diffusers_configs,
    model_config,
    read_component,
    schedule_config,
    to_diffusers,
    to_original,
)
from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors, write_torch
from ldm.checkpoint.keys import EMA, check_prediction, check_schedule, misfit, swap_in_ema
from ldm.config import Config, ModelConfig, dump_config, load_config
from ldm.diffusion import make_schedule
from ldm.files import read_json, write_text
from scripts.checkpoint_cli import atomic_directory, check_output, one_line_errors, prefix_errors, provenance


def read_folder(folder: Path) -> tuple[Components, dict[str, Json]]:
    """Read the known components of a pipeline, and all its configs by component, its index as `pipeline`."""
    for needed in ("unet", "scheduler/scheduler_config.json"):
        if not (folder / needed).exists():
            raise CheckpointError(f"{folder}: got no {needed} in it, expected a folder of a diffusers pipeline")
    configs = {path.parent.name: read_json(path, {}) for path in sorted(folder.glob("*/*config.json"))}
    configs["pipeline"] = read_json(folder / "model_index.json", {})
    return {name: read_component(folder / name) for name in STEMS if (folder / name).is_dir()}, configs


def write_folder(folder: Path, components: Components, files: Mapping[str, Json], metadata: Mapping[str, str]) -> None:
    """Write weights, as safetensors with `metadata`, and JSON files into an existing folder."""
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    for name, part in components.items():
        write_safetensors(folder / name / f"{STEMS[name]}.safetensors", part, metadata)


def check_counterpart(model: ModelConfig, state: keys.State) -> None:
    """Refuse a model that diffusers cannot build, or whose pipelines would feed it something else."""
    encoder, stage, inputs = model.exemplar_encoder, model.first_stage, model.input_channels
    exemplar, text = keys.holds(state, *keys.NEW_PARTS), model.condition == "text"
    pipeline, fed = ("text", TEXT_INPUTS[9]) if text else ("exemplars", EXEMPLAR_INPUTS)
    both = model.condition == "both" or (exemplar and keys.holds(state, keys.TEXT_TOWER, keys.TEXT_MODULE))
    asymmetric = stage.decoder == "asymmetric" or keys.holds(state, keys.FIRST_STAGE + keys.CONDITION_ENCODER)
    lacking = {
        "condition both": both,
        f"input_channels {', '.join(inputs)} (its pipeline with {pipeline} feeds {', '.join(fed)})": (
            (exemplar and inputs != EXEMPLAR_INPUTS) or (text and inputs not in TEXT_INPUTS.values())
        ),
        f"exemplar_encoder.tower {encoder.tower}": exemplar and encoder.tower != "clip",
        f"exemplar_encoder.tokens {encoder.tokens}": exemplar and encoder.tokens != "pooled",
        f"exemplar_encoder.mapper_layers {encoder.mapper_layers}": exemplar
        and encoder.mapper_layers != (encoder.num_layers + 1) // 5,
        "first_stage.decoder asymmetric in a pipeline": asymmetric,
        f"first_stage.patch_size {stage.patch_size}": stage.patch_size != 1,
        "a first stage without norms": stage.norm_groups == 0,
        "first_stage.linear_path": stage.linear_path,
        "first_stage.embed_dim other than z_channels": stage.embed_dim != stage.z_channels,
        "schedule.name cosine as published (its own cosine differs)": model.schedule.name == "cosine",
    }
    if what := next((what for what, absent in lacking.items() if absent), ""):
        raise CheckpointError(f"diffusers has no counterpart of {what}; this model runs here alone")


def to_folder(args: argparse.Namespace, argv: list[str] | None) -> None:
    """Convert the checkpoint `args.input` to the folder `args.output`."""
    beside = args.input.parent / "config.yaml"
    config = args.config or (beside if beside.is_file() else None)
    model = load_config(*([config] if config else [])).model
    print(f"config: {config or 'the published model'}")
    state = read_checkpoint(args.input)
    with prefix_errors(args.input):
        check_counterpart(model, state)
        components = to_diffusers(swap_in_ema(state) if args.use_ema else state)
        if "unet" not in components:
            raise CheckpointError(f"holds no UNet; {misfit(state)}")
        files = diffusers_configs(components, model)
    check_prediction(state, model.parameterization, source=args.input)
    check_schedule(make_schedule(model.schedule).buffers(), state, source=args.input)
    if averaged := sum(name.startswith(EMA) for name in state):
        print(f"{'took the averaged weights from' if args.use_ema else 'left out'} {averaged} tensors {EMA}*")
    index = files["model_index.json"]
    if args.tokenizer is not None:
        if not args.tokenizer.is_dir():
            raise CheckpointError(f"{args.tokenizer}: no such folder; pass the tokenizer folder of Stable Diffusion")
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    elif "text_encoder" in components:
        print("no --tokenizer: the result holds none; pass tokenizer=… to from_pretrained")
    elif "image_encoder" not in components:
        print("no text encoder in the checkpoint: the result holds none; pass text_encoder=… to from_pretrained")
    if "vae" not in components:
        print("no first stage in the checkpoint: the result holds none; pass vae=… to from_pretrained")
    print(f"{index['_class_name']}: " + ", ".join(f"{name} {len(part)} tensors" for name, part in components.items()))
    if args.dry_run:
        return
    record = provenance("convert_checkpoint", argv, {"input": args.input})
    with atomic_directory(args.output) as partial:
        write_folder(partial, components, files, record)
        if args.tokenizer is not None:
            shutil.copytree(args.tokenizer, partial / "tokenizer")


def to_file(args: argparse.Namespace, argv: list[str] | None) -> None:
    """Convert the folder `args.input` to the checkpoint `args.output`, with its config and tokenizer beside."""
    components, configs = read_folder(args.input)
    with prefix_errors(args.input):
        check_family(components, configs)
        state = to_original(components, schedule_config(configs["scheduler"]))
        model = model_config(components, configs)
        config = dump_config(Config(model=model)) if model else None
    beside = args.output.parent / "config.yaml"
    print(f"{', '.join(components)}: {len(state)} tensors" + (f"; config: {beside}" if config else ""))
    if config is None:
        print("no config.yaml: a part of the model is missing, or nothing tells what its UNet's input channels are")
    tokenizer, target = args.input / "tokenizer", args.output.parent / "tokenizer"
    if "text_encoder" in components and not tokenizer.is_dir() and not target.exists():
        print("no tokenizer in the folder: put one beside the checkpoint, in `tokenizer` (docs/text.md)")
    if config and not args.overwrite and beside.exists() and beside.read_text(encoding="utf-8") != config:
        raise CheckpointError(
            f"{beside}: is there already, with another config; pass --overwrite, or choose another folder"
        )
    if args.dry_run:
        return
    record = provenance("convert_checkpoint", argv, {"input": args.input})
    (write_safetensors if args.output.suffix == ".safetensors" else write_torch)(args.output, state, record)
    if config:
        write_text(beside, config)
    if tokenizer.is_dir() and not target.exists():
        with atomic_directory(target) as partial:
            shutil.copytree(tokenizer, partial, dirs_exist_ok=True)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--to", required=True, choices=("diffusers", "original"))
    parser.add_argument(
        "--config", type=Path, help="the checkpoint's config; default: config.yaml beside it, or the published model's"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged UNet weights")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="CLIP tokenizer to copy into the result")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; show what would be written")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    if args.to == "diffusers" and args.input.is_dir():
        raise CheckpointError(f"{args.input}: is a folder already; pass a checkpoint, or --to original")
    if args.to == "original" and args.input.is_file():
        raise CheckpointError(f"{args.input}: is one file; pass a diffusers folder, or --to diffusers")
    endings = [".safetensors", ".ckpt"] if args.to == "original" else []
    check_output(args.output, [args.input], overwrite=args.overwrite or args.dry_run, endings=endings)
    (to_folder if args.to == "diffusers" else to_file)(args, argv)
    print(f"dry run: {args.output} not written" if args.dry_run else f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
