"""Learning rates and optimizers."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from ldm.config import ConfigError
from ldm.training.module import adamw, lr_factor


class TestLearningRate:
    def test_warm_up_is_the_reference_s(self, golden: dict[str, Tensor]) -> None:
        factor = lr_factor(10_000, "constant", total_steps=10**9)
        got = torch.tensor([factor(int(n)) for n in golden["lr/n"]], dtype=torch.float64)
        torch.testing.assert_close(got, golden["lr/factor"].double(), rtol=1e-6, atol=0)  # stored in float32

    def test_cosine(self) -> None:
        factor = lr_factor(100, "cosine", total_steps=1100)
        assert factor(100) == 1.0
        assert factor(600) == pytest.approx(0.525)  # half-way between 1 and 0.05
        assert factor(1100) == factor(5000) == pytest.approx(0.05)
        values = [factor(step) for step in range(100, 1101)]
        assert values == sorted(values, reverse=True)

    def test_no_warm_up(self) -> None:
        assert lr_factor(0, "constant", 10)(0) == 1.0
        assert lr_factor(20, "cosine", 10)(25) == 1.0  # the run ends before the warm-up does


def test_an_optimizer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        adamw("adamw_8bit")
