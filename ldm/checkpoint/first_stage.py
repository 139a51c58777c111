"""What an autoencoder's tensors are called: in CompVis' files, in `diffusers`' folders, in whole models.

The names of this project's modules are CompVis', as the authors of the asymmetric decoder use them, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoint.keys import FIRST_STAGE

# What trainers and the authors' files hold besides: losses, discriminators, and layers that no picture goes through.
UNUSED = ("loss.", "discriminator.", "decoder.up_layers.")
CONDITION_ENCODER = "decoder.encoder."  # of the asymmetric decoder alone

# (in diffusers, here), replaced from top to bottom; the decoder's `up_blocks` are counted the other way round.
DIFFUSERS = (
    ("decoder.condition_encoder.", CONDITION_ENCODER),
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".attn_1.group_norm.", ".attn_1.norm."),
    (".attn_1.to_q.", ".attn_1.q."),
    (".attn_1.to_k.", ".attn_1.k."),
    (".attn_1.to_v.", ".attn_1.v."),
    (".attn_1.to_out.0.", ".attn_1.proj_out."),
    (".down_blocks.", ".down."),
    (".resnets.", ".block."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
)


def autoencoder_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors under the names of `AutoencoderKL`.

    Args:
        state: a file's tensors: the authors', a `diffusers` component's, or those of a whole model or training run.
    """
    if any(name.startswith(FIRST_STAGE) for name in state):
        state = {name.removeprefix(FIRST_STAGE): x for name, x in state.items() if name.startswith(FIRST_STAGE)}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
    if not any(".mid_block." in name for name in state):
        return state
    levels = len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")})
    return {_from_diffusers(name, levels): _kernel(name, tensor) for name, tensor in state.items()}


def _from_diffusers(name: str, levels: int) -> str:
    name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    for theirs, ours in DIFFUSERS:
        name = name.replace(theirs, ours)
    return name


def _kernel(name: str, tensor: Tensor) -> Tensor:
    """A linear layer's weight in the attention as the convolution's of 1 x 1 that it is here."""
    return tensor[..., None, None] if ".attentions." in name and tensor.dim() == 2 else tensor
