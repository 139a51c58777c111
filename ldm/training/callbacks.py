"""What a run does besides stepping: averages, checkpoints, pictures, speed, signals."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate
from torch.utils.flop_counter import flop_registry

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import TEXT_MODULE, TOWER
from ldm.config import Config, LoggingConfig
from ldm.files import atomic_write
from ldm.images import tensor_to_pil
from ldm.training.diffusion_module import DiffusionTraining, FirstStageTraining, NonFiniteLoss
from ldm.training.fsdp import ShardedStrategy, copy_whole, local_part, whole


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


class EMA(Callback):
    """Exponential moving average of the trained weights, shorter-sighted at the start: min(decay, (1 + n) / (10 + n)).

    Validation sees the average. Checkpoints hold it in `state_dict`, the trained weights beside it. Lightning's own
    averages a copy of the whole module, frozen parts included, and cannot have it sharded.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}  # of a checkpoint, whole
        self._count = 0  # of updates
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in _trained(pl_module):
            self._average[name] = parameter.detach().clone()
            if name in self._loaded:
                copy_whole(self._loaded[name], self._average[name])
        self._loaded = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self._step:
            return  # between accumulated batches
        weight = 1.0 - min(self.decay, (1.0 + self._count) / (10.0 + self._count)) if self._count else 1.0
        pairs = [(local_part(self._average[name]), local_part(p.detach())) for name, p in _trained(pl_module)]
        average, current = zip(*pairs, strict=True)
        torch._foreach_lerp_(average, current, weight)  # pyright: ignore[reportPrivateImportUsage]
        self._count, self._step = self._count + 1, trainer.global_step

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: pl.LightningModule) -> None:
        for name, parameter in _trained(pl_module) if self._average else ():
            a, b = local_part(parameter), local_part(self._average[name])
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["latest_update_step"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["state_dict"]  # of a sharded model: empty but in the first process
        checkpoint["current_model_state"] = {name: state[name] for name in self._average if name in state}
        for name, average in self._average.items():
            tensor = whole(average)
            if name in state:
                state[name] = tensor.cpu() if tensor is not average else tensor
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._count)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "current_model_state" in checkpoint:
            self._loaded = checkpoint["state_dict"]
            self._count = int(checkpoint["averaging_state"]["n_averaged"])
            parameters = dict(pl_module.named_parameters())
            for name, tensor in checkpoint["current_model_state"].items():
                if name in parameters:
                    copy_whole(tensor, parameters[name])


def _trained(module: pl.LightningModule) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


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
        finite = all(bool(local_part(p).isfinite().all()) for _, p in _trained(module))
        if not trainer.strategy.reduce_boolean_decision(finite):
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


class _Operations(TorchDispatchMode):
    """Counts floating-point operations by PyTorch's formulas. Its own FlopCounterMode also takes some operators apart,
    which changes roundings, and a resumed run would end with other bits."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Monitor(Callback):
    """Logs how fast a run is, what it waits for, and how large gradients and weights are.

    Per logged step: `train/samples_per_s` of all processes; `train/step_s`, seconds of an optimizer step;
    `train/data_wait`, the share of time in which the next batch was not there; `train/tflops`, 1e12 floating-point
    operations per second of this process, as PyTorch counts them in the first step; `train/lr`; `train/grad_norm` of
    everything and of each part; `train/param_norm`; `train/memory_gib`, the peak on the GPU.

    Args:
        count_flops: compiled models cannot be counted.
    """

    def __init__(self, *, count_flops: bool) -> None:
        self.count_flops = count_flops
        self._flops_per_batch = 0
        self._counter: _Operations | None = None
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
        if self.count_flops and not self._flops_per_batch:
            self._counter = _Operations()
            self._counter.__enter__()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._logs(trainer, trainer.global_step + 1):
            parts: dict[str, list[Tensor]] = defaultdict(list)
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    parts[part_of(name)].append(parameter.grad)
            norms = {name: whole(torch.nn.utils.get_total_norm(gradients)) for name, gradients in parts.items()}
            pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(list(norms.values())))
            pl_module.log_dict({f"train/grad_norm_{name}": norm for name, norm in norms.items()})
            trained = [p.detach() for _, p in _trained(pl_module)]
            pl_module.log("train/param_norm", whole(torch.nn.utils.get_total_norm(trained)))
            pl_module.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._flops_per_batch = self._counter.total
            self._stop_counting()
            self._begin()  # counting slows the step down
            return
        self._samples += len(batch["key"]) * trainer.world_size
        self._batches += 1
        self._batch_end = now = time.perf_counter()
        if trainer.global_step > self._step and self._logs(trainer, trainer.global_step):
            seconds = now - self._start
            pl_module.log("train/samples_per_s", self._samples / seconds, prog_bar=True)
            pl_module.log("train/step_s", seconds / self._batches * trainer.accumulate_grad_batches)
            pl_module.log("train/data_wait", self._waited / seconds)
            if self._flops_per_batch:
                pl_module.log("train/tflops", self._flops_per_batch * self._batches / seconds / 1e12)
            if torch.cuda.is_available():
                pl_module.log("train/memory_gib", torch.cuda.max_memory_allocated() / 2**30)
            self._begin()
            self._step = trainer.global_step

    @staticmethod
    def _logs(trainer: pl.Trainer, step: int) -> bool:
        """Whether Lightning hands this step's values to the loggers."""
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return every > 0 and step % every == 0

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, as the curves name it."""
    if name == "learnable_vector":
        return "null_token"
    parts = {"model.": "unet", "first_stage_model.": "first_stage", "discriminator.": "discriminator"}
    parts |= dict.fromkeys((TOWER, TEXT_MODULE), "tower")
    return next((part for prefix, part in parts.items() if name.startswith(prefix)), "mapper")


class ImageGrid(Callback):
    """Writes a picture of validation samples at intervals, as PNG and to the loggers that take pictures.

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
        if not due or not (trainer.is_global_zero or isinstance(trainer.strategy, ShardedStrategy)):
            return
        self._last_step = step
        samples = trainer.datamodule.val_set.first(self.options.num_images)  # type: ignore[attr-defined]
        stacked = move_data_to_device(default_collate(samples), pl_module.device)
        assert isinstance(pl_module, DiffusionTraining | FirstStageTraining)
        pl_module.eval()
        with torch.no_grad():
            rows = pl_module.preview(stacked, self.options)
        pl_module.train()
        if not trainer.is_global_zero:
            return
        size = max(row.shape[-1] for row in rows)
        rows = [torch.nn.functional.interpolate(row.float().cpu(), size=(size, size)) for row in rows]
        grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
        self._write(trainer, grid, step)

    def _write(self, trainer: pl.Trainer, grid: Tensor, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        picture = tensor_to_pil(grid)
        picture.save(self.directory / f"step{step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("grid", (grid + 1.0) / 2.0, step)
            elif isinstance(logger, WandbLogger):
                logger.log_image("grid", [picture], step=step)


def run_callbacks(config: Config, run_dir: Path) -> list[Callback]:
    """The callbacks of a run, in the order in which they act: average, pictures, speed, then saving."""
    directory, options = run_dir / "checkpoints", config.logging
    stage = config.training if config.stage == "diffusion" else config.first_stage_training
    average: list[Callback] = [EMA(stage.ema_decay)] if stage.ema_decay > 0 else []
    bar: list[Callback] = [RichProgressBar()] if config.trainer.get("enable_progress_bar", True) else []
    return [
        *bar,
        *average,
        Monitor(count_flops=not config.training.compile),
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
