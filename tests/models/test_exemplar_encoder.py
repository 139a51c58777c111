"""Every stage of the exemplar encoder against the reference's outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.latent_diffusion import LatentDiffusion
from ldm.models.exemplar_encoder import ExemplarEncoder, MapperAttention

Close = Callable[[Tensor, Tensor], None]


def test_every_stage(golden: dict[str, Tensor], tiny_model: LatentDiffusion, close: Close) -> None:
    encoder, exemplar = tiny_model.cond_stage_model, golden["exemplar/ref"]
    tower = encoder.transformer(pixel_values=exemplar)
    close(tower.last_hidden_state, golden["exemplar/clip_last_hidden"])
    close(tower.pooler_output, golden["exemplar/clip_pooled"])
    mapped = encoder.mapper(tower.pooler_output[:, None])
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


def test_position_ids_are_restored_after_a_build_without_memory(tiny_model: LatentDiffusion) -> None:
    with torch.device("meta"):
        encoder = ExemplarEncoder(tiny_model.config.exemplar_encoder)
    encoder.restore_position_ids("cpu")
    position_ids = encoder.transformer.embeddings.position_ids
    assert position_ids.tolist() == [list(range(17))]  # the class token and 4 x 4 patches
    assert not any(name.endswith("position_ids") for name in encoder.state_dict())
