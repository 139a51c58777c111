"""The tiny model with the reference's weights, and what the reference computed with it.

`golden/tiny_golden.safetensors.xz` holds inputs and outputs of the published code in float32 on a CPU, run with weights
that are a function of their names (procweights.py). The reference repeated differs from itself by up to 6e-6.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from pathlib import Path

# One worker per core: further threads of each would only wait for the cores of the others, here and in processes
# that tests start. NumPy reads it when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from ldm.checkpoint.io import write_safetensors
from ldm.checkpoint.keys import to_file_keys
from ldm.config import (
    AutoencoderConfig,
    Config,
    ExemplarEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    dump_config,
    load_config,
)
from ldm.latent_diffusion import LatentDiffusion, load_model
from tests.procweights import read_golden, write_tiny_model

TINY_CONFIG = Path(__file__).parent.parent / "configs" / "tiny.yaml"

Close = Callable[[Tensor, Tensor], None]

# A busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are always collected, and skipped where there is no CUDA device.

    Slow ones come first: at the end, one would keep a worker while the others have nothing left.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return read_golden("tiny_golden")


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return load_config(TINY_CONFIG)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("reference") / "tiny_model.safetensors")


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> LatentDiffusion:
    """Shared: tests leave its weights and modes as they are."""
    return load_model(TINY_CONFIG, tiny_checkpoint)


@pytest.fixture
def trainable_model(tiny_checkpoint: Path) -> LatentDiffusion:
    """A copy of one's own, with gradients."""
    return load_model(TINY_CONFIG, tiny_checkpoint).requires_grad_(True).train()


@pytest.fixture(scope="session")
def close() -> Close:
    """Asserts parity: 2e-5 absolute in float32, three times the reference's own spread of 6e-6."""

    def check(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)

    return check


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its config beside it: random weights, small enough to sample in well under a second."""
    config = Config(
        model=ModelConfig(
            image_size=32,
            schedule=ScheduleConfig(name="cosine"),
            unet=UNetConfig(
                model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[1], context_dim=16
            ),
            first_stage=AutoencoderConfig(ch=32, ch_mult=[1, 1], num_res_blocks=1),
            exemplar_encoder=ExemplarEncoderConfig(
                image_size=14, patch_size=7, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2
            ),
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.yaml").write_text(dump_config(config))
    torch.manual_seed(0)
    state = load_model(config).state_dict()
    for tensor in state.values():  # layers that start at zero would hide the exemplar
        if tensor.is_floating_point() and not tensor.any():
            tensor.normal_(std=0.1)
    write_safetensors(folder / "model.safetensors", state)
    return folder


MERGES = ["d o", "do g</w>", "c a", "ca t</w>"]


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-pair tokenizer of letters, `dog` and `cat`, in CLIP's files."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = [*letters, *(merge.replace(" ", "") for merge in MERGES)]
    words += [f"unused {i}" for i in range(size - len(words) - 2)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 58)
    return folder


@pytest.fixture(scope="session")
def text_config() -> Config:
    """Stable Diffusion inpainting in every convention but its size."""
    return Config(
        model=ModelConfig(
            image_size=32,
            condition="text",
            input_channels=["x_t", "hole_mask", "z_masked"],
            unet=UNetConfig(
                model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2, 1], context_dim=16
            ),
            first_stage=AutoencoderConfig(ch=32, ch_mult=[1, 1, 1], num_res_blocks=1),
            text_encoder=TextEncoderConfig(
                vocab_size=58, max_length=12, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2
            ),
        )
    )


@pytest.fixture(scope="session")
def text_folder(text_config: Config, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the published names, with config and tokenizer beside them."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "config.yaml").write_text(dump_config(text_config))
    (folder / "tokenizer").symlink_to(tokenizer_folder)
    torch.manual_seed(0)
    state = load_model(text_config).state_dict()
    for tensor in state.values():  # layers that start at zero would hide the prompt
        if tensor.is_floating_point() and not tensor.any():
            tensor.normal_(std=0.1)
    write_safetensors(folder / "model.safetensors", to_file_keys(state))
    return folder
