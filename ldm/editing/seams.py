"""Making a painted region agree with what surrounds it.

Decoding changes colours a little, everywhere and not alike, so that a region pasted back shows its outline. What it
should be along its edge is known, though: there the scene is at hand, and so is the decoder's picture of it.

Dimension key: B pictures · H, W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of pixels in [-1, 1]. Decoders err by less; where more is missing, what is painted reaches over the hole's edge.
LIMIT = 0.2


def agree(painted: Tensor, image: Tensor, keep_mask: Tensor) -> Tensor:
    """Correct a painted region by the decoder's error along its edge, carried smoothly into it.

    Args:
        painted: (B, 3, H, W), what was decoded, hole and surroundings.
        image: (B, 3, H, W), the true pixels; those in the hole are not looked at.
        keep_mask: (B, 1, H, W), 0 in the hole, 1 elsewhere.

    Returns:
        (B, 3, H, W). A hole without surroundings is returned as it is.

    Source: Pérez et al. 2003, Eq. 5 to 7 (the correction is a membrane over the hole, here interpolated from coarse to
        fine as in Gortler et al. 1996, section 3.4, instead of solved for).
    """
    kept = (keep_mask > 0.5).to(painted.dtype)
    ring = F.max_pool2d(1 - kept, 3, stride=1, padding=1) * kept
    return painted + membrane((image - painted).clamp(-LIMIT, LIMIT) * ring, ring)


def membrane(values: Tensor, known: Tensor) -> Tensor:
    """Values (B, C, H, W), where `known` (B, 1, H, W) is 1, and a smooth continuation of them elsewhere.

    Source: Gortler et al. 1996, section 3.4 (from coarse to fine).
    """
    if min(values.shape[2:]) == 1:
        mean = (values * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
        return mean.expand_as(values)
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    half = F.avg_pool2d(values * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = membrane(half, (share > 0).to(values.dtype))
    up = F.interpolate(coarse, size=values.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, values, up)
