"""Relight a foreground: paint it in other light, chosen by a prompt, a direction or a background.

The UNet reads the noisy latents together with those of the foreground (8 input channels), or of the foreground and the
background (12 input channels).

Dimension key: B samples · W, H pixels, multiples of 64 · h, w latent cells · Z latent channels.
Source: Zhang et al. 2025, "Scaling In-the-Wild Training for Diffusion-based Illumination Harmonization and Editing by
Imposing Consistent Light Transport" (IC-Light). The steps and numbers are those of its published demonstrations.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.config import RELIGHTING_CHANNELS
from ldm.editing.editor import OnPhase, checked
from ldm.editing.hole_masks import fit_mask
from ldm.editing.settings import EditSettings
from ldm.files import UserError
from ldm.images import Picture, load_mask, open_image, open_upright, tensor_to_pil
from ldm.latent_diffusion import LatentDiffusion
from ldm.samplers import OnStep

LIGHTS = ("none", "left", "right", "top", "bottom")
GREY = (127, 127, 127)  # the level that `encode` maps to exactly 0
SIDE = 64  # widths and heights are multiples of this
NEGATIVE_PROMPT = "lowres, bad anatomy, bad hands, cropped, worst quality"
INITIAL_LIGHT = (255, 0)  # grey levels of the initial image, from the lit side to the dark side
BACKGROUND_LIGHT = (224, 32)  # the same for a generated background
AMBIENT = (64, 64)  # the background without a direction of light
GUIDANCE = {False: 2.0, True: 7.0}  # default scale by whether the model reads a background
SAMPLING = {*EditSettings().sampling, "seed", "n_samples"}


class Relighter:
    """IC-Light for images of any size, by a model that reads text, a foreground and maybe a background."""

    def __init__(self, model: LatentDiffusion) -> None:
        channels = model.config.input_channels[1:]
        if not model.reads_text or channels not in (list(RELIGHTING_CHANNELS), list(RELIGHTING_CHANNELS[:1])):
            raise UserError(f"got a model that reads {channels}, expected one for relighting: configs/iclight-fc.yaml")
        self.model, self.reads_background = model, len(channels) == 2

    @torch.inference_mode()
    def relight(
        self,
        foreground: Picture,
        prompt: str = "",
        *,
        mask: Picture | None = None,
        background: Picture | None = None,
        light: str = "none",
        size: tuple[int, int] | None = None,
        strength: float = 0.9,
        highres_scale: float = 1.5,
        highres_strength: float = 0.5,
        on_step: OnStep | None = None,
        on_phase: OnPhase | None = None,
        **sampling: Any,
    ) -> Image.Image | list[Image.Image]:
        """Paint the foreground in another light, on `background` or on one that the model invents.

        Args:
            foreground, mask: see `on_grey`; the model invents what is transparent.
            prompt: text about subject and light; `best quality` helps.
            background: for a model that reads one, cropped to the result's size; None is a gradient, or dark grey.
            light: its direction, one of LIGHTS: in the initial image, or in the background if the model reads one.
            size: (W, H) of the first pass, rounded to multiples of 64; None is about the model's in pixels.
            strength: share of the schedule, in (0, 1], by which the initial image is noised.
            highres_scale: factor, at least 1, by which the second pass enlarges the first result to repaint it.
            highres_strength: share of the schedule, in [0, 1], by which the second pass adds noise; 0 leaves it out.
            on_step, on_phase: as for `Editor.edit`.
            **sampling: SAMPLING of `EditSettings`; by default NEGATIVE_PROMPT, 25 steps a pass and GUIDANCE.

        Returns an RGB image; a list of them if n_samples > 1 or `seed` is a list. UserError if a file or a setting
        cannot be used, the model does not read a background, or what was painted is not finite.
        """
        if unknown := sampling.keys() - SAMPLING:
            raise UserError(f"got the setting {min(unknown)}, expected one of {', '.join(sorted(SAMPLING))}")
        if light not in LIGHTS:
            raise UserError(f"light: got {light!r}, expected one of {', '.join(LIGHTS)}")
        if background is not None and not self.reads_background:
            raise UserError("got a background for a model that reads none; give a light, or use a model for both")
        if background is not None and light != "none":
            raise UserError(f"got a background and light={light!r}; give one of them")
        if not 0 <= highres_strength <= 1 or highres_scale < 1:
            got = f"highres_strength={highres_strength}, highres_scale={highres_scale}"
            raise UserError(f"got {got}, expected 0 to 1, and 1 or more")
        guidance_scale = GUIDANCE[self.reads_background]
        defaults = {"negative_prompt": NEGATIVE_PROMPT, "num_steps": 25, "guidance_scale": guidance_scale}
        settings = EditSettings(prompt=prompt, **defaults | sampling)
        pictures = [on_grey(foreground, mask)] + ([] if background is None else [open_image(background)])
        model, count, begin = self.model, len(settings.seeds), on_phase or (lambda _: None)
        size = _multiples(size) if size else working_size(pictures[0].size, model.config.image_size)
        begin("encoding")
        options = {"generator": [torch.Generator().manual_seed(seed) for seed in settings.seeds], "on_step": on_step}
        options |= settings.sampling
        context = model.context(None, [prompt]).expand(count, -1, -1)
        options["null_context"] = model.null_context(options.pop("negative_prompt"))

        def paint(size: tuple[int, int], z_0: Tensor | None, strength: float) -> list[Image.Image]:
            """Run one pass."""
            read = [ImageOps.fit(picture, size, Image.Resampling.LANCZOS) for picture in pictures]
            if self.reads_background and background is None:
                read.append(gradient(size, light, BACKGROUND_LIGHT if light != "none" else AMBIENT))
            c_concat = torch.cat([self.encode([one]) for one in read], dim=1).expand(count, -1, -1, -1)
            begin("painting")
            z = model.sample(c_concat, context, z_0=z_0, strength=strength, **options)
            begin("decoding")
            return [tensor_to_pil(pixels) for pixels in checked(model.decode_latents(z).cpu(), model)]

        z_0 = None
        if light != "none" and not self.reads_background:
            z_0 = self.encode([gradient(size, light, INITIAL_LIGHT)]).expand(count, -1, -1, -1)
        results = paint(size, z_0, strength)
        if highres_strength > 0:
            begin("encoding")
            size = _multiples((size[0] * highres_scale, size[1] * highres_scale))
            z_0 = self.encode([result.resize(size, Image.Resampling.LANCZOS) for result in results])
            results = paint(size, z_0, highres_strength)
        return results[0] if settings.is_single else results

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode RGB images of one size as scaled latents (B, Z, h, w): the posterior's mode, grey level 127 as 0."""
        levels, model = np.stack([np.asarray(image) for image in images]).astype(np.float32), self.model
        x = torch.from_numpy(levels / 127 - 1).movedim(-1, 1)  # grey levels [0, 255] => about [-1, 1]
        posterior = model.first_stage_model.encode(x.to(model.betas.device, model.weight_dtype))
        return model.config.scale_factor * posterior.mean.float()


