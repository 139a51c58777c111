"""What a run does besides stepping: averages, checkpoints, pictures, speed, signals."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, WeightAveraging
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from torch import Tensor

from ldm.checkpoint.io import CheckpointError
from ldm.config import Config, LoggingConfig
from ldm.data.transforms import exemplar_to_pixels, tensor_to_pil
from ldm.files import replacing
from ldm.training import DiffusionTraining, FirstStageTraining, NonFiniteLoss


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
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)

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


class EMA(WeightAveraging):
    """Exponential moving average of the weights, shorter-sighted at the start: min(decay, (1 + n) / (10 + n)).

    Checkpoints hold the average as `state_dict` and the trained weights beside it.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
            n = float(num_averaged)
            weight = 1.0 - min(decay, (1.0 + n) / (10.0 + n))
            torch._foreach_lerp_(averaged, current, weight)  # pyright: ignore[reportPrivateImportUsage]

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The module keeps the trained weights: what is saved must go on holding both."""


class Checkpoints(Callback):
    """Saves the run: `last.ckpt` and `stepNNNNNNN.ckpt` at intervals, `last.ckpt` at the end and on a signal.

    SIGTERM, SIGUSR1 and Ctrl-C let the step finish (validation is broken off), save and raise Interrupted.
    Saving is always at the end of an optimizer step, never between accumulated batches, so that nothing is lost.

    Args:
        directory: where the files go.
        every: steps between periodic checkpoints; 0 leaves only the last.
        keep: newest periodic files that stay.
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
        """The signal that any process received, or 0: all must agree, or one would save while another steps."""
        number = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    @staticmethod
    def _finishing(trainer: pl.Trainer) -> bool:
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch) or trainer.should_stop

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, *, periodic: bool) -> None:
        if not all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad):
            raise NonFiniteLoss(
                f"weights are NaN or infinite after step {trainer.global_step}: training stopped and the last good "
                "checkpoint kept. Resume from it with a lower learning rate or gradient clipping "
                "(trainer.gradient_clip_val=1.0)"
            )
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
    """A second name for a file that is only ever replaced, never written to; a copy where links are not possible."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


class MetricsFile(CSVLogger):
    """`metrics.csv`, appended to by a resumed run."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment  # pyright: ignore[reportReturnType]


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Lightning's deletes the file that an earlier part of the run wrote; here its columns are taken over."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with open(path, newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class SpeedMonitor(Callback):
    """Logs samples per second over all ranks, gradient norm and peak memory."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._samples = time.perf_counter(), 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._samples = time.perf_counter(), 0  # validation does not count

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch["key"]) * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            now = time.perf_counter()
            pl_module.log("train/samples_per_s", self._samples / (now - self._start), prog_bar=True)
            self._start, self._samples = now, 0
            if torch.cuda.is_available():
                pl_module.log("train/memory_gib", torch.cuda.max_memory_allocated() / 2**30)


class ImageGrid(Callback):
    """Writes a picture of validation samples at intervals, to TensorBoard and as PNG.

    Rows: scene, masked scene, exemplar, sample (diffusion) or scene, reconstruction (first stage). Weights are the
    ones being trained, or their average where EMA is on and validation has swapped it in.
    """

    def __init__(self, options: LoggingConfig, directory: Path) -> None:
        self.options, self.directory = options, directory
        self._last_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.options.image_every
        due = every > 0 and step > 0 and step % every == 0 and step != self._last_step
        if not (due and trainer.is_global_zero):
            return
        self._last_step = step
        data = trainer.datamodule.val_set  # type: ignore[attr-defined]
        samples = [data[i] for i in range(min(self.options.num_images, len(data)))]
        device = pl_module.device
        stacked = {name: torch.stack([s[name] for s in samples]).to(device) for name in samples[0]}
        pl_module.eval()
        with torch.no_grad():
            rows = self.rows(pl_module, stacked)
        pl_module.train()
        size = max(row.shape[-1] for row in rows)
        rows = [torch.nn.functional.interpolate(row.float().cpu(), size=(size, size)) for row in rows]
        grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
        self._write(trainer, grid, step)

    def rows(self, module: pl.LightningModule, batch: dict[str, Tensor]) -> list[Tensor]:
        """Pictures (N, 3, S, S) in [-1, 1], one tensor per row of the grid."""
        if isinstance(module, FirstStageTraining):
            return [
                batch["image"],
                module.first_stage_model.decode(module.first_stage_model.encode(batch["image"]).mode()),
            ]
        assert isinstance(module, DiffusionTraining)
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        z_0, z_masked = module.latents(batch, generators)
        sample = module.sample(
            z_masked,
            batch["keep_mask"],
            module.encode_exemplar(batch["exemplar"]),
            num_steps=self.options.sampler_steps,
            guidance_scale=self.options.guidance_scale,
            generator=generators,
        )
        pictures = [module.decode_latents(z) for z in (z_0, z_masked, sample)]
        return [*pictures[:2], exemplar_to_pixels(batch["exemplar"]), pictures[2]]

    def _write(self, trainer: pl.Trainer, grid: Tensor, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        tensor_to_pil(grid).save(self.directory / f"step{step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("grid", (grid + 1.0) / 2.0, step)


def run_callbacks(config: Config, run_dir: Path) -> list[Callback]:
    """The callbacks of a run, in the order in which they act: average, pictures, speed, then saving."""
    directory, options = run_dir / "checkpoints", config.logging
    stage = config.training if config.stage == "diffusion" else config.first_stage_training
    average: list[Callback] = [EMA(stage.ema_decay)] if stage.ema_decay > 0 else []
    return [
        *average,
        SpeedMonitor(),
        ImageGrid(options, run_dir / "images"),
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
