"""A training run: a config becomes module, data and Lightning trainer."""

import contextlib
import datetime
import importlib.metadata
import logging
import math
import platform
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import LambdaCallback, Timer
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from ldm.checkpoint.io import read_checkpoint
from ldm.checkpoint.keys import SCHEDULE_BUFFERS, check_keys, to_module_keys
from ldm.config import Config, ConfigError, dump_config
from ldm.data.datamodule import DataModule
from ldm.files import UserError, read_json, write_json, write_text
from ldm.pixel_diffusion import named_as_here
from ldm.training.callbacks import MODULES, Interrupted, MetricsFile, SafeCheckpointIO, run_callbacks
from ldm.training.module import parts_of

PACKAGES = ("torch", "pytorch-lightning", "numpy", "pillow", "opencv-python-headless", "opencv-python", "transformers")
EXPECTED_WARNINGS = (
    ".*in eval mode at the start of training.*",  # frozen parts are
    ".*your dataloader is not resumable.*",  # the data module resumes it
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's does
    ".*does not have many workers.*",  # data.num_workers is the user's choice
    ".*callback used in the previous run.*|.*callbacks used to create the checkpoint.*",
    ".*LeafSpec.*",  # Lightning's own use of torch
    ".*overridden `transfer_batch_to_device`.*",  # the module knows which tensors stay on the CPU
    ".*smaller than the logging interval.*",  # steps are logged at that interval across epochs
)
NOISE = ("💡", "TPU available", "Loading `train_dataloader` to estimate")  # messages that say nothing of a run


