"""Image features of published networks, for metrics that compare the content of images.

A figure depends on the weights and on the preprocessing, so both have names here, which the tables print.

Dimension key: N images · B batch · D feature channels · S side of the network's input, pixels · W width of a tower.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.io import sha256_file
from ldm.evaluation.cache import FeatureCache
from ldm.files import UserError
from ldm.images import CLIP_MEAN, CLIP_STD, Box, normalise, open_image
from ldm.models.efficientnet import LITE_MEAN, LITE_STD, load_feature_network

# How an image, or a box of it, is resized for the network.
WHOLE = "whole"  # as the network's authors do it
SQUASH = "squash"  # to a square, antialiased
PAPER_REGION = "paper region"  # to a square without antialiasing, as the paper's CLIP score does it

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE_LETTERS = {384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # of a ViT, by its width


class View(NamedTuple):
    """An image, or a box of it, and how it is resized."""

    path: Path
    resize_mode: str  # WHOLE, SQUASH or PAPER_REGION
    box: Box | None = None  # None: the whole image


# For each resize mode its description, for tables, and the function from an RGB image to the network's input.
Modes = Mapping[str, tuple[str, Callable[[Image.Image], Tensor]]]


def normalised_square(size: int, mean: Sequence[float], std: Sequence[float], short_side: int = 0) -> Modes:
    """Make the preprocessing to a square of normalised RGB values; `CLIPImageProcessor` would need torchvision.

    With `short_side`, `WHOLE` scales the short side to this length and cuts out the centre; otherwise it squashes.
    """

    def squash(image: Image.Image) -> Tensor:
        return normalise(image.resize((size, size), Image.Resampling.BICUBIC), mean, std)

    def centre(image: Image.Image) -> Tensor:
        # Rounds as torchvision does: the long side down, half a pixel of the margin to the even number.
        width, height = (max(short_side, short_side * side // min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return normalise(image.crop((left, top, left + size, top + size)), mean, std)

    def paper_region(image: Image.Image) -> Tensor:
        return F.interpolate(normalise(image, mean, std)[None], (size, size), mode="bilinear", antialias=False)[0]

    squashed = (f"squashed to {size} px (bicubic, antialiased)", squash)
    centred = (f"short side to {short_side} px (bicubic, antialiased), centre {size} px", centre)
    region = (f"squashed to {size} px (bilinear, not antialiased)", paper_region)
    return {WHOLE: centred if short_side else squashed, SQUASH: squashed, PAPER_REGION: region}


class FeatureNetwork(nn.Module):
    """A frozen network with its exact name (weights and their source, for tables) and its preprocessing.

    `embed` computes the features (B, D) of a batch of preprocessed images with `tower`, which holds the weights.
    """

    def __init__(self, name: str, tower: nn.Module, embed: Callable[[Tensor], Tensor], dim: int, modes: Modes) -> None:
        super().__init__()
        self.name, self.tower, self.dim, self._embed, self._modes = name, tower, dim, embed, modes
        self.preprocessing = {mode: words for mode, (words, _) in modes.items()}  # descriptions, for tables
        self.eval().requires_grad_(False)

    def preprocess(self, image: Image.Image, resize_mode: str, box: Box | None = None) -> Tensor:
        """Convert an image, or a box of it, to the network's input, (3, S, S) float32 for most networks."""
        box = box or Box(0, 0, *image.size)
        if box.clipped(*image.size) != box or min(box.size) < 1:
            raise UserError(f"got the box {box}, expected one within the image's {image.width}x{image.height} pixels")
        return self._modes[resize_mode][1](image.convert("RGB").crop(box))

    @cached_property
    def key(self) -> str:
        """The digest of name, preprocessing and weights: equal for networks that give equal features."""
        digest = hashlib.sha256(repr((self.name, self.preprocessing)).encode())
        for name, tensor in sorted(self.tower.state_dict().items()):
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def forward(self, x: Tensor) -> Tensor:
        """Compute features (B, D) float32, not normalised, of preprocessed images (B, 3, S, S)."""
        return self._embed(x).float()


