#!/usr/bin/env python
"""Cache the latents of training samples, so that a training step runs the UNet alone.

Draws several (crop, hole, augmentation) variants of every image, encodes image and masked image with the first stage
and, if the image tower is frozen, the exemplar with the tower. Writes OUT/train.safetensors and
OUT/validation.safetensors for `data.kind: cached`, and OUT/latents.yaml, a config with the scale of the latents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.checkpoint.io import CheckpointError, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import FIRST_STAGE, TOWER, check_keys, to_module_keys
from ldm.config import Config, ConfigError, load_config
from ldm.data.datamodule import box_dataset
from ldm.files import write_text
from ldm.images import exemplar_to_pixels
from ldm.latent_diffusion import add_imagenet_tower, latent_mask
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.exemplar_encoder import ExemplarEncoder

LATENTS_CONFIG = "latents.yaml"


def load_part(module: nn.Module, state: dict[str, Tensor], prefix: str, source: Path) -> None:
    """Load the tensors under `prefix` of a checkpoint into a module, strictly."""
    own = {name.removeprefix(prefix): x.float() for name, x in state.items() if name.startswith(prefix)}
    check_keys({name: x.shape for name, x in module.state_dict().items()}, own, source=source)
    module.load_state_dict(own)


def load_encoders(config: Config, checkpoint: Path, device: str) -> tuple[AutoencoderKL, ExemplarEncoder | None]:
    """Load the first stage and, if its tower is frozen, the exemplar encoder without its mapper."""
    state = to_module_keys(read_checkpoint(checkpoint))
    first_stage = AutoencoderKL(config.model.first_stage)
    load_part(first_stage, state, FIRST_STAGE, checkpoint)
    exemplar_encoder = None
    if not config.training.train_tower:
        exemplar_encoder = ExemplarEncoder(config.model.exemplar_encoder)
        load_part(exemplar_encoder.transformer, add_imagenet_tower(state, exemplar_encoder), TOWER, checkpoint)
    for module in filter(None, (first_stage, exemplar_encoder)):
        module.eval().requires_grad_(False).to(device)
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return first_stage, exemplar_encoder


@torch.no_grad()
def encoded(
    first_stage: AutoencoderKL,
    exemplar_encoder: ExemplarEncoder | None,
    loader: DataLoader[dict[str, torch.Tensor]],
    device: str,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of samples as the arrays that `ldm.data.cached` stores."""
    for batch in loader:
        pixels = torch.cat([batch["image"], batch["masked_image"]]).to(device)
        posterior = first_stage.encode(pixels)
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        image_moments, masked_moments = moments.half().cpu().numpy().reshape(2, -1, *moments.shape[1:])
        mask = latent_mask(batch["keep_mask"], moments)
        exemplar = (exemplar_to_pixels(batch["exemplar"]).clamp(-1, 1) + 1) * 127.5
        arrays = {
            "image_moments": image_moments,
            "masked_moments": masked_moments,
            "keep_mask": (mask * 255).round().byte().numpy(),
            "exemplar": exemplar.round().byte().permute(0, 2, 3, 1).numpy(),
        }
        if exemplar_encoder is not None:
            arrays["exemplar_features"] = exemplar_encoder.features(batch["exemplar"].to(device)).half().cpu().numpy()
        yield arrays


def write_cache(path: str | Path, num_samples: int, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write a cache of `num_samples` from batches of its arrays: memory does not grow with the number of samples."""
    batches = iter(batches)
    first = next(batches)
    layout = {
        name: torch.empty(num_samples, *array.shape[1:], dtype=torch.from_numpy(array).dtype, device="meta")
        for name, array in first.items()
    }
    pieces = ((name, torch.from_numpy(batch[name])) for batch in chain([first], batches) for name in layout)
    write_safetensors(path, layout, pieces=pieces)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", nargs="+", default=["configs/mini.yaml"], metavar="YAML",
        help="configs, merged from left to right (default: configs/mini.yaml)")  # fmt: skip
    add("--checkpoint", type=Path, required=True, help="checkpoint with a trained first stage")
    add("--root", type=Path, default=Path("dataset/mini"), help="images and boxes (default: dataset/mini)")
    add(
        "--out",
        type=Path,
        default=Path("dataset/mini-cache"),
        help="folder for the caches (default: dataset/mini-cache)",
    )
    add("--draws", type=int, default=3, help="variants of each training image (default: 3)")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=2)
    add("--seed", type=int, default=23)
    add("--device", default="cpu")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="override config keys, for example data.kind=coco")
    args = parser.parse_args(argv)
    try:
        config = load_config(*args.config, overrides=args.overrides)
        first_stage, exemplar_encoder = load_encoders(config, args.checkpoint, args.device)
        config.data.kind = "open_images" if config.data.kind == "cached" else config.data.kind
        config.data.root, config.seed = str(args.root), args.seed
        for split, draws in (("train", args.draws), ("validation", 1)):
            dataset = box_dataset(config, split)
            variants = [(epoch, index) for epoch in range(draws) for index in range(len(dataset))]
            loader = DataLoader(dataset, batch_size=args.batch_size, sampler=variants, num_workers=args.workers)
            batches = encoded(first_stage, exemplar_encoder, loader, args.device)
            bar = tqdm(batches, total=len(loader), desc=f"{split}: latents", unit="batch")
            write_cache(args.out / f"{split}.safetensors", len(variants), bar)
    except (CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scale, std = latent_scale(args.out / "validation.safetensors")
    sizes = f"  latent_std: {std}\n" if config.model.parameterization == "v" else ""
    write_text(args.out / LATENTS_CONFIG, f"# measured on this cache\nmodel:\n  scale_factor: {scale:.4f}\n{sizes}")
    print(
        f"{args.out}: done. Latents have unit variance with model.scale_factor={scale:.4f}; set it in the config, "
        f"or merge {args.out / LATENTS_CONFIG} after it"
    )
    return 0


def latent_scale(path: Path) -> tuple[float, list[float]]:
    """Return 1 / standard deviation of the cached image latents, the scale factor of the diffusion model.

    And, so scaled, the standard deviation of each channel.
    """
    from safetensors.numpy import load_file

    mean, logvar = np.split(load_file(path)["image_moments"].astype(np.float64), 2, axis=1)
    scale = float(1.0 / np.sqrt(mean.var() + np.exp(logvar).mean()))
    std = scale * np.sqrt(mean.var((0, 2, 3)) + np.exp(logvar).mean((0, 2, 3)))
    return scale, std.round(4).tolist()


if __name__ == "__main__":
    raise SystemExit(main())
