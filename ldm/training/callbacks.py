"""What a run does besides stepping: average, checkpoints, image grids, speed, signals."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.throughput import measure_flops
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import default_collate

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import TEXT_MODULE, TOWER
from ldm.config import Config, LoggingConfig
from ldm.files import atomic_write
from ldm.images import tensor_to_pil
from ldm.training import fsdp
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.ema import EMA, trained_parameters
from ldm.training.first_stage_module import FirstStageTraining
from ldm.training.module import NonFiniteError, logs_step


class Interrupted(Exception):
    """A signal ended the run, whose state is saved.

    Attributes:
        number: of the signal.
        saved: the file to continue from; None where no step had been taken.
    """

    def __init__(self, number: int, saved: Path | None) -> None:
        super().__init__(f"{signal.Signals(number).name} received")
        self.number, self.saved = number, saved


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it; reads one without running what is in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        try:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # PyTorch's writer hides what the operating system said behind an error of its own.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise CheckpointError(
                f"{path}: cannot be saved ({reason.strerror}); what was there before is intact. Make room, then "
                f"continue with --resume {Path(path).parents[1]}"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # damaged files raise nearly anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: not a checkpoint to resume from: {reason}") from error
        if not isinstance(checkpoint, dict) or "optimizer_states" not in checkpoint:
            raise CheckpointError(
                f"{path}: holds weights but no training state, so nothing can be resumed; start a new run from it with "
                "--pretrained-model"
            )
        return checkpoint


class Checkpoints(Callback):
    """Saves the run: `last.ckpt` and `stepNNNNNNN.ckpt` at intervals, `last.ckpt` at the end and on a signal.

    SIGTERM, SIGUSR1 and Ctrl-C let the step finish (validation: the batch), save and raise Interrupted. Saving is
    always at the end of an optimizer step, never between accumulated batches: nothing is lost. Weights that are NaN or
    infinite are never saved.

    Args:
        directory: folder of the files.
        every: steps between periodic checkpoints; 0: only the last.
        keep: number of newest periodic files that are kept.
    """

    def __init__(self, directory: Path, *, every: int, keep: int) -> None:
        self.directory, self.every, self.keep = directory, every, keep
        self.received = 0  # number of the signal
        self._saved_step = -1
        self._previous: dict[int, Any] = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.received = number

    def _listen(self) -> None:
        if not self._previous:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not stepped or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        number = self._agreed(trainer)
        periodic = self.every > 0 and trainer.global_step % self.every == 0
        if periodic or number or self._finishing(trainer):
            self._save(trainer, pl_module, periodic=periodic)
        if number:
            raise Interrupted(number, self.directory / "last.ckpt")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._agreed(trainer):
            raise StopIteration  # ends the validation in good order; averaged weights are swapped back

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.callback_metrics.get("val/loss", torch.zeros(())).isnan():
            raise NonFiniteError(f"val/loss is NaN after step {trainer.global_step}")  # before `best.ckpt` is saved
        if number := self._agreed(trainer):
            if trainer.global_step > 0 and not trainer.sanity_checking:
                self._save(trainer, pl_module, periodic=False)
            last = self.directory / "last.ckpt"
            raise Interrupted(number, last if last.is_file() else None)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _agreed(self, trainer: pl.Trainer) -> int:
        """Return the signal that any process received, or 0: all must agree, or one would save while another steps."""
        if trainer.world_size == 1:
            return self.received
        number = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    @staticmethod
    def _finishing(trainer: pl.Trainer) -> bool:
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch) or trainer.should_stop

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, *, periodic: bool) -> None:
        norm = fsdp.total_norm(p.detach() for _, p in trained_parameters(module))  # finite if every weight is
        if not trainer.strategy.reduce_boolean_decision(bool(norm.isfinite())):
            raise NonFiniteError(f"weights are NaN or infinite after step {trainer.global_step}")
        last = self.directory / "last.ckpt"
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(last, weights_only=False)
            self._saved_step = trainer.global_step
        if periodic and trainer.is_global_zero:
            _link(last, self.directory / f"step{trainer.global_step:07d}.ckpt")
            old = sorted(self.directory.glob("step*.ckpt"), key=lambda path: path.stat().st_mtime)
            for path in old[: max(0, len(old) - self.keep)]:
                path.unlink()


def _link(source: Path, target: Path) -> None:
    """Give a file, which is only ever replaced, a second name; copy it where hard links are impossible."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


