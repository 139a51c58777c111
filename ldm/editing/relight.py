"""Relighting: a foreground in other light, by a prompt, a direction or a background.

The UNet sees the latents of the foreground, and with twelve channels of the background, beside the noisy one.

Dimension key: B samples · W, H pixels, multiples of 64 · h, w latent cells · Z latent channels.
Source: Zhang et al. 2025, "Scaling In-the-Wild Training for Diffusion-based Illumination Harmonization and Editing by
Imposing Consistent Light Transport" (IC-Light); the steps and numbers are those of its published demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.config import RELIGHTING_CHANNELS
from ldm.editing.editor import Picture, as_rgb, seeds_of
from ldm.files import UserError
from ldm.images import open_rgba, tensor_to_pil, to_rgba
from ldm.latent_diffusion import LatentDiffusion
from ldm.samplers import OnStep

LIGHTS = ("none", "left", "right", "top", "bottom")
GREY = (127, 127, 127)  # the level that is exactly 0 here: nothing is there
SIDE = 64  # which sides are multiples of
NEGATIVE_PROMPT = "lowres, bad anatomy, bad hands, cropped, worst quality"
INITIAL_LIGHT, BACKGROUND_LIGHT, AMBIENT = (255, 0), (224, 32), 64  # grey levels from the lit side to the other
GUIDANCE = (2.0, 7.0)  # scales: without a background, with one


class Relighter:
    """IC-Light for pictures.

    Args:
        model: from `load_model`, with the input channels `[x_t, z_foreground]` or `[x_t, z_foreground, z_background]`.

    Raises:
        UserError: the model is for something else.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        channels = model.config.input_channels[1:]
        if not model.reads_text or channels not in (list(RELIGHTING_CHANNELS), list(RELIGHTING_CHANNELS[:1])):
            raise UserError(
                f"got a model with the input channels x_t, {', '.join(channels)} and the condition "
                f"{model.config.condition}, expected one for relighting; see configs/iclight-fc.yaml"
            )
        self.model = model
        self.reads_background = len(channels) == 2

    def relight(
        self,
        foreground: Picture,
        prompt: str = "",
        *,
        mask: Picture | None = None,
        background: Picture | None = None,
        light: str = "none",
        negative_prompt: str = NEGATIVE_PROMPT,
        size: tuple[int, int] | None = None,
        sampler: str = "dpm_solver_pp",
        num_steps: int = 25,
        guidance_scale: float | None = None,
        strength: float = 0.9,
        highres_scale: float = 1.5,
        highres_strength: float = 0.5,
        seed: int | Sequence[int] = 0,
        n_samples: int = 1,
        on_step: OnStep | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Paint the foreground in another light, on a background of the model's own or the given one.

        Args:
            foreground: picture or path; what is transparent of it is left to the model.
            prompt: of subject and light; `best quality` helps.
            mask: white where the foreground is, of its size, soft edges allowed; None takes its alpha channel.
            background: for a model that reads one; cropped to the size. None with light `none` is dark grey.
            light: where it comes from. Of a model that reads no background it is the picture that noise is added to,
                of one that does the background.
            negative_prompt: what guidance leads away from.
            size: (W, H) of the first pass, rounded to multiples of 64; None is about the model's own with the
                foreground's aspect.
            sampler, num_steps, seed, n_samples, on_step: as for `Editor.edit`, the steps of each pass.
            guidance_scale: None is 2 without a background, 7 with one, as published.
            strength: of the noise on the initial light.
            highres_scale: size of the result, times that of the first pass, whose result is enlarged and painted over.
            highres_strength: of the noise of this second pass; 0 leaves it out, and the size as it is.

        Returns:
            An RGB picture; a list of them for n_samples > 1 or a list of seeds.

        Raises:
            UserError: a setting is out of range, or the model reads no background.
            OSError, ValueError: a file cannot be read.
        """
        if light not in LIGHTS:
            raise UserError(f"light: got {light!r}, expected one of {', '.join(LIGHTS)}")
        if background is not None and not self.reads_background:
            raise UserError("got a background for a model that reads none; give a light, or use a model for both")
        if background is not None and light != "none":
            raise UserError(f"got a background and light={light!r}; give one of them")
        if not 0 <= highres_strength <= 1 or highres_scale < 1:
            raise UserError(
                f"got highres_strength={highres_strength}, highres_scale={highres_scale}, "
                "expected 0 to 1, and 1 or more"
            )
        seeds, alone = seeds_of(seed, n_samples)
        cut_out = on_grey(foreground, mask)
        size = _multiples(size) if size else working_size(cut_out.size, self.model.config.image_size)
        sampling: dict[str, Any] = dict(sampler=sampler, num_steps=num_steps, on_step=on_step)
        sampling["guidance_scale"] = GUIDANCE[self.reads_background] if guidance_scale is None else guidance_scale
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def behind(size: tuple[int, int]) -> Image.Image | None:
            if not self.reads_background:
                return None
            if background is not None:
                return ImageOps.fit(as_rgb(background), size, Image.Resampling.LANCZOS)
            return gradient(size, light, BACKGROUND_LIGHT if light != "none" else (AMBIENT, AMBIENT))

        z_0 = None
        if light != "none" and not self.reads_background:
            z_0 = self.encode([gradient(size, light, INITIAL_LIGHT)] * len(seeds))
        results = self._paint(
            cut_out, behind(size), size, prompt, negative_prompt, generators, z_0=z_0, strength=strength, **sampling
        )
        if highres_strength > 0:
            size = _multiples((size[0] * highres_scale, size[1] * highres_scale))
            z_0 = self.encode([result.resize(size, Image.Resampling.LANCZOS) for result in results])
            results = self._paint(
                cut_out,
                behind(size),
                size,
                prompt,
                negative_prompt,
                generators,
                z_0=z_0,
                strength=highres_strength,
                **sampling,
            )
        return results[0] if alone else results

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of one size to scaled latents (B, Z, h, w): the posterior's mode, grey level 127 as 0."""
        levels = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32)
        x = torch.from_numpy(levels / 127 - 1).movedim(-1, 1)  # levels => about [-1, 1]
        model = self.model
        posterior = model.first_stage_model.encode(x.to(model.betas.device, model.weight_dtype))
        return model.config.scale_factor * posterior.mode().float()

    @torch.inference_mode()
    def _paint(
        self,
        foreground: Image.Image,
        background: Image.Image | None,
        size: tuple[int, int],
        prompt: str,
        negative_prompt: str,
        generators: list[torch.Generator],
        **sampling: Any,
    ) -> list[Image.Image]:
        """One pass at a size."""
        model, count = self.model, len(generators)
        fitted = ImageOps.fit(foreground, size, Image.Resampling.LANCZOS)
        c_concat = torch.cat([self.encode([picture]) for picture in (fitted, background) if picture], dim=1)
        context, null_context = model.context(None, [prompt]), model.null_context(negative_prompt)
        z = model.sample(
            c_concat.expand(count, -1, -1, -1),
            context.expand(count, -1, -1),
            null_context=null_context,
            generator=generators,
            **sampling,
        )
        return [tensor_to_pil(pixels) for pixels in model.decode_latents(z)]


