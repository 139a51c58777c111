"""ControlNet: a copy of the UNet's encoder that reads an image (edges, depth, a pose …) and steers the UNet with it.

Dimensions: B batch · H, W pixels · h, w latent cells (H / 8, W / 8) · L context tokens · D token channels.
Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint.convert import read_component, to_original
from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import UNET, check_keys, holds
from ldm.config import UNetConfig
from ldm.models.layers import Uninitialised, zero_init
from ldm.models.unet import Projectable, UNetEncoder

HINT_CHANNELS = (16, 32, 96, 256)  # of the control image on its way to the latent grid
HINT_DOWNSAMPLING = 2 ** (len(HINT_CHANNELS) - 1)
GUESS_LOWEST = 0.1  # scale of the finest residuals in guess mode; the middle's is 1

CONTROL = "control_model."  # prefix in the published files, which may hold the steered model, too


class ControlNet(UNetEncoder):
    """Computes residuals for the UNet's skip connections and middle from an image.

    It reads x_t alone, also where the steered UNet reads more channels: control networks are trained with Stable
    Diffusion.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(replace(config, in_channels=config.out_channels))
        hint: list[nn.Module] = [nn.Conv2d(3, HINT_CHANNELS[0], 3, padding=1), nn.SiLU()]
        for narrow, wide in pairwise(HINT_CHANNELS):
            hint += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.SiLU()]
            hint += [nn.Conv2d(narrow, wide, 3, padding=1, stride=2), nn.SiLU()]
        self.input_hint_block = nn.Sequential(
            *hint, zero_init(nn.Conv2d(HINT_CHANNELS[-1], config.model_channels, 3, padding=1))
        )
        widths = [*self.skip_channels, self.skip_channels[-1]]
        *outs, middle_out = (nn.Sequential(zero_init(nn.Conv2d(width, width, 1))) for width in widths)
        self.zero_convs, self.middle_block_out = nn.ModuleList(outs), middle_out

    def forward(self, x_t: Tensor, t: Projectable, context: Projectable, hint: Tensor) -> list[Tensor]:
        """Compute the residuals, from the finest to the middle, as `UNetModel.forward` takes them.

        x_t (B, 4, h, w) is the noisy latent alone; hint (B / n, C, h, w) the output of `input_hint_block`, taken n
        times; t and context are as for the UNet.
        """
        condition = self.condition(t, context)
        x, residuals = x_t, []
        for i, (stage, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            x = stage(x, *condition)
            if i == 0:
                x = (x.unflatten(0, (-1, len(hint))) + hint).flatten(0, 1)
            residuals.append(zero_conv(x))
        return [*residuals, self.middle_block_out(self.middle_block(x, *condition))]


@dataclass(frozen=True)
class Control:
    """A control network on the model's device, with its image and strength."""

    network: ControlNet
    picture: Image.Image | str | Path  # edges, depth, a pose …, of the scene's size or aspect
    scale: float = 1.0  # factor of the residuals; 1 is as trained, 0 is without
    # steer the prompt's branch of the guidance alone, and less the finer the residuals are, so that the edit follows
    # the image even without words; source: Zhang et al. 2023, section 3.4
    guess_mode: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):  # the hole would be black
            raise ValueError(f"control scale: got {self.scale}, expected a finite number")

    def scales(self, count: int) -> list[float]:
        """Return the factor of each residual, from the finest to the middle; in guess mode geometric, from 0.1 to 1."""
        lowest = GUESS_LOWEST if self.guess_mode else 1.0
        return [self.scale * lowest ** (1 - i / (count - 1)) for i in range(count)]


class Steering:
    """One or several controls, whose images (1 or B, 3, H, W) in [0, 1] are encoded once for all steps."""

    @torch.no_grad()
    def __init__(self, controls: Sequence[Control], pictures: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.controls = controls
        self.hints = [
            control.network.input_hint_block(picture.to(next(control.network.parameters()).device, dtype))
            for control, picture in zip(controls, pictures, strict=True)
        ]

    def prepare(self, timesteps: Sequence[int], context: Tensor) -> Callable[[Tensor, int, bool], list[Tensor]]:
        """Return the sum of the controls' residuals as a function for a sampling run, see `UNetEncoder.prepare`.

        It reads x_t (B, 4, h, w) alone, the timestep, and whether the first half of the batch is the branch of guidance
        without the condition.
        """
        networks = [control.network.prepare(timesteps, context) for control in self.controls]

        def residuals(x_t: Tensor, t: int, guided: bool) -> list[Tensor]:
            parts: list[list[Tensor]] = []
            for control, network, hint in zip(self.controls, networks, self.hints, strict=True):
                first = len(x_t) // 2 if guided and control.guess_mode else 0  # samples before it are not steered
                found = network(x_t[first:], t, hint)
                scaled = [x * scale for x, scale in zip(found, control.scales(len(found)), strict=True)]
                parts.append([torch.cat([x.new_zeros(first, *x.shape[1:]), x]) if first else x for x in scaled])
            return [torch.stack(same_place).sum(0) for same_place in zip(*parts, strict=True)]

        return residuals


def load_controlnet(
    path: str | Path, config: UNetConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ControlNet:
    """Load a control network for a UNet, strictly, in evaluation mode without gradients.

    `path` is a file in the published layout (`control_model.*`, alone or with the model that it steers) or in that of
    diffusers, or a folder of diffusers; other files and networks for another UNet are refused.
    """
    state = control_state(read_component(Path(path)), str(path))
    with Uninitialised():
        network = ControlNet(config)
    check_keys({name: tensor.shape for name, tensor in network.state_dict().items()}, state, source=path)
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return network.requires_grad_(False).eval().to(device)


def control_state(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a control network's tensors under its module's names, from either layout; refuse other files."""
    if holds(state, "controlnet_down_blocks."):
        try:
            state = {name.removeprefix(UNET): tensor for name, tensor in to_original({"unet": state}).items()}
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
    elif holds(state, CONTROL):
        state = {name.removeprefix(CONTROL): tensor for name, tensor in state.items() if name.startswith(CONTROL)}
    conv = state.get("input_blocks.0.0.weight")
    if conv is None or not holds(state, "zero_convs."):
        raise CheckpointError(f"{source}: not a control network; pass a file such as control_v11p_sd15_canny.pth")
    if conv.shape[1] != 4:
        remedy = "use one for Stable Diffusion itself, which steers inpainting models as it is"
        raise CheckpointError(f"{source}: its input conv has {conv.shape[1]} channels, expected 4; {remedy}")
    return dict(state)