@torch.inference_mode()
def finite_features(network: FeatureNetwork, x: Tensor, names: Sequence[object]) -> np.ndarray:
    """Compute the features (B, D) of preprocessed images; UserError with the name of the first that is not finite."""
    features = network(x.to(next(network.parameters()).device)).cpu().numpy()
    if len(wrong := np.flatnonzero(~np.isfinite(features).all(1))):
        raise UserError(f"{names[wrong[0]]}: {network.name} gives features that are not finite; check its weights")
    return features


def extract(network: FeatureNetwork, views: Sequence[View], **options: Any) -> np.ndarray:
    """Compute the features (N, D) float32 of N views, in their order; `iter_features` has the options."""
    return np.concatenate([np.empty((0, network.dim), np.float32), *iter_features(network, views, **options)])


def iter_features(
    network: FeatureNetwork,
    views: Sequence[View],
    *,
    cache: FeatureCache | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    label: str = "features",
    unreadable: dict[Path, str] | None = None,
) -> Iterator[np.ndarray]:
    """Stream the features of views in their order, (at most batch_size, D) float32 at a time.

    `unreadable` gets the images that cannot be read, with the reason, and their views are left out; without it they are
    a UserError, as are features that are not finite.
    """
    bar = tqdm(total=len(views), desc=label, unit="image", disable=None, leave=False)
    with bar, ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for start in range(0, len(views), batch_size):
            batch = views[start : start + batch_size]
            distinct = list(dict.fromkeys(batch))
            read = pool.map(lambda view: _read(network, view, cache, unreadable), distinct)
            keyed = {view: one for view, one in zip(distinct, read, strict=True) if one}
            found: dict[View, Any] = {view: one for view, (_, one) in keyed.items()}
            missing = [view for view, one in found.items() if isinstance(one, Tensor)]
            for _, group in groupby(missing, key=lambda view: found[view].shape):  # Inception takes any size
                same = list(group)
                pixels = torch.stack([found[view] for view in same])
                found |= zip(same, finite_features(network, pixels, [view.path for view in same]), strict=True)
            if cache:
                for view in missing:
                    cache.put(keyed[view][0], found[view])
            rows = [found[view] for view in batch if view in found]
            yield np.array(rows, np.float32).reshape(-1, network.dim)
            bar.update(len(batch))


def _read(
    network: FeatureNetwork, view: View, cache: FeatureCache | None, unreadable: dict[Path, str] | None
) -> tuple[str, np.ndarray | Tensor] | None:
    """Return a view's key in the cache, and its feature from there or else its pixels; None if it is unreadable."""
    key = ""
    try:
        if cache:
            identity = repr((sha256_file(view.path), network.key, view.resize_mode, view.box and tuple(view.box)))
            key = hashlib.sha256(identity.encode()).hexdigest()
            if (feature := cache.get(key)) is not None:
                return key, feature
        return key, network.preprocess(open_image(view.path), view.resize_mode, view.box)
    except (UserError, OSError) as error:
        message = f"{view.path}: {str(error).removeprefix(f'{view.path}: ')}"
        if unreadable is None:
            raise UserError(message) from error
        unreadable[view.path] = message
        return None


