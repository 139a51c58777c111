"""Numbers of improved-diffusion, guided-diffusion and denoising-diffusion-pytorch, computed by their own code.

`golden/lineage/NAME.safetensors.xz` holds inputs and outputs in float32 on a CPU; every draw of noise is among them.
Networks have weights that are a function of their names (procweights.py), zero-initialised layers too. Images are in
[-1, 1] unless the key says `_01`, timesteps count from 0. Re-run with another order of summation their own results
differ by up to 4e-6 (networks), 1e-5 (trajectories) and 1e-6 relative (losses).
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import ldm.pixel_diffusion
from ldm.config import ModelConfig, ScheduleConfig, UNetConfig
from ldm.diffusion import NoiseSchedule, make_schedule
from ldm.pixel_diffusion import PixelDiffusion
from tests.procweights import GOLDEN, read_golden, uniform, weight


@cache
def lineage(name: str) -> dict[str, Tensor]:
    """The tensors of a group; tests leave them as they are."""
    return read_golden(f"lineage/{name}")


def facts(name: str) -> dict[str, Any]:
    """The settings of a group."""
    return _read_json("facts")[name]


def manifests() -> dict[str, Any]:
    """Published files by name (`index`), and their tensors (`manifests`: name, shape and type of each, in lines)."""
    return _read_json("manifests")


@cache
def _read_json(name: str) -> dict[str, Any]:
    return json.loads(lzma.decompress((GOLDEN / "lineage" / f"{name}.json.xz").read_bytes()))


def their_schedule(name: str, num_timesteps: int = 1000) -> ScheduleConfig:
    """A schedule as the three projects scale it: the bounds of `linear` are those of 1,000 steps."""
    T = num_timesteps
    ends = {"linear_start": 0.1 / T, "linear_end": 20 / T} if name == "linear" else {}
    return ScheduleConfig(name=name, num_timesteps=T, **ends)


def schedule_of(name: str, num_timesteps: int = 1000) -> NoiseSchedule:
    return make_schedule(their_schedule(name, num_timesteps))


def unet_config(flags: dict[str, Any], *, low_res: bool = False) -> UNetConfig:
    """Translate the arguments of their UNets."""
    resampling = "conv" if flags.get("conv_resample", True) else "pool"
    heads = flags.get("num_head_channels", -1)
    return UNetConfig(
        in_channels=flags["in_channels"] * (1 + low_res),
        out_channels=flags["out_channels"],
        model_channels=flags["model_channels"],
        channel_mult=flags["channel_mult"],
        num_res_blocks=flags["num_res_blocks"],
        attention_resolutions=flags["attention_resolutions"],
        num_heads=flags.get("num_heads", 1),
        head_channels=heads if heads > 0 else None,
        num_heads_upsample=flags.get("num_heads_upsample"),
        context_dim=0,
        num_classes=flags.get("num_classes"),
        scale_shift=flags["use_scale_shift_norm"],
        resample="res_block" if flags.get("resblock_updown") else resampling,
    )


def value(name: str, shape: Sequence[int]) -> Tensor:
    """A weight of their networks: `weight`, but for gains of RMS norms and frequencies, which it does not know."""
    kind = name.rsplit(".", 1)[-1]
    if kind in ("g", "weights"):
        u = uniform(name, torch.Size(shape).numel()).reshape(tuple(shape))
        return 1 + 0.2 * u if kind == "g" else u
    return weight(name, shape)


def fill(network: nn.Module, prefix: str, *, by_head: bool = True) -> nn.Module:
    """Give a network the weights of theirs. By head: its attention channels are those of a head, then of the next."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(value(prefix + name, parameter.shape))
        for module in network.modules():
            if by_head and hasattr(module, "qkv"):
                for part in (module.qkv.weight, module.qkv.bias):
                    part.copy_(reorder(part.clone(), module.num_heads))
    return network.eval()


def reorder(tensor: Tensor, heads: int) -> Tensor:
    """Turn channels [head][query, key, value][channel] into [query, key, value][head][channel]."""
    return rearrange(tensor, "(h three d) ... -> (three h d) ...", three=3, h=heads)


def by_head(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `reorder`."""
    return rearrange(tensor, "(three h d) ... -> (h three d) ...", three=3, h=heads)


def pixel_model(
    unet: UNetConfig, schedule: ScheduleConfig, prefix: str = "", *, by_head: bool = True, **settings: Any
) -> PixelDiffusion:
    """A model in pixels, with the weights of theirs if there is a prefix."""
    learned = {"variance": "learned_range"} if unet.out_channels == 2 * unet.in_channels else {}
    names = {"kind": "pixel", "input_channels": ["x_t"]}
    model = PixelDiffusion(ModelConfig(**{**names, **learned, **settings}, unet=unet, schedule=schedule))
    if prefix:
        fill(model.unet, prefix, by_head=by_head)
    return model.requires_grad_(False).eval()


class Draws:
    """Hands out recorded noise in place of the model's own draws."""

    def __init__(self, recorded: Tensor, patch: pytest.MonkeyPatch) -> None:
        self.remaining: Iterator[Tensor] = iter(recorded)
        self.count = 0
        patch.setattr(ldm.pixel_diffusion, "draw_noise", lambda *_args, **_kwargs: self())

    def __call__(self) -> Tensor:
        self.count += 1
        return next(self.remaining)


def near(got: Tensor, expected: Tensor, bar: float, *, of_largest: bool = False) -> None:
    """Assert equality up to `bar`, or up to `bar` times the largest expected value."""
    size = expected.double().abs().max().item() if of_largest else 1.0
    torch.testing.assert_close(got.detach().double(), expected.double(), rtol=0, atol=bar * size)


def relative(got: Tensor, expected: Tensor, bar: float) -> None:
    """Assert equality of each number up to `bar` of its size."""
    torch.testing.assert_close(got.detach().double(), expected.double(), rtol=bar, atol=0)
