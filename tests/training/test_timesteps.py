"""Timesteps drawn by their losses: what is drawn, and that it leaves the objective what it was."""

from __future__ import annotations

import pytest
import torch

from ldm.training.timesteps import LossAwareTimesteps

LOSSES = torch.tensor([1.0, 2.0, 5.0, 2.0])


@pytest.fixture
def trained() -> LossAwareTimesteps:
    timesteps = LossAwareTimesteps(4)
    for _ in range(10):
        timesteps.update(torch.arange(4), LOSSES)
    return timesteps


def shares(timesteps: LossAwareTimesteps, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([timesteps.draw(generator) for _ in range(n)])
    return torch.bincount(drawn, minlength=4) / n


def test_timesteps_are_drawn_alike_until_all_are_known() -> None:
    timesteps = LossAwareTimesteps(4)
    for _ in range(20):
        timesteps.update(torch.tensor([0, 1, 2]), LOSSES[:3])
    assert torch.equal(timesteps.weight(torch.arange(4)), torch.ones(4))
    # 4,000 draws: a share of a quarter has a standard deviation of 0.007
    torch.testing.assert_close(shares(timesteps, 4000), torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_larger_losses_are_drawn_more_often_and_count_less(trained: LossAwareTimesteps) -> None:
    expected = 0.999 * LOSSES / LOSSES.sum() + 0.001 / 4
    torch.testing.assert_close(shares(trained, 4000), expected, atol=0.03, rtol=0)
    weights = trained.weight(torch.arange(4))
    torch.testing.assert_close(weights, 1 / (4 * expected))
    torch.testing.assert_close((expected * weights * LOSSES).sum(), LOSSES.mean())  # the objective of uniform draws


def test_old_losses_are_forgotten(trained: LossAwareTimesteps) -> None:
    for _ in range(10):
        trained.update(torch.tensor([2]), torch.tensor([1.0]))
    expected = torch.tensor([1.0, 2.0, 1.0, 2.0]) / 6
    torch.testing.assert_close(trained.weight(torch.arange(4)), 1 / (4 * expected), rtol=5e-3, atol=0)
    other = LossAwareTimesteps(4)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.weight(torch.arange(4)), trained.weight(torch.arange(4)))
    assert shares(other, 50).tolist() == shares(trained, 50).tolist()