def load_network(spec: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Load a feature network in evaluation mode, float32; UserError if its package or weights are missing or unfit.

    The spec is `efficientnet-lite0`; `clip` or `dinov2`, alone or with :NAME (on the Hugging Face hub) or :FOLDER (in
    the hub's layout); or `open_clip:ARCH/TAG`, weights that the package open_clip knows (TAG may be a file).
    """
    kind, _, argument = spec.partition(":")
    if kind not in _LOADERS or (kind == "efficientnet-lite0" and argument):
        networks = "efficientnet-lite0, clip[:NAME or FOLDER], open_clip:ARCH/TAG or dinov2[:NAME or FOLDER]"
        raise UserError(f"got the feature network {spec!r}, expected {networks}")
    return _LOADERS[kind](argument).to(device)


def _efficientnet(_: str) -> FeatureNetwork:
    tower: Any = load_feature_network()
    modes = normalised_square(224, (LITE_MEAN / 255,) * 3, (LITE_STD / 255,) * 3)
    name = "EfficientNet-Lite0 (ImageNet)"
    return FeatureNetwork(name, tower, lambda x: tower.extract_features(x).mean((2, 3)), 1280, modes)


def _clip(argument: str) -> FeatureNetwork:
    from transformers import CLIPVisionModelWithProjection

    tower, title = _pretrained(CLIPVisionModelWithProjection, "clip", argument or "openai/clip-vit-base-patch32")
    size, dim = tower.config.image_size, tower.config.projection_dim
    modes = normalised_square(size, CLIP_MEAN, CLIP_STD, short_side=size)
    return FeatureNetwork(title, tower, lambda x: tower(x).image_embeds, dim, modes)


def _dinov2(argument: str) -> FeatureNetwork:
    from transformers import Dinov2Model

    tower, title = _pretrained(Dinov2Model, "dinov2", argument or "facebook/dinov2-base")
    modes = normalised_square(224, _IMAGENET_MEAN, _IMAGENET_STD, short_side=256)
    # The features are the class token after the last norm.
    return FeatureNetwork(title, tower, lambda x: tower(x).last_hidden_state[:, 0], tower.config.hidden_size, modes)


def _source(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


def first_line(error: Exception) -> str:
    """Return what an error of another library says, short enough for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _pretrained(kind: Any, spec: str, name: str) -> tuple[Any, str]:
    """Load a model of transformers, and name it; weights that are missing are an error, not random numbers."""
    from transformers import AutoConfig, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise it lists the text tower's weights, which are not wanted
    try:
        config = AutoConfig.from_pretrained(name)
        if hasattr(config, "vision_config"):  # both towers of CLIP; the projection's size may be in the outer one only
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        if config.model_type != kind.config_class.model_type:
            raise UserError(f"it holds a model of the type {config.model_type}")
        tower, report = kind.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"{len(missing)} weights are missing, {missing[0]} for one")
    except Exception as error:  # several libraries read the files and the hub, each with errors of its own
        raise UserError(
            f"{spec}:{name}: cannot be loaded ({first_line(error)}); expected a model on the Hugging Face hub or its "
            f"folder; offline, do `hf download {name} --local-dir FOLDER` elsewhere and name it {spec}:FOLDER"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    vit = f"ViT-{_SIZE_LETTERS.get(config.hidden_size, config.hidden_size)}/{config.patch_size}"
    if spec == "dinov2":
        return tower, f"DINOv2 {vit}" + f" ({_source(name)})" * (not name.startswith("facebook/"))
    side = f"@{config.image_size}" * (config.image_size != 224)
    return tower, f"CLIP {vit}{side} ({'OpenAI' if name.startswith('openai/') else _source(name)})"


def _open_clip(argument: str) -> FeatureNetwork:
    """Load a model of open_clip; `WHOLE` is its own preprocessing."""
    architecture, _, tag = argument.partition("/")
    if not architecture or not tag:
        raise UserError(f"got open_clip:{argument}, expected open_clip:ARCH/TAG, such as open_clip:ViT-B-32/openai")
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
        raise UserError(f'{first_line(error)}: do pip install -e ".[clip]", or use clip:FOLDER') from error
    try:
        # The weights decide about the activation: open_clip itself only warns where it does not fit them.
        quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
        model, transform = open_clip.create_model_from_pretrained(architecture, pretrained=tag, force_quick_gelu=quick)
    except Exception as error:  # the name is unknown or the download fails; several libraries, each with its own errors
        remedy = "open_clip.list_pretrained() lists the names; the first use needs a network connection"
        raise UserError(f"open_clip:{argument}: {first_line(error)}; {remedy}") from error
    config = open_clip.get_model_preprocess_cfg(model)
    size = np.ravel(config["size"])[0].item()
    modes = normalised_square(size, config["mean"], config["std"])
    own = f"open_clip's, {size} px ({config['resize_mode']}, {config['interpolation']})", transform
    with torch.no_grad():
        dim = model.encode_image(torch.zeros(1, 3, size, size)).shape[1]
    tower = re.sub(r"-([0-9]+)", r"/\1", architecture, count=1)  # ViT-B-32 => ViT-B/32, as everywhere else
    title = f"CLIP {tower} ({'OpenAI' if tag == 'openai' else f'open_clip {_source(tag)}'})"
    return FeatureNetwork(title, model, model.encode_image, dim, {**modes, WHOLE: own})


_LOADERS = {"efficientnet-lite0": _efficientnet, "clip": _clip, "open_clip": _open_clip, "dinov2": _dinov2}
