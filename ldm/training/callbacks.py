"""What a run does besides stepping: checkpoints, curves, speed, image grids, signals."""

import csv
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from einops import rearrange
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.throughput import measure_flops
from pytorch_lightning import LightningModule as Module
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from ldm.checkpoint.io import CheckpointError, atomic_target
from ldm.checkpoint.keys import TEXT_MODULE, TOWER
from ldm.config import Config, LoggingConfig
from ldm.files import atomic_write
from ldm.images import tensor_to_pil
from ldm.training import fsdp
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.ema import EMA, FurtherEMA, trained_parameters
from ldm.training.fid import SampleDistance
from ldm.training.first_stage_module import FirstStageTraining
from ldm.training.module import NonFiniteError, logs_step
from ldm.training.pixel_module import ClassifierTraining, PixelTraining

MODULES = {  # by stage and kind of model
    ("diffusion", "latent"): DiffusionTraining,
    ("diffusion", "pixel"): PixelTraining,
    ("first_stage", "latent"): FirstStageTraining,
    ("classifier", "classifier"): ClassifierTraining,
}
SHOWN = {"train/loss": "loss {:.3g}", "train/samples_per_s": "{:.3g}/s"}  # in the line of progress
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PARTS = {  # prefixes of parameter names => the part of the model, as the curves name it; others: mapper
    "learnable_vector": "null_token",
    "model.": "unet",
    "first_stage_model.": "first_stage",
    "discriminator.": "discriminator",
    TOWER: "tower",
    TEXT_MODULE: "tower",
}


class Interrupted(Exception):
    """A signal of this number ended the run; `saved` is the file to continue from, None before the first step."""

    def __init__(self, number: int, saved: Path | None) -> None:
        super().__init__(f"{signal.Signals(number).name} received")
        self.number, self.saved = number, saved


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it; reads one without running what is in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        then = f"continue with --resume {Path(path).parents[1]}"
        with atomic_target(path, then) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # damaged files raise nearly anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path}: not a checkpoint to resume from: {reason}") from error
        if any(part not in checkpoint for part in ("optimizer_states", "loops", "pytorch-lightning_version")):
            raise CheckpointError(f"{path}: holds no training state; start a new run from it with --pretrained-model")
        return checkpoint


class Checkpoints(Callback):
    """Saves the run: `last.ckpt` and `stepNNNNNNN.ckpt` at intervals, `last.ckpt` at the end and on a signal.

    SIGTERM, SIGUSR1 and Ctrl-C let the step finish (validation: the batch), save and raise Interrupted. Saving is
    always at the end of an optimizer step, never between accumulated batches: nothing is lost. Weights that are NaN or
    infinite are never saved.
    """

    def __init__(self, options: LoggingConfig, directory: Path) -> None:
        self.options, self.directory, self.last = options, directory, directory / "last.ckpt"
        self.received = 0  # number of the signal
        self._saved_step = -1
        self._previous: dict[int, Any] = {}  # signal handlers

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.received = number

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._previous = self._previous or {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.on_sanity_check_start(trainer, pl_module)
        # Lightning would wait for the GPU in every step to hear of a SIGTERM that `_agreed` hears of
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        epochs = trainer.fit_loop.epoch_progress.total
        if trainer.fit_loop.restarted_mid_epoch and epochs.completed == epochs.ready:
            # Resumed behind the last step of an epoch: Lightning completes that epoch and would not count the next.
            trainer.fit_loop.reset_restart_stage()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Count the epoch's batches in the size that they have now; before, they may have been larger or smaller."""
        progress, data = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        whole, before = data.batches()
        progress["is_last_batch"] = data.samples == 0  # checkpoints are written behind a batch
        shift = (before if data.samples else whole) - progress["current"]["ready"]
        progress["current"] = {name: count + shift for name, count in progress["current"].items()}

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not stepped or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        every = self.options.checkpoint_every
        periodic = every > 0 and trainer.global_step % every == 0
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        ends = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch) or trainer.should_stop
        due = trainer.global_step % max(1, trainer.log_every_n_steps) == 0  # pyright: ignore[reportAttributeAccessIssue]
        # to agree, processes wait for their GPUs
        number = self._agreed(trainer) if due or periodic or ends or trainer.world_size == 1 else 0
        if periodic or number or ends:
            self._save(trainer, pl_module, periodic=periodic)
        if number:
            raise Interrupted(number, self.last)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._agreed(trainer):
            raise StopIteration  # ends the validation in good order; averaged weights are swapped back

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking and trainer.callback_metrics.get("val/loss", torch.zeros(())).isnan():
            raise NonFiniteError(f"val/loss is NaN after step {trainer.global_step}")  # before `best.ckpt` is saved
        if number := self._agreed(trainer):
            if trainer.global_step > 0 and not trainer.sanity_checking:
                self._save(trainer, pl_module, periodic=False)
            raise Interrupted(number, self.last if self.last.is_file() else None)

    def _agreed(self, trainer: Trainer) -> int:
        """Return the signal that any process received, or 0: all must agree, or one would save while another steps."""
        if trainer.world_size == 1:
            return self.received
        number = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _save(self, trainer: Trainer, module: Module, *, periodic: bool) -> None:
        norm = fsdp.total_norm(p.detach() for _, p in trained_parameters(module))  # finite if every weight is
        if not trainer.strategy.reduce_boolean_decision(bool(norm.isfinite())):
            raise NonFiniteError(f"weights are NaN or infinite after step {trainer.global_step}")
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(self.last, weights_only=False)
            self._saved_step = trainer.global_step
        if periodic and trainer.is_global_zero:
            with atomic_write(self.directory / f"step{trainer.global_step:07d}.ckpt", sync=False) as second_name:
                second_name.unlink()
                try:
                    os.link(self.last, second_name)  # safe: `last.ckpt` is only ever replaced
                except OSError:
                    shutil.copyfile(self.last, second_name)
            old = sorted(self.directory.glob("step*.ckpt"), key=lambda path: path.stat().st_mtime)
            for path in old[: -self.options.keep_last or None]:
                path.unlink()


