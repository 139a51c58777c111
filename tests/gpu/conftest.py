"""Tests that run on a CUDA device (`pytest -m gpu`) and, so that they are known to be sound, on the CPU as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

# Read when CUDA starts: without it deterministic algorithms refuse products of matrices.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.training.conftest import (  # noqa: F401
    batch,
    config_file,
    dataset,
    fit,
    make_config,
    one_thread,
    pretrained,
    uncounted,
    weights,
)

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Precision(NamedTuple):
    """A device, the weights' type, and the type of operations under autocast."""

    device: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    def context(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, self.autocast) if self.autocast else nullcontext()


ON_CPU = {
    "fp32": Precision("cpu"),
    "bf16": Precision("cpu", torch.bfloat16),
    "fp16": Precision("cpu", torch.float16),
    "bf16-mixed": Precision("cpu", autocast=torch.bfloat16),
    "16-mixed": Precision("cpu", autocast=torch.float16),
}
ON_CUDA = {name: way._replace(device="cuda") for name, way in ON_CPU.items()}
PRECISIONS = [
    *(pytest.param(name, way, id=f"cpu-{name}") for name, way in ON_CPU.items()),
    *(pytest.param(name, way, id=f"cuda-{name}", marks=pytest.mark.gpu) for name, way in ON_CUDA.items()),
]


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """TensorFloat-32 has 10 bits of mantissa: off, so that float32 means 23 of them."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolution
