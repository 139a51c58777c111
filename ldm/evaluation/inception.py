"""FID, sFID and IS as most of the literature computes them: features of the Inception network of 2015.

The network is torch-fidelity's, with weights from a local file; torchmetrics would download them, and has no sFID.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint.io import read_checkpoint
from ldm.evaluation.features import SQUASH, WHOLE, FeatureNetwork, first_line
from ldm.evaluation.frechet import Estimate
from ldm.files import UserError

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
# Columns of the features: of FID (Heusel et al. 2017), of sFID, seven channels of a 17x17 map (Nash et al. 2021, 5.2),
# and logits without bias, of the Inception score.
POOLED, SPATIAL, LOGITS = slice(0, 2048), slice(2048, 4071), slice(4071, 5079)


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int = 0) -> Estimate:
    """Compute the Inception score of logits (N, classes), exp E[KL(p(y|x) || p(y))], as the mean over random parts.

    It has no interval; the note has the standard deviation of the parts. Source: Salimans et al. 2016, section 4.
    """
    log_p = torch.from_numpy(np.random.default_rng(seed).permutation(logits)).double().log_softmax(1)
    parts = [(part, part.logsumexp(0) - np.log(len(part))) for part in log_p.tensor_split(splits)]
    scores = [float((part.exp() * (part - marginal)).sum(1).mean().exp()) for part, marginal in parts]
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
        kinds = ["2048", "logits_unbiased"]
        try:
            tower: Any = source.FeatureExtractorInceptionV3("inception-v3-compat", kinds, str(copy))
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{weights}: does not fit ({first_line(error)}); expected {WEIGHTS_URL}") from error

    spatial: list[Tensor] = []
    # TensorFlow's name of this map is mixed_6/conv, which is after the activation.
    tower.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, x: spatial.append(x[:, :7].flatten(1)))

    def embed(x: Tensor) -> Tensor:
        spatial.clear()
        pooled, logits = tower(x)
        return torch.cat([pooled, spatial.pop(), logits], dim=1)

    words = "squashed to 299 px (bilinear, not antialiased, TensorFlow 1's grid)"  # by the network, from bytes
    squashed = words, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)
    modes = {WHOLE: squashed, SQUASH: squashed}
    return FeatureNetwork("Inception-v3 (2015, FID)", tower, embed, LOGITS.stop, modes).to(device)