class MetricsFile(Logger):
    """Writes `metrics.csv`, a row per call; a resumed run appends to it.

    Args:
        run_dir: folder of the file.
    """

    name = version = ""  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]: one file, no folders

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self._columns: list[str] = []

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not row.keys() <= set(self._columns):
            self._add_columns(row)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _add_columns(self, row: Iterable[str]) -> None:
        """Add the columns of a row that the file lacks: the whole file is written anew."""
        rows: list[dict[str, str]] = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows, self._columns = list(reader), list(reader.fieldnames or ())
        self._columns += [name for name in row if name not in self._columns]
        with atomic_write(self.path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run directory holds `config.yaml`."""


class Monitor(Callback):
    """Logs how fast a run is, what it waits for, and how large gradients and weights are.

    Per logged step: `train/samples_per_s` of all processes; `train/step_s`, seconds of an optimizer step;
    `train/data_wait`, the share of time in which the next batch was not there; `train/tflops`, 1e12 floating-point
    operations per second of this process; `train/lr`; `train/grad_norm` of everything and of each part;
    `train/param_norm`; `train/memory_gib`, the peak on the GPU.

    Args:
        config: the run, whose operations are counted with the first batch.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._flops_per_batch = 0
        self._step = 0  # the last one that was logged
        self._begin()

    def _begin(self) -> None:
        self._start = self._batch_end = time.perf_counter()
        self._samples, self._batches, self._waited = 0, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()  # validation does not count

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._batch_end
        if not self._flops_per_batch:
            self._flops_per_batch = batch_flops(self.config, batch)
            self._begin()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if logs_step(trainer, trainer.global_step + 1):
            parts: dict[str, list[Tensor]] = defaultdict(list)
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    parts[part_of(name)].append(parameter.grad)
            norms = {name: fsdp.total_norm(gradients) for name, gradients in parts.items()}
            pl_module.log("train/grad_norm", fsdp.total_norm(norms.values()))
            pl_module.log_dict({f"train/grad_norm_{name}": norm for name, norm in norms.items()})
            weights = fsdp.total_norm(p.detach() for _, p in trained_parameters(pl_module))
            pl_module.log("train/param_norm", weights)
            pl_module.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch["key"]) * trainer.world_size
        self._batches += 1
        self._batch_end = now = time.perf_counter()
        if trainer.global_step > self._step and logs_step(trainer, trainer.global_step):
            seconds = now - self._start
            pl_module.log("train/samples_per_s", self._samples / seconds, prog_bar=True)
            pl_module.log("train/step_s", seconds / self._batches * trainer.accumulate_grad_batches)
            pl_module.log("train/data_wait", self._waited / seconds)
            pl_module.log("train/tflops", self._flops_per_batch * self._batches / seconds / 1e12)
            if torch.cuda.is_available():
                pl_module.log("train/memory_gib", torch.cuda.max_memory_allocated() / 2**30)
            self._begin()
            self._step = trainer.global_step


def batch_flops(config: Config, batch: dict[str, Any]) -> int:
    """Count the floating-point operations of a training step's forward and backward pass, without computing them.

    A second model is built on PyTorch's meta device, where tensors have shapes and no content.
    """
    config = replace(config, training=replace(config.training, compile=False))
    shapes = {name: x.to("meta") if isinstance(x, Tensor) and name != "key" else x for name, x in batch.items()}
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            module = DiffusionTraining(config) if config.stage == "diffusion" else FirstStageTraining(config)
            if isinstance(module, DiffusionTraining):
                module.add_lora(config.seed)
        module.to("meta")  # the schedule, which is always made on the CPU
        return measure_flops(module, lambda: module.losses(shapes)[0].mean(), lambda loss: loss)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, as the curves name it."""
    if name == "learnable_vector":
        return "null_token"
    parts = {"model.": "unet", "first_stage_model.": "first_stage", "discriminator.": "discriminator"}
    parts |= dict.fromkeys((TOWER, TEXT_MODULE), "tower")
    return next((part for prefix, part in parts.items() if name.startswith(prefix)), "mapper")


class ImageGrid(Callback):
    """Writes a grid of validation samples at intervals, as PNG and to the loggers that take images.

    Rows: scene, masked scene, exemplar, sample (diffusion) or scene, reconstruction (first stage). With EMA they show
    the averaged weights.
    """

    def __init__(self, options: LoggingConfig, directory: Path, ema: EMA | None) -> None:
        self.options, self.directory, self.ema = options, directory, ema
        self._last_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.options.image_every
        if every == 0 or step == 0 or step % every != 0 or step == self._last_step:
            return
        self._last_step = step
        # All processes take part: a sharded model needs them, and the others would wait anyway.
        rows = self._rows(trainer, pl_module)
        if trainer.is_global_zero:
            size = max(row.shape[-1] for row in rows)
            rows = [torch.nn.functional.interpolate(row.float().cpu(), size=(size, size)) for row in rows]
            grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
            self._write(trainer, grid, step)

    @torch.no_grad()
    def _rows(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[Tensor]:
        assert isinstance(module, DiffusionTraining | FirstStageTraining)
        samples = trainer.datamodule.val_set.first(self.options.num_images)  # type: ignore[attr-defined]
        batch = module.transfer_batch_to_device(default_collate(samples), module.device, 0)
        if self.ema is not None:
            self.ema.swap_in(module)
        module.eval()
        rows = module.preview(batch, self.options)
        module.train()
        if self.ema is not None:
            self.ema.swap_out(module)
        return rows

    def _write(self, trainer: pl.Trainer, grid: Tensor, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        image = tensor_to_pil(grid)
        image.save(self.directory / f"step{step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("grid", (grid + 1.0) / 2.0, step)
            elif isinstance(logger, WandbLogger):
                logger.log_image("grid", [image], step=step)


def run_callbacks(config: Config, run_dir: Path) -> list[Callback]:
    """Make the callbacks of a run, in the order in which they act: average, images, speed, then saving."""
    directory, options = run_dir / "checkpoints", config.logging
    stage = config.training if config.stage == "diffusion" else config.first_stage_training
    ema = None
    if stage.ema_decay > 0:
        ema = (fsdp.ShardedEMA if config.trainer.get("strategy") == "fsdp2" else EMA)(stage.ema_decay)
    bar: list[Callback] = [RichProgressBar()] if config.trainer.get("enable_progress_bar", True) else []
    return [
        *bar,
        *([ema] if ema is not None else []),
        Monitor(config),
        ImageGrid(options, run_dir / "images", ema),
        Checkpoints(directory, every=options.checkpoint_every, keep=options.keep_last),
        ModelCheckpoint(
            directory,
            filename="best",
            monitor="val/loss",
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # only when there is a fresh val/loss
        ),
    ]
