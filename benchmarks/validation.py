"""Measure the spread of one model's validation loss, with new noise every time and with the same noise.

    python benchmarks/validation.py --base configs/mini.yaml --checkpoint pretrained_models/mini/model.safetensors \\
        data.root=dataset/mini-cache

With the same noise the spread is zero; the table therefore shows which differences each choice can detect. The model is
compared with a copy whose UNet weights have a little noise added (--change times their standard deviation). The last
column is the difference of the losses divided by its standard deviation over repetitions; below 2 a single validation
does not show it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ldm.checkpoint.io import read_checkpoint
from ldm.config import load_config
from ldm.data.datamodule import DataModule
from ldm.latent_diffusion import add_imagenet_tower, load_weights
from ldm.training.diffusion_module import DiffusionTraining


def validation_loss(module: DiffusionTraining, batches: Sequence[dict[str, Tensor]], repetition: int) -> float:
    """Return the loss that validation logs; each repetition has its own noise, timesteps and dropped exemplars."""
    losses = []
    with torch.no_grad():
        for batch in batches:
            keys = torch.tensor(
                [int(np.random.default_rng([repetition, k]).integers(2**62)) for k in batch["key"].tolist()]
            )
            losses.append(module.losses({**batch, "key": keys})[0])
    return float(torch.cat(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["configs/mini.yaml"])
    parser.add_argument("--checkpoint", default="pretrained_models/mini/model.safetensors")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--change", type=float, default=0.02, help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    config = load_config(*args.base, overrides=args.overrides)
    config.training.compile = False
    batches = list(DataModule(config).val_dataloader())
    models = []
    for change in (0.0, args.change):
        module = DiffusionTraining(config)
        state = add_imagenet_tower(read_checkpoint(args.checkpoint), module.cond_stage_model)
        load_weights(module, state, args.checkpoint, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.unet.parameters():
                scale = change * parameter.std() if parameter.numel() > 1 else 0.0
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        models.append(module.eval())

    rounds = track(range(args.repetitions), "validating", console=Console(stderr=True))
    losses = np.array([[validation_loss(module, batches, r) for module in models] for r in rounds])
    before, after = losses.T
    table = Table("noise", "loss", "spread (standard deviation)", "changed model", "difference / its spread",
                  title=f"{sum(len(b['key']) for b in batches)} samples, {args.repetitions} repetitions")  # fmt: skip
    gap, new = (after - before).mean(), np.sqrt(before.var(ddof=1) + after.var(ddof=1))
    table.add_row(
        "new every time", f"{before.mean():.4f}", f"{before.std(ddof=1):.4f}", f"{after.mean():.4f}", f"{gap / new:.1f}"
    )
    same = (after - before).std(ddof=1)
    table.add_row("the same", f"{before[0]:.4f}", "0", f"{after[0]:.4f}", f"{gap / same:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
