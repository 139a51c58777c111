"""A handful of pictures with boxes, a model of milliseconds, and runs of a few steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.checkpoint.io import write_safetensors
from ldm.checkpoint.keys import SCHEDULE_BUFFERS
from ldm.config import Config, load_config
from ldm.data.datamodule import DataModule
from ldm.evaluation import cache
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.run import Run
from scripts import pipeline

TINY: dict[str, Any] = {
    "model": {
        "image_size": 16,
        "unet": {
            "model_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "num_heads": 2,
            "context_dim": 32,
        },
        "first_stage": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1},
        "exemplar_encoder": {
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_heads": 2,
            "mapper_layers": 1,
        },
    },
    "data": {"batch_size": 4, "val_batch_size": 4, "num_workers": 0},
    "training": {"base_lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
    "logging": {"image_every": 0, "num_images": 2, "sampler_steps": 2, "checkpoint_every": 0},
    "trainer": {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    },
}
TRAIN_SAMPLES = 17  # four batches of four, and one sample that is left out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are bit-identical only with equal numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open Images layout: small JPEGs of coloured blotches, one box each."""
    root, rng = tmp_path_factory.mktemp("open-images"), np.random.default_rng(0)
    for split, count in (("train", TRAIN_SAMPLES), ("validation", 8)):
        images, boxes = root / "images" / split, root / "bbox" / split
        images.mkdir(parents=True)
        boxes.mkdir(parents=True)
        for i in range(count):
            size = (int(rng.integers(40, 65)), int(rng.integers(40, 65)))
            blotches = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            blotches.resize(size, Image.Resampling.BICUBIC).save(images / f"{i:04d}.jpg")
            x, y = rng.integers(2, 12, size=2)
            (boxes / f"{i:04d}.txt").write_text(f"{x}.0 {y}.0 {x + 20}.5 {y + 22}.0\n")
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
    return next(iter(DataModule(make_config()).train_dataloader()))


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
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands, run by importing their scripts: the seconds of eighteen interpreters' imports are saved."""
    done: list[list[str]] = []

    def execute(command: list[str]) -> int:
        done.append(command)
        path = Path(command[0])
        name = ".".join(path.relative_to(pipeline.ROOT).with_suffix("").parts)
        return importlib.import_module(name).main(command[1:])

    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.setattr(cache, "DEFAULT_PATH", tmp_path / "features")
    return done
