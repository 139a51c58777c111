"""FID, sFID and IS as most of the literature computes them: features of the Inception network of 2015.

The network is torch-fidelity's, which torchmetrics uses too. torchmetrics downloads its weights and has no sFID and no
stream over files, so the network is used directly, with weights from a local file. The feature vector of an image holds
three kinds of features side by side, which `fid_features`, `sfid_features` and `is_logits` separate.

Dimensions: N images · B batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.io import read_checkpoint
from ldm.evaluation.features import SQUASH, WHOLE, FeatureNetwork, Preprocess
from ldm.files import UserError

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"

_POOLED, _LOGITS = 2048, 1008
_SPATIAL_CHANNELS, _SPATIAL_SIDE = 7, 17
_SPATIAL = _SPATIAL_CHANNELS * _SPATIAL_SIDE**2  # 2023


def fid_features(features: np.ndarray) -> np.ndarray:
    """Select the pooled features that FID compares (N, 2048). Source: Heusel et al. 2017, section "FID"."""
    return features[:, :_POOLED]


def sfid_features(features: np.ndarray) -> np.ndarray:
    """Select seven channels of a 17x17 map, which sFID compares (N, 2023). Source: Nash et al. 2021, section 5.2."""
    return features[:, _POOLED : _POOLED + _SPATIAL]


def is_logits(features: np.ndarray) -> np.ndarray:
    """Select the logits without bias, for the Inception score (N, 1008)."""
    return features[:, _POOLED + _SPATIAL :]


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Compute the Inception score, exp E[KL(p(y|x) || p(y))]: confident and diverse classifications score high.

    Args:
        logits: (N, classes).
        splits: number of random parts; the score is the mean over the parts.
        seed: shuffles the images.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        ValueError: fewer images than parts.

    Source: Salimans et al. 2016, section 4.
    """
    if len(logits) < splits:
        raise ValueError(f"got {len(logits)} images, expected at least {splits}, one for each part")
    log_p = torch.from_numpy(np.random.default_rng(seed).permutation(logits)).double().log_softmax(1)
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = part.logsumexp(0) - np.log(len(part))
        scores.append(float((part.exp() * (part - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _to_bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# The network resizes images itself: it takes their bytes, (3, H, W) uint8.
_SQUASHED = ("squashed to 299 px (bilinear, not antialiased, TensorFlow 1's grid)", _to_bytes)
PREPROCESS = Preprocess({WHOLE: _SQUASHED, SQUASH: _SQUASHED})


def load_inception(weights: str | Path, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Load the Inception network of 2015 with features (B, 2048 + 2023 + 1008).

    Args:
        weights: `pt_inception-2015-12-05-6726825d.pth`, of pytorch-fid or torch-fidelity.
        device: of the network.

    Raises:
        UserError: torch-fidelity is not installed, the file is missing, or it holds another network.
        CheckpointError: the file cannot be read.
    """
    weights = Path(weights)
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; download {WEIGHTS_URL}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        remedy = "do pip install torch-fidelity, and the torchvision that belongs to your torch"
        raise UserError(f"{error}: Inception FID, sFID and IS need torch-fidelity; {remedy}") from error
    state = read_checkpoint(weights)
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles without restrictions: it gets a copy that holds tensors only.
        copy = Path(folder) / WEIGHTS
        torch.save(state, copy)
        try:
            tower: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(copy))
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{weights}: does not fit ({str(error).splitlines()[0]}); expected {WEIGHTS} of {WEIGHTS_URL}"
            ) from error

    spatial: list[Tensor] = []
    # TensorFlow's name of this map is mixed_6/conv, which is after the activation.
    tower.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, x: spatial.append(x[:, :_SPATIAL_CHANNELS].flatten(1)))

    def embed(x: Tensor) -> Tensor:
        spatial.clear()
        pooled, logits = tower(x)
        return torch.cat([pooled, spatial.pop(), logits], dim=1)

    network = FeatureNetwork("Inception-v3 (2015, FID)", tower, embed, _POOLED + _SPATIAL + _LOGITS, PREPROCESS)
    return network.to(device)
