"""A pixel model of milliseconds, and small images with classes: scikit-learn's digits."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from ldm.config import Config, load_config

TINY: dict[str, Any] = {
    "model": {
        "kind": "pixel",
        "image_size": 8,
        "input_channels": ["x_t"],
        "variance": "learned_range",
        "schedule": {"name": "cosine", "num_timesteps": 100},
        "unet": {
            "in_channels": 1,
            "out_channels": 2,
            "model_channels": 16,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "num_heads": 2,
            "context_dim": 0,
            "num_classes": 10,
            "scale_shift": True,
            "norm_groups": 8,
        },
    },
    "data": {"kind": "images", "batch_size": 4, "val_batch_size": 4, "num_workers": 0, "max_val_samples": 8},
    "training": {"objective": "hybrid", "base_lr": 2e-3, "warmup_steps": 0, "ema_decay": 0.9},
    "logging": {"image_every": 0, "num_images": 2, "sampler_steps": 2, "checkpoint_every": 0},
    "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
}
CLASSIFIER = {
    "stage": "classifier",
    "model": {"kind": "classifier", "classifier": {"num_classes": 10}, "unet": {"resample": "res_block"}},
}


def write_digits(path: Path, count: int = 200) -> Path:
    """Write `count` digits of 8 x 8 pixels as a batch with labels, and return its path."""
    digits: Any = load_digits()
    images = (digits.images[:count, ..., None] * (255 / 16)).astype(np.uint8)
    np.savez(path, arr_0=images, arr_1=digits.target[:count])
    return path


def tiny_config(root: Path, *overrides: str) -> Config:
    """Return the config of a tiny model of digits."""
    return load_config(OmegaConf.create(TINY), overrides=[f"data.root={root}", *overrides])
