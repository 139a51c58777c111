"""Editing pictures of any size: fit the scene to the model, paint the hole, put it back.

Dimension key: B samples · S the model's picture side, pixels · W, H scene size, pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageChops, ImageOps, PngImagePlugin
from torch import Tensor

from ldm import images
from ldm.config import Config
from ldm.editing.hole_masks import box_hole, depth, drawn_hole, grown, parts, reshaped
from ldm.editing.seams import agree, membrane
from ldm.files import UserError, atomic_write
from ldm.images import (
    MID_GREY,
    Box,
    exemplar_to_tensor,
    flatten,
    load_mask,
    mask_to_tensor,
    open_upright,
    pad_box,
    pil_to_tensor,
    tensor_to_pil,
)
from ldm.latent_diffusion import LatentDiffusion, load_model
from ldm.models.controlnet import HINT_DOWNSAMPLING, Control, ControlNet, Steering, load_controlnet
from ldm.samplers import OnStep

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "pretrained_models" / "mini"
EXAMPLE_PARTS = ("scene", "mask", "exemplar")
MAX_ENLARGEMENT = 4  # a scene pixel covers at most this many model pixels per side

Picture = Image.Image | str | Path


@dataclass(frozen=True)
class Window:
    """The square of the scene that the model sees; it may reach beyond the scene's borders."""

    left: int
    top: int
    side: int


def fit_window(
    hole: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    crop_margin: float = 0.5,
    min_side: int = 1,
    whole_image: bool = False,
) -> Window:
    """Choose the square that shows the hole with context around it.

    The square's side is the hole's longer side plus `crop_margin` of it on both sides. Where that
    is more than the scene's short side, the margin shrinks to fit, down to half; beyond that the
    square reaches over the border. It is never larger than the scene's long side, is centred on the
    hole, and is moved inside the scene on every axis on which it fits.

    Args:
        hole: bounding box of the hole: left, top, right, bottom in pixels, right and bottom exclusive.
        size: (W, H) of the scene.
        crop_margin: context on each side as a share of the hole's longer side, at least 0.
        min_side: least side in pixels, as far as the scene is that large.
        whole_image: take the smallest square that holds the whole scene.
    """
    x0, y0, x1, y1 = hole
    width, height = size
    if whole_image:
        side = max(size)
    else:
        longest = max(x1 - x0, y1 - y0)
        wanted = max(round(longest * (1 + 2 * crop_margin)), min_side)
        least = round(longest * (1 + crop_margin))
        side = min(wanted, max(min(size), least), max(size))
    return Window(_place(x0, x1, width, side), _place(y0, y1, height, side), side)


