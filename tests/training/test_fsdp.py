"""FSDP2 in two processes: the training of one, and checkpoints that any strategy resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import Fit, MakeConfig, column, last

pytestmark = pytest.mark.slow


def test_a_sharded_model_trains_and_resumes_as_a_whole_one(
    train_in_two: Callable[..., None], command: list[str], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    """One epoch; the second by FSDP2 again, and by one process that reads the same checkpoint."""
    limits = ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1")
    settings, first = ("trainer.gradient_clip_val=1.0", *limits), "trainer.max_epochs=1"
    train_in_two(*command, "trainer.strategy=fsdp2", *settings, first, "logging.image_every=2")
    (two,) = tmp_path.glob("*_run")
    one = tmp_path / "one"
    fit(make_config(*settings, first), one)
    for name in ("train/grad_norm", "train/param_norm", "val/loss"):
        assert column(two, name) == pytest.approx(column(one, name), rel=2e-3), name
    assert list((two / "images").glob("*.png"))
    states = last(two), last(one)
    for part in ("state_dict", "current_model_state"):
        got, expected = ({name: tensor.shape for name, tensor in state[part].items()} for state in states)
        assert got == expected
    for got, expected in zip(*(state["optimizer_states"][0]["state"].items() for state in states), strict=True):
        assert got[0] == expected[0] and got[1]["exp_avg"].shape == expected[1]["exp_avg"].shape

    fit(make_config(*settings), one, resume=one / "checkpoints" / "last.ckpt")
    fit(make_config(*settings), tmp_path / "of two", resume=two / "checkpoints" / "last.ckpt")
    train_in_two("--resume", str(two), "trainer.strategy=fsdp2", *settings, "trainer.max_epochs=2")
    second = column(one, "val/loss")[-1]
    assert column(tmp_path / "of two", "val/loss") == pytest.approx([second], rel=2e-3)
    assert column(two, "val/loss")[-1] == pytest.approx(second, rel=2e-3)
