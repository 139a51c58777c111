"""Checkpoints, signals, curves, image grids, and values that are not finite."""

from __future__ import annotations

import csv
import io
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoint.io import CheckpointError
from ldm.config import load_config
from ldm.training import callbacks
from ldm.training.callbacks import batch_flops
from ldm.training.cli import main
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.first_stage_module import FirstStageTraining
from ldm.training.module import NonFiniteError
from tests.training.conftest import Fit, MakeConfig, SignalAt, StopAt, column, last


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_save_too(number: int, fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    handler = signal.getsignal(number)
    _, code = fit(make_config(), tmp_path, callbacks=[SignalAt(2, number)])
    assert code == 128 + number
    assert last(tmp_path)["global_step"] == 2
    assert signal.getsignal(number) == handler


def test_what_a_run_leaves_behind(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "batch_flops", batch_flops)
    config = make_config("logging.checkpoint_every=1", "logging.keep_last=2", "trainer.max_epochs=1")
    fit(config, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "step0000003.ckpt",
        "step0000004.ckpt",
    }
    assert load_config(tmp_path / "config.yaml") == config
    assert list(tmp_path.glob("events.out.tfevents*"))
    with open(tmp_path / "metrics.csv", newline="") as file:
        columns = next(csv.reader(file))
    assert {"train/loss", "train/loss_t1of4", "train/lr", "train/param_norm", "val/loss"} <= set(columns)

    def curve(name: str) -> list[float]:
        return column(tmp_path, f"train/{name}")

    assert len(curve("grad_norm")) == 4
    parts = zip(*(curve(f"grad_norm_{part}") for part in ("unet", "mapper", "null_token")), strict=True)
    assert curve("grad_norm") == pytest.approx([math.hypot(*norms) for norms in parts], rel=1e-5)
    assert all(0 <= share < 1 for share in curve("data_wait"))
    for samples, seconds in zip(curve("samples_per_s"), curve("step_s"), strict=True):
        assert samples * seconds == pytest.approx(2)
    # operations: the same for every step, and the encoders' with the UNet's forward and backward passes
    operations = [a * b for a, b in zip(curve("tflops"), curve("step_s"), strict=True)]
    assert min(operations) > 0 and max(operations) == pytest.approx(min(operations))


def test_epochs_shorter_than_the_logging_interval_are_logged(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    """Four batches in an epoch, two in a step."""
    every = ("trainer.log_every_n_steps=3", "trainer.accumulate_grad_batches=2")
    fit(make_config(*every, "trainer.max_epochs=3", "trainer.limit_val_batches=0"), tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == [2, 5]
    assert all(row[f"train/{name}"] for row in rows for name in ("grad_norm", "lr", "samples_per_s", "step_s"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("overrides", "step", "samples", "validations"),
    [
        (("trainer.max_epochs=null", "trainer.max_steps=3"), "3/3", 12, 1),
        (("trainer.max_epochs=2",), "4/4", 16, 2),
        (("trainer.max_epochs=-1",), "3/?", 12, 2),
        (("trainer.max_epochs=2", "trainer.accumulate_grad_batches=2"), "2/2", 16, 2),
    ],
)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_one_line(
    is_terminal: bool,
    overrides: tuple[str, ...],
    step: str,
    samples: int,
    validations: int,
    fit: Fit,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Epochs of two batches."""
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    if is_terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
    batches = ("data.batch_size=4", "data.val_batch_size=1")
    config = make_config(*overrides, *batches, "trainer.enable_progress_bar=true")
    fit(config, tmp_path, callbacks=[StopAt(3)] if "-1" in overrides[0] else [])
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert sum("val/loss" in line for line in lines) == validations
    if is_terminal:
        drawn = terminal.getvalue().replace("\n", "\r").split("\r")
        assert all(len(line) <= 80 for line in drawn)
        assert any("validation 4/4" in line for line in drawn)
        assert len(lines) == validations
        lines = [line for line in drawn if "samples" in line]
    else:
        assert "\r" not in out + err
        assert len(lines) == validations + int(step.split("/")[0])
        lines = [line for line in lines if "val/loss" not in line]
    for word in (f"step {step}", f"{samples} samples", "left", "loss ", "/s"):
        assert word in lines[-1]


@pytest.mark.parametrize("stage", ["diffusion", "first_stage"])
def test_image_grids_show_the_average(
    stage: str, fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_class = DiffusionTraining if stage == "diffusion" else FirstStageTraining
    weights, original = [], module_class.preview

    def preview(self: Any, *args: Any) -> list[Tensor]:
        weights.append({name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad})
        return original(self, *args)

    monkeypatch.setattr(module_class, "preview", preview)
    options = ("logging.image_every=4", "logging.checkpoint_every=4", "first_stage_training.ema_decay=0.9")
    run, _ = fit(make_config(f"stage={stage}", "trainer.max_epochs=1", *options), tmp_path)
    state = last(tmp_path)
    assert len(weights) == 1 and state["global_step"] == 4
    for name, shown in weights[0].items():
        assert torch.equal(shown, state["state_dict"][name]), name
    for name, parameter in run.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, state["current_model_state"][name]), name


def test_operations_are_counted_without_a_trace(make_config: MakeConfig, batch: dict[str, Tensor]) -> None:
    """As PyTorch counts them in a real step, and no random number is drawn.

    PyTorch leaves a CPU's attention out: here it is at half the resolution, and small.
    """
    config = make_config("model.unet.channel_mult=[1,2]", "model.unet.attention_resolutions=[2]")
    before = torch.get_rng_state()
    counted = batch_flops(config, batch)
    assert torch.equal(torch.get_rng_state(), before)
    module = DiffusionTraining(config)
    with FlopCounterMode(display=False) as counter:
        module.losses(batch)[0].mean().backward()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_resuming_from_weights_alone(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="--pretrained-model"):
        fit(make_config(), tmp_path / "run", resume=path)


def test_a_malicious_checkpoint_is_not_run(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "bad.ckpt"
    torch.save({"optimizer_states": [], "payload": Payload()}, path)
    with pytest.raises(CheckpointError):
        fit(make_config(), tmp_path / "run", resume=path)
    assert not (tmp_path / "owned").exists()


class TestNonFinite:
    def test_loss(
        self,
        config_file: Path,
        pretrained: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        original = DiffusionTraining.losses

        def losses(self: DiffusionTraining, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            values, t = original(self, batch)
            return (values * torch.nan if self.training and self.global_step == 2 else values), t

        monkeypatch.setattr(DiffusionTraining, "losses", losses)
        arguments = ["-b", str(config_file), "-l", str(tmp_path), "--pretrained-model", str(pretrained)]
        assert main([*arguments, "logging.checkpoint_every=1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "loss is nan at step 2 " in error
        (run_dir,) = tmp_path.iterdir()
        assert last(run_dir)["global_step"] == 2  # the state before the step that failed
        assert all(x.isfinite().all() for x in last(run_dir)["current_model_state"].values())

    def test_weights_are_not_saved(
        self, fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = DiffusionTraining.losses

        def losses(self: DiffusionTraining, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            values, t = original(self, batch)
            if self.training and self.global_step == 2:  # finite, but with an infinite slope
                values = values + (self.learnable_vector - self.learnable_vector.detach()).abs().sqrt().sum()
            return values, t

        monkeypatch.setattr(DiffusionTraining, "losses", losses)
        with pytest.raises(NonFiniteError, match="after step 3"):
            fit(make_config("logging.checkpoint_every=1"), tmp_path)
        assert last(tmp_path)["global_step"] == 2