def on_grey(foreground: Picture, mask: Picture | None = None) -> Image.Image:
    """Lay a foreground over grey, with `mask`, see `fit_mask`, or its alpha channel as opacity: RGB."""
    image = open_upright(foreground, "the foreground").convert("RGBA")
    matte = image.getchannel("A") if mask is None else fit_mask(load_mask(mask), image.size, "foreground")
    if matte.getbbox() is None:
        raise UserError("the foreground is empty; give an image that is not all transparent, or a mask with white")
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, GREY), matte)


def gradient(size: tuple[int, int], light: str, levels: tuple[int, int]) -> Image.Image:
    """Draw a grey gradient, RGB, with the first of two levels at the lit side: left, right, top or bottom."""
    (bright, dark), is_row = levels if light in ("left", "top") else levels[::-1], light in ("left", "right")
    ramp = np.linspace(bright, dark, size[0] if is_row else size[1]).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(ramp if is_row else ramp[:, None], size[::-1])).convert("RGB")


def working_size(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Return the (W, H) with an image's aspect ratio and about `image_size`^2 pixels, in multiples of 64.

    UserError if the image is so thin that the multiples make more than four times as many.
    """
    scale = image_size / (size[0] * size[1]) ** 0.5
    width, height = _multiples((size[0] * scale, size[1] * scale))
    if width * height > 4 * image_size**2:
        raise UserError(f"the foreground is {size[0]} x {size[1]}, too thin for the model; crop it, or give a size")
    return width, height


def _multiples(size: Sequence[float]) -> tuple[int, int]:
    width, height = (max(SIDE, round(side / SIDE) * SIDE) for side in size)
    return width, height
