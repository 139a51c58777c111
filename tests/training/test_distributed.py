"""Two processes on one machine, over gloo: the same training as one, and no waiting for the dead."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldm.config import Config
from ldm.training.run import Run

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "lightning": [sys.executable, "main.py"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "main.py"],
}
TWO = ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=2", "data.val_batch_size=2")

Start = Callable[..., subprocess.Popen[str]]

pytestmark = pytest.mark.slow


@pytest.fixture
def start(config_file: Path, pretrained: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts two processes as a group of their own, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(launcher: str, *overrides: str) -> subprocess.Popen[str]:
        words = ["-b", str(config_file), "-l", str(tmp_path), "-n", "two", "--pretrained-model", str(pretrained)]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        process = subprocess.Popen(
            [*LAUNCHERS[launcher], *words, *TWO, *overrides],
            cwd=ROOT,
            env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_processes_train_as_one_with_twice_the_batch(
    start: Start, fit: Callable[..., tuple[Run, int]], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    options = ("trainer.max_epochs=2", "training.timesteps=loss_aware")
    _, errors = (process := start("torchrun", *options)).communicate(timeout=300)
    assert process.returncode == 0, errors
    fit(make_config(*options), tmp_path / "one")
    (two,) = tmp_path.glob("*_two")
    # What the model does, not its weights: a bias before a norm has no gradient but rounding, which Adam blows up.
    for name in ("train/grad_norm", "val/loss"):
        assert column(two, name) == pytest.approx(column(tmp_path / "one", name), rel=2e-3)
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (two, tmp_path / "one")]
    assert torch.equal(*(state["timesteps"]["counts"] for state in states))  # of all processes


def test_a_divided_model_trains_and_resumes_as_a_whole_one(
    start: Start, fit: Callable[..., tuple[Run, int]], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """FSDP2 for two epochs; the third by FSDP2 again, and by one process that reads the same checkpoint."""
    clip, strategy = "trainer.gradient_clip_val=1.0", "trainer.strategy=fsdp2"
    _, errors = (
        process := start("torchrun", strategy, clip, "trainer.max_epochs=2", "logging.image_every=4")
    ).communicate(timeout=300)
    assert process.returncode == 0, errors
    fit(make_config(clip, "trainer.max_epochs=2"), tmp_path / "one")
    (two,) = tmp_path.glob("*_two")
    for name in ("train/grad_norm", "train/param_norm", "val/loss"):
        assert column(two, name) == pytest.approx(column(tmp_path / "one", name), rel=2e-3), name
    assert list((two / "images").glob("*.png"))
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (two, tmp_path / "one")]
    for part in ("state_dict", "current_model_state"):
        got, expected = ({name: tensor.shape for name, tensor in state[part].items()} for state in states)
        assert got == expected
    for got, expected in zip(*(state["optimizer_states"][0]["state"].items() for state in states), strict=True):
        assert got[0] == expected[0] and got[1]["exp_avg"].shape == expected[1]["exp_avg"].shape

    fit(make_config(clip), tmp_path / "one", resume=tmp_path / "one" / "checkpoints" / "last.ckpt")
    fit(make_config(clip), tmp_path / "of two", resume=two / "checkpoints" / "last.ckpt")
    process = start("torchrun", strategy, clip, "trainer.max_epochs=3", "--resume", str(two))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    third = column(tmp_path / "one", "val/loss")[-1]
    assert column(tmp_path / "of two", "val/loss") == pytest.approx([third], rel=2e-3)
    assert column(two, "val/loss")[-1] == pytest.approx(third, rel=2e-3)


def column(run_dir: Path, name: str) -> list[float]:
    with open(run_dir / "metrics.csv", newline="") as file:
        values = [float(row[name]) for row in csv.DictReader(file) if row[name]]
    assert values
    return values


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_process_ends_the_other_with_a_message(launcher: str, start: Start, tmp_path: Path) -> None:
    process = start(launcher, "trainer.max_epochs=null", "trainer.max_steps=1000000", "logging.checkpoint_every=3")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*_two/checkpoints/step0000003.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    others = children(process.pid)
    os.kill(others[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)  # without a remedy it would wait for half an hour
    assert process.returncode not in (0, None)
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert "another process of this run has ended" in line and "--resume" in line
    assert launcher == "torchrun" or "Traceback" not in errors  # torchrun adds its own


def children(pid: int) -> list[int]:
    """Of a process, in the order in which they were started."""
    task = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return sorted(int(word) for word in task.split())
