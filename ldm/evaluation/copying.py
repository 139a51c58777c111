"""Copying: does an edit bring the exemplar's surroundings with it?

Pasting the exemplar into the hole is the trivial solution of training on a picture's own crops (Yang et al. 2023,
section 3.2). What gives it away is the exemplar's background, which hardly any object covers in the corners.

Dimension key: N items.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_CELLS = 8  # a corner is an eighth of the width by an eighth of the height


def corner_colours(picture: Image.Image) -> np.ndarray:
    """(4, 3): mean colours of the corners, an eighth of each side long; grey levels 0 … 255."""
    cells = np.array(picture.convert("RGB").resize((_CELLS, _CELLS), Image.Resampling.BOX), dtype=np.float64)
    return cells[[0, 0, -1, -1], [0, -1, 0, -1]]


def copied_background(edited: np.ndarray, exemplars: np.ndarray, true_pictures: np.ndarray) -> np.ndarray:
    """How far the corners of edited regions have gone from the scene's colours to the exemplar's.

    With d the difference between the exemplar's corners and the true picture's, and c that between the
    edit's and the true picture's, the share over all items is sum(c·d) / sum(d·d), that of least squares:
    0 for the true picture, 1 for a pasted exemplar. An edit that misses the true background by chance is
    a little above 0, since c and d are measured from the same pictures; an edit without an exemplar
    (null token, inpainting) shows by how much.

    Args:
        edited: (N, 4, 3), `corner_colours` of the regions inside the holes' boxes.
        exemplars: (N, 4, 3), of the exemplars.
        true_pictures: (N, 4, 3), of the same regions of the true pictures.

    Returns:
        (N,) what each item adds, times N: the mean is the share.

    Raises:
        ValueError: shapes differ, or every exemplar has the corners of its true picture.
    """
    if not edited.shape == exemplars.shape == true_pictures.shape:
        shapes = f"{edited.shape}, {exemplars.shape} and {true_pictures.shape}"
        raise ValueError(f"got corners of shapes {shapes}, expected equal ones")
    away = exemplars - true_pictures
    mean_square = (away**2).sum((1, 2)).mean()
    if not mean_square > 0:
        raise ValueError("got exemplars with the corners of their true pictures: copies cannot be told from edits")
    return ((edited - true_pictures) * away).sum((1, 2)) / mean_square
