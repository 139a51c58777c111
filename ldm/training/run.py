"""A training run: a config becomes module, data and Lightning trainer."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import inspect
import json
import logging
import math
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ldm.checkpoint.convert import autoencoder_keys
from ldm.checkpoint.io import CheckpointError, read_checkpoint
from ldm.checkpoint.keys import CONDITION_ENCODER, FIRST_STAGE, NEW_PARTS, SCHEDULE_BUFFERS, check_keys, to_module_keys
from ldm.config import Config, ConfigError, dump_config
from ldm.data.datamodule import DataModule
from ldm.files import UserError, write_text
from ldm.latent_diffusion import add_imagenet_tower
from ldm.training.callbacks import Interrupted, MetricsFile, SafeCheckpointIO, run_callbacks
from ldm.training.diffusion_module import DiffusionTraining, uninitialised
from ldm.training.ema import trained_parameters
from ldm.training.first_stage_module import FirstStageTraining

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


class Run:
    """A training run: module, data and trainer of a config.

    Args:
        config: what to train, on what, how.
        run_dir: gets `config.yaml`, `history.json`, `checkpoints/`, `images/` and the loggers' files.
        scale_lr: multiply the config's base learning rate by accumulation, processes and batch size.

    Raises:
        ConfigError: `trainer` holds something that Lightning's Trainer or this training cannot work with.
        FileNotFoundError, ValueError: the data cannot be used.
    """

    def __init__(self, config: Config, run_dir: Path, *, scale_lr: bool = False) -> None:
        _silence_expected_warnings()
        pl.seed_everything(config.seed, workers=True, verbose=False)
        self.config, self.run_dir = config, run_dir
        self.data = DataModule(config)
        self.trainer = _trainer(config, run_dir)
        _check_combinations(config, self.trainer.world_size)
        self.global_batch = self.trainer.accumulate_grad_batches * self.trainer.world_size * config.data.batch_size
        diffusion = config.stage == "diffusion"
        self.options = config.training if diffusion else config.first_stage_training
        if scale_lr:  # into the config, so that a resumed run finds it there
            self.options.base_lr *= self.global_batch
        self.module = DiffusionTraining(config) if diffusion else FirstStageTraining(config)

    def initialise(self, checkpoint: str | None, *, from_scratch: bool, resuming: bool) -> None:
        """Load the initial weights and list those that stay random.

        Args:
            checkpoint: file in the published layout; it may lack the parts that Paint by Example adds.
            from_scratch: whether every trained part may start from random weights.
            resuming: the trainer will restore a whole state; nothing to load or check.

        Raises:
            CheckpointError: the file does not fit, or a frozen part would stay random.
            UserError: the model reads captions, and there is no tokenizer.
        """
        if not resuming:
            state = to_module_keys(read_checkpoint(checkpoint)) if checkpoint else {}
            if isinstance(self.module, DiffusionTraining):
                state, optional = self._diffusion_state(self.module, state, checkpoint, from_scratch)
                self._find_tokenizer(self.module, checkpoint)
            else:
                state, optional = self._first_stage_state(self.module, state, checkpoint)
            if checkpoint or isinstance(self.module, DiffusionTraining):
                self._load(state, optional, checkpoint or "")
        if isinstance(self.module, DiffusionTraining):
            self.module.add_lora(self.config.seed)

    def _diffusion_state(
        self, module: DiffusionTraining, state: dict[str, Tensor], checkpoint: str | None, from_scratch: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors to load, and the names that may be missing among them."""
        options = self.config.training
        unused = (*SCHEDULE_BUFFERS, "discriminator.")  # the config has its own schedule
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
        if module.reads_exemplars:
            state = add_imagenet_tower(state, module.cond_stage_model)
        if not options.use_prior:
            trained = {name for name, _ in trained_parameters(module)}
            state = {name: tensor for name, tensor in state.items() if name not in trained}
        if options.fresh_conditioning:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(NEW_PARTS)}
        acceptable, refused = uninitialised(module, set(state), from_scratch=from_scratch or not options.use_prior)
        if options.lora_rank:  # trains none of them
            acceptable, refused = [], [*acceptable, *refused]
        if refused:
            raise CheckpointError(
                f"{checkpoint or 'no checkpoint given'}: {len(refused)} tensors would stay random: {_parts(refused)}. "
                "Frozen parts need trained weights: prepare one complete file with scripts/modify_checkpoints.py "
                "and pass it as --pretrained-model; --train-from-scratch allows trained parts to start from nothing"
            )
        return state, acceptable

    def _find_tokenizer(self, module: DiffusionTraining, checkpoint: str | None) -> None:
        """Check that captions can be read, and note the tokenizer in the config for those who use the run's model."""
        if module.reads_text:
            folder = module.text_encoder.find_tokenizer(Path(checkpoint or "").parent)
            module.text_encoder.tokenize([""])
            self.config.model.text_encoder.tokenizer = str(folder.resolve())

    def _first_stage_state(
        self, module: FirstStageTraining, state: dict[str, Tensor], checkpoint: str | None
    ) -> tuple[dict[str, Tensor], list[str]]:
        """As `_diffusion_state`; without a checkpoint the autoencoder starts from random weights."""
        if checkpoint is None:
            if module.frozen_encoder:
                raise CheckpointError(
                    "no checkpoint given: an asymmetric decoder is trained for an existing encoder; pass the encoder's "
                    "model as --pretrained-model"
                )
            return {}, []
        state = {FIRST_STAGE + name: tensor for name, tensor in autoencoder_keys(state).items()}
        if not module.frozen_encoder:
            return state, []
        decoder, branch = FIRST_STAGE + "decoder.", FIRST_STAGE + CONDITION_ENCODER
        shapes = {name: x.shape for name, x in module.state_dict().items() if name.startswith(decoder)}
        plain = [name for name in shapes if not name.startswith(branch)]
        if all(name in state and state[name].shape == shapes[name] for name in plain):
            return state, [branch]
        # a wider or deeper decoder starts from nothing, as the authors' do
        return {name: tensor for name, tensor in state.items() if not name.startswith(decoder)}, [decoder]

    def _load(self, state: dict[str, Tensor], optional: list[str], source: str) -> None:
        prefix = "" if isinstance(self.module, DiffusionTraining) else FIRST_STAGE  # the discriminator starts at random
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in self.module.state_dict().items()
            if name.startswith(prefix) and name not in SCHEDULE_BUFFERS
        }
        missing = check_keys(expected, state, source=source, allow_missing=optional)
        self.module.load_state_dict(state, strict=False)
        if missing and self.trainer.is_global_zero:
            Console().print(f"starting from random weights: {_parts(missing)} ({len(missing)} tensors)")

    def summary(self) -> str:
        """Return as text: parameters trained and frozen, batch, learning rate and steps per epoch."""
        parts = {name: list(child.parameters()) for name, child in self.module.named_children()}
        parts["null token"] = list(self.module.parameters(recurse=False))
        parts["total"] = list(self.module.parameters())
        table = Table("part", "trained", "frozen")
        for name, parameters in parts.items():
            counts = [sum(p.numel() for p in parameters if p.requires_grad is trained) for trained in (True, False)]
            if any(counts):
                table.add_row(name, *(f"{count:,}" for count in counts))
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        per_rank = len(self.data.train_set) // self.trainer.world_size // self.config.data.batch_size
        return (
            f"{capture.get()}samples: {len(self.data.train_set):,} train, {len(self.data.val_set):,} validation\n"
            f"batch: {self.global_batch} samples per step, learning rate {self.options.base_lr:g}\n"
            f"steps per epoch: {math.ceil(per_rank / self.trainer.accumulate_grad_batches):,}"
        )

    def fit(self, checkpoint: Path | None) -> int:
        """Train, continuing from `checkpoint` if one is given.

        Returns:
            The exit status: 0, or 128 + the number of the signal that ended the run.

        Raises:
            UserError: another process of the run has ended.
        """
        leader = self.trainer.is_global_zero
        if leader:
            self._record(checkpoint)
            print(f"run directory: {self.run_dir}\n{self.summary()}")
        try:
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint)
        except Interrupted as stop:
            if not leader:
                return 0  # Lightning kills the first process as soon as another one reports a failure
            remedy = (
                f"saved {stop.saved}; continue with --resume {self.run_dir}" if stop.saved else "nothing to save yet"
            )
            print(f"{stop}: {remedy}")
            return 128 + stop.number
        except RuntimeError as error:
            # A peer that is gone shows as NCCL's error type or as a message of Gloo's.
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            rank, reason = self.trainer.global_rank, str(error).splitlines()[0]
            raise UserError(
                f"process {rank} of {self.trainer.world_size}: another process of this run has ended ({reason}); "
                f"see its own messages, then continue with --resume {self.run_dir}"
            ) from error
        return 0

    def _record(self, checkpoint: Path | None) -> None:
        """Write the run's config (`config.yaml`) and add this start to its history (`history.json`)."""
        try:
            write_text(self.run_dir / "config.yaml", dump_config(self.config))
            history = self.run_dir / "history.json"
            before = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else []
            write_text(history, json.dumps([*before, self._circumstances(checkpoint)], indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{self.run_dir}: cannot write here ({error.strerror}); choose another --logdir"
            ) from error

    def _circumstances(self, checkpoint: Path | None) -> dict[str, Any]:
        """Describe when, how and with which versions this part of the run was started."""
        device = self.trainer.strategy.root_device
        versions = {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "resumed_from": checkpoint and str(checkpoint),
            "seed": self.config.seed,
            "processes": self.trainer.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": versions,
        }


def _parts(names: Iterable[str]) -> str:
    """List the parts of the model, such as `model.diffusion_model`, that tensors belong to."""
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))


