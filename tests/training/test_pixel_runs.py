"""Runs in pixel space: averages, grids, distances, exports, starts from published layouts; the recipes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.openai import examine
from ldm.config import ModelConfig, load_config
from ldm.evaluation.features import WHOLE, FeatureNetwork
from ldm.images import pil_to_tensor
from ldm.pixel_diffusion import Classifier, PixelDiffusion, load_pixel_model
from ldm.training.fid import SampleDistance
from ldm.training.pixel_module import PixelTraining
from ldm.training.run import Run
from scripts import export_checkpoint
from tests.lineage import by_head, manifests
from tests.training.conftest import ROOT, MakeConfig, column, filled, last, train
from tests.training.test_resume import assert_same_state

STAGES = ("diffusion", "classifier")


# --- Averages, grids and distances ------------------------------------------------------------------------------------


class Mean(FeatureNetwork):
    """Features that need no weights: four pixels."""

    def __init__(self) -> None:
        mode = ("as it is", lambda image: pil_to_tensor(image.resize((2, 2)))[:1])
        super().__init__("mean", nn.Linear(1, 1), lambda x: x.flatten(1), 4, {WHOLE: mode})


def test_grids_and_distances_show_the_average_and_leave_the_training_alone(
    pixel_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SampleDistance, "network", Mean())
    options = ("trainer.max_steps=4", "model.unet.dropout=0.1", "training.ema_decay=0.5")
    train(pixel_config(*options), tmp_path / "plain")
    shown: list[Tensor] = []
    preview = PixelTraining.preview

    def watched(self: PixelTraining, *args: Any) -> list[Tensor]:
        assert not self.training
        shown.append(self.unet.out[2].bias.detach().clone())
        return preview(self, *args)

    monkeypatch.setattr(PixelTraining, "preview", watched)
    watching = ("logging.image_every=4", "logging.fid_every=2", "logging.fid_samples=6")
    capsys.readouterr()
    train(pixel_config(*options, *watching), tmp_path / "watched")
    states = last(tmp_path / "watched"), last(tmp_path / "plain")
    assert_same_state(*states)
    assert torch.equal(shown[-1], states[0]["state_dict"]["model.diffusion_model.out.2.bias"])
    assert not torch.equal(shown[-1], states[0]["current_model_state"]["model.diffusion_model.out.2.bias"])
    distances = column(tmp_path / "watched", "val/fid")
    assert len(distances) == 2 and all(np.isfinite(distances)) and distances[0] > 0
    assert re.search(r"^step 4: FID \(mean, 6 images\) [\d.]+", capsys.readouterr().out, re.MULTILINE)
    with Image.open(tmp_path / "watched" / "images" / "step0000004.png") as grid:
        assert grid.size == (2 * 8, 2 * 8)  # two samples; images, samples


def test_each_average_can_be_exported(
    pixel_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pixel_config("training.more_ema_decays=[0.1,0.2]", "trainer.max_steps=3")
    train(config, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = last(tmp_path / "run")
    expected = {"": state["state_dict"], "0.1": state["ema.0.1"]["average"], "0.2": state["ema.0.2"]["average"]}
    for decay, tensors in expected.items():
        out = tmp_path / f"of {decay}" / "model.safetensors"
        options = ["--ema-decay", decay] if decay else []
        assert export_checkpoint.main([str(checkpoint), str(out), "--dtype", "float32", *options]) == 0
        model = load_pixel_model(out, out.with_name("config.yaml"))
        assert model.config == config.model
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, tensors[name]), (decay, name)
    name = "model.diffusion_model.out.2.weight"
    assert len({float(tensors[name].norm()) for tensors in expected.values()}) == 3
    capsys.readouterr()
    assert export_checkpoint.main([str(checkpoint), str(tmp_path / "x.safetensors"), "--ema-decay", "0.7"]) != 0
    assert "got --ema-decay 0.7, expected one of its own: 0.1, 0.2" in capsys.readouterr().err


# --- Files of improved-diffusion and guided-diffusion -----------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_starts_from_a_file_of_theirs(stage: str, pixel_config: MakeConfig, tmp_path: Path) -> None:
    """Bare names, and the channels of attention of one head after the other."""
    config = pixel_config(stage=stage)
    module = filled(config)
    prefix = "model.diffusion_model."
    state = {}
    for name, tensor in module.state_dict().items():
        state[name.removeprefix(prefix)] = by_head(tensor, 2) if ".qkv." in name else tensor
    torch.save(state, tmp_path / "theirs.pt")
    run = Run(config, tmp_path / "run")
    run.initialise(str(tmp_path / "theirs.pt"), from_scratch=False, resuming=False)
    for name, tensor in module.state_dict().items():
        assert torch.equal(run.module.state_dict()[name], tensor), name
    wrong = pixel_config("model.unet.num_classes=null", "model.unet.channel_mult=[1,3]", stage=stage)
    with pytest.raises(CheckpointError):
        Run(wrong, tmp_path / "wrong").initialise(str(tmp_path / "theirs.pt"), from_scratch=False, resuming=False)


def recipes() -> dict[str, str]:
    """Published files by the config that is their recipe."""
    lines = {path.name: path.read_text().splitlines()[0] for path in sorted((ROOT / "configs/pixel").glob("*.yaml"))}
    found = {name: re.match(r"# The recipe of (\w+\.pt)", line) for name, line in lines.items()}
    return {name: match[1] for name, match in found.items() if match}


def published(file: str) -> dict[str, Tensor]:
    """The tensors of a published file, without their numbers."""
    index, texts = manifests()["index"], manifests()["manifests"]
    key, entry = next((key, entry) for key, entry in index.items() if entry.get("file") == file)
    if same := entry.get("same_manifest_as"):
        key = f"{key.split('_')[0]}_{same.split()[0]}"
    rows = (line.split("\t") for line in texts[key].splitlines())
    return {name: torch.empty([int(n) for n in shape.split("x")], device="meta") for name, shape, _ in rows}


def test_every_published_architecture_has_a_recipe() -> None:
    entries = (entry for entry in manifests()["index"].values() if "file" in entry)
    originals = {entry["file"] for entry in entries if "same_manifest_as" not in entry}
    assert originals <= set(recipes().values())


@pytest.mark.parametrize("name", recipes())
def test_recipes_build_the_published_architectures(name: str) -> None:
    """Every name and shape is the published file's, and the config says what is read off it."""
    state = published(recipes()[name])
    config = load_config(ROOT / "configs/pixel" / name).model
    with torch.device("meta"):
        model = (Classifier if config.kind == "classifier" else PixelDiffusion)(config)
    prefix = "model.diffusion_model."
    assert {n.removeprefix(prefix): x.shape for n, x in model.state_dict().items()} == {
        n: x.shape for n, x in state.items()
    }
    found = examine(state)
    assert found.is_published
    read = load_config(OmegaConf.create(found.config)).model
    free = ["dropout", "activation_checkpointing"]  # without effect on what is computed
    free += ["num_heads"] if config.unet.head_channels else []  # head_channels say it
    assert replace(read.unet, **{key: getattr(config.unet, key) for key in free}) == config.unet

    def facts(model: ModelConfig) -> tuple[Any, ...]:
        schedule = model.schedule
        ends = (schedule.linear_start, schedule.linear_end) if schedule.name == "linear" else ()
        inputs = model.kind, model.image_size, model.small_size, model.input_channels, model.variance
        return *inputs, schedule.name, schedule.num_timesteps, *ends

    assert facts(config) == facts(read)
    assert config.kind != "classifier" or config.classifier == read.classifier
