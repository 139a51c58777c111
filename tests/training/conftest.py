"""A few images with boxes, a model of milliseconds, runs of a few steps, and processes that train."""

from __future__ import annotations

import contextlib
import csv
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.checkpoint.io import write_safetensors
from ldm.checkpoint.keys import SCHEDULE_BUFFERS
from ldm.config import Config, load_config
from ldm.data.datamodule import DataModule
from ldm.evaluation import cache
from ldm.training import callbacks, cli
from ldm.training.callbacks import MODULES
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.run import Run
from scripts import pipeline
from tests.pixel import CLASSIFIER, write_digits
from tests.pixel import TINY as PIXEL_TINY

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "model": {
        "image_size": 16,
        "unet": {
            "model_channels": 16,
            "channel_mult": [1],
            "num_res_blocks": 1,
            "attention_resolutions": [1],
            "num_heads": 2,
            "context_dim": 32,
            "norm_groups": 8,
        },
        "first_stage": {"ch": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 8},
        "exemplar_encoder": {
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 1,
            "num_heads": 2,
            "mapper_layers": 1,
        },
    },
    "data": {"batch_size": 2, "val_batch_size": 2, "num_workers": 0},
    "training": {"base_lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
    "logging": {"image_every": 0, "num_images": 2, "sampler_steps": 2, "checkpoint_every": 0},
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    },
}
TRAIN_SAMPLES = 9  # four batches of two, and one sample that is left out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are bit-identical only with equal numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting a step's operations takes as long as five steps."""
    monkeypatch.setattr(callbacks, "batch_flops", lambda *_: 10**9)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open Images layout: small JPEGs of coloured blotches, one box each."""
    root, rng = tmp_path_factory.mktemp("open-images"), np.random.default_rng(0)
    for split, count in (("train", TRAIN_SAMPLES), ("validation", 4)):
        images, boxes = root / "images" / split, root / "bbox" / split
        images.mkdir(parents=True)
        boxes.mkdir(parents=True)
        for i in range(count):
            size = (int(rng.integers(40, 65)), int(rng.integers(40, 65)))
            blotches = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            blotches.resize(size, Image.Resampling.BICUBIC).save(images / f"{i:04d}.jpg")
            x, y = rng.integers(2, 12, size=2)
            (boxes / f"{i:04d}.txt").write_text(f"{x}.0 {y}.0 {x + 20}.5 {y + 22}.0\n")
    DataModule(load_config(overrides=[f"data.root={root}"]))  # makes the indexes, and prints its progress here
    return root


@pytest.fixture(scope="session")
def config_file(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "root": str(dataset)}}))
    return path


MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def make_config(config_file: Path) -> MakeConfig:
    """The tiny config with overrides, written as on the command line."""
    return lambda *overrides: load_config(config_file, overrides=overrides)


@pytest.fixture(scope="session")
def weights(make_config: MakeConfig) -> dict[str, Tensor]:
    """All weights of a tiny model, its zero-initialised layers filled so that every part has an effect."""
    torch.manual_seed(0)
    state = DiffusionTraining(make_config()).state_dict()
    weights = {name: tensor.clone() for name, tensor in state.items() if name not in SCHEDULE_BUFFERS}
    for tensor in weights.values():
        if not tensor.any():
            tensor.normal_(std=0.05)
    return weights


@pytest.fixture(scope="session")
def pretrained(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "tiny.safetensors"
    write_safetensors(path, weights)
    return path


@pytest.fixture(scope="session")
def batch(make_config: MakeConfig) -> dict[str, Tensor]:
    return next(iter(DataModule(make_config("data.batch_size=4")).train_dataloader()))


def last(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def column(run_dir: Path, name: str) -> list[float]:
    """The values of one curve."""
    with open(run_dir / "metrics.csv", newline="") as file:
        values = [float(row[name]) for row in csv.DictReader(file) if row[name]]
    assert values
    return values


class SignalAt(Callback):
    """Sends a signal to this process while a step, or the validation after it, is under way."""

    def __init__(self, step: int, number: int = signal.SIGTERM, *, in_validation: bool = False) -> None:
        self.step, self.number, self.in_validation = step, number, in_validation

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if not self.in_validation and trainer.global_step == self.step - 1:
            signal.raise_signal(self.number)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self.in_validation and trainer.global_step == self.step:
            signal.raise_signal(self.number)


class StopAt(Callback):
    """Ends a run after a step, as time that is up does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, trainer: pl.Trainer, *args: Any
    ) -> None:
        trainer.should_stop = trainer.global_step >= self.step


