"""A training run: a config becomes model, data and Lightning trainer."""

from __future__ import annotations

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
from ldm.training.diffusion_module import DiffusionTraining, FirstStageTraining, uninitialised

EXPECTED_WARNINGS = (
    ".*in eval mode at the start of training.*",  # frozen parts are
    ".*your dataloader is not resumable.*",  # the data module resumes it
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's does
    ".*does not have many workers.*",  # data.num_workers is the user's choice
    ".*callback used in the previous run.*|.*callbacks used to create the checkpoint.*",
    ".*LeafSpec.*",  # Lightning's own use of torch
    ".*smaller than the logging interval.*",  # steps are logged at that interval across epochs
)


class Run:
    """Everything that `main.py` needs of one run.

    Args:
        config: what to train, on what, how.
        run_dir: gets `config.yaml`, `history.json`, `checkpoints/`, `images/`, and what the loggers write.
        scale_lr: multiply the config's base learning rate by accumulation, processes and batch size.

    Raises:
        ConfigError: `trainer` holds something that Lightning's Trainer does not take.
        FileNotFoundError, ValueError: the data cannot be used.
    """

    def __init__(self, config: Config, run_dir: Path, *, scale_lr: bool = False) -> None:
        _quiet()
        pl.seed_everything(config.seed, workers=True, verbose=False)
        if config.stage == "first_stage" and config.trainer.get("strategy") == "fsdp2":
            raise ConfigError("trainer.strategy: got fsdp2, expected auto or ddp: the first stage is not sharded")
        self.config, self.run_dir = config, run_dir
        self.data = DataModule(config)
        self.trainer = _trainer(config, run_dir)
        self.global_batch = self.trainer.accumulate_grad_batches * self.trainer.world_size * config.data.batch_size
        diffusion = config.stage == "diffusion"
        self.options = config.training if diffusion else config.first_stage_training
        if scale_lr:  # into the config, so that a resumed run finds it there
            self.options.base_lr *= self.global_batch
        self.module = DiffusionTraining(config) if diffusion else FirstStageTraining(config)

    def initialise(self, checkpoint: str | None, *, from_scratch: bool, resuming: bool) -> None:
        """Give the weights their starting values and list those that stay random.

        Args:
            checkpoint: file in the published layout; it may lack the parts that Paint by Example adds.
            from_scratch: whether every trained part may start from random weights.
            resuming: the trainer will restore a whole state; nothing to check.

        Raises:
            CheckpointError: the file does not fit, or a frozen part would stay random.
            UserError: captions are to be read, and there is no tokenizer.
        """
        if not resuming:
            self._load(checkpoint, from_scratch=from_scratch)
            self._find_tokenizer(checkpoint)
        if isinstance(self.module, DiffusionTraining):
            self.module.add_lora(self.config.seed)

    def _load(self, checkpoint: str | None, *, from_scratch: bool) -> None:
        given = to_module_keys(read_checkpoint(checkpoint)) if checkpoint else {}
        if isinstance(self.module, FirstStageTraining):
            self._load_first_stage(self.module, checkpoint, given)
            return
        unused = (*SCHEDULE_BUFFERS, "discriminator.")  # the config's schedule; what the first stage was trained with
        given = {name: tensor for name, tensor in given.items() if not name.startswith(unused)}
        if self.module.reads_exemplars:
            given = add_imagenet_tower(given, self.module.cond_stage_model)
        use_prior = self.config.training.use_prior
        if not use_prior:
            trained = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
            given = {name: tensor for name, tensor in given.items() if name not in trained}
        if self.config.training.fresh_conditioning:
            given = {name: tensor for name, tensor in given.items() if not name.startswith(NEW_PARTS)}
        acceptable, refused = uninitialised(self.module, set(given), from_scratch=from_scratch or not use_prior)
        if self.config.training.lora_rank:  # which trains none of them
            acceptable, refused = [], [*acceptable, *refused]
        if refused:
            parts = sorted({".".join(name.split(".")[:2]) for name in refused})
            raise CheckpointError(
                f"{checkpoint or 'no checkpoint given'}: {len(refused)} tensors would stay random: {', '.join(parts)}. "
                "Frozen parts need trained weights: prepare one complete file with scripts/modify_checkpoints.py "
                "and pass it as --pretrained-model; --train-from-scratch allows trained parts to start from nothing"
            )
        check_keys(self._shapes(), given, source=checkpoint or "", allow_missing=acceptable)
        self.module.load_state_dict(given, strict=False)
        if acceptable and self.trainer.is_global_zero:
            parts = sorted({".".join(name.split(".")[:2]) for name in acceptable})
            Console().print(f"starting from random weights: {', '.join(parts)} ({len(acceptable)} tensors)")

    def _find_tokenizer(self, checkpoint: str | None) -> None:
        """Make sure that captions can be read, and note in the config by what, for those who go on from the run."""
        if isinstance(self.module, DiffusionTraining) and self.module.reads_text:
            encoder = self.module.text_encoder
            folder = encoder.find_tokenizer(Path(checkpoint or "").parent)
            encoder.tokenize([""])
            self.config.model.text_encoder.tokenizer = str(folder.resolve())

    def _load_first_stage(self, module: FirstStageTraining, checkpoint: str | None, given: dict[str, Tensor]) -> None:
        if checkpoint is None:
            if module.frozen_encoder:
                raise CheckpointError(
                    "no checkpoint given: an asymmetric decoder is trained for an encoder that stays as it is; pass "
                    "the model whose encoder that is as --pretrained-model"
                )
            return
        expected = self._shapes(FIRST_STAGE)
        given = {FIRST_STAGE + name: tensor for name, tensor in autoencoder_keys(given).items()}
        fresh = None
        if module.frozen_encoder:
            decoder, branch = FIRST_STAGE + "decoder.", FIRST_STAGE + CONDITION_ENCODER
            plain = [name for name in expected if name.startswith(decoder) and not name.startswith(branch)]
            fits = all(name in given and given[name].shape == expected[name] for name in plain)
            if not fits:  # a wider or deeper one starts from nothing, as the authors' do
                given = {name: tensor for name, tensor in given.items() if not name.startswith(decoder)}
            fresh = branch if fits else decoder
        missing = check_keys(expected, given, source=checkpoint, allow_missing=[fresh] if fresh else ())
        module.load_state_dict(given, strict=False)
        if missing and self.trainer.is_global_zero:
            Console().print(f"starting from random weights: {fresh}* ({len(missing)} tensors)")

    def _shapes(self, prefix: str = "") -> dict[str, tuple[int, ...]]:
        state: dict[str, Tensor] = self.module.state_dict()
        return {
            name: tuple(tensor.shape)
            for name, tensor in state.items()
            if name.startswith(prefix) and name not in SCHEDULE_BUFFERS
        }

    def summary(self) -> str:
        """Parameters trained and frozen, batch, learning rate and steps, as text."""
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
        """Train, from `checkpoint` on if given.

        Returns:
            The exit status: 0, or 128 + the number of the signal that ended the run.
        """
        leader = self.trainer.is_global_zero
        if leader:
            self._explain(checkpoint)
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

    def _explain(self, checkpoint: Path | None) -> None:
        """Write what the run is (`config.yaml`) and how its parts were started (`history.json`)."""
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
        """When, how and with what this part of the run was started."""
        device = self.trainer.strategy.root_device
        packages = ("torch", "pytorch-lightning", "numpy", "pillow", "opencv-python-headless", "transformers")
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "resumed_from": checkpoint and str(checkpoint),
            "seed": self.config.seed,
            "processes": self.trainer.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }


def _commit() -> str | None:
    """The source's git commit, with a + where files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


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


def _quiet() -> None:
    """Leave out what Lightning says about things that are meant to be so."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for package in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{package}.utilities.rank_zero").setLevel(logging.WARNING)