def on_grey(foreground: Picture, mask: Picture | None = None) -> Image.Image:
    """A foreground over grey, RGB; as far as `mask`, or its own alpha channel, says that it is there.

    Raises:
        UserError: the mask has another size, or says that nothing is there.
    """
    if isinstance(foreground, Image.Image):
        picture = to_rgba(ImageOps.exif_transpose(foreground))
    else:
        picture = open_rgba(foreground)
    matte = picture.getchannel("A") if mask is None else as_rgb(mask).convert("L")
    if matte.size != picture.size:
        raise UserError(
            f"the foreground's mask is {matte.width}x{matte.height}, the foreground {picture.width}x{picture.height}; "
            "give a mask of its size"
        )
    if matte.getbbox() is None:
        raise UserError("the foreground is empty; give a picture that is not all transparent, or a mask with white")
    return Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, GREY), matte)


def gradient(size: tuple[int, int], light: str, levels: tuple[int, int]) -> Image.Image:
    """Grey from a lit side to the other, RGB: left, right, top or bottom has the first level."""
    width, height = size
    bright, dark = levels if light in ("left", "top") else levels[::-1]
    along = np.linspace(bright, dark, width if light in ("left", "right") else height).astype(np.uint8)
    grid = np.broadcast_to(along[None] if light in ("left", "right") else along[:, None], (height, width))
    return Image.fromarray(np.ascontiguousarray(grid)).convert("RGB")


def working_size(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """(W, H) with a picture's aspect, about as many pixels as a square of `image_size`, multiples of 64."""
    scale = image_size / (size[0] * size[1]) ** 0.5
    return _multiples((size[0] * scale, size[1] * scale))


def _multiples(size: Sequence[float]) -> tuple[int, int]:
    width, height = (max(SIDE, round(side / SIDE) * SIDE) for side in size)
    return width, height
