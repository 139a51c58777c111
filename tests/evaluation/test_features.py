"""Towers, key maps and preprocessing against the reference's features, and against the formulas written out.

`golden/eval` holds pictures and what the published evaluation code made of them with OpenAI's own CLIP code, its
ViT-B/32 filled with the weights of tests/procweights.py.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.evaluation.cache import FeatureCache
from ldm.evaluation.features import (
    FeatureNetwork,
    View,
    extract,
    iter_features,
    load_network,
    normalised_square,
)
from ldm.evaluation.metrics import cosine_scores, paper_box, region_similarities
from ldm.files import UserError
from ldm.images import CLIP_MEAN, CLIP_STD, Box
from tests.procweights import read_golden, weight

try:
    import open_clip
except (ImportError, RuntimeError):  # torchvision raises RuntimeError beside another build of torch
    open_clip: Any = None

GOLDEN = Path(__file__).parent.parent / "golden" / "eval"


def openai_tower(width: int, layers: int, patch: int, image_size: int, dim: int) -> dict[str, Tensor]:
    """A CLIP image tower under OpenAI's names, as the reference made it."""
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": ((image_size // patch) ** 2 + 1, width),
        "proj": (width, dim),
        "conv1.weight": (width, 3, patch, patch),
    }
    shapes |= {f"ln_{name}.{kind}": (width,) for name in ("pre", "post") for kind in ("weight", "bias")}
    linears = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
    for block in (f"transformer.resblocks.{index}." for index in range(layers)):
        shapes |= {f"{block}ln_{name}.{kind}": (width,) for name in "12" for kind in ("weight", "bias")}
        for name, (out, into) in linears.items():
            shapes |= {f"{block}{name}weight": (out * width, into * width), f"{block}{name}bias": (out * width,)}
    tower = {f"visual.{name}": weight(f"visual.{name}", shape) for name, shape in shapes.items()}
    tower["visual.proj"] *= math.sqrt(dim / width)
    return tower


