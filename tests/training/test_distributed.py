"""Two processes on one machine, over gloo: the same training as one, and no waiting for the dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import ENDLESS, Fit, MakeConfig, column, last, wait_for_third_step
from tests.training.test_run import assert_gradients_close

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "lightning": (),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
}


def test_two_processes_train_as_one_with_twice_the_batch(
    train_in_two: Callable[..., None], command: list[str], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    options = ("trainer.max_epochs=1", "training.timesteps=loss_aware", "logging.checkpoint_every=1")
    train_in_two(*command, *options, "logging.keep_last=9", "trainer.strategy=ddp")
    (two,) = tmp_path.glob("*_run")
    one = tmp_path / "one"
    fit(make_config(*options, "logging.keep_last=9"), one)
    moments = []  # after one step: a tenth of the gradients
    for run in (one, two):
        state = torch.load(run / "checkpoints" / "step0000001.ckpt", weights_only=True)
        moments.append([x["exp_avg"] for x in state["optimizer_states"][0]["state"].values()])
    assert_gradients_close(*moments)
    # What the model does, not its weights: a bias before a norm has no gradient but rounding, which Adam blows up.
    for name in ("train/grad_norm", "val/loss"):
        assert column(two, name) == pytest.approx(column(one, name), rel=2e-3)
    assert torch.equal(*(last(run)["timesteps"]["counts"] for run in (two, one)))  # of all processes


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_process_ends_the_other_with_a_message(launcher: str, main_process: Callable[..., Any]) -> None:
    two = ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=1")
    process = main_process(*two, launcher=LAUNCHERS[launcher])
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)  # without a remedy it would wait for half an hour
    assert process.returncode not in (0, None)
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "--resume" in line
    assert launcher == "torchrun" or "Traceback" not in errors  # torchrun adds its own


def test_a_signal_to_one_process_ends_both_at_a_logged_step(
    fork_two: Callable[..., list[Any]], command: list[str], tmp_path: Path
) -> None:
    options = ("trainer.strategy=ddp", "trainer.log_every_n_steps=7", "trainer.limit_val_batches=0")
    processes = fork_two(*command, *ENDLESS, *options)
    wait_for_third_step(tmp_path, processes[0].is_alive)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM, 0]
    (run_dir,) = tmp_path.glob("*_run")
    step = last(run_dir)["global_step"]
    assert step % 7 == 0 or step % 3 == 0  # logged, or saved anyway


def children(pid: int) -> list[int]:
    """The processes that a process started, in their order."""
    task = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return sorted(int(word) for word in task.split())
