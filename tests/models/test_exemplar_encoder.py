"""Every stage of the exemplar encoder against the reference's outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.config import ConfigError, load_config
from ldm.latent_diffusion import LatentDiffusion, load_model
from ldm.models.exemplar_encoder import ExemplarEncoder, MapperAttention
from ldm.models.layers import Uninitialised

Close = Callable[[Tensor, Tensor], None]

TINY_CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def test_every_stage(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close) -> None:
    encoder, exemplar = tiny_model.cond_stage_model, golden["exemplar/ref"]
    hidden: list[Tensor] = []
    hook = encoder.transformer.encoder.layers.register_forward_hook(lambda *args: hidden.append(args[-1]))
    pooled = encoder.features(exemplar)
    hook.remove()
    close(hidden[0], golden["exemplar/clip_last_hidden"])
    close(pooled[:, 0], golden["exemplar/clip_pooled"])
    mapped = encoder.mapper(pooled)
    close(mapped, golden["exemplar/mapper"])
    close(encoder.final_ln(mapped), golden["exemplar/final_ln"])
    close(encoder(exemplar), golden["exemplar/encode"])
    close(tiny_model.encode_exemplar(exemplar), golden["exemplar/proj_out"])


def test_mapper_attends_between_tokens() -> None:
    """With one token the mapper's queries and keys have no effect; the layer is right about more than one."""
    attention = MapperAttention(8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator)
    q, k, v = attention.c_qkv(x).chunk(3, dim=-1)
    expected = attention.c_proj((q @ k.mT / 8**0.5).softmax(-1) @ v)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-6)


def test_a_build_without_initial_values_draws_nothing(tiny_model: LatentDiffusion) -> None:
    state = torch.get_rng_state()
    with Uninitialised():
        ExemplarEncoder(tiny_model.config.exemplar_encoder)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def all_tokens_model(tiny_checkpoint: Path) -> LatentDiffusion:
    """The tiny model of the published layout, read as one that passes every token on."""
    config = load_config(TINY_CONFIG, overrides=["model.exemplar_encoder.tokens=all"])
    return load_model(config, tiny_checkpoint)


def test_all_tokens(golden: dict[str, Tensor], all_tokens_model: LatentDiffusion, close: Close) -> None:
    encoder, exemplar = all_tokens_model.cond_stage_model, golden["exemplar/ref"]
    seen: list[Tensor] = []
    hook = encoder.mapper.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    context = all_tokens_model.encode_exemplar(exemplar)
    hook.remove()
    assert context.shape == (2, 17, 768)  # the class token and 4 x 4 patches
    close(seen[0][:, 0], golden["exemplar/clip_pooled"])  # the one token of the bottleneck is the first of them
    assert not torch.allclose(context, context[:, :1].expand_as(context), atol=1e-3)


def test_the_number_of_tokens_changes_no_names(tiny_model: LatentDiffusion, all_tokens_model: LatentDiffusion) -> None:
    layouts = [{name: x.shape for name, x in model.state_dict().items()} for model in (tiny_model, all_tokens_model)]
    assert layouts[0] == layouts[1]


def test_every_token_reaches_the_prediction(all_tokens_model: LatentDiffusion) -> None:
    """The general attention path: the loss has a gradient in each token, and in the queries and keys."""
    unet = copy.deepcopy(all_tokens_model.unet).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(2, 17, 768, generator=generator, requires_grad=True)
    x = torch.randn(2, 9, 8, 8, generator=generator)
    unet(x, torch.tensor([10, 500]), context).square().mean().backward()
    assert context.grad is not None
    assert (context.grad.abs().amax(dim=2) > 0).all()
    for parameter in unet.single_token_dead_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_the_null_token_stands_for_all_tokens(all_tokens_model: LatentDiffusion) -> None:
    """Null-dropping and guided sampling broadcast it; attention to equal tokens is attention to one."""
    model, generator = all_tokens_model, torch.Generator().manual_seed(0)
    context = torch.randn(2, 17, 768, generator=generator)
    got = model.drop_condition(context, torch.tensor([False, True]))
    assert torch.equal(got[0], context[0])
    assert torch.equal(got[1], model.null_context()[0].expand(17, -1))
    x, t = torch.randn(1, 9, 8, 8, generator=generator), torch.tensor([300])
    # The general path sums 17 equal terms: float32 rounding, a few units in the last place of values about 1.
    torch.testing.assert_close(model.unet(x, t, got[1:]), model.unet(x, t, model.null_context()), rtol=0, atol=1e-5)
    c_concat = model.c_concat(torch.randn(2, 4, 8, 8, generator=generator), torch.ones(2, 1, 16, 16))
    for scale in (1.0, 5.0):
        sampled = model.sample(c_concat, context, num_steps=2, guidance_scale=scale, generator=generator)
        assert sampled.shape == (2, 4, 8, 8)
        assert sampled.isfinite().all()


def test_unknown_tokens() -> None:
    with pytest.raises(ConfigError, match=r"model\.exemplar_encoder\.tokens: got 'some'"):
        load_config(overrides=["model.exemplar_encoder.tokens=some"])
