"""Long runs in pixel space: resumed, in two processes, sharded, compiled."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.config import dump_config, load_config
from tests.training.conftest import MakeConfig, SignalAt, column, filled, last, train
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
        options = (f"training.compile={compiled}", "trainer.limit_val_batches=0", "model.unet.channel_mult=[1]")
        config = pixel_config(*options, stage=stage)
        train(config, tmp_path / compiled)
        losses.append(column(tmp_path / compiled, "train/loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert last(tmp_path / "true")["state_dict"].keys() == last(tmp_path / "false")["state_dict"].keys()
