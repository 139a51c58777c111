"""Whether the outline of an edit can be seen.

Dimension key: H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Seam:
    """Differences between neighbouring pixels, means in grey levels 0 … 255; nan where there are no such pairs."""

    jump: float  # of the result, across the hole's edge
    usual: float  # of the scene, between the pixels at the edge outside the hole and the ones behind them


def seam(result: Image.Image, scene: Image.Image, hole_mask: Image.Image) -> Seam:
    """Compare the step at a hole's edge with the scene's own steps right beside it.

    Args:
        result: the edit.
        scene: what was edited, of the same size.
        hole_mask: mode L, of the same size; grey levels of 128 and more are the hole.

    Raises:
        ValueError: the sizes differ.
    """
    if not result.size == scene.size == hole_mask.size:
        sizes = f"{result.size}, {scene.size} and {hole_mask.size}"
        raise ValueError(f"got a result, a scene and a mask of {sizes} pixels, expected equal sizes")
    hole = np.asarray(hole_mask.convert("L")) >= 128
    edited, true = (np.asarray(image.convert("RGB")).astype(np.float64) for image in (result, scene))
    jumps, usual = [], []
    for axis in (0, 1):
        inside = np.moveaxis(hole, axis, 0)
        steps, own = (np.abs(np.diff(np.moveaxis(x, axis, 0), axis=0)).mean(-1) for x in (edited, true))
        cross = inside[1:] != inside[:-1]
        jumps.append(steps[cross])
        # a pair of outer pixels, the nearer of which has the hole on its other side
        usual += [own[:-1][cross[1:] & inside[2:] & ~inside[:-2]], own[1:][cross[:-1] & inside[:-2] & ~inside[2:]]]
    found = [np.concatenate(values) for values in (jumps, usual)]
    return Seam(*(float(values.mean()) if len(values) else float("nan") for values in found))
