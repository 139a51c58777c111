"""How visible the outline of an edit is, for the benchmarks of finishing and of decoders."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Seam:
    """Mean differences between neighbouring pixels, grey levels 0 to 255; nan if there are no such pairs."""

    jump: float  # in the result, across the hole's edge
    usual: float  # in the scene, between pixels at the edge outside the hole and the pixels behind them


def seam(result: Image.Image, scene: Image.Image, hole_mask: Image.Image) -> Seam:
    """Compare the step of an edit at the hole's edge with the scene's own steps right beside it."""
    hole = np.asarray(hole_mask.convert("L")) >= 128
    edited, true = (np.asarray(image.convert("RGB")).astype(np.float64) for image in (result, scene))
    jumps, usual = [], []
    for axis in (0, 1):
        inside = np.moveaxis(hole, axis, 0)
        steps, own = (np.abs(np.diff(np.moveaxis(x, axis, 0), axis=0)).mean(-1) for x in (edited, true))
        cross = inside[1:] != inside[:-1]
        jumps.append(steps[cross])
        # Pairs of outer pixels; the nearer one has the hole on its other side.
        usual += [own[:-1][cross[1:] & inside[2:] & ~inside[:-2]], own[1:][cross[:-1] & inside[:-2] & ~inside[2:]]]
    means = [np.concatenate(values) for values in (jumps, usual)]
    return Seam(*(float(values.mean()) if len(values) else float("nan") for values in means))