class MetricsFile(Logger):
    """Writes `metrics.csv` in the folder of a run, a row per call; a resumed run appends to it."""

    name = version = ""  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]: one file, no folders

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self._columns: list[str] = []

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row, rows = {"step": step, **metrics}, []
        if not row.keys() <= set(self._columns):  # new columns: the whole file is written anew
            if self.path.is_file():
                with open(self.path, newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self._columns = list(dict.fromkeys([*(rows[0] if rows else self._columns), *row]))
            with atomic_write(self.path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run directory holds `config.yaml`."""


class Monitor(Callback):
    """Logs the module's curves, speed, what a run waits for, and norms; see `docs/training.md`."""

    def __init__(self, config: Config) -> None:
        self.config, self._flops_per_batch = config, 0
        self._begin()

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self._batch_end = time.perf_counter()
        self._samples, self._batches, self._waited, self._lr = 0, 0, 0.0, None  # lr: of a step that is to be logged

    on_train_start = on_validation_end = _begin  # validation does not count

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._batch_end
        if not self._flops_per_batch:
            self._flops_per_batch = batch_flops(self.config, batch)
            self._begin()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if logs_step(trainer, trainer.global_step + 1):
            gradients: dict[str, list[Tensor]] = defaultdict(list)
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "mapper")
                    gradients[part].append(parameter.grad)
            norms = {f"grad_norm_{part}": fsdp.total_norm(tensors) for part, tensors in gradients.items()}
            norms["grad_norm"] = fsdp.total_norm(norms.values())
            norms["param_norm"] = fsdp.total_norm(p.detach() for _, p in trained_parameters(pl_module))
            for name, norm in norms.items():
                pl_module.record(f"train/{name}", norm)
            self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._samples += len(batch["key"]) * trainer.world_size
        self._batches += 1
        self._batch_end = time.perf_counter()
        if self._lr is not None:
            curves: dict[str, float] = pl_module.read_curves()  # waits for the GPU: before the time is taken
            pl_module.check_finite(curves["train/loss"], batch_idx)
            seconds = time.perf_counter() - self._start
            curves["train/lr"] = self._lr
            curves["train/samples_per_s"] = self._samples / seconds
            curves["train/step_s"] = seconds / self._batches * trainer.accumulate_grad_batches
            curves["train/data_wait"] = self._waited / seconds
            curves["train/tflops"] = self._flops_per_batch * self._batches / seconds / 1e12
            if torch.cuda.is_available():
                curves["train/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            # not by `log`, which copies every value to the GPU, and reads those of the progress bar in every step
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **curves}, trainer.global_step - 1)
            trainer.progress_bar_metrics.update({name: curves[name] for name in SHOWN if name in curves})
            self._begin()


