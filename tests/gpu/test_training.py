"""Training on the device: precisions, options, strategies, resume, and no step that waits for the GPU."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.data.datamodule import DataModule
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.module import logs_step
from tests.training.conftest import Fit, MakeConfig, SignalAt, column, last

pytestmark = pytest.mark.slow

# Distance of a loss from float32 on the CPU, as a share of it. A loss averages the rounding of its outputs, which is
# 2e-3 (bfloat16) or 2e-4 (float16, and TF32 where a GPU trains in float32) of each, enlarged by some fifty layers.
TOLERANCE = {"bf16-mixed": 2e-2, "16-mixed": 5e-3}
PRECISION = {"cpu": "32-true", "cuda": "bf16-mixed"}  # of a run whose options matter
PLACES = [
    pytest.param("cpu", "bf16-mixed", id="cpu-bf16-mixed"),
    *(
        pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu)
        for name in ("32-true", "bf16-mixed", "16-mixed")
    ),
]


def tolerance(device: str, precision: str) -> float:
    return TOLERANCE.get(precision, 1e-4 if device == "cpu" else 5e-3)


def place(device: str, precision: str) -> tuple[str, str]:
    return f"trainer.accelerator={device}", f"trainer.precision={precision}"


@pytest.fixture(autouse=True)
def nondeterministic() -> Iterator[None]:
    """Ends what `trainer.deterministic` began."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def exact(fit: Fit, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs in float32 on the CPU."""
    run_dir = tmp_path_factory.mktemp("exact")
    assert fit(make_config(), run_dir)[1] == 0
    return run_dir


def assert_losses_near(run_dir: Path, expected: Path, distance: float) -> None:
    for name in ("train/loss", "val/loss"):
        assert column(run_dir, name) == pytest.approx(column(expected, name), rel=distance)


@pytest.mark.parametrize(("device", "precision"), PLACES)
def test_a_run_in_every_precision(
    exact: Path,
    weights: dict[str, Tensor],
    fit: Fit,
    make_config: MakeConfig,
    tmp_path: Path,
    device: str,
    precision: str,
) -> None:
    run, code = fit(make_config(*place(device, precision)), tmp_path)
    assert (code, run.trainer.global_step) == (0, 8)
    first, *_ = column(tmp_path, "train/loss")  # before float16's loss scale has found its size by skipping steps
    assert first == pytest.approx(column(exact, "train/loss")[0], rel=tolerance(device, precision))
    if precision != "16-mixed":
        assert_losses_near(tmp_path, exact, 2 * tolerance(device, precision))  # eight steps away
    state = last(tmp_path)["current_model_state"]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state.values())
    assert not torch.equal(state["model.diffusion_model.out.2.weight"], weights["model.diffusion_model.out.2.weight"])


OPTIONS = {
    "activation checkpointing": "model.unet.activation_checkpointing=true",
    "fused optimizer": "training.optimizer=adamw_fused",
    "gradient clipping": "trainer.gradient_clip_val=1000.0",
}


@pytest.mark.parametrize(
    ("device", "options"),
    [
        pytest.param("cpu", (*OPTIONS.values(),), id="cpu-all of them"),
        *(pytest.param("cuda", (word,), id=f"cuda-{name}", marks=pytest.mark.gpu) for name, word in OPTIONS.items()),
    ],
)
def test_an_option_changes_no_loss(
    fit: Fit, make_config: MakeConfig, exact: Path, tmp_path: Path, device: str, options: tuple[str, ...]
) -> None:
    assert fit(make_config(*place(device, PRECISION[device]), *options), tmp_path)[1] == 0
    assert_losses_near(tmp_path, exact, 2 * tolerance(device, PRECISION[device]))


def assert_same(got: Any, expected: Any, distance: float) -> None:
    """Weights, average and moments of two checkpoints, tensor by tensor."""
    states = [
        {**checkpoint["state_dict"], **{f"trained {n}": x for n, x in checkpoint["current_model_state"].items()}}
        | {
            (n, key): x
            for n, moments in checkpoint["optimizer_states"][0]["state"].items()
            for key, x in moments.items()
        }
        for checkpoint in (got, expected)
    ]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(
            tensor.cpu(), states[1][name].cpu(), rtol=0, atol=distance, msg=lambda m, n=name: f"{n}: {m}"
        )


LORA = ("training.lora_rank=4",)
# Stopped between two readings of the losses, and saved before the next.
LOSS_AWARE = ("training.timesteps=loss_aware", "trainer.log_every_n_steps=4", "logging.checkpoint_every=4")