Fit = Callable[..., tuple[Run, int]]


@pytest.fixture(scope="session")
def fit(pretrained: Path) -> Fit:
    """Runs a config in this process; further callbacks act before the run's own."""

    def run(
        config: Config, run_dir: Path, *, resume: Path | None = None, callbacks: Sequence[Callback] = ()
    ) -> tuple[Run, int]:
        run = Run(config, run_dir)
        run.trainer.callbacks[:0] = callbacks  # pyright: ignore[reportAttributeAccessIssue]
        run.initialise(str(pretrained), from_scratch=False, resuming=resume is not None)
        return run, run.fit(resume)

    return run


@pytest.fixture
def command(config_file: Path, pretrained: Path, tmp_path: Path) -> list[str]:
    """The words of a training command; its run directory is `tmp_path/DATE_run`."""
    return ["-b", str(config_file), "-l", str(tmp_path), "-n", "run", "--pretrained-model", str(pretrained)]


def _train(words: list[str], env: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(env)
    sys.exit(cli.main(words))


@pytest.fixture
def fork() -> Iterator[Callable[..., Any]]:
    """Starts a training command in a process, and group, of its own: without an interpreter's seconds of imports."""
    processes = []

    def start(words: Sequence[str], **env: str) -> Any:
        process = multiprocessing.get_context("fork").Process(target=_train, args=(list(words), env))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def fork_two(fork: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Starts a training command in two processes, over gloo on the loopback device."""

    def start(*words: str) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"WORLD_SIZE": "2", "NODE_RANK": "0"}
        words = (*words, "trainer.devices=2", "data.batch_size=1", "data.val_batch_size=1")
        return [fork(words, **env, LOCAL_RANK=str(rank), RANK=str(rank)) for rank in (0, 1)]

    return start


@pytest.fixture
def train_in_two(fork_two: Callable[..., list[Any]]) -> Callable[..., None]:
    """Runs a training command in two processes."""

    def run(*words: str) -> None:
        processes = fork_two(*words)
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0, 0]

    return run


ENDLESS = ("trainer.max_epochs=null", "trainer.max_steps=1000000", "logging.checkpoint_every=3")


def wait_for_third_step(logdir: Path, is_alive: Callable[[], bool]) -> None:
    """Wait until an `ENDLESS` run has taken three steps."""
    deadline = time.monotonic() + 300
    while not list(logdir.glob("*_run/checkpoints/step0000003.ckpt")):
        assert is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def main_process(command: list[str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `main.py`, waits for its third step, and yields the process, the head of a group of its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        process = subprocess.Popen(
            [sys.executable, *launcher, "main.py", *command, *ENDLESS, *words],
            cwd=ROOT,
            env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        wait_for_third_step(tmp_path, lambda: process.poll() is None)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands, run by importing their scripts: the seconds of eighteen interpreters' imports are saved."""
    done: list[list[str]] = []

    def execute(command: list[str]) -> int:
        done.append(command)
        path = Path(command[0])
        name = ".".join(path.relative_to(pipeline.ROOT).with_suffix("").parts)
        words = command[1:]
        if path.stem == "evaluate":  # Fréchet distances and intervals take most of the time
            words = [*(word for word in words if word not in ("fid", "foreground-fid")), "--resamples", "2"]
        return importlib.import_module(name).main(words)

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(cache, "DEFAULT_PATH", tmp_path / "features")
    return done


# --- In pixel space ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "digits.npz")


@pytest.fixture(scope="session")
def pixel_config(digits: Path) -> MakeConfig:
    """The tiny config of a diffusion model of digits, or of a classifier, with overrides."""

    def config(*overrides: str, stage: str = "diffusion") -> Config:
        parts = [PIXEL_TINY, CLASSIFIER] if stage == "classifier" else [PIXEL_TINY]
        return load_config(*map(OmegaConf.create, parts), overrides=[f"data.root={digits}", *overrides])

    return config


def train(
    config: Config,
    run_dir: Path,
    *,
    weights: Path | None = None,
    resume: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Run, int]:
    """Run a config in this process, from random weights, a file or a checkpoint; further callbacks act first."""
    run = Run(config, run_dir)
    run.trainer.callbacks[:0] = callbacks  # pyright: ignore[reportAttributeAccessIssue]
    run.initialise(weights and str(weights), from_scratch=True, resuming=resume is not None)
    return run, run.fit(resume)


def filled(config: Config) -> Any:
    """A module in pixel space whose zero-initialised layers have an effect."""
    torch.manual_seed(0)
    module = MODULES[config.stage, config.model.kind](config)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return module