# OpenAI's name => transformers' name, beside `attn.in_proj_*`, which transformers keeps in three tensors, and `proj`.
OPENAI_NAMES = {
    r"^(class_embedding)$": r"vision_model.embeddings.\1",
    r"^positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^ln_pre\.": "vision_model.pre_layrnorm.",
    r"^ln_post\.": "vision_model.post_layernorm.",
    r"^transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}


def openai_to_transformers(visual: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a CLIP image tower as CLIPVisionModelWithProjection of transformers names them.

    OpenAI's names come without `visual.`. There queries, keys and values are one tensor, and the projection (W, D)
    multiplies from the right.
    """
    mapped: dict[str, Tensor] = {}
    for renamed, tensor in visual.items():
        for pattern, replacement in OPENAI_NAMES.items():
            renamed = re.sub(pattern, replacement, renamed)
        if renamed == "proj":
            mapped["visual_projection.weight"] = tensor.T.contiguous()
        elif ".in_proj_" in renamed:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                mapped[renamed.replace(".in_proj_", f".{letter}_proj.")] = third
        else:
            mapped[renamed] = tensor
    return mapped


def save_tower(folder: Path, **sizes: int) -> dict[str, Tensor]:
    """Save `openai_tower` as a folder in the hub's layout; return its tensors without `visual.`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    state = {name.removeprefix("visual."): tensor for name, tensor in openai_tower(**sizes).items()}
    width, dim = sizes["width"], sizes["dim"]
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=sizes["layers"], hidden_act="quick_gelu",
        num_attention_heads=width // 64, image_size=sizes["image_size"], patch_size=sizes["patch"], projection_dim=dim,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(config)
    tower.load_state_dict(openai_to_transformers(state), strict=True)
    tower.save_pretrained(folder)
    return state


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (224, 224), (300, 50), (1, 1), (64, 64)]
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for path, (width, height) in zip(paths, sizes, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


# ---- CLIP ----


@pytest.mark.slow
def test_features_and_scores_of_the_reference(tmp_path: Path) -> None:
    """Float32 in another order of operations: 1e-6 relative is reached, 1e-4 is what figures need."""
    save_tower(tmp_path / "B32", width=768, layers=12, patch=32, image_size=224, dim=512)
    network = load_network(f"clip:{tmp_path / 'B32'}")
    assert (network.name, network.dim) == ("CLIP ViT-B/32 (B32)", 512)
    golden = read_golden("eval/features")
    for folder in ("gt", "gen"):
        views = [View(path, "whole") for path in sorted((GOLDEN / folder).glob("*.png"))]
        assert_relative(extract(network, views), golden[f"feat_{folder}"][: len(views)].numpy(), 2e-5)

    golden = read_golden("eval/region_feats_antialias_false")
    scores = json.loads((GOLDEN / "golden_eval.json").read_text())["region_clip_antialias_False"]["per_id"]
    for id_, score in scores.items():
        result, exemplar, mask = (
            GOLDEN / "region" / f"{int(id_):012d}_{what}.png" for what in ("result", "ref", "mask")
        )
        views = [View(result, "paper region", paper_box(Image.open(mask))), View(exemplar, "squash")]
        features = extract(network, views)
        assert_relative(features[:1], golden[f"{id_}/feat_result"].numpy(), 2e-5)
        assert_relative(features[1:], golden[f"{id_}/feat_ref"].numpy(), 2e-5)
        assert cosine_scores(features[:1], features[1:])[0] == pytest.approx(score, rel=2e-5)


def assert_relative(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (np.linalg.norm(got - expected, axis=1) <= tolerance * np.linalg.norm(expected, axis=1)).all()


def openai_forward(w: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """The image tower of Radford et al. 2021, written out."""
    width = w["class_embedding"].shape[0]
    patch = w["conv1.weight"].shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}weight"].T + w[f"{name}bias"]

    x = F.conv2d(x, w["conv1.weight"], stride=patch).flatten(2).mT
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["positional_embedding"]
    x = norm(x, "ln_pre")
    for index in range(sum(name.endswith("ln_1.weight") for name in w)):
        block = f"transformer.resblocks.{index}."
        q, k, v = (
            linear(norm(x, f"{block}ln_1"), f"{block}attn.in_proj_").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attention = (q @ k.mT / math.sqrt(width // heads)).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{block}attn.out_proj.")
        h = linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc.")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{block}mlp.c_proj.")
    return norm(x[:, 0], "ln_post") @ w["proj"]


def test_a_tower_is_the_formula(tmp_path: Path) -> None:
    state = save_tower(tmp_path / "tiny", width=128, layers=2, patch=8, image_size=32, dim=24)
    network = load_network(f"clip:{tmp_path / 'tiny'}")
    assert network.name == "CLIP ViT-128/8@32 (tiny)"
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Float32 through two blocks, in another order.
    torch.testing.assert_close(network(x), openai_forward(state, x, heads=2), rtol=1e-4, atol=1e-4)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


# ---- folders in the hub's layout ----


def tiny_clip_config() -> Any:
    from transformers import CLIPConfig

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=99, max_position_embeddings=8)
    return CLIPConfig(
        text_config=sizes | text, vision_config=sizes | dict(image_size=48, patch_size=16), projection_dim=20
    )


def test_a_folder_of_transformers(tmp_path: Path, pictures: list[Path]) -> None:
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    whole = CLIPModel(tiny_clip_config())
    whole.half().save_pretrained(tmp_path / "whole")
    network = load_network(f"clip:{tmp_path / 'whole'}")
    assert (network.name, network.dim) == ("CLIP ViT-64/16@48 (whole)", 20)
    assert network.preprocessing["whole"] == "short side to 48 px (bicubic, antialiased), centre 48 px"
    features = extract(network, [View(path, "whole") for path in pictures])
    pixels = torch.stack([network.preprocess(Image.open(path), "whole") for path in pictures])
    with torch.no_grad():
        expected = whole.float().eval().get_image_features(pixel_values=pixels)
    expected = getattr(expected, "pooler_output", expected)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)  # float32, batches alike

    network.tower.save_pretrained(tmp_path / "tower")  # pyright: ignore
    alone = load_network(f"clip:{tmp_path / 'tower'}")
    assert isinstance(alone.tower, CLIPVisionModelWithProjection)
    assert np.array_equal(features, extract(alone, [View(path, "whole") for path in pictures]))


def test_dinov2_is_the_normed_class_token(tmp_path: Path, pictures: list[Path]) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(config)
    nn.init.normal_(model.layernorm.bias)
    model.save_pretrained(tmp_path / "small")
    network = load_network(f"dinov2:{tmp_path / 'small'}")
    assert (network.name, network.dim) == ("DINOv2 ViT-32/14 (small)", 32)
    assert network.preprocessing["whole"] == "short side to 256 px (bicubic, antialiased), centre 224 px"
    x = network.preprocess(Image.open(pictures[0]), "squash")
    assert x.shape == (3, 224, 224)
    features = network(x[None])
    # Normed with weight 1: what is left without the bias has mean 0 and variance 1 (less the eps).
    free = features[0] - model.layernorm.bias.detach()
    assert float(free.mean()) == pytest.approx(0, abs=1e-4)
    assert float(free.var(correction=0)) == pytest.approx(1, abs=1e-2)


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel, Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(UserError, match=f"clip:{tmp_path / 'a'}: .*dinov2"):
        load_network(f"clip:{tmp_path / 'a'}")
    # Without the projection: transformers would fill it with random numbers.
    CLIPVisionModel(tiny_clip_config().vision_config).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=r"visual_projection\.weight"):
        load_network(f"clip:{tmp_path / 'b'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"clip:{tmp_path / 'empty'}: ") as error:
        load_network(f"clip:{tmp_path / 'empty'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "name"),
    [("clip", "openai/clip-vit-base-patch32"), ("dinov2", "facebook/dinov2-base"), ("clip:some/model", "some/model")],
)
def test_without_a_network_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, name: str
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_network(spec)
    kind, message = spec.partition(":")[0], str(error.value)
    assert message.startswith(f"{kind}:{name}: ")
    assert f"name it {kind}:FOLDER" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "spec", ["vgg", "", "efficientnet-lite0:x", "clip:/no/such/file.pt", "clip:./folder", "clip:a/b/c"]
)
def test_what_names_no_network(spec: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(spec) if ":" not in spec else spec)):
        load_network(spec)


# ---- preprocessing ----

CLIP_MODES = normalised_square(224, CLIP_MEAN, CLIP_STD, short_side=224)
CLIP_224 = FeatureNetwork("CLIP", nn.Identity(), nn.Identity(), 0, CLIP_MODES).preprocess


def pixels_of(x: Tensor) -> np.ndarray:
    """Back to grey levels."""
    levels = 255 * (x * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None])
    return levels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("size", "scaled", "corner"),
    [
        ((400, 300), (298, 224), (37, 0)),  # 298.67 is cut off, not rounded
        ((300, 403), (224, 300), (0, 38)),
        ((224, 227), (224, 227), (0, 2)),  # 1.5 to the even number
        ((225, 224), (225, 224), (0, 0)),  # 0.5 likewise
        ((10, 10), (224, 224), (0, 0)),
    ],
)
def test_whole_is_the_centre_of_the_scaled_picture(
    size: tuple[int, int], scaled: tuple[int, int], corner: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    left, top = corner
    expected = np.asarray(picture.resize(scaled, Image.Resampling.BICUBIC))[top : top + 224, left : left + 224]
    np.testing.assert_allclose(pixels_of(CLIP_224(picture, "whole")), expected, atol=1e-3)


def test_boxes_are_cut_before_scaling() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8))
    box = Box(10, 5, 41, 45)
    for rule in ("whole", "squash", "paper region"):
        assert torch.equal(CLIP_224(picture, rule, box), CLIP_224(picture.crop(box), rule))
        assert CLIP_224(picture, rule, box).shape == (3, 224, 224)
    expected = picture.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(pixels_of(CLIP_224(picture, "squash", box)), np.asarray(expected), atol=1e-3)


