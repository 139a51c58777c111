"""FID, sFID and IS as most of the literature computes them: features of the Inception network of 2015.

The network is torch-fidelity's, with weights from a local file; torchmetrics, which uses it too, downloads them and has
no sFID. The features of an image are of three kinds, side by side:

- POOLED, which FID compares (2048). Source: Heusel et al. 2017, section "FID".
- SPATIAL, seven channels of a 17x17 map, which sFID compares (2023). Source: Nash et al. 2021, section 5.2.
- LOGITS without bias, for the Inception score (1008).
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.io import read_checkpoint
from ldm.evaluation.features import SQUASH, WHOLE, FeatureNetwork, first_line
from ldm.evaluation.frechet import Estimate
from ldm.files import UserError

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
POOLED, SPATIAL, LOGITS = slice(0, 2048), slice(2048, 4071), slice(4071, 5079)


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int = 0) -> Estimate:
    """Compute the Inception score of logits (N, classes), exp E[KL(p(y|x) || p(y))], as the mean over random parts.

    It has no interval; the note has the standard deviation of the parts. Source: Salimans et al. 2016, section 4.
    """
    log_p = torch.from_numpy(np.random.default_rng(seed).permutation(logits)).double().log_softmax(1)
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = part.logsumexp(0) - np.log(len(part))
        scores.append(float((part.exp() * (part - log_marginal)).sum(1).mean().exp()))
    note = f"; spread of the parts {np.std(scores):.2f}"
    return Estimate(float(np.mean(scores)), math.nan, math.nan, len(logits), note)


def load_inception(weights: str | Path, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Load the Inception network of 2015 from WEIGHTS, a file of pytorch-fid or torch-fidelity; both must be there."""
    if not Path(weights).is_file():
        raise UserError(f"{weights}: no such file; download {WEIGHTS_URL}")
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{error}: do pip install torch-fidelity, with the torchvision of your torch") from error
    state = read_checkpoint(weights)
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles without restrictions: it gets a copy that holds tensors only.
        copy = Path(folder) / WEIGHTS
        torch.save(state, copy)
        try:
            tower: Any = source.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(copy)
            )
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{weights}: does not fit ({first_line(error)}); expected {WEIGHTS_URL}") from error

    spatial: list[Tensor] = []
    # TensorFlow's name of this map is mixed_6/conv, which is after the activation.
    tower.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, x: spatial.append(x[:, :7].flatten(1)))

    def embed(x: Tensor) -> Tensor:
        spatial.clear()
        pooled, logits = tower(x)
        return torch.cat([pooled, spatial.pop(), logits], dim=1)

    def to_bytes(image: Image.Image) -> Tensor:  # (3, H, W) uint8: the network resizes images itself
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    squashed = "squashed to 299 px (bilinear, not antialiased, TensorFlow 1's grid)", to_bytes
    modes = {WHOLE: squashed, SQUASH: squashed}
    return FeatureNetwork("Inception-v3 (2015, FID)", tower, embed, LOGITS.stop, modes).to(device)