def batch_flops(config: Config, batch: dict[str, Any]) -> int:
    """Count the floating-point operations of a step's forward and backward pass on the meta device, without them."""
    config = replace(config, training=replace(config.training, compile=False))
    shapes = {name: x.to("meta") if isinstance(x, Tensor) and name != "key" else x for name, x in batch.items()}
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            module = MODULES[config.stage, config.model.kind](config)
            module.add_lora(config.seed)
        module.to("meta")  # the schedule, which is always made on the CPU
        return measure_flops(module, lambda: module.losses(shapes)[0].mean(), lambda loss: loss)


class Progress(Callback):
    """Shows steps, samples, time left, loss and speed.

    A terminal has one line, redrawn as steps pass; elsewhere, as in a log file, each logged step writes one.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.terminal, self.bar = batch_size, sys.stderr.isatty(), tqdm(disable=True)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        steps = trainer.estimated_stepping_batches
        self.bar = tqdm(
            total=None if math.isinf(steps) else int(steps),
            initial=trainer.global_step,
            bar_format="step {n_fmt}/{total_fmt}%s {remaining} left{postfix}" % (" |{bar}|" if self.terminal else ","),
            dynamic_ncols=True,
            mininterval=0,  # or a validation may hide that the step before it was taken
            delay=0 if self.terminal else math.inf,  # never drawn, but it keeps the time
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.bar.n:
            return  # gradients are accumulated
        samples = (trainer.fit_loop.total_batch_idx + 1) * self.batch_size * trainer.world_size
        metrics = trainer.progress_bar_metrics
        figures = (form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)
        self.bar.set_postfix_str(", ".join([f"{samples:,} samples", *figures]), refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)
        if logs_step(trainer, trainer.global_step) and not self.terminal:
            self._say(str(self.bar))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.terminal:
            self.bar.set_postfix_str(f"validation {args[3] + 1}/{trainer.num_val_batches[0]}")

    def on_validation_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if (loss := trainer.callback_metrics.get("val/loss")) is not None:
            self._say(f"step {trainer.global_step}: val/loss {loss:.4g}")

    def _say(self, line: str) -> None:
        if not self.bar.disable:
            self.bar.write(line) if self.terminal else print(line, flush=True)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.bar.close()

    on_exception = teardown


class ImageGrid(Callback):
    """Writes the module's `preview` of validation samples at intervals, by averaged weights, as PNG and to loggers."""

    def __init__(self, options: LoggingConfig, directory: Path, ema: EMA) -> None:
        self.options, self.directory, self.ema = options, directory, ema
        self._last_step = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        step, every = trainer.global_step, self.options.image_every
        if every == 0 or step % every != 0 or step == self._last_step:
            return
        self._last_step = step
        samples = trainer.datamodule.first_val_samples(self.options.num_images)  # type: ignore[attr-defined]
        batch = pl_module.transfer_batch_to_device(default_collate(samples), pl_module.device, 0)
        self.ema.on_validation_epoch_start(trainer, pl_module)
        pl_module.eval()
        rows = pl_module.preview(batch, self.options)  # in all processes: a sharded model needs them
        pl_module.train()
        self.ema.on_validation_epoch_end(trainer, pl_module)
        if trainer.is_global_zero:
            size = max(row.shape[-1] for row in rows)
            rows = [torch.nn.functional.interpolate(row.float().cpu(), size=(size, size)) for row in rows]
            grid = rearrange(rows, "row column c h w -> c (row h) (column w)").clamp(-1, 1)
            image = tensor_to_pil(grid)
            self.directory.mkdir(parents=True, exist_ok=True)
            image.save(self.directory / f"step{step:07d}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image("grid", (grid + 1.0) / 2.0, step)
                elif isinstance(logger, WandbLogger):
                    logger.log_image("grid", [image], step=step)


def run_callbacks(config: Config, run_dir: Path) -> list[Callback]:
    """Make the callbacks of a run, in the order in which they act: average, speed, images, then saving."""
    directory = run_dir / "checkpoints"
    stage = config.first_stage_training if config.stage == "first_stage" else config.training
    ema = EMA(stage.ema_decay)
    return [
        *([ema] if ema.decay > 0 else []),
        *(FurtherEMA(decay) for decay in (config.training.more_ema_decays if config.stage != "first_stage" else [])),
        Monitor(config),
        *([Progress(config.data.batch_size)] if config.trainer.get("enable_progress_bar", True) else []),
        ImageGrid(config.logging, run_dir / "images", ema),
        *([SampleDistance(config, ema)] if config.logging.fid_every else []),
        Checkpoints(config.logging, directory),
        # only when there is a fresh val/loss
        ModelCheckpoint(directory, "best", "val/loss", enable_version_counter=False, save_on_train_epoch_end=False),
    ]
