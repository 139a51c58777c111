"""Mixed precision, TF32 and a compiled UNet: the same training, with weights and average in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.training.ema import EMA
from ldm.training.run import Run
from tests.training.conftest import Fit, MakeConfig, column, last

THREE_STEPS = ("trainer.max_epochs=null", "trainer.max_steps=3")


class LateAverage(Callback):
    """Lets the average begin behind its warm-up, and records a weight after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        (ema,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA))  # pyright: ignore[reportAttributeAccessIssue]
        ema._count = 10**6
        self.weights.append(pl_module.proj_out.weight.detach().double())

    def on_train_batch_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, trainer: pl.Trainer, pl_module: Any, *args: Any
    ) -> None:
        self.weights.append(pl_module.proj_out.weight.detach().double())


def test_mixed_precision_keeps_weights_and_average_in_float32(
    fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    options = (*THREE_STEPS, "training.ema_decay=0.9999", "training.base_lr=0.01", "training.warmup_steps=0")
    fit(make_config(*options, "trainer.max_steps=1"), tmp_path / "float32")
    late = LateAverage()
    run, _ = fit(make_config(*options, "trainer.precision=bf16-mixed"), tmp_path / "mixed", callbacks=[late])
    assert all(parameter.dtype == torch.float32 for parameter in run.module.parameters())
    state = last(tmp_path / "mixed")
    for part in ("state_dict", "current_model_state"):
        assert {tensor.dtype for tensor in state[part].values() if tensor.is_floating_point()} == {torch.float32}
    # bfloat16 rounds every activation by up to 0.4 %; over the errors of a whole picture that averages out
    losses = (column(tmp_path / name, "train/loss")[0] for name in ("mixed", "float32"))
    assert next(losses) == pytest.approx(next(losses), rel=0.01)
    start, *weights = late.weights
    average = start.clone()
    for weight in weights:
        average = 0.9999 * average + 0.0001 * weight
    got = state["state_dict"]["proj_out.weight"].double()
    assert (got != start).double().mean() > 0.9  # a bfloat16 average would stay where it is
    torch.testing.assert_close(got, average, rtol=1e-6, atol=1e-8)  # three roundings to float32


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("matmul_precision")
def test_tf32_is_for_gpus_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = a @ b
    Run(make_config(), tmp_path)
    assert torch.get_float32_matmul_precision() == ("high" if torch.cuda.is_available() else "highest")
    assert torch.equal(a @ b, exact)


@pytest.mark.slow
def test_a_compiled_unet_trains_alike_and_its_run_goes_on_without(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A UNet of one level, without validations, which would be compiled by themselves.

    Its graphs, forward and backward, are captured as always; generating code for them would take a minute.
    """
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    unet = ("model.unet.channel_mult=[1]", "model.unet.attention_resolutions=[1]")

    def train(name: str, steps: int, *options: str, resume: Path | None = None) -> None:
        options = (*options, *unet, "trainer.limit_val_batches=0", "trainer.max_epochs=null")
        run = Run(make_config(*options, f"trainer.max_steps={steps}"), tmp_path / name)  # seeds all weights
        for parameter in run.module.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        assert run.fit(resume) == 0

    train("eager", 4)
    train("compiled", 2, "training.compile=true")
    train("compiled", 4, resume=tmp_path / "compiled" / "checkpoints" / "last.ckpt")  # names are the plain ones
    losses = [column(tmp_path / name, "train/loss") for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # fused operations round otherwise, in four steps
    states = [last(tmp_path / name) for name in ("compiled", "eager")]
    for part in ("state_dict", "current_model_state"):  # the average, the trained weights
        got, expected = (state[part] for state in states)
        assert got.keys() == expected.keys()
        torch.testing.assert_close(got["proj_out.weight"], expected["proj_out.weight"], rtol=1e-3, atol=1e-4)
