"""The average of the weights: its formula, its type, and the weights that it stands for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.training.ema import EMA
from tests.training.conftest import Fit, MakeConfig


def test_average_follows_its_formula(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    options = ("trainer.max_epochs=1", "trainer.limit_val_batches=0", "logging.checkpoint_every=1")
    fit(make_config(*options, "logging.keep_last=9"), tmp_path)
    steps = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("checkpoints/step*.ckpt"))]
    average = steps[0]["current_model_state"]["proj_out.weight"]  # the first step's weights are its start
    for n, state in enumerate(steps):
        if n > 0:
            decay = min(0.9, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * state["current_model_state"]["proj_out.weight"]
        torch.testing.assert_close(state["state_dict"]["proj_out.weight"], average, rtol=1e-5, atol=1e-7)


def test_the_average_is_float32_and_gives_the_weights_back() -> None:
    """With a decay of 0.999 a bfloat16 average would stay where it is."""
    module = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema, trainer = EMA(0.999), SimpleNamespace(global_step=0)
    ema._count = 10**6  # the warm-up is over
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema.on_train_start(trainer, module)  # pyright: ignore[reportArgumentType]
        module.weight.fill_(2.0)
    for step in range(1, 101):
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module, None, None, 0)  # pyright: ignore[reportArgumentType]
    checkpoint = {"state_dict": module.state_dict()}
    ema.on_save_checkpoint(trainer, module, checkpoint)  # pyright: ignore[reportArgumentType]
    assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(2 - 0.999**100, rel=1e-5)
    ema.on_validation_epoch_start(trainer, module)  # pyright: ignore[reportArgumentType]
    assert module.weight.item() == pytest.approx(2 - 0.999**100, rel=2**-8)
    ema.on_validation_epoch_end(trainer, module)  # pyright: ignore[reportArgumentType]
    assert module.weight.item() == 2.0
    ema.on_save_checkpoint(trainer, module, checkpoint := {"state_dict": module.state_dict()})  # pyright: ignore[reportArgumentType]
    assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(2 - 0.999**100, rel=1e-5)
