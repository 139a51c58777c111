"""Augment exemplars with albumentations, which takes seconds to import and which editing works without."""

import os
import random
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm.config import ConfigError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import asks the network for a newer version
import albumentations as A
import cv2


class PaperParams(NamedTuple):
    """Parameters of the paper's augmentation, in the order in which they act. The defaults change nothing."""

    flip: bool = False  # left-right
    angle: float = 0.0  # degrees, counter-clockwise, about the centre
    blur: int = 0  # side of the box filter, pixels; 0 = none
    shifts: np.ndarray | None = None  # (3, 2) pixels x, y: how far the affine map moves its three points


def draw_paper_params(rng: np.random.Generator, size: int, strength: float = 1.0) -> PaperParams:
    """Draw the paper's augmentation for an exemplar of side `size`; `strength` multiplies angles and lengths.

    The paper uses albumentations 0.4.3 with HorizontalFlip, Rotate(limit=20), Blur(p=0.3), ElasticTransform(p=0.3) at
    224 px. The last one moves three points of an affine map; its displacement by at most 0.018 px is left out.
    """
    flip = rng.random() < 0.5
    angle = strength * float(rng.uniform(-20, 20)) if rng.random() < 0.5 else 0.0
    scale = strength * size / 224
    blur = int(rng.choice([3, 5, 7]) * scale) | 1 if rng.random() < 0.3 else 0  # | 1: to the next odd side
    shifts = rng.uniform(-50 * scale, 50 * scale, size=(3, 2)) if rng.random() < 0.3 else None
    return PaperParams(flip, angle, blur, shifts)


class PaperAugmentation(A.ImageOnlyTransform):
    """Apply `paper_params` of the call. The transforms of albumentations 2 of the same names act differently."""

    @property
    def targets_as_params(self) -> list[str]:
        return ["paper_params"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        return {"paper_params": data["paper_params"]}

    def apply(self, img: np.ndarray, paper_params: PaperParams, **params: Any) -> np.ndarray:
        flip, angle, blur, shifts = paper_params
        side = img.shape[0]
        if flip:
            img = cv2.flip(img, 1)
        if angle:
            img = _warp(img, cv2.getRotationMatrix2D((side / 2, side / 2), angle, 1.0))
        if blur:
            img = cv2.blur(img, (blur, blur))
        if shifts is not None:
            centre, arm = side // 2, side // 3
            points = centre + np.array([(arm, arm), (arm, -arm), (-arm, -arm)], dtype=np.float32)
            img = _warp(img, cv2.getAffineTransform(points, points + shifts.astype(np.float32)))
        return img


def _warp(img: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(img, matrix, img.shape[:2], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def build_pipeline(size: int, settings: Mapping[str, Any] | None = None) -> A.Compose:
    """Build the pipeline that squashes an exemplar to a square of side `size` and augments it as in the paper.

    `settings`, a serialised pipeline (`albumentations.to_dict`), replaces the augmentation; ConfigError if it cannot.
    """
    if settings is None:
        return A.Compose([A.Resize(size, size), PaperAugmentation(p=1.0)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # unknown arguments
            transform: Any = A.from_dict(dict(settings))
            pipeline = A.Compose([A.Resize(size, size), transform])
        result = augment(pipeline, np.zeros((size, size, 3), np.uint8), PaperParams(), seed=0)
        if result.shape != (size, size, 3) or result.dtype != np.uint8:
            raise ValueError(f"returns {result.dtype} of shape {result.shape}, expected RGB bytes of side {size}")
    except Exception as error:  # albumentations checks its arguments with errors of many classes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"data.augmentation: not a usable pipeline of albumentations.to_dict: {reason}") from error
    return pipeline


def augment(pipeline: A.Compose, pixels: np.ndarray, params: PaperParams, *, seed: int | None = None) -> np.ndarray:
    """Squash and augment an exemplar (H, W, 3) to (E, E, 3) uint8; `seed` decides all draws except `params`."""
    if seed is not None:  # `set_random_seed` would give all transforms the same draws
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return pipeline(image=np.ascontiguousarray(pixels), paper_params=params)["image"]