class Run:
    """A training run: module, data and trainer of a config.

    Args:
        run_dir: gets `config.yaml`, `history.json`, `checkpoints/`, `images/` and the loggers' files.
        scale_lr: multiply the config's base learning rate by accumulation, processes and batch size.

    Raises:
        ConfigError: `trainer` holds something that Lightning's Trainer or this training cannot work with.
        FileNotFoundError, ValueError: the data cannot be used.
    """

    def __init__(self, config: Config, run_dir: Path, *, scale_lr: bool = False) -> None:
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for package in ("pytorch_lightning", "lightning_fabric"):
            logger = logging.getLogger(f"{package}.utilities.rank_zero")
            logger.addFilter(lambda record: not record.getMessage().startswith(NOISE))
        if torch.cuda.is_available():  # on a CPU attention's backward pass would take twice as long
            torch.set_float32_matmul_precision("high")  # TF32
        pl.seed_everything(config.seed % 2**32, workers=True, verbose=False)
        self.config, self.run_dir = config, run_dir
        self.trainer = _trainer(config, run_dir)
        _check_combinations(config, self.trainer.world_size)
        self.data = DataModule(config)
        self.global_batch = self.trainer.accumulate_grad_batches * self.trainer.world_size * config.data.batch_size
        self.module = MODULES[config.stage, config.model.kind](config)
        if scale_lr:  # in the config, so that a resumed run finds it there
            self.module.options.base_lr *= self.global_batch

    def initialise(self, checkpoint: str | None, *, from_scratch: bool, resuming: bool) -> None:
        """Load the initial weights and list the parts that stay random; see `DiffusionTraining.starting_weights`.

        Nothing is loaded or checked when resuming: the trainer will restore a whole state.
        """
        if not resuming:
            names = self.module.state_dict()
            state = named_as_here(read_checkpoint(checkpoint), self.config.model) if checkpoint else {}
            state = to_module_keys(state, expected=names)
            unused = (*SCHEDULE_BUFFERS, "discriminator.")  # the config's schedule; a random discriminator
            state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
            state, optional = self.module.starting_weights(state, checkpoint, from_scratch)
            expected = {n: x.shape for n, x in self.module.state_dict().items() if not n.startswith(unused)}
            missing = check_keys(expected, state, source=checkpoint or "", allow_missing=optional)
            self.module.load_state_dict(state, strict=False)
            if missing and self.trainer.is_global_zero:
                print(f"starting from random weights: {parts_of(missing)} ({len(missing)} tensors)")
        self.module.add_lora(self.config.seed)

    def summary(self) -> str:
        """Return as text: parameters trained and frozen, batch, learning rate and steps per epoch."""
        parts = {name: child.parameters() for name, child in self.module.named_children()}
        parts |= {"null token": self.module.parameters(recurse=False), "total": self.module.parameters()}
        lines = [f"{'part':<20}{'trained':>15}{'frozen':>15}"]
        for name, parameters in parts.items():
            counts = {True: 0, False: 0}
            for parameter in parameters:
                counts[parameter.requires_grad] += parameter.numel()
            lines += [f"{name:<20}{counts[True]:>15,}{counts[False]:>15,}"] if any(counts.values()) else []
        batches = len(self.data.train_set) // self.trainer.world_size // self.config.data.batch_size
        lines.append(f"samples: {len(self.data.train_set):,} train, {len(self.data.val_set):,} validation")
        lines.append(f"batch: {self.global_batch} samples per step, learning rate {self.module.options.base_lr:g}")
        lines.append(f"steps per epoch: {math.ceil(batches / self.trainer.accumulate_grad_batches):,}")
        return "\n".join(lines)

    def fit(self, checkpoint: Path | None) -> int:
        """Train, from `checkpoint` on if there is one; return 0, or 128 + the signal that ended the run."""
        if self.trainer.is_global_zero:
            # Once the checkpoint is restored: a config that does not fit it must not replace the run's own.
            record = LambdaCallback(on_train_start=lambda *_: self._record(checkpoint))
            self.trainer.callbacks.append(record)  # pyright: ignore[reportAttributeAccessIssue]
            print(f"run directory: {self.run_dir}\n{self.summary()}")
        try:
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint)
        except Interrupted as stop:
            if not self.trainer.is_global_zero:
                return 0  # Lightning kills the first process as soon as another one reports a failure
            print(f"run directory: {self.run_dir}")
            again = f"continue with: python main.py --resume {shlex.quote(str(self.run_dir))}"
            print(f"{stop}: saved {stop.saved}; {again}" if stop.saved else f"{stop}: nothing to save yet")
            return 128 + stop.number
        except RuntimeError as error:  # a peer that is gone: NCCL's error type or a message of Gloo's
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            ended = f"another process of this run has ended ({str(error).splitlines()[0]})"
            folder = self.trainer.checkpoint_callback.dirpath  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            run_dir = Path(folder).parent  # of the first process
            remedy = f"see its own messages, then continue with --resume {run_dir}"
            raise UserError(f"process {self.trainer.global_rank}: {ended}; {remedy}") from error
        if self.trainer.is_global_zero:
            print(self.result())
        return 0

    def result(self) -> str:
        """Return as text: where the run is, its last and best checkpoint, and the command that uses it."""
        lines, folder = [f"run directory: {self.run_dir}"], self.run_dir / "checkpoints"
        best, checkpoint = folder / "best.ckpt", folder / "last.ckpt"
        if checkpoint.is_file():
            lines.append(f"last checkpoint: {checkpoint} (step {self.trainer.global_step})")
        if best.is_file():
            loss = self.trainer.checkpoint_callback.best_model_score  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            lines.append(f"best checkpoint: {best}" + (f" (val/loss {loss:.4g})" if loss is not None else ""))
            checkpoint = best
        file = shlex.quote(str(checkpoint))
        if self.config.model.kind != "latent":
            classifies = self.config.stage == "classifier"
            following = "scripts/sample_images.py " + (f"MODEL --classifier {file}" if classifies else file)
        elif self.config.stage == "diffusion":
            reads = {"exemplar": "--reference REFERENCE", "text": "--prompt PROMPT"}
            inputs = reads.get(self.config.model.condition, " ".join(reads.values()))
            config = shlex.quote(str(self.run_dir / "config.yaml"))
            following = f"inference.py --config {config} --checkpoint {file} --image IMAGE --mask MASK {inputs}"
        elif self.config.model.first_stage.decoder == "asymmetric":
            following = f"scripts/export_checkpoint.py {file} DECODER.safetensors"
        else:
            following = f"main.py --train-from-scratch --base CONFIG --pretrained-model {file}"
        return "\n".join([*lines, f"next: python {following}"])

    def _record(self, checkpoint: Path | None) -> None:
        """Write the config (`config.yaml`), and when, how and with what this part of the run began (`history.json`)."""
        device = self.trainer.strategy.root_device
        start: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "resumed_from": checkpoint and str(checkpoint),
            "seed": self.config.seed,
            "processes": self.trainer.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": {},
        }
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                start["versions"][name] = importlib.metadata.version(name)
        history = self.run_dir / "history.json"
        write_text(self.run_dir / "config.yaml", dump_config(self.config))
        try:
            before = read_json(history, [])
        except UserError as error:
            print(f"warning: {error}; the history begins anew", file=sys.stderr)
            before = []
        write_json(history, [*before, start])


