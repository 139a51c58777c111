"""Control networks: loading them, and steering a UNet with one or several.

Dimensions: B batch · H, W pixels · h, w latent cells · L context tokens · D token channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.convert import to_original
from ldm.checkpoint.folders import read_component
from ldm.checkpoint.io import CheckpointError, read_checkpoint
from ldm.checkpoint.keys import UNET, check_keys
from ldm.config import UNetConfig
from ldm.models.controlnet import ControlNet

CONTROL = "control_model."  # of the published files, which may hold the steered model, too
GUESS_LOWEST = 0.1  # scale of the finest residuals in guess mode; the middle's is 1
_INPUT_CONV = "input_blocks.0.0.weight"
# What a folder of diffusers calls the parts that the UNet does not have.
_DIFFUSERS_PARTS = {
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
    **{f"controlnet_cond_embedding.blocks.{i}.": f"input_hint_block.{2 * i + 2}." for i in range(6)},
    "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
    "controlnet_mid_block.": "middle_block_out.0.",
}
_DIFFUSERS_ZERO_CONVS = "controlnet_down_blocks."


@dataclass(frozen=True)
class Control:
    """What steers an edit.

    Attributes:
        network: on the model's device.
        picture: of the scene's size or aspect, what the network reads: edges, depth, a pose …
        scale: of its residuals; 1 is as trained, 0 is without.
        guess_mode: steer the prompt's branch of the guidance alone, and less the finer the residuals are, so that the
            picture is followed without words, too. Source: Zhang et al. 2023, section 3.4.

    Raises:
        ValueError: the scale is no finite number.
    """

    network: ControlNet
    picture: Image.Image | str | Path
    scale: float = 1.0
    guess_mode: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):  # the hole would be black
            raise ValueError(f"control scale: got {self.scale}, expected a finite number")

    def scales(self, count: int) -> list[float]:
        """Of so many residuals, from the finest to the middle."""
        if not self.guess_mode:
            return [self.scale] * count
        return [self.scale * GUESS_LOWEST ** (1 - i / (count - 1)) for i in range(count)]


class Steering:
    """One or several controls, their pictures encoded once for all steps.

    Args:
        controls: what steers.
        pictures: of each, (1 or B, 3, H, W) in [0, 1].
        dtype: of the computation.
    """

    @torch.no_grad()
    def __init__(self, controls: Sequence[Control], pictures: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.controls = controls
        self.hints = [
            control.network.encode_hint(picture.to(next(control.network.parameters()).device, dtype))
            for control, picture in zip(controls, pictures, strict=True)
        ]

    def residuals(self, x_t: Tensor, t: Tensor, context: Tensor, *, guided: bool) -> list[Tensor]:
        """The sum of the controls' residuals, as `UNetModel.forward` takes them.

        Args:
            x_t, t, context: of the UNet's call; x_t (B, 4, h, w) alone.
            guided: the first half of the batch is the branch without the condition.
        """
        given = [self._of(*pair, x_t, t, context, guided) for pair in zip(self.controls, self.hints, strict=True)]
        return [torch.stack(parts).sum(0) for parts in zip(*given, strict=True)]

    def _of(
        self, control: Control, hint: Tensor, x_t: Tensor, t: Tensor, context: Tensor, guided: bool
    ) -> list[Tensor]:
        start = len(x_t) // 2 if guided and control.guess_mode else 0
        repeats = (len(x_t) - start) // len(hint)
        residuals = control.network(x_t[start:], t[start:], context[start:], hint.repeat(repeats, 1, 1, 1))
        scaled = [residual * s for residual, s in zip(residuals, control.scales(len(residuals)), strict=True)]
        return [torch.cat([part.new_zeros(start, *part.shape[1:]), part]) for part in scaled] if start else scaled


def load_controlnet(
    path: str | Path, config: UNetConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ControlNet:
    """Load a control network for a UNet, strictly.

    Args:
        path: file in the published layout (`control_model.*`, alone or with the model that it steers), or in that of
            diffusers (`diffusion_pytorch_model.safetensors`), or a folder of diffusers.
        config: of the UNet.

    Returns:
        The network in evaluation mode, without gradients.

    Raises:
        CheckpointError: the file cannot be read, is no control network, or one for another UNet.
    """
    state = read_component(Path(path)) if Path(path).is_dir() else read_checkpoint(path)
    state = control_state(state, str(path))
    with torch.device("meta"):
        network = ControlNet(config)
    check_keys({name: tensor.shape for name, tensor in network.state_dict().items()}, state, source=path)
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return network.requires_grad_(False).eval().to(device)


def control_state(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a control network under its module's names, from either layout.

    Raises:
        CheckpointError: it is none, or one that a UNet for inpainting was copied for.
    """
    if any(name.startswith(CONTROL) for name in state):
        found = {name.removeprefix(CONTROL): tensor for name, tensor in state.items() if name.startswith(CONTROL)}
    elif any(name.startswith(_DIFFUSERS_ZERO_CONVS) for name in state):
        try:
            found = _from_diffusers(state)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
    else:
        found = dict(state)
    if _INPUT_CONV not in found or not any(name.startswith("zero_convs.") for name in found):
        raise CheckpointError(
            f"{source}: not a control network; pass a file with {CONTROL}* or {_DIFFUSERS_ZERO_CONVS}*, such as "
            "control_v11p_sd15_canny.pth"
        )
    channels = found[_INPUT_CONV].shape[1]
    if channels != 4:
        raise CheckpointError(
            f"{source}: its input conv has {channels} channels, expected 4: it was copied from an inpainting UNet, but "
            "a control network sees the noisy latent alone; use one that was made from Stable Diffusion itself, which "
            "steers inpainting models as it is"
        )
    return found


def _from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found, encoder = {}, {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in _DIFFUSERS_PARTS if name.startswith(prefix)), None)
        if prefix is not None:
            found[_DIFFUSERS_PARTS[prefix] + name.removeprefix(prefix)] = tensor
        elif name.startswith(_DIFFUSERS_ZERO_CONVS):
            number, kind = name.removeprefix(_DIFFUSERS_ZERO_CONVS).split(".", 1)
            found[f"zero_convs.{number}.0.{kind}"] = tensor
        else:
            encoder[name] = tensor
    return found | {name.removeprefix(UNET): tensor for name, tensor in to_original({"unet": encoder}).items()}
