"""The part of a picture that an edit is judged by."""

from __future__ import annotations

from PIL import Image


def hole_region(picture: Image.Image, hole_mask: Image.Image) -> Image.Image:
    """The picture inside the hole's bounding box.

    Args:
        picture: the edited (or true) scene.
        hole_mask: mode L, of the same size; grey levels of 128 and more are the hole.

    Raises:
        ValueError: the sizes differ, or the hole is empty.
    """
    return picture.crop(_box(picture, hole_mask))


def copy_paste(scene: Image.Image, hole_mask: Image.Image, exemplar: Image.Image) -> Image.Image:
    """The edit that a scissors user makes: the exemplar squashed into the hole's bounding box.

    It shows the exemplar as plainly as a picture of this size can, and fits the scene as badly.
    """
    left, top, right, bottom = _box(scene, hole_mask)
    pasted = scene.copy()
    pasted.paste(exemplar.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return pasted


def _box(picture: Image.Image, hole_mask: Image.Image) -> tuple[int, int, int, int]:
    if picture.size != hole_mask.size:
        raise ValueError(f"got a picture of {picture.size} and a mask of {hole_mask.size} pixels, expected equal sizes")
    box = hole_mask.point([0] * 128 + [255] * 128).getbbox()
    if box is None:
        raise ValueError("got an empty mask, expected a hole (white, 255)")
    return box
