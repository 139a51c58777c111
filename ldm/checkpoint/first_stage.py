"""What an autoencoder's tensors are called: in CompVis' files, in `diffusers`' folders, in whole models.

The names of this project's modules are CompVis', as the authors of the asymmetric decoder use them, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ldm.checkpoint.convert import to_original
from ldm.checkpoint.keys import FIRST_STAGE

# What trainers and the authors' files hold besides: losses, discriminators, and layers that no picture goes through.
UNUSED = ("loss.", "discriminator.", "decoder.up_layers.")
CONDITION_ENCODER = "decoder.encoder."  # of the asymmetric decoder alone


def autoencoder_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors under the names of `AutoencoderKL`.

    Args:
        state: a file's tensors: the authors', a `diffusers` component's, or those of a whole model or training run.

    Raises:
        CheckpointError: a `diffusers` component holds something else, too.
    """
    if any(".mid_block." in name for name in state):
        state = to_original({"vae": state})
    if any(name.startswith(FIRST_STAGE) for name in state):
        state = {name.removeprefix(FIRST_STAGE): x for name, x in state.items() if name.startswith(FIRST_STAGE)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