def _commit() -> str | None:
    """Return the source's git commit, with a + if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--abbrev=40", "--dirty=+"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _check_combinations(config: Config, processes: int) -> None:
    """Refuse settings of the trainer that this training cannot work with."""
    strategy, precision = config.trainer.get("strategy", "auto"), str(config.trainer.get("precision", "32-true"))
    first_stage, sharded = config.stage == "first_stage", strategy == "fsdp2"
    adversarial = first_stage and config.first_stage_training.adversarial_weight > 0
    refusals = {
        f"trainer.precision: got {precision}, expected 32-true, bf16-mixed or 16-mixed: weights in 16 bits lose the "
        "optimizer's small updates": precision in ("bf16-true", "16-true"),
        "trainer.strategy: got fsdp2, expected auto or ddp: the first stage is not sharded": first_stage and sharded,
        "training.compile: got true with trainer.strategy fsdp2, expected false": config.training.compile and sharded,
        f"trainer.strategy: got {strategy}, expected ddp_find_unused_parameters_true: before adversarial_start the "
        "discriminator has no gradients": adversarial and processes > 1 and strategy in ("auto", "ddp"),
    }
    for message, refused in refusals.items():
        if refused:
            raise ConfigError(message)


def _trainer(config: Config, run_dir: Path) -> pl.Trainer:
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self", "callbacks", "logger", "plugins"}
    if unknown := set(config.trainer) - known:
        raise ConfigError(
            f"trainer.{', trainer.'.join(sorted(unknown))}: unknown; Lightning's Trainer takes {sorted(known)}"
        )
    try:
        return pl.Trainer(
            **{"enable_model_summary": False, "default_root_dir": run_dir, **config.trainer},
            callbacks=run_callbacks(config, run_dir),
            logger=[_logger(name, config, run_dir) for name in config.logging.loggers],
            plugins=[SafeCheckpointIO()],
            use_distributed_sampler=False,  # the data module splits by rank itself
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def _logger(name: str, config: Config, run_dir: Path) -> Logger:
    match name:
        case "tensorboard":
            return TensorBoardLogger(run_dir, name="", version="")
        case "csv":
            return MetricsFile(run_dir)
    try:
        # The same id makes a resumed run go on with its curves.
        return WandbLogger(
            name=run_dir.name,
            id=run_dir.name,
            resume="allow",
            project=config.logging.wandb_project,
            save_dir=run_dir,
            config=OmegaConf.to_container(OmegaConf.structured(config)),
        )
    except ModuleNotFoundError:
        raise ConfigError(
            "logging.loggers: wandb is not installed; pip install wandb, or use tensorboard or csv"
        ) from None


def _silence_expected_warnings() -> None:
    """Silence what Lightning says about intended behaviour."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for package in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{package}.utilities.rank_zero").setLevel(logging.WARNING)
