"""Runs in pixel space: resumed, in two processes, sharded, compiled, with averages, grids and distances; examples."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.openai import examine
from ldm.config import ModelConfig, dump_config, load_config
from ldm.evaluation.features import WHOLE, FeatureNetwork
from ldm.images import pil_to_tensor
from ldm.pixel_diffusion import Classifier, Guidance, PixelDiffusion, load_pixel_model
from ldm.training.fid import SampleDistance
from ldm.training.pixel_module import PixelTraining
from ldm.training.run import Run
from scripts import export_checkpoint
from tests.lineage import by_head, manifests
from tests.pixel import write_digits
from tests.training.conftest import ROOT, MakeConfig, SignalAt, column, filled, last, train
from tests.training.test_resume import assert_same_state

STAGES = ("diffusion", "classifier")
RESUMED = {  # with two timesteps each has its ten losses after a few steps, and later draws depend on them
    "diffusion": (
        "training.timesteps=loss_aware",
        "model.schedule.num_timesteps=2",
        "training.more_ema_decays=[0.5,0.99]",
        "model.unet.dropout=0.1",
        "trainer.log_every_n_steps=3",
        "trainer.max_steps=10",
    ),
    "classifier": ("training.more_ema_decays=[0.5]", "model.unet.dropout=0.1", "data.crop=random", "data.flip=true"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bit_identical(stage: str, pixel_config: MakeConfig, tmp_path: Path) -> None:
    config = pixel_config(*RESUMED[stage], *(["trainer.max_steps=6"] if stage == "classifier" else []), stage=stage)
    train(config, tmp_path / "whole")
    stop = config.trainer["max_steps"] - 2
    assert train(config, tmp_path / "parts", callbacks=[SignalAt(stop)])[1] == 128 + signal.SIGTERM
    before = last(tmp_path / "parts")
    assert before["global_step"] == stop
    assert train(config, tmp_path / "parts", resume=tmp_path / "parts" / "checkpoints" / "last.ckpt")[1] == 0
    states = last(tmp_path / "parts"), last(tmp_path / "whole")
    assert_same_state(*states)
    for decay in config.training.more_ema_decays:
        got, expected = (state[f"ema.{decay}"] for state in states)
        assert got["n_averaged"] == expected["n_averaged"] == config.trainer["max_steps"]
        for name, tensor in expected["average"].items():
            assert torch.equal(got["average"][name], tensor), name
    if stage == "diffusion":
        assert int(before["timesteps"]["counts"].min()) >= 10  # the draws after the stop depend on the losses


@pytest.fixture
def words(pixel_config: MakeConfig, tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of a training command from weights of which all have an effect, and a batch of two in all."""

    def command(stage: str) -> list[str]:
        config = pixel_config("data.batch_size=2", "data.val_batch_size=2", "trainer.max_steps=4", stage=stage)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        torch.save({"state_dict": filled(config).state_dict()}, tmp_path / "start.ckpt")
        files = ["-b", str(tmp_path / "config.yaml"), "--pretrained-model", str(tmp_path / "start.ckpt")]
        return [*files, "-l", str(tmp_path), "-n", "run"]

    return command


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_with_twice_the_batch(
    strategy: str, stage: str, train_in_two: Callable[..., None], words: Any, tmp_path: Path
) -> None:
    """Also sharded: the same norms and losses, a checkpoint of whole tensors, and a grid."""
    options = ["trainer.val_check_interval=4", "trainer.check_val_every_n_epoch=null", "data.max_val_samples=2"]
    options += ["training.timesteps=loss_aware", "training.objective=vlb"] if stage == "diffusion" else []
    train_in_two(*words(stage), *options, f"trainer.strategy={strategy}", "logging.image_every=4")
    (two,) = tmp_path.glob("*_run")
    one = tmp_path / "one"
    config = load_config(tmp_path / "config.yaml", overrides=options)
    train(config, one, weights=tmp_path / "start.ckpt")
    for name in ("train/grad_norm", "train/param_norm", "val/loss"):
        assert column(two, name) == pytest.approx(column(one, name), rel=2e-3), name
    assert len(list((two / "images").glob("*.png"))) == 1
    states = last(two), last(one)
    for part in ("state_dict", "current_model_state"):
        got, expected = ({name: tensor.shape for name, tensor in state[part].items()} for state in states)
        assert got == expected
    if stage == "diffusion":
        seen = [state["timesteps"]["counts"].sum() + state["timesteps"]["pending"][:, 0].numel() for state in states]
        assert seen[0] == seen[1] == 8  # of all processes
    assert train(config, tmp_path / "on", resume=two / "checkpoints" / "last.ckpt")[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_network_trains_alike(
    stage: str, pixel_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs are captured as always; generating code for them would take a minute."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    losses = []
    for compiled in ("false", "true"):
        config = pixel_config(f"training.compile={compiled}", "trainer.limit_val_batches=0", stage=stage)
        train(config, tmp_path / compiled)
        losses.append(column(tmp_path / compiled, "train/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert last(tmp_path / "true")["state_dict"].keys() == last(tmp_path / "false")["state_dict"].keys()


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
    config = pixel_config("training.more_ema_decays=[0.5,0.99]", "trainer.max_steps=3")
    train(config, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = last(tmp_path / "run")
    expected = {"": state["state_dict"], "0.5": state["ema.0.5"]["average"], "0.99": state["ema.0.99"]["average"]}
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
    assert "got --ema-decay 0.7, expected one of its own: 0.5, 0.99" in capsys.readouterr().err


# --- Files of improved-diffusion and guided-diffusion -----------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_starts_from_a_file_of_theirs(stage: str, pixel_config: MakeConfig, tmp_path: Path) -> None:
    """Bare names, and the channels of attention of one head after the other."""
    config = pixel_config(stage=stage)
    module = filled(config)
    prefix = "classifier." if stage == "classifier" else "model.diffusion_model."
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
    prefix = "classifier." if config.kind == "classifier" else "model.diffusion_model."
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


# --- Examples ---------------------------------------------------------------------------------------------------------

SMALL = (
    *("model.parameterization=v", "model.variance=posterior", "model.unet.out_channels=1", "training.objective=simple"),
    *("training.ema_decay=0.98", "training.lr_schedule=linear", "trainer.log_every_n_steps=100"),
    *("data.batch_size=64", "trainer.limit_val_batches=0", "trainer.max_steps=500"),
)


@pytest.fixture(scope="module")
def all_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("all digits") / "digits.npz", 1797)


@pytest.fixture(scope="module")
def reader() -> SVC:
    """Tells real digits apart: 99 % of those that it was not fitted to."""
    digits: Any = load_digits()
    svc = SVC().fit(digits.data[:1200], digits.target[:1200])
    assert svc.score(digits.data[1200:], digits.target[1200:]) > 0.94
    return svc


def trained(pixel_config: MakeConfig, run_dir: Path, *overrides: str, stage: str = "diffusion") -> Any:
    config = pixel_config(*overrides, stage=stage)
    began = time.process_time()
    train(config, run_dir)
    print(f"{stage}: {time.process_time() - began:.0f} s")
    assert time.process_time() - began < 60
    return load_pixel_model(run_dir / "checkpoints" / "last.ckpt", run_dir / "config.yaml")


def accuracy(reader: SVC, model: PixelDiffusion, guidance: Guidance) -> float:
    """The share of 200 samples that are read as what they were asked to be."""
    labels = torch.arange(200) % 10
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    images = model.sample(noise, labels, sampler="ddpm", steps="25", guidance=guidance, generator=generator)
    return float(reader.score(((images + 1) * 8).clamp(0, 16).flatten(1).numpy(), labels.numpy()))


@pytest.mark.slow
def test_digits_become_legible_within_a_minute_of_one_core(
    pixel_config: MakeConfig, all_digits: Path, reader: SVC, tmp_path: Path
) -> None:
    model = trained(pixel_config, tmp_path, *SMALL, f"data.root={all_digits}", "training.p_uncond=0.1")
    shares = accuracy(reader, model, Guidance()), accuracy(reader, model, Guidance(scale=2.0))
    print(f"right digits: {shares[0]:.0%}, with guidance {shares[1]:.0%}")
    assert min(shares) > 0.6  # chance is 10 %


@pytest.mark.slow
def test_a_classifier_leads_a_model_without_classes(
    pixel_config: MakeConfig, all_digits: Path, reader: SVC, tmp_path: Path
) -> None:
    """ADM, Algorithm 1, with a classifier of noisy digits."""
    own = f"data.root={all_digits}"
    model = trained(pixel_config, tmp_path / "model", *SMALL, own, "model.unet.num_classes=null")
    options = ("data.batch_size=64", "trainer.limit_val_batches=0", "trainer.max_steps=300")
    classifier = trained(pixel_config, tmp_path / "classifier", *options, own, stage="classifier")
    shares = [accuracy(reader, model, g) for g in (Guidance(), Guidance(classifier=classifier, classifier_scale=3.0))]
    print(f"right digits: {shares[0]:.0%}, led by the classifier {shares[1]:.0%}")
    assert shares[0] < 0.25  # chance is 10 %
    assert shares[1] > 0.6
