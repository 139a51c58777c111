"""An edit with the bundled model in every precision, against float32 on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Editor
from ldm.editing.editor import BUNDLED_MODEL
from tests.gpu.conftest import ON_CPU, ON_CUDA, Precision

EXAMPLE = BUNDLED_MODEL / "examples" / "1-dahlia-by-the-lake"
# dB in the hole, from float32 on the CPU. Ten steps of guided sampling enlarge each rounding: bfloat16 gives 38.6.
# float16 has three bits more, which is 18 dB. One level off in every pixel is 48 dB.
PSNR = {"fp32": 48.0, "fp16": 45.0, "bf16": 32.0}


def edit(device: str, dtype: torch.dtype) -> np.ndarray:
    editor = Editor.from_pretrained(None, device=device, dtype=dtype)
    parts = (EXAMPLE / f"{name}.png" for name in ("scene", "mask", "exemplar"))
    result = editor.edit(*parts, seed=3, num_steps=10)
    assert isinstance(result, Image.Image)
    return np.asarray(result).astype(float)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return edit("cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param("bf16", ON_CPU["bf16"], id="cpu-bf16"),
        *(pytest.param(name, ON_CUDA[name], id=f"cuda-{name}", marks=pytest.mark.gpu) for name in PSNR),
    ],
)
def test_an_edit_in_every_precision(expected: np.ndarray, name: str, way: Precision) -> None:
    got = edit(way.device, way.weights)
    hole = np.asarray(Image.open(EXAMPLE / "mask.png").convert("L")) >= 128
    np.testing.assert_array_equal(got[~hole], expected[~hole])
    error = np.square(got[hole] - expected[hole]).mean()
    assert error == 0 or 10 * math.log10(255**2 / error) >= PSNR[name]
