"""A mask-conditioned decoder from a file, in the place of a model's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ldm.checkpoint.first_stage import CONDITION_ENCODER, autoencoder_keys
from ldm.checkpoint.folders import weight_files
from ldm.checkpoint.io import CheckpointError, read_checkpoint
from ldm.checkpoint.keys import check_keys
from ldm.models.asymmetric import AsymmetricAutoencoderKL
from ldm.models.autoencoder import AutoencoderKL


def decoder_file(path: str | Path) -> Path:
    """The file with the weights: of a `diffusers` component's folder the one that it holds.

    Raises:
        CheckpointError: it is not there.
    """
    path = Path(path)
    file = weight_files(path)[0] if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a mask-conditioned decoder's checkpoint or diffusers folder")
    return file


def replace_decoder(first_stage: AutoencoderKL, path: str | Path) -> AsymmetricAutoencoderKL:
    """The same first stage with a mask-conditioned decoder, whose width and depth its file tells.

    Args:
        first_stage: its encoder stays.
        path: the authors' checkpoint, a training run's, an exported one, or the folder of a `diffusers` component.

    Raises:
        CheckpointError: the file is not there, holds no such decoder, does not fit, or was trained for an encoder whose
            latents mean something else.
    """
    file = decoder_file(path)
    state = read_checkpoint(file)
    try:
        state = autoencoder_keys(state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    last = state.get("decoder.conv_out.weight")
    if last is None or last.dim() != 4 or not any(name.startswith(CONDITION_ENCODER) for name in state):
        raise CheckpointError(
            f"{file}: holds no mask-conditioned decoder ({CONDITION_ENCODER}…); give one that was trained with "
            "model.first_stage.decoder=asymmetric, or the authors' (docs/asymmetric.md)"
        )
    config = first_stage.config
    blocks = {name.split(".")[4] for name in state if name.startswith("decoder.up.0.block.")}
    config = replace(
        config,
        decoder="asymmetric",
        decoder_width=last.shape[1] / (config.ch * config.ch_mult[0]),
        decoder_res_blocks=len(blocks) - 1,
    )
    with torch.device("meta"):
        widened = AsymmetricAutoencoderKL(config)
    check_keys({name: tensor.shape for name, tensor in widened.state_dict().items()}, state, source=file)
    own = {n: x for n, x in first_stage.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
    # as far apart as half precision may put equal weights
    if not all(torch.allclose(x.float(), state[n].to(x.device).float(), rtol=1e-2, atol=1e-3) for n, x in own.items()):
        raise CheckpointError(
            f"{file}: was trained for another encoder than this model's, so that latents mean something else; give the "
            "decoder that was trained for this model"
        )
    dtype = first_stage.quant_conv.weight.dtype
    widened.load_state_dict({**{name: tensor.to(dtype) for name, tensor in state.items()}, **own}, assign=True)
    return widened
