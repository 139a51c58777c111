"""Compute the memory and the operations of a training step of a config, without weights or a GPU.

    python benchmarks/memory.py                               configs/v1.yaml
    python benchmarks/memory.py configs/mini.yaml --batch-sizes 32 64

The model is built on PyTorch's meta device, where tensors have shapes and no content. Parameters, gradients,
Adam's two moments and the average are counted; activations are what autograd saves in the UNet's forward pass, and with
activation checkpointing what stays saved plus the largest single block, which is computed again in the backward pass.
The encoders keep nothing for a backward pass. Operations are PyTorch's formulas for matrix products, convolutions
and attention. Not counted: buffers of libraries, fragmentation, DDP's gradient buckets.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import Config, load_config
from ldm.models.layers import SpatialTransformer
from ldm.models.unet import ResBlock
from ldm.training.diffusion_module import DiffusionTraining

GIB = 2**30


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves, without parameters and every storage once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self._pack, lambda x: x)
        self.total = 0
        self._known = {p.untyped_storage()._cdata for p in module.parameters()}
        self._kept: list[torch.UntypedStorage] = []  # so that no other storage gets its address

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(storage)
            self.total += storage.nbytes()
        return x


def activations(config: Config, batch_size: int, *, checkpointing: bool) -> tuple[int, int]:
    """Return the bytes that autograd keeps of the UNet's float32 forward pass: in total, and of its largest layer."""
    config = copy.deepcopy(config)
    config.model.unet.activation_checkpointing = checkpointing
    with torch.device("meta"):
        module = DiffusionTraining(config)
        latent = config.model.image_size // module.downsampling
        x = torch.empty(batch_size, config.model.unet.in_channels, latent, latent)
        t = torch.empty(batch_size, dtype=torch.long)
        tokens = 1 if config.model.exemplar_encoder.tokens == "pooled" else 257
        context = torch.empty(batch_size, tokens, config.model.unet.context_dim, requires_grad=True)
        saved = SavedBytes(module.unet)
        with saved:
            started, sizes = [], [0]
            for layer in module.unet.modules():
                if isinstance(layer, ResBlock | SpatialTransformer):
                    layer.register_forward_pre_hook(lambda *_: started.append(saved.total))
                    layer.register_forward_hook(lambda *_: sizes.append(saved.total - started.pop()))
            module.unet(x, t, context)
    return saved.total, max(sizes)


def operations(config: Config) -> dict[str, float]:
    """Return the TFLOP for one sample, by part of a training step."""
    side, exemplar = config.model.image_size, config.model.exemplar_encoder
    with torch.device("meta"):
        module = DiffusionTraining(config)
        latent = side // module.downsampling
        x = torch.empty(1, config.model.unet.in_channels, latent, latent)
        t = torch.empty(1, dtype=torch.long)
        context = torch.empty(1, 1, config.model.unet.context_dim, requires_grad=True)
        pictures = torch.empty(2, 3, side, side)  # with and without the hole
        parts: dict[str, Callable[[], object]] = {
            "first stage, image and masked image": lambda: module.first_stage_model.encode(pictures),
            "image tower": lambda: module.cond_stage_model.features(
                torch.empty(1, 3, exemplar.image_size, exemplar.image_size)
            ),
            "UNet, forward and backward": lambda: module.unet(x, t, context).sum().backward(),
        }
        counted = {}
        for name, part in parts.items():
            with FlopCounterMode(display=False) as counter:
                part()
            counted[name] = counter.get_total_flops() / 1e12
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/v1.yaml")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    config = load_config(args.config)
    with torch.device("meta"):
        module = DiffusionTraining(config)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    state = Table("float32", "GiB", title=f"{args.config}: {trained / 1e6:.1f} M trained, {frozen / 1e6:.1f} M frozen")
    parts = {
        "trained parameters": trained,
        "frozen parameters": frozen,
        "gradients": trained,
        "Adam's moments": 2 * trained,
    }
    for name, count in (*parts.items(), ("EMA", trained)):
        state.add_row(name, f"{4 * count / GIB:.2f}")
    console = Console()
    console.print(state)
    work = Table("part", "TFLOP per sample", title="operations; with cached latents only the UNet's")
    for name, count in operations(config).items():
        work.add_row(name, f"{count:.3g}")
    console.print(work)

    table = Table(
        "batch size", "activations, GiB", "with activation checkpointing", title="UNet, float32; half in bf16"
    )
    for batch_size in args.batch_sizes:
        whole, layer = activations(config, batch_size, checkpointing=False)
        kept, _ = activations(config, batch_size, checkpointing=True)
        table.add_row(str(batch_size), f"{whole / GIB:.2f}", f"{(kept + layer) / GIB:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