def _place(start: int, stop: int, length: int, side: int) -> int:
    """Left end of an interval of `side`: around [start, stop) inside [0, length) if it fits, else centred there."""
    if side > length:
        return -((side - length) // 2)
    return min(max((start + stop - side) // 2, 0), length - side)


class Editor:
    """Inpainting of pictures: replace the hole of a scene by what an exemplar shows, or what a prompt says.

    Args:
        model: from `load_model`; its device and precision are used as they are.

    Raises:
        UserError: the model is float16 on the CPU.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        parameter = next(model.parameters())
        if parameter.dtype == torch.float16 and parameter.device.type == "cpu":
            raise UserError("got float16 on the CPU, expected float32 or bfloat16 there; pass dtype=torch.float32")
        self.model = model
        self.device = parameter.device

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        config: str | Path | DictConfig | Config | None = None,
        decoder: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Editor:
        """Load a model and make an editor of it.

        Args:
            path: checkpoint file, or a folder with `config.yaml` and `model.safetensors`; None is the
                bundled small model.
            config: the model's config; None takes the `config.yaml` beside the checkpoint.
            decoder: a decoder that sees the pixels that are kept, for the model's encoder: a file or a `diffusers`
                component's folder; see `ldm.latent_diffusion.replace_decoder`.
            device: `cpu`, `cuda`, `mps`, or `auto` for the fastest one present.
            dtype: precision of the weights; float16 is not for the CPU.

        Raises:
            UserError: the device, the checkpoint or its config is not there.
            ConfigError, CheckpointError, ValueError: the files cannot be used, or float16 is asked for on the CPU.
        """
        chosen = pick_device(device)
        checkpoint = checkpoint_file(path)
        if config is None:
            config = checkpoint.parent / "config.yaml"
            if not config.is_file():
                raise UserError(
                    f"{checkpoint}: no config.yaml beside it; name its config (configs/v1.yaml for the published model)"
                )
        return cls(load_model(config, checkpoint, decoder=decoder, device=chosen, dtype=dtype))

    def edit(
        self,
        scene: Picture,
        hole_mask: Picture,
        exemplar: Picture | Sequence[Picture | None] | None = None,
        *,
        separate: bool = False,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        sampler: str = "dpm_solver_pp",
        num_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        n_samples: int = 1,
        crop_margin: float | None = None,
        feather: int | None = None,
        match_colors: bool = True,
        whole_image: bool = False,
        controls: Sequence[Control] = (),
        on_step: OnStep | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Replace the hole of a scene by what the exemplar shows or the prompt says, whichever the model reads.

        The hole and its surroundings are cropped square, resized to the model's size, painted, and put
        back at the scene's size. Every pixel outside the hole equals the scene's bit for bit; the scene counts as
        what it looks like: turned upright as its EXIF data say, transparent parts over mid-grey, 8 bits, RGB.

        Args:
            scene: picture or path, any size, aspect and mode. A colour profile stays with the result.
            hole_mask: white (>= 128) is painted; a mask of another size is resized (nearest) with a warning.
                A mask that is white everywhere is allowed: the whole scene is made up from the exemplar.
            exemplar: picture or path; cropped to its opaque part and squashed to the exemplar encoder's square, as in
                the paper (`prepare_exemplar` has other ways). None uses the model's null token, that is, inpaints
                without an exemplar. A list: one for each separate part of the hole, in the order of `holes.parts`, from
                top to bottom, or one for all of them.
            separate: edit the separate parts of the hole one after the other, each with a crop of its own, as a list of
                exemplars does, too.
            prompt: what to paint, in words; None is the empty prompt.
            negative_prompt: what guidance leads away from; None is the empty prompt.
            sampler: ddpm | ddim | plms | dpm_solver_pp | unipc.
            num_steps: denoising steps.
            guidance_scale: 1 follows the exemplar without guidance; the paper uses 5.
            guidance_interval: the noise levels with guidance, from 0, data, to 1, noise.
            eta: DDIM's stochasticity in [0, 1].
            seed: sample i uses `seed + i`, or the i-th entry of a list. Equal seeds give the same picture
                alone or among others; across devices and batch sizes up to rounding.
            n_samples: pictures to make; with a list of seeds, its length.
            crop_margin: surroundings on each side as a share of the hole's longer side; `fit_window`. None is what
                the model's config says.
            feather: pixels within the hole over which the painted region fades into what the scene shows there; None is
                a fiftieth of the hole's longer side.
            match_colors: correct the painted region for the decoder's change of colours at its edge; `seams.agree`.
            whole_image: show the model the whole scene instead of a crop, as the paper does. A scene that
                is not square is extended by reflection, not squashed.
            controls: control networks (`load_controlnet`), each with a picture that it reads.
            on_step: called after each step as `on_step(step, num_steps, x_t, x_0)`, for one part after the other.

        Returns:
            An RGB picture of the scene's size; a list of them for n_samples > 1 or a list of seeds.

        Raises:
            UserError: the mask is empty, a setting is out of range, the model does not read what is given, or the
                numbers of parts and exemplars differ.
            OSError, ValueError: a file cannot be read.
        """
        seeds, alone = seeds_of(seed, n_samples)
        if crop_margin is None:
            crop_margin = self.model.config.crop_margin
        if not 0 <= crop_margin < math.inf or (feather or 0) < 0:
            raise UserError(f"got crop_margin={crop_margin}, feather={feather}, expected 0 or more")

        picture, hole = _opaque(scene, hole_mask)
        if exemplar is None or isinstance(exemplar, (Image.Image, str, Path)):
            exemplars, holes = [exemplar], parts(hole) if separate else [hole]
        else:
            exemplars, holes = list(exemplar), parts(hole)
        if len(exemplars) not in (1, len(holes)):
            raise UserError(
                f"got {len(exemplars)} exemplars for a hole of {len(holes)} separate parts, expected one or "
                f"{len(holes)}, from top to bottom"
            )
        image_size = self.model.config.image_size
        results = [picture] * len(seeds)
        for i, hole in enumerate(holes):
            # They are one picture before the first part is painted.
            fits = [
                fit_scene(result, hole, image_size, crop_margin=crop_margin, whole_image=whole_image)
                for result in (results if i else results[:1])
            ]
            shown = exemplars[i % len(exemplars)]
            steering = None
            if controls:
                pictures = [fits[0].same_square(control.picture, image_size) for control in controls]
                steering = Steering(controls, pictures, self.model.weight_dtype)
            painted = self.paint(
                torch.cat([fitted.image for fitted in fits]).expand(len(seeds), -1, -1, -1),
                fits[0].keep_mask.expand(len(seeds), -1, -1, -1),
                None if shown is None else self.exemplar_tensor(shown).expand(len(seeds), -1, -1, -1),
                seeds,
                steering=steering,
                prompts=None if prompt is None else [prompt],
                negative_prompt=negative_prompt,
                sampler=sampler,
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                eta=eta,
                on_step=on_step,
            )
            results = [
                fitted.put_back(pixels, feather=feather, match_colors=match_colors)
                for fitted, pixels in zip(fits if i else fits * len(seeds), painted, strict=True)
            ]
        return results[0] if alone else results

    def load_controlnet(self, path: str | Path) -> ControlNet:
        """A control network for the model, on its device; see `control.load_controlnet`.

        Raises:
            UserError: the model's latents are not those of Stable Diffusion.
        """
        if self.model.downsampling != HINT_DOWNSAMPLING:
            raise UserError(
                f"{path}: control networks read {HINT_DOWNSAMPLING} pixels a latent cell, this model has "
                f"{self.model.downsampling}; use a model of Stable Diffusion's size"
            )
        return load_controlnet(path, self.model.config.unet, device=self.device, dtype=self.model.weight_dtype)

    def exemplar_tensor(self, exemplar: Picture) -> Tensor:
        """(1, 3, E, E), an exemplar's opaque part, squashed to the encoder's square and normalised for it."""
        return exemplar_to_tensor(prepare_exemplar(exemplar), self.model.config.exemplar_encoder.image_size)[None]

    @torch.inference_mode()
    def paint(
        self,
        image: Tensor,
        keep_mask: Tensor,
        pixel_values: Tensor | None,
        seeds: Sequence[int],
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Edit pictures that have the model's size already.

        Args:
            image: (B, 3, S, S) in [-1, 1]; what is inside the hole is never looked at.
            keep_mask: (B, 1, S, S) in [0, 1], 1 = keep.
            pixel_values: (B, 3, E, E) exemplars, CLIP-normalised; None uses the null token.
            seeds: B seeds.
            prompts: one for all or B; None is the empty prompt.
            negative_prompt: as for `edit`.
            **sampling: passed to `LatentDiffusion.sample`.

        Returns:
            (B, 3, S, S) float32 in [-1, 1] on the CPU, the hole and the model's rendering of the rest.

        Raises:
            UserError: the model does not read what is given.
        """
        model = self.model
        if not model.inpaints:
            raise UserError("got a model for relighting, which does not inpaint; use Relighter or scripts/relight.py")
        if pixel_values is not None and not model.reads_exemplars:
            raise UserError("got an exemplar for a model that reads text; give a prompt instead")
        if not (prompts is None and negative_prompt is None) and not model.reads_text:
            raise UserError("got a prompt for a model that reads exemplars, not text; give an exemplar instead")
        # Drawn on the CPU, one generator per sample: the same noise on every device and in every batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        image, keep_mask = image.to(self.device), keep_mask.to(self.device)
        exemplar = None if pixel_values is None else model.encode_exemplar(pixel_values.to(self.device))
        context = model.context(exemplar, prompts).expand(len(seeds), -1, -1)
        null_context = model.null_context(negative_prompt)
        z_masked = model.encode_image(image * keep_mask, generators)  # pixels [-1, 1] => scaled latents
        c_concat = model.c_concat(z_masked, keep_mask)
        z = model.sample(c_concat, context, null_context=null_context, generator=generators, **sampling)
        return model.decode_latents(z, image, keep_mask).clamp(-1, 1).float().cpu()


def checkpoint_file(path: str | Path | None) -> Path:
    """The file with the weights: of a folder its `model.safetensors`, for None the bundled model's.

    Raises:
        UserError: it is not there.
    """
    checkpoint = BUNDLED_MODEL if path is None else Path(path)
    if path is None and not (checkpoint / "model.safetensors").is_file():
        raise UserError(
            f"{checkpoint}: the bundled model is not there (an installed copy does not hold it); "
            "run from a clone of the repository, or name a checkpoint"
        )
    if checkpoint.is_dir():
        checkpoint = checkpoint / "model.safetensors"
    folder = checkpoint.parent
    if not checkpoint.is_file() and (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder}: a folder of diffusers; make a checkpoint of it with `python scripts/convert_checkpoint.py "
            f"{folder} OUT.safetensors --to original`"
        )
    if not checkpoint.is_file():
        raise UserError(
            f"{checkpoint}: no such checkpoint; see pretrained_models/README.md for where weights come from"
        )
    return checkpoint


def bundled_examples() -> list[Path]:
    """The folders in pretrained_models/mini/examples that hold scene.png, mask.png and exemplar.png, in order."""
    folders = sorted((BUNDLED_MODEL / "examples").glob("*/"))
    return [folder for folder in folders if all((folder / f"{part}.png").is_file() for part in EXAMPLE_PARTS)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has no common class for the devices' allocators."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


@dataclass(frozen=True)
class FittedScene:
    """A scene, and the square of it in the model's size.

    Attributes:
        scene: the whole picture, RGB.
        hole: its hole, mode L, 0 or 255.
        window: where the square lies.
        image: (1, 3, S, S) in [-1, 1], the square's pixels.
        keep_mask: (1, 1, S, S), 0 in the hole, 1 elsewhere.
    """

    scene: Image.Image
    hole: Image.Image
    window: Window
    image: Tensor
    keep_mask: Tensor

    def same_square(self, picture: Picture, image_size: int) -> Tensor:
        """The square of another picture of the scene that the model sees, (1, 3, S, S) in [0, 1].

        Raises:
            UserError: the picture has another aspect than the scene.
        """
        other, (width, height) = as_rgb(picture), self.scene.size
        if abs(other.width * height - other.height * width) > sum((*other.size, width, height)):  # beyond rounding
            raise UserError(
                f"the control picture is {other.width}x{other.height}, the scene {width}x{height}; give one of its size"
            )
        square = _cut(other.resize(self.scene.size, Image.Resampling.BICUBIC), self.window)
        square = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
        return (pil_to_tensor(square)[None] + 1) / 2

    def put_back(
        self, painted: Tensor, *, feather: int | None = 0, match_colors: bool = True, whole: bool = False
    ) -> Image.Image:
        """Paste the painted square (3, S, S) into the scene: inside the hole only, or as a whole and as it is.

        Feather and colour agreement are as for `Editor.edit`.
        """
        if feather is None:
            feather = default_feather(self.hole)
        if match_colors and not whole:
            painted = agree(painted[None], self.image, self.keep_mask)[0]
        left, top, side = self.window.left, self.window.top, self.window.side
        box = _clipped(self.window, self.scene.size)
        square = tensor_to_pil(painted)
        if square.size != (side, side):
            square = square.resize((side, side), Image.Resampling.BICUBIC)
        inside = square.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))
        result = self.scene.copy()
        # Blending is exact at both ends: weight 255 takes the painted pixel, 0 leaves the scene's.
        result.paste(inside, box[:2], None if whole else self._weights(feather).crop(box))
        return result

    def _weights(self, feather: int) -> Image.Image:
        """Of what is painted, mode L: 0 outside the hole, rising linearly to 255 feather + 1 pixels inside its edge."""
        if feather == 0:
            return self.hole
        share = np.minimum(self._depth, feather + 1, dtype=np.float32) / (feather + 1)
        weights = Image.new("L", self.hole.size)
        weights.paste(Image.fromarray(np.rint(255 * share).astype(np.uint8)), _with_rim(self.hole))
        return weights

    @cached_property
    def _depth(self) -> np.ndarray:
        return depth(self.hole.crop(_with_rim(self.hole)))


def fit_scene(
    scene: Picture,
    hole_mask: Picture,
    image_size: int,
    *,
    crop_margin: float = 0.5,
    whole_image: bool = False,
) -> FittedScene:
    """Crop the hole and its surroundings square and resize them to the model's size.

    At the model's size a pixel is part of the hole when any scene pixel in it is, so that nothing of
    what is to be replaced is shown to the model as something to keep.

    Raises:
        UserError: the mask is empty.
    """
    picture, hole = _opaque(scene, hole_mask)
    bounds = hole.getbbox()
    assert bounds is not None
    window = fit_window(
        bounds,
        picture.size,
        crop_margin=crop_margin,
        min_side=-(-image_size // MAX_ENLARGEMENT),
        whole_image=whole_image,
    )
    # Where the square reaches over the border, the hole is reflected with the scene: what must not be
    # seen inside must not be seen in its mirror image either.
    square, square_hole = _cut(picture, window), _cut(hole, window)
    if window.side != image_size:
        square = square.resize((image_size, image_size), Image.Resampling.BICUBIC)
        share = square_hole.convert("F").resize((image_size, image_size), Image.Resampling.BOX)
        square_hole = Image.fromarray(np.uint8(255) * (np.asarray(share) > 0))
    return FittedScene(picture, hole, window, pil_to_tensor(square)[None], mask_to_tensor(square_hole)[None])


def _opaque(scene: Picture, hole_mask: Picture) -> tuple[Image.Image, Image.Image]:
    """A scene, RGB, and its hole. What is transparent in the hole becomes a continuation of what surrounds it.

    With grey there, what is painted would fade into grey.
    """
    picture = upright(scene)
    hole = _of_size(as_hole(hole_mask), picture.size)
    result = flatten(picture, MID_GREY)
    if picture.mode == "RGBA":
        box = _with_rim(hole)
        see_through = picture.getchannel("A").crop(box).point([255] * 255 + [0])
        unknown = ImageChops.multiply(see_through, hole.crop(box))
        colours = pil_to_tensor(result.crop(box))[None]
        result.paste(tensor_to_pil(membrane(colours, mask_to_tensor(unknown)[None])[0]), box, unknown)
    return result, hole


def seeds_of(seed: int | Sequence[int], n_samples: int) -> tuple[list[int], bool]:
    """The seed of every sample; and whether a single picture was asked for.

    Raises:
        UserError: there are no seeds, or as many as samples there are not, or one is too large.
    """
    if isinstance(seed, (int, np.integer)):
        if n_samples < 1:
            raise UserError(f"n_samples: got {n_samples}, expected at least 1")
        seeds, alone = [int(seed) + i for i in range(n_samples)], n_samples == 1
    else:
        if not len(seed) or n_samples not in (1, len(seed)):
            raise UserError(f"got {len(seed)} seeds for {n_samples} samples, expected one seed per sample")
        seeds, alone = [int(one) for one in seed], False
    for one in seeds:
        check_seed(one)
    return seeds, alone


def check_seed(seed: int) -> None:
    """Raise UserError where no generator takes such a seed."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed: got {seed}, expected less than 2^63")


def _of_size(hole: Image.Image, size: tuple[int, int]) -> Image.Image:
    if hole.size == size:
        return hole
    warnings.warn(
        f"the mask is {hole.width}x{hole.height}, the scene {size[0]}x{size[1]}: "
        "resized the mask to the scene (nearest)",
        stacklevel=4,
    )
    hole = hole.resize(size, Image.Resampling.NEAREST)
    if hole.getbbox() is None:
        raise UserError("the mask's hole vanished when it was resized to the scene; give a mask of the scene's size")
    return hole


def prepare_exemplar(
    exemplar: Picture, mask: Picture | None = None, *, background: str = "keep", fit: str = "squash"
) -> Image.Image:
    """An exemplar cut out as asked for, to be given to `Editor.edit`.

    Args:
        exemplar: picture or path, any size and mode.
        mask: white (>= 128) where the object is, of the exemplar's size; None takes the exemplar's alpha channel, if
            it has one. The exemplar is cropped to it.
        background: of the object: keep | grey, which the model knows as nothing.
        fit: squash, as the paper does when the encoder's square is filled; or pad to a square first, with grey.

    Returns:
        RGB.

    Raises:
        UserError: the mask is empty or of another size, or an option is unknown.
    """
    if background not in ("keep", "grey") or fit not in ("squash", "pad"):
        raise UserError(f"got background={background!r}, fit={fit!r}, expected keep or grey, and squash or pad")
    picture = upright(exemplar)
    shape = as_hole(mask) if mask is not None else _alpha(picture).point([0] * 128 + [255] * 128)
    if shape.getbbox() is None:
        raise UserError("the exemplar is transparent everywhere; give an opaque picture, or its mask")
    picture = as_rgb(picture)
    if shape.size != picture.size:
        raise UserError(
            f"the exemplar's mask is {shape.width}x{shape.height}, the exemplar {picture.width}x{picture.height}; "
            "give a mask of its size"
        )
    if background == "grey":
        picture = Image.composite(picture, Image.new("RGB", picture.size, MID_GREY), shape)
    picture = picture.crop(shape.getbbox())
    if fit == "squash":
        return picture
    side = max(picture.size)
    return ImageOps.pad(picture, (side, side), Image.Resampling.BICUBIC, MID_GREY)


def given_hole(
    scene: Picture,
    size: tuple[int, int],
    *,
    mask: Picture | None = None,
    boxes: Sequence[Sequence[float]] = (),
    polygons: Sequence[Sequence[float]] = (),
    grow: int = 0,
    shape: str = "given",
    seed: int = 0,
) -> Image.Image:
    """The hole of a scene from whatever says where it is.

    Args:
        size: (W, H) of the scene, upright.
        mask: as for `Editor.edit`.
        boxes: left, top, right, bottom of rectangles; polygons: x0, y0, x1, y1, x2, y2 … of outlines. Pixels; all of
            them together are the hole. Without mask, boxes and polygons it is the scene's transparent part.
        grow: pixels to widen it by.
        shape: what its parts become afterwards, given | box | arbitrary; seed: of the latter.

    Raises:
        UserError: there is nothing to paint, or a shape is none.
        OSError, ValueError: a file cannot be read.
    """
    if mask is not None:
        hole = as_hole(mask)
    elif boxes or polygons:
        hole = Image.new("L", size)
        for part in (*(box_hole(size, box) for box in boxes), *(drawn_hole(size, line) for line in polygons)):
            hole.paste(255, mask=part)
    else:
        hole = transparent_hole(scene)
    return reshaped(grown(hole, grow), shape, seed)


def transparent_hole(scene: Picture) -> Image.Image:
    """Where a scene is not opaque, as a hole.

    Raises:
        UserError: nowhere.
    """
    hole = _alpha(upright(scene)).point([255] * 255 + [0])
    if hole.getbbox() is None:
        raise UserError("the scene has no transparent part to paint; give a mask, a box or a polygon")
    return hole


def _alpha(picture: Image.Image) -> Image.Image:
    return picture.getchannel("A") if picture.mode == "RGBA" else Image.new("L", picture.size, 255)


def upright(picture: Picture) -> Image.Image:
    """A picture or file as upright 8-bit RGB, or RGBA where it has transparency."""
    return images.upright(picture) if isinstance(picture, Image.Image) else open_upright(picture)


def as_rgb(picture: Picture) -> Image.Image:
    """A picture or file as upright 8-bit RGB, transparent parts over mid-grey."""
    return flatten(upright(picture), MID_GREY)


def as_hole(mask: Picture) -> Image.Image:
    """A mask or file as mode L, 255 where it says paint (grey level 128 or more) and 0 elsewhere.

    Raises:
        UserError: there is nothing to paint.
    """
    if isinstance(mask, Image.Image):
        grey, name = flatten(ImageOps.exif_transpose(mask), (0, 0, 0)).convert("L"), "the mask"
    else:
        grey, name = load_mask(mask), str(mask)
    lightest = int(np.asarray(grey).max())
    if lightest < 128:
        raise UserError(f"{name}: empty, got no grey level above {lightest}; paint what is to be replaced white (255)")
    return grey.point([0] * 128 + [255] * 128)


def save_png(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG, whole or not at all, with `text` in its metadata (tEXt, or iTXt beyond Latin-1)."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic_write(path) as partial:
        image.save(partial, format="png", pnginfo=info, compress_level=4)


def _cut(picture: Image.Image, window: Window) -> Image.Image:
    box = _clipped(window, picture.size)
    inside = picture.crop(box)
    left, top = box[0] - window.left, box[1] - window.top
    right, bottom = window.side - left - inside.width, window.side - top - inside.height
    if not (left or top or right or bottom):
        return inside
    pixels = np.asarray(inside)
    channels = [(0, 0)] * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, [(top, bottom), (left, right), *channels], mode="reflect"))


def _clipped(window: Window, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, side = window.left, window.top, window.side
    return max(left, 0), max(top, 0), min(left + side, size[0]), min(top + side, size[1])


def _with_rim(hole: Image.Image) -> Box:
    """The hole's box and the pixels right beside it."""
    return pad_box(Box(*(hole.getbbox() or ())), hole.size, 1)


def default_feather(hole: Image.Image) -> int:
    """A fiftieth of the hole's longer side, in pixels."""
    left, top, right, bottom = hole.getbbox() or (0, 0, 0, 0)
    return round(max(right - left, bottom - top) / 50)


def pick_device(device: str | torch.device) -> torch.device:
    """The device of that name; `auto` is cuda, mps or cpu, the first that is there.

    Raises:
        UserError: the device is not there.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in present.items() if there))
    chosen = torch.device(device)
    if not present.get(chosen.type, False):
        there = ", ".join(name for name, there in present.items() if there)
        raise UserError(f"device: got {device}, which this machine or this PyTorch lacks; expected auto, {there}")
    return chosen


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of weights of fp32 | bf16 | fp16, or of the original's words: full is fp32, autocast is fp16 on CUDA
    and fp32 elsewhere."""
    if precision == "autocast":
        precision = "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "full": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