def _commit() -> str | None:
    """Return the source's git commit, with a + if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()


def _check_combinations(config: Config, processes: int) -> None:
    """Refuse settings that this training cannot work with."""
    strategy, precision = config.trainer.get("strategy", "auto"), config.trainer.get("precision")
    stage, model, options, data = config.stage, config.model, config.training, config.data.kind
    first_stage, sharded, kind = stage == "first_stage", strategy == "fsdp2", model.kind
    stages = " or ".join(stage for stage, trained in MODULES if trained == kind)
    objective, learned, fid = options.objective, model.variance == "learned_range", config.logging.fid_every
    edm, discrete = model.schedule.name == "edm", options.timesteps != "uniform" or options.min_snr_gamma > 0
    size, least = model.image_size, 1 if kind == "latent" else 2 ** (len(model.unet.channel_mult) - 1)
    # before adversarial_start the discriminator has no gradients
    unused = first_stage and config.first_stage_training.adversarial_weight > 0 and processes > 1
    for message, refused in {
        f"stage: got {stage}, expected {stages} with model.kind {kind}": stage not in stages,
        f"data.kind: got {data}, expected images with pixel and classifier as model.kind, another with latent": (
            (data == "images") == (kind == "latent") and not first_stage
        ),
        f"model.image_size: got {size}, expected a multiple of {least} for model.unet.channel_mult": size % least,
        f"training.objective: got {objective}, expected another one: model.variance is {model.variance}": (
            kind == "pixel" and objective == ("simple" if learned else "hybrid")
        ),
        "model.schedule.name: got edm, expected another one for its loss or for weighted timesteps": (
            kind == "pixel" and edm and (discrete or objective != "simple")
        ),
        f"training.timesteps: got loss_aware, expected another one with model.last_level {model.last_level:g}": (
            options.timesteps == "loss_aware" and model.last_level > 0
        ),
        f"logging.fid_every: got {fid}, expected 0 with model.kind {kind}": fid and kind != "pixel",
        # weights in 16 bits lose the optimizer's small updates
        f"trainer.precision: got {precision}, expected 32-true, bf16-mixed or 16-mixed": (
            precision in ("bf16-true", "16-true")
        ),
        f"training.optimizer: got adamw_fused, expected adamw to clip gradients in {precision}": (
            options.optimizer == "adamw_fused" and "mixed" in str(precision) and config.trainer.get("gradient_clip_val")
        ),
        f"trainer.strategy: got {strategy}, expected auto or ddp: the first stage is not sharded": (
            first_stage and sharded
        ),
        "training.compile: got true, expected false with trainer.strategy fsdp2": options.compile and sharded,
        f"trainer.strategy: got {strategy}, expected ddp_find_unused_parameters_true": (
            unused and strategy in ("auto", "ddp")
        ),
    }.items():
        if refused:
            raise ConfigError(message)


def _trainer(config: Config, run_dir: Path) -> pl.Trainer:
    options: dict[str, Any] = {"enable_model_summary": False, "default_root_dir": run_dir, **config.trainer}
    options["enable_progress_bar"] = False  # `Progress` takes its place
    try:
        trainer = pl.Trainer(
            **options,
            callbacks=run_callbacks(config, run_dir),
            logger=[_logger(name, config, run_dir) for name in config.logging.loggers],
            plugins=[SafeCheckpointIO()],
            use_distributed_sampler=False,  # the data module splits by rank itself
        )
        # `trainer.max_time` first: the step that it ends with is then saved.
        trainer.callbacks.sort(key=lambda c: not isinstance(c, Timer))  # pyright: ignore[reportAttributeAccessIssue]
        return trainer
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def _logger(name: str, config: Config, run_dir: Path) -> Logger:
    if name == "tensorboard":
        return TensorBoardLogger(run_dir, name="", version="")
    if name == "csv":
        return MetricsFile(run_dir)
    values, project = OmegaConf.to_container(OmegaConf.structured(config)), config.logging.wandb_project
    run_id = run_dir.name  # the same in a resumed run, whose curves go on
    try:
        return WandbLogger(run_id, run_dir, id=run_id, resume="allow", project=project, config=values)
    except ModuleNotFoundError:
        raise ConfigError("logging.loggers: got wandb, which is not installed; pip install wandb") from None
