"""The UNet against the reference's outputs, block by block, and its one-token path against the general one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config import ConfigError, UNetConfig
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.layers import TransformerBlock, timestep_embedding
from ldm.models.unet import UNetModel
from tests.procweights import weight

Close = Callable[[Tensor, Tensor], None]
BLOCKS = [f"input_blocks.{i}" for i in range(4)] + ["middle_block"] + [f"output_blocks.{i}" for i in range(4)]


def small_unet(**changes: Any) -> UNetModel:
    """A UNet in float64 with weights in every layer: those that start as zero hide everything before them."""
    sizes: dict[str, Any] = {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [1, 2],
        "num_heads": 4,
        "context_dim": 16,
    }
    unet = UNetModel(UNetConfig(**{**sizes, **changes})).double()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(weight(name, parameter.shape))
    return unet


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(s, generator=generator).double() for s in ((2, 9, 8, 12), (2, tokens, 16)))
    return x, torch.tensor([3, 700]), context


def same(got: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of float64."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_timestep_embedding(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close) -> None:
    embedding = timestep_embedding(golden["unet/t"], 32)
    close(embedding, golden["unet/timestep_embedding_32"])
    t = torch.tensor([0, 1, 7, 500, 999])
    difference = (timestep_embedding(t, 320) - golden["unet/timestep_embedding_320"]).abs().amax(dim=1)
    # frequencies come from the machine's own exp: one unit in their last place, 6e-8, times t
    assert (difference <= 6e-8 * t.clamp(min=1)).all()
    close(tiny_model.unet.time_embed(embedding), golden["unet/time_embed"])


@pytest.mark.parametrize(("context", "out"), [("context", "out"), ("context3", "out_context3")])
def test_output(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close, context: str, out: str) -> None:
    got = tiny_model.unet(golden["unet/x"], golden["unet/t"], golden[f"unet/{context}"])
    close(got, golden[f"unet/{out}"])


def test_every_block(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close) -> None:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, output: outputs.update({name: output})

    hooks = [tiny_model.unet.get_submodule(name).register_forward_hook(keep(name)) for name in BLOCKS]
    try:
        tiny_model.unet(golden["unet/x"], golden["unet/t"], golden["unet/context"])
    finally:
        for hook in hooks:
            hook.remove()
    assert {f"unet/hook/{name}" for name in BLOCKS} == {name for name in golden if name.startswith("unet/hook/")}
    for name in BLOCKS:
        close(outputs[name], golden[f"unet/hook/{name}"])


def outputs_and_gradients(unet: UNetModel, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x, t, _ = inputs(tokens=1)
    unet.zero_grad(set_to_none=True)
    tokens = tokens.clone().requires_grad_(True)
    out = unet(x, t, tokens)
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    assert tokens.grad is not None
    return out.detach(), {"context": tokens.grad, **gradients}


def test_one_token_takes_the_short_way_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, (_, _, context) = small_unet(), inputs(tokens=1)
    out, gradients = outputs_and_gradients(unet, context)

    def general(block: TransformerBlock, x: Tensor, context: Tensor) -> Tensor:
        x = x + block.attn1(block.norm1(x))
        x = x + block.attn2(block.norm2(x), *block.attn2.keys_values(context))
        return x + block.ff(block.norm3(x))

    monkeypatch.setattr(TransformerBlock, "forward", general)
    general_out, general_gradients = outputs_and_gradients(unet, context)

    same(out, general_out)  # the softmax over one key is 1
    assert len(out.unique()) > 100  # not a network that puts out a constant
    dead = {id(p) for p in unet.single_token_dead_parameters()}
    for name, parameter in unet.named_parameters():
        if id(parameter) in dead:
            assert name not in gradients
            same(general_gradients[name], torch.zeros_like(parameter))
        else:
            same(gradients[name], general_gradients[name])
    same(gradients["context"], general_gradients["context"])


def test_equal_tokens_count_as_one() -> None:
    unet, (x, t, context) = small_unet(), inputs(tokens=1)
    with torch.no_grad():
        same(unet(x, t, context.repeat(1, 3, 1)), unet(x, t, context))


def test_dead_parameters_are_those_without_effect() -> None:
    unet, (x, t, context) = small_unet(), inputs(tokens=1)
    dead = unet.single_token_dead_parameters()
    assert len(dead) == 4 * 7  # to_q, to_k, and norm2's pair, in seven transformer blocks
    with torch.no_grad():
        before = unet(x, t, context)
        for parameter in dead:
            parameter.normal_()
        assert torch.equal(unet(x, t, context), before)
        assert not torch.allclose(unet(x, t, inputs(tokens=3)[2]), before)


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    _, _, context = inputs(tokens=1)
    plain, frugal = small_unet(), small_unet(activation_checkpointing=True)
    (out, gradients), (frugal_out, frugal_gradients) = (outputs_and_gradients(u, context) for u in (plain, frugal))
    same(out, frugal_out)
    assert gradients.keys() == frugal_gradients.keys()
    for name, gradient in gradients.items():
        same(gradient, frugal_gradients[name])


def test_starts_by_predicting_zero() -> None:
    x, t, context = (tensor.float() for tensor in inputs(tokens=1))
    unet = UNetModel(UNetConfig(model_channels=32, channel_mult=[1], num_res_blocks=1, num_heads=4, context_dim=16))
    assert not unet(x, t, context).any()


@pytest.mark.parametrize("sizes", [{"model_channels": 40}, {"num_heads": 3}, {"channel_mult": [1, 2], "num_heads": 64}])
def test_widths_that_do_not_divide_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.unet: got .*\d+"):
        small_unet(**sizes)


@pytest.mark.slow
def test_code_that_inductor_makes_computes_the_same() -> None:
    unet = UNetModel(UNetConfig(model_channels=8, norm_groups=4, channel_mult=[1], num_res_blocks=1, num_heads=1,
                                attention_resolutions=[], context_dim=8))  # fmt: skip
    for name, parameter in unet.named_parameters():
        nn.init.normal_(parameter, std=0.1 if "norm" in name else 0.05)
    inputs = torch.randn(1, 9, 8, 8), torch.tensor([500]), torch.randn(1, 1, 8)
    with torch.inference_mode():
        expected = unet(*inputs)
        unet.compile()
        got = unet(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))  # fused operations