@pytest.mark.parametrize(
    ("device", "precision", "options"),
    [
        *(pytest.param(*case.values, (), id=case.id, marks=case.marks) for case in PLACES[1:]),
        pytest.param("cpu", "bf16-mixed", (*LORA, *LOSS_AWARE), id="cpu-LoRA and losses of timesteps"),
        *(
            pytest.param("cuda", "bf16-mixed", options, id=f"cuda-{name}", marks=pytest.mark.gpu)
            for name, options in (("LoRA", LORA), ("losses of timesteps", LOSS_AWARE))
        ),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, device: str, precision: str, options: tuple[str, ...]
) -> None:
    """Bit for bit on the CPU. On a GPU deterministic algorithms should do the same; a tenth of a step is allowed.

    A weight moves by about the learning rate in a step, so a step too many, or moments that are lost, would show.
    """
    config = make_config(*place(device, precision), *options, "trainer.deterministic=true")
    assert fit(config, tmp_path / "whole")[1] == 0
    assert fit(config, tmp_path / "stopped", callbacks=[SignalAt(3)])[1] == 128 + 15
    assert fit(config, tmp_path / "stopped", resume=tmp_path / "stopped" / "checkpoints" / "last.ckpt")[1] == 0
    distance = 0.0 if device == "cpu" else config.training.base_lr / 10
    assert_same(last(tmp_path / "stopped"), last(tmp_path / "whole"), distance)


@pytest.mark.parametrize(("device", "precision"), PLACES)
def test_the_first_stage_with_its_game(
    fit: Fit, make_config: MakeConfig, tmp_path: Path, device: str, precision: str
) -> None:
    settings = ("stage=first_stage", "model.image_size=32", "trainer.max_epochs=1")
    settings += ("first_stage_training.adversarial_weight=0.5", "first_stage_training.adversarial_start=0")
    for folder, where in (("exact", ("cpu", "32-true")), ("tested", (device, precision))):
        assert fit(make_config(*settings, *place(*where)), tmp_path / folder)[1] == 0
    for name in ("train/loss", "train/discriminator"):
        first, expected = (column(tmp_path / folder, name)[0] for folder in ("tested", "exact"))
        assert first == pytest.approx(expected, rel=tolerance(device, precision))


def test_a_batch_is_pinned_and_its_keys_stay_on_the_cpu(make_config: MakeConfig, device: str) -> None:
    config = make_config()
    batch = next(iter(DataModule(config).train_dataloader()))
    assert all(tensor.is_pinned() == torch.cuda.is_available() for tensor in batch.values())
    moved = DiffusionTraining(config).transfer_batch_to_device(batch, torch.device(device), 0)
    assert {name: tensor.device.type for name, tensor in moved.items()} == dict.fromkeys(batch, device) | {"key": "cpu"}


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, which ends with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_strategies_in_one_process(
    one_process: None, exact: Path, fit: Fit, make_config: MakeConfig, tmp_path: Path, strategy: str, device: str
) -> None:
    """Over gloo on the CPU and NCCL on a GPU, with a resume by the strategy's own means.

    A bias before a norm has no gradient but rounding, which Adam blows up: shards, which are summed in another order,
    change the loss by 1.8e-3 of it within eight steps.
    """
    config = make_config(*place(device, PRECISION[device]), f"trainer.strategy={strategy}")
    assert fit(config, tmp_path, callbacks=[SignalAt(5)])[1] == 128 + 15
    backend = torch.distributed.get_backend()
    _, code = fit(config, tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    assert (backend, code) == ({"cpu": "gloo", "cuda": "nccl"}[device], 0)
    expected = column(exact, "val/loss")
    assert column(tmp_path, "val/loss") == pytest.approx(expected, rel=5e-3 + 2 * tolerance(device, PRECISION[device]))
    assert last(tmp_path)["state_dict"].keys() == last(exact)["state_dict"].keys()


class ForbidWaiting(Callback):
    """From the second epoch on, PyTorch raises where a step that is not logged waits for the GPU."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        unlogged = trainer.current_epoch > 0 and not logs_step(trainer, trainer.global_step + 1)
        self.steps += unlogged
        torch.cuda.set_sync_debug_mode("error" if unlogged else "default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_unlogged_step_waits_for_the_gpu(fit: Fit, make_config: MakeConfig, tmp_path: Path, precision: str) -> None:
    """Forward, backward, optimizer, average and the copy of the next batch.

    Not `16-mixed`, whose loss scaler asks in every step whether gradients are finite.
    """
    forbid = ForbidWaiting()
    options = ("trainer.log_every_n_steps=4", "trainer.max_epochs=3", "trainer.enable_progress_bar=false")
    try:
        assert fit(make_config(*place("cuda", precision), *options), tmp_path, callbacks=[forbid])[1] == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert forbid.steps == 6  # three of the four steps of each epoch but the first
