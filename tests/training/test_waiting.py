"""A training step never waits for the device: nothing is read between two logged steps, and nothing is sent slowly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.training.callbacks import MODULES
from ldm.training.module import TrainingModule
from tests.training.conftest import Fit, MakeConfig, column

EVERY = 2  # steps between two logged ones
STEPS = 2 * EVERY


class Reads(TorchDispatchMode):
    """Counts the scalars that are read one by one, in each of the `counts` that are appended."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[-1] += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("timesteps", ["uniform", "loss_aware"])
def test_only_logged_steps_read_values(
    timesteps: str, fit: Fit, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers, read_curves = [], TrainingModule.read_curves  # of all curves at once

    def count(self: TrainingModule) -> dict[str, float]:
        transfers.append(self.global_step)
        return read_curves(self)

    monkeypatch.setattr(TrainingModule, "read_curves", count)
    config = make_config(
        "data.batch_size=1",
        "training.optimizer=adamw_fused",  # the other one reads step counters on the CPU
        f"training.timesteps={timesteps}",
        "trainer.enable_progress_bar=true",
        "trainer.max_epochs=1",
        f"trainer.limit_train_batches={STEPS + 1}",
        "trainer.limit_val_batches=1",
        f"trainer.log_every_n_steps={EVERY}",
        "trainer.gradient_clip_val=1.0",
    )
    with Reads() as reads:
        run, _ = fit(
            config, tmp_path, callbacks=[LambdaCallback(on_train_batch_start=lambda *_: reads.counts.append(0))]
        )
    assert reads.counts[1 : STEPS + 1] == [0] * STEPS  # in the last step is a validation
    assert transfers == [EVERY, STEPS]
    assert run.trainer.progress_bar_metrics["train/loss"] == pytest.approx(column(tmp_path, "train/loss")[-1])


class FakeDevice(TorchDispatchMode):
    """Takes the meta device, on which reading a value is an error, for a GPU, and notes what is sent to it slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.slow: list[str] = []
        self.copies: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        given = {x.device.type for x in tensors if x.ndim > 0 or copies}  # kernels take scalars as arguments
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        if "cpu" in given and "meta" in given | made and not kwargs.get("non_blocking"):
            self.slow.append(str(func))  # a tensor copied, or used as an index, while the CPU waits
        if copies and "cpu" in given and "meta" in given | made:
            self.copies.append(args[0].shape)
        return result


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.timesteps=loss_aware", "training.min_snr_gamma=5"),
        ("training.p_uncond=0.5", "training.offset_noise=0.1", "training.train_tower=true"),
        (
            "stage=first_stage",
            "first_stage_training.adversarial_weight=0.5",
            "first_stage_training.adversarial_start=0",
        ),
        ("stage=first_stage", "model.first_stage.decoder=asymmetric", "first_stage_training.colour_weight=1.0"),
    ],
)
def test_a_step_sends_all_draws_without_waiting(
    overrides: tuple[str, ...], make_config: MakeConfig, batch: dict[str, Tensor]
) -> None:
    config = make_config(*overrides, "model.image_size=32")
    with torch.device("meta"):
        module: Any = MODULES[config.stage, config.model.kind](config)
    strategy = SingleDeviceStrategy(torch.device("meta"))
    module.to("meta").trainer = SimpleNamespace(log_every_n_steps=9, global_step=0, world_size=1, strategy=strategy)
    module.train()
    on_device = {name: x if name == "key" else x.to("meta") for name, x in batch.items()}
    on_device["image"] = torch.zeros(4, 3, 32, 32, device="meta")  # the smallest that a discriminator judges
    on_device["masked_image"] = on_device["image"]
    module.training_step(on_device, 0)  # the first one sends the schedule
    with FakeDevice() as device:
        module.training_step(on_device, 0).backward()
    assert device.slow == []
    if config.stage == "diffusion":
        Z, side = config.model.first_stage.embed_dim, 32 // module.downsampling
        values = 3 * 4 * Z * side**2  # noise of the two posteriors and of the loss, for four samples
        assert device.copies == [(4 * values + 4 * 8 + 4,)]  # bytes; a timestep and whether to drop the condition
