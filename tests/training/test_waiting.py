"""A training step never waits for the device: nothing is read between two logged steps, and nothing is sent slowly."""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.training.callbacks import MODULES
from ldm.training.module import TrainingModule
from ldm.training.run import Run
from tests.training.conftest import Fit, MakeConfig, column

EVERY = 2  # steps between two logged ones
STEPS = 2 * EVERY


class MarkSteps(Callback):
    """Marks in a profile where each step starts."""

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        with record_function("step starts"):
            pass


def parents(event: Any) -> list[str]:
    """The names of the operations within which one ran."""
    return [] if event.cpu_parent is None else [event.cpu_parent.name, *parents(event.cpu_parent)]


def profiled(config: Any, fit: Fit, run_dir: Path) -> tuple[Run, list[int], list[int]]:
    """A run, how many scalars it read one by one in each step, and after which steps it read all curves."""
    transfers, read_curves = [], TrainingModule.read_curves

    def count(self: TrainingModule) -> dict[str, float]:
        transfers.append(self.global_step)
        return read_curves(self)

    with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as trace:
        patch.setattr(TrainingModule, "read_curves", count)
        run, _ = fit(config, run_dir, callbacks=[MarkSteps()])
    events = trace.events() or []
    starts = sorted(event.time_range.start for event in events if event.name == "step starts")
    counts = Counter(
        bisect(starts, event.time_range.start)
        for event in events
        if event.name == "aten::_local_scalar_dense" and "aten::_fused_adamw_" not in parents(event)
    )
    return run, [counts[i + 1] for i in range(len(starts))], transfers


@pytest.mark.parametrize("timesteps", ["uniform", "loss_aware"])
def test_only_logged_steps_read_values(timesteps: str, fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        "data.batch_size=1",
        "training.optimizer=adamw_fused",  # its reads, of step counters on the CPU, can be told from the others
        f"training.timesteps={timesteps}",
        "trainer.enable_progress_bar=true",
        "trainer.max_epochs=1",
        f"trainer.limit_train_batches={STEPS + 1}",
        "trainer.limit_val_batches=1",
        f"trainer.log_every_n_steps={EVERY}",
        "trainer.gradient_clip_val=1.0",
    )
    run, counts, transfers = profiled(config, fit, tmp_path)
    assert counts[:STEPS] == [0] * STEPS  # in the last step is a validation
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
        module: Any = MODULES[config.stage](config)
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