def test_the_papers_region_is_not_antialiased() -> None:
    # Every fourth pixel of a large picture decides: the two between which a sample falls.
    picture = np.zeros((896, 896, 3), np.uint8)
    picture[:, 1::4], picture[:, 2::4] = 100, 200
    region = pixels_of(CLIP_224(Image.fromarray(picture), "paper region"))
    np.testing.assert_allclose(region, 150, atol=1e-3)
    smooth = pixels_of(CLIP_224(Image.fromarray(picture), "squash"))
    assert abs(smooth[:, 20:-20] - 75).max() < 2  # the mean, in whole grey levels


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (5, 5, 3, 9), (-1, 0, 5, 5), (0, 0, 61, 5), (0, 0, 5, 51)])
def test_bad_boxes_are_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="60x50"):
        CLIP_224(Image.new("RGB", (60, 50)), "squash", Box(*box))


# ---- extraction ----


class Counting(nn.Module):
    """Mean and spread of each channel; counts what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.batches: list[int] = []

    def embed(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1) * self.scale


def counting_network(name: str = "counting") -> tuple[FeatureNetwork, Counting]:
    tower = Counting()
    return FeatureNetwork(name, tower, tower.embed, 6, normalised_square(32, CLIP_MEAN, CLIP_STD, short_side=32)), tower


def views_of(pictures: Sequence[Path]) -> list[View]:
    views = [View(path, rule) for path in pictures for rule in ("whole", "squash", "paper region")]
    return [*views, View(pictures[0], "squash", Box(3, 4, 20, 30)), views[0]]


def test_features_come_in_order_whatever_the_batch_threads_and_cache(tmp_path: Path, pictures: list[Path]) -> None:
    network, _ = counting_network()
    views = views_of(pictures)
    expected = np.stack(
        [network(network.preprocess(Image.open(v.path), v.resize_mode, v.box)[None])[0].numpy() for v in views]
    )
    cache = FeatureCache(tmp_path / "cache")
    for batch_size in (1, 3, 100):
        for options in ({}, {"num_workers": 3}, {"cache": cache}, {"cache": cache, "num_workers": 3}):
            features = extract(network, views, batch_size=batch_size, **options)
            assert features.dtype == np.float32
            np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)  # sums in another order
    assert extract(network, []).shape == (0, 6)
    assert [len(chunk) for chunk in iter_features(network, views, batch_size=7)] == [7, 7, 3]


def test_nothing_is_computed_twice(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.evaluation import features as module

    opened: list[Path] = []
    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda path: opened.append(path) or original(path))
    network, tower = counting_network()
    views = views_of(pictures)
    cache = FeatureCache(tmp_path / "cache")
    first = extract(network, views, cache=cache)
    assert tower.batches == [len(opened)] == [len(set(views))]
    opened.clear()
    shutil.copy(pictures[0], tmp_path / "renamed.png")
    again = extract(network, [*views, View(tmp_path / "renamed.png", "whole")], cache=cache)
    assert np.array_equal(again[:-1], first)
    assert np.array_equal(again[-1], first[0])
    assert len(tower.batches) == 1 and not opened

    Image.new("RGB", (40, 40), (9, 99, 199)).save(pictures[0])  # another picture of the same name
    changed = extract(network, views[:1], cache=cache)
    assert not np.array_equal(changed[0], first[0])
    other, other_tower = counting_network("other")
    extract(other, views[:1], cache=cache)
    assert other_tower.batches == [1]


def test_the_key_tells_networks_apart() -> None:
    network, tower = counting_network()
    same, _ = counting_network()
    assert network.key == same.key != counting_network("other")[0].key
    weights, _ = counting_network()
    with torch.no_grad():
        weights.tower.scale[3] = 1.0000001
    sizes = FeatureNetwork("counting", tower, tower.embed, 6, normalised_square(33, CLIP_MEAN, CLIP_STD, short_side=32))
    assert len({network.key, weights.key, sizes.key}) == 3


def test_a_broken_picture_is_named(tmp_path: Path, pictures: list[Path]) -> None:
    network, _ = counting_network()
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[1].read_bytes()[:500])
    for workers in (0, 2):
        with pytest.raises(UserError, match=f"{broken}: damaged"):
            extract(network, [View(pictures[0], "whole"), View(broken, "whole")], num_workers=workers)
    with pytest.raises(UserError, match=f"{pictures[0]}: .*61"):
        extract(network, [View(pictures[0], "squash", Box(0, 0, 61, 5))])


def test_features_that_are_not_finite_are_refused_with_the_file(pictures: list[Path]) -> None:
    network, tower = counting_network()
    with torch.no_grad():
        tower.scale[2] = float("nan")
    with pytest.raises(UserError, match=f"{pictures[0]}: .*counting"):
        extract(network, [View(pictures[0], "whole")])
    image = Image.open(pictures[0]).convert("RGB")
    with pytest.raises(UserError, match="counting"):
        region_similarities(network, [image], Image.new("L", image.size, 255), [image])


def test_the_one_picture_whose_features_are_not_finite_is_named(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = counting_network()
    embed = network._embed

    def spoilt(x: Tensor) -> Tensor:
        features = embed(x)
        features[2, 1] = float("inf")
        return features

    monkeypatch.setattr(network, "_embed", spoilt)
    with pytest.raises(UserError, match=f"{pictures[2]}: counting"):
        extract(network, [View(path, "squash") for path in pictures[:4]])


def test_unreadable_pictures_are_left_out_if_asked_for(tmp_path: Path, pictures: list[Path]) -> None:
    network, _ = counting_network()
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[1].read_bytes()[:500])
    paths = [tmp_path / "missing.png", pictures[0], broken, pictures[1]]
    views = [View(path, "squash") for path in paths]
    for cache in (None, FeatureCache(tmp_path / "cache")):
        unreadable: dict[Path, str] = {}
        found = [*iter_features(network, views, batch_size=1, cache=cache, unreadable=unreadable)]
        assert [len(chunk) for chunk in found] == [0, 1, 0, 1]
        assert np.array_equal(np.concatenate(found), extract(network, views[1::2]))
        assert sorted(unreadable) == sorted([paths[0], broken])


# ---- EfficientNet-Lite0 ----


def test_efficientnet_sees_more_than_pixels(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    # A mirrored picture is far away in pixels, yet shows the same thing.
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    disc = ((np.hypot(*(np.mgrid[:128, :128] - 40.0)) < 30) * 200).astype(np.uint8)
    picture = Image.fromarray(np.stack([disc, np.tile(ramp, (128, 1)), 255 - disc], -1))
    other = Image.fromarray(np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, image in (("a", picture), ("b", mirrored), ("c", other)):
        image.save(tmp_path / f"{name}.png")
    network = load_network("efficientnet-lite0")
    assert (network.name, network.dim) == ("EfficientNet-Lite0 (ImageNet)", 1280)
    assert network.preprocessing["whole"] == network.preprocessing["squash"]
    a, b, c = extract(network, [View(tmp_path / f"{name}.png", "whole") for name in "abc"])
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > a @ c / np.linalg.norm(a) / np.linalg.norm(c)


# ---- open_clip, by a small model with random weights that is registered with it ----

needs_open_clip = pytest.mark.skipif(open_clip is None, reason="needs the extra clip")

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def small_model(tmp_path: Path) -> tuple[str, Any]:
    """The spec of a small model whose weights are a file, and the model itself."""
    (tmp_path / "ViT-T-8-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "ViT-T-8-test.json")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-T-8-test").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return f"open_clip:ViT-T-8-test/{tmp_path / 'weights.pt'}", model


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@needs_open_clip
@torch.no_grad()
def test_image_features_are_those_of_open_clip(small_model: tuple[str, Any], image_path: Path) -> None:
    spec, model = small_model
    network = load_network(spec)
    assert (network.name, network.dim) == ("CLIP ViT-T/8-test (open_clip weights.pt)", 24)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    image = Image.open(image_path)
    transform = open_clip.image_transform(32, is_train=False)
    squashed = open_clip.image_transform(32, is_train=False, resize_mode="squash")
    box = Box(10, 5, 60, 45)
    views = [View(image_path, "whole"), View(image_path, "squash", box), View(image_path, "paper region", box)]
    features = extract(network, views)
    for feature, x in zip(features, (transform(image), squashed(image.crop(box))), strict=False):
        # A batch of one and a batch of three: rounding in another order.
        np.testing.assert_allclose(feature, model.encode_image(x[None])[0].numpy(), rtol=1e-4, atol=1e-5)
    assert features.shape == (3, 24)
    assert np.isfinite(features).all()


@needs_open_clip
def test_equal_weights_have_equal_keys(small_model: tuple[str, Any], tmp_path: Path) -> None:
    spec, model = small_model
    key = load_network(spec).key
    assert key == load_network(spec).key
    with torch.no_grad():
        model.visual.proj[0, 0] += 1e-6
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert key != load_network(spec).key


@needs_open_clip
def test_unknown_models_are_named() -> None:
    for spec in ("open_clip:ViT-X/y", "open_clip:ViT-B-32/no-such-tag"):
        with pytest.raises(UserError, match=spec) as error:
            load_network(spec)
        assert "\n" not in str(error.value)


def test_a_spec_names_architecture_and_weights() -> None:
    with pytest.raises(UserError, match="open_clip:ViT-B-32,"):
        load_network("open_clip:ViT-B-32")


@pytest.mark.skipif(open_clip is not None, reason="is about its absence")
def test_without_open_clip_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"\[clip\]"):
        load_network("open_clip:ViT-B-32/openai")
