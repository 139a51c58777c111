"""The inputs of an edit, normalised once: every way in makes an `EditRequest`, and the editor reads nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageChops, ImageOps

from ldm.editing import hole_masks
from ldm.editing.geometry import pull_push_fill, with_rim
from ldm.editing.settings import EditSettings
from ldm.files import UserError
from ldm.images import MID_GREY, Picture, flatten, mask_to_tensor, open_upright, pil_to_tensor, tensor_to_pil


@dataclass(frozen=True)
class EditRequest:
    """A scene with its hole, exemplars and settings."""

    scene: Image.Image  # RGB, upright; transparent parts are mid-grey, inside the hole they continue their surroundings
    hole: Image.Image  # hole mask, mode L, 0 or 255, of the scene's size, not empty
    exemplars: tuple[Image.Image | None, ...]  # RGB, cropped to the object; None: null token; one, or one a component
    settings: EditSettings

    def components(self) -> list[tuple[Image.Image, Image.Image | None]]:
        """Return the parts of the hole that are edited one after the other, each with its exemplar."""
        holes = hole_masks.connected_components(self.hole) if self.settings.per_component else [self.hole]
        if len(self.exemplars) not in (1, len(holes)):
            raise UserError(f"got {len(self.exemplars)} exemplars, expected 1, or {len(holes)} (one for each part)")
        return [(hole, self.exemplars[i % len(self.exemplars)]) for i, hole in enumerate(holes)]


def make_request(
    scene: Picture,
    exemplar: Picture | Sequence[Picture | None] | None = None,
    settings: EditSettings | None = None,
    *,
    mask: Picture | None = None,
    boxes: Sequence[Sequence[float]] = (),
    polygons: Sequence[Sequence[float]] = (),
    reference_mask: Picture | None = None,
) -> EditRequest:
    """Read and normalise the inputs of an edit.

    Args:
        scene: a picture as for `open_image`, of any size, aspect and mode. A colour profile stays with the result.
        exemplar: likewise; None uses the null token. A list edits each connected component of the hole by itself: one
            exemplar for each, from top to bottom, or one for all.
        mask, boxes, polygons: the hole, see `make_hole`.
        reference_mask: white where the object of the exemplar is, see `prepare_exemplar`.

    UserError if a file cannot be read, the hole or an exemplar is empty, or a mask has the wrong size.
    """
    settings = settings or EditSettings()
    upright_scene = open_upright(scene, "the scene")
    hole = hole_masks.make_hole(upright_scene, mask=mask, boxes=boxes, polygons=polygons)
    hole = hole_masks.apply_shape(hole_masks.dilate(hole, settings.dilate), settings.mask_shape, settings.seeds[0])
    exemplars: list[Any] = [exemplar]  # an array is one picture
    if isinstance(exemplar, (list, tuple)):
        exemplars, settings = list(exemplar), replace(settings, per_component=True)
    options = {"background": settings.reference_background, "fit": settings.reference_fit}
    prepared = (one if one is None else prepare_exemplar(one, reference_mask, **options) for one in exemplars)
    return EditRequest(fill_transparent(upright_scene, hole), hole, tuple(prepared), settings)


def fill_transparent(scene: Image.Image, hole: Image.Image) -> Image.Image:
    """Return an upright scene as RGB: transparent parts are mid-grey, but inside the hole continue their surroundings.

    The feather fades into the hole and would show the grey.
    """
    result = flatten(scene, MID_GREY)
    if scene.mode == "RGBA":
        box = with_rim(hole)
        unknown = ImageChops.multiply(hole_masks.transparent_part(scene.crop(box)), hole.crop(box))
        colours = pil_to_tensor(result.crop(box))[None]
        filled = pull_push_fill(colours, mask_to_tensor(unknown)[None])[0]
        result.paste(tensor_to_pil(filled), box, unknown)
    return result


def prepare_exemplar(
    exemplar: Picture, mask: Picture | None = None, *, background: str = "keep", fit: str = "squash"
) -> Image.Image:
    """Crop an exemplar to its object: RGB.

    Args:
        exemplar: a picture of any size and mode.
        mask: white (>= 128) where the object is, see `fit_mask`; None takes the exemplar's alpha channel.
        background: keep, or replace by grey, which the model knows as "nothing".
        fit: squash, as the paper does when the encoder's square is filled; or pad to a square with grey.
    """
    image = open_upright(exemplar, "the exemplar")
    if mask is not None:
        shape = hole_masks.fit_mask(hole_masks.as_hole(mask), image.size, "exemplar")
    else:
        shape = image.convert("RGBA").getchannel("A").point(hole_masks.TO_BINARY)
    bounds = shape.getbbox()
    if bounds is None:
        raise UserError("the exemplar is transparent everywhere; give an opaque image, or its mask")
    image = flatten(image, MID_GREY)
    if background == "grey":
        image = Image.composite(image, Image.new("RGB", image.size, MID_GREY), shape)
    image = image.crop(bounds)
    side = max(image.size)
    return image if fit == "squash" else ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, MID_GREY)
