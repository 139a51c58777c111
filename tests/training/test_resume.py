"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.config import Config
from ldm.training.cli import main
from ldm.training.diffusion_module import DiffusionTraining
from ldm.training.run import Run
from scripts import make_shards

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

Fit = Callable[..., tuple[Run, int]]
MakeConfig = Callable[..., Config]


class Recorder(Callback):
    """Which samples a run was trained on, and after which steps it validated, batch by batch."""

    def __init__(self) -> None:
        self.keys: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.keys.append(batch["key"].tolist())

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append(trainer.global_step)


def state_of(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_state(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit-identical average, trained weights, optimizer, schedule and position."""
    for part in ("state_dict", "current_model_state"):
        assert got[part].keys() == expected[part].keys()
        differing = [name for name, tensor in expected[part].items() if not torch.equal(got[part][name], tensor)]
        assert not differing, (part, differing)
    for name, moments in expected["optimizer_states"][0]["state"].items():
        for key, tensor in moments.items():
            assert torch.equal(got["optimizer_states"][0]["state"][name][key], tensor), (name, key)
    for part in ("lr_schedulers", "global_step", "DataModule", "averaging_state"):
        assert got[part] == expected[part], part
    groups = [c["optimizer_states"][0]["param_groups"] for c in (got, expected)]
    assert groups[0] == groups[1]


class SignalAt(Callback):
    """Sends a signal to this process while a step, or the validation after it, is under way."""

    def __init__(self, step: int, number: int = signal.SIGTERM, *, in_validation: bool = False) -> None:
        self.step, self.number, self.in_validation = step, number, in_validation

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.in_validation and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.in_validation and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


BY_EPOCHS = ("trainer.max_epochs=3",)
BY_STEPS = (
    "trainer.max_epochs=null",
    "trainer.max_steps=10",
    "trainer.val_check_interval=3",
    "trainer.check_val_every_n_epoch=null",
)
ACCUMULATED = ("trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "data.batch_size=2")
WORKERS = ("trainer.max_epochs=3", "data.num_workers=2", "model.unet.dropout=0.2")


@pytest.fixture(scope="module")
def uninterrupted(
    fit: Fit, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, ...]], tuple[dict[str, Any], list[list[int]]]]:
    """Final state and samples of a run, computed once for each set of overrides."""
    done: dict[tuple[str, ...], tuple[dict[str, Any], list[list[int]]]] = {}

    def run(overrides: tuple[str, ...]) -> tuple[dict[str, Any], list[list[int]]]:
        if overrides not in done:
            torch.set_num_threads(1)
            run_dir, recorder = tmp_path_factory.mktemp("uninterrupted"), Recorder()
            assert fit(make_config(*overrides), run_dir, callbacks=[recorder])[1] == 0
            done[overrides] = state_of(run_dir), recorder.keys
        return done[overrides]

    return run


@pytest.mark.parametrize(
    ("overrides", "stop"),
    [
        pytest.param(BY_EPOCHS, SignalAt(2), id="first epoch"),
        pytest.param(BY_EPOCHS, SignalAt(4), id="end of first epoch"),
        pytest.param(BY_EPOCHS, SignalAt(6), id="second epoch"),
        pytest.param(BY_EPOCHS, SignalAt(8), id="end of second epoch"),
        pytest.param(BY_EPOCHS, SignalAt(8, in_validation=True), id="validation at the end of an epoch"),
        pytest.param(WORKERS, SignalAt(6), id="second epoch, with workers and dropout"),
        pytest.param(WORKERS, SignalAt(4), id="end of first epoch, with workers and dropout"),
        pytest.param(BY_STEPS, SignalAt(6), id="by steps, validation due"),
        pytest.param(BY_STEPS, SignalAt(8), id="by steps, end of an epoch"),
        pytest.param(BY_STEPS, SignalAt(6, in_validation=True), id="by steps, validation"),
        pytest.param(ACCUMULATED, SignalAt(5), id="accumulated gradients"),
        pytest.param(ACCUMULATED, SignalAt(4), id="accumulated gradients, end of an epoch"),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_bit_identical(
    overrides: tuple[str, ...],
    stop: SignalAt,
    uninterrupted: Callable[[tuple[str, ...]], tuple[dict[str, Any], list[list[int]]]],
    fit: Fit,
    make_config: MakeConfig,
    tmp_path: Path,
) -> None:
    expected, expected_keys = uninterrupted(overrides)
    before, after = Recorder(), Recorder()
    run, code = fit(make_config(*overrides), tmp_path, callbacks=[before, stop])
    assert code == 128 + signal.SIGTERM
    assert run.trainer.global_step == stop.step  # it ended at once
    assert state_of(tmp_path)["global_step"] == stop.step
    assert before.validated.count(stop.step) == stop.in_validation  # nothing more is validated after the signal

    _, code = fit(make_config(*overrides), tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt", callbacks=[after])
    assert code == 0
    assert before.keys + after.keys == expected_keys
    assert_same_state(state_of(tmp_path), expected)


def test_lora_is_resumed_bit_identically(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("training.lora_rank=4", *BY_EPOCHS)
    fit(config, tmp_path / "whole")
    fit(config, tmp_path / "run", callbacks=[SignalAt(6)])
    fit(config, tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert_same_state(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


def test_the_losses_that_timesteps_are_drawn_by_are_resumed(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    """With two timesteps each has its ten losses after a few steps, and later draws depend on them."""
    config = make_config("training.timesteps=loss_aware", "model.schedule.num_timesteps=2", "trainer.max_epochs=5")
    whole, _ = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "run", callbacks=[SignalAt(14)])
    fit(config, tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert isinstance(whole.module, DiffusionTraining) and whole.module.timesteps is not None
    assert int(whole.module.timesteps.counts.sum()) == 80 and int(whole.module.timesteps.counts.min()) >= 10
    assert_same_state(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    for name in ("losses", "counts"):
        assert torch.equal(*(state_of(tmp_path / run)["timesteps"][name] for run in ("run", "whole")))


@pytest.mark.parametrize(("workers", "stop"), [(0, 6), (2, 7), (2, 4)])
def test_training_from_shards_is_resumed_bit_identically(
    workers: int, stop: int, dataset: Path, fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    source = ["data.kind=open_images", f"data.root={dataset}"]
    assert make_shards.main(["--out", str(shards), "--megabytes", "1", *source]) == 0
    config = make_config("data.kind=shards", f"data.root={shards}", f"data.num_workers={workers}", *BY_EPOCHS)
    whole, before, after = Recorder(), Recorder(), Recorder()
    assert fit(config, tmp_path / "whole", callbacks=[whole])[1] == 0
    assert len(whole.keys) == 12 and len({key for keys in whole.keys for key in keys}) == 12 * len(whole.keys[0])
    fit(config, tmp_path / "run", callbacks=[before, SignalAt(stop)])
    fit(config, tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "last.ckpt", callbacks=[after])
    assert before.keys + after.keys == whole.keys
    assert_same_state(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["best.ckpt", "step0000003.ckpt"])
def test_every_kind_of_checkpoint_can_be_resumed(
    name: str, uninterrupted: Callable[..., Any], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    expected, expected_keys = uninterrupted(BY_EPOCHS)
    # A periodic checkpoint inside an epoch; the best one is written at the end of an epoch, after validation.
    stop = SignalAt(5 if name == "best.ckpt" else 4)
    fit(make_config(*BY_EPOCHS, "logging.checkpoint_every=3"), tmp_path, callbacks=[stop])
    checkpoint = tmp_path / "checkpoints" / name
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert step == (4 if name == "best.ckpt" else 3)
    after = Recorder()
    fit(make_config(*BY_EPOCHS), tmp_path, resume=checkpoint, callbacks=[after])
    assert after.keys == expected_keys[step:]
    assert_same_state(state_of(tmp_path), expected)


def test_a_finished_run_can_be_extended(
    uninterrupted: Callable[..., Any], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    expected, expected_keys = uninterrupted(BY_STEPS)
    first = [o if "max_steps" not in o else "trainer.max_steps=6" for o in BY_STEPS]
    before, after = Recorder(), Recorder()
    assert fit(make_config(*first), tmp_path, callbacks=[before])[1] == 0
    fit(make_config(*BY_STEPS), tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt", callbacks=[after])
    assert before.keys + after.keys == expected_keys
    assert_same_state(state_of(tmp_path), expected)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_save_too(number: int, fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    handler = signal.getsignal(number)
    _, code = fit(make_config(), tmp_path, callbacks=[SignalAt(2, number)])
    assert code == 128 + number
    assert state_of(tmp_path)["global_step"] == 2
    assert signal.getsignal(number) == handler


def test_overrides_win_over_the_checkpoint(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    fit(make_config("trainer.max_epochs=1"), tmp_path)
    before = state_of(tmp_path)["optimizer_states"][0]["param_groups"][0]
    config = make_config("trainer.max_epochs=2", "training.base_lr=2.0e-4", "training.weight_decay=0.5")
    fit(config, tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    group = state_of(tmp_path)["optimizer_states"][0]["param_groups"][0]
    assert (before["lr"], before["weight_decay"]) == (1e-3, 0.01)
    assert (group["lr"], group["weight_decay"]) == (2e-4, 0.5)


def test_curves_of_a_resumed_run_are_appended(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    fit(make_config(), tmp_path, callbacks=[SignalAt(3)])
    events = {path.name for path in tmp_path.glob("events.out.tfevents*")}
    fit(make_config(), tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    step, loss = header.split(",").index("step"), header.split(",").index("train/loss")
    steps = [int(row.split(",")[step]) for row in rows if row.split(",")[loss]]
    # Lightning writes a step's row after the step; the one that the signal ended has none.
    assert steps == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert events < {path.name for path in tmp_path.glob("events.out.tfevents*")}


def test_a_full_disk_leaves_the_checkpoint_before(
    config_file: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-b", str(config_file), "-l", str(tmp_path), "--pretrained-model", str(pretrained)]
    assert main([*words, "trainer.max_epochs=1"]) == 0
    (run_dir,) = tmp_path.iterdir()
    before = (run_dir / "checkpoints" / "last.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # Python ignores the signal that comes with it
    try:
        capsys.readouterr()
        assert main(["--resume", str(run_dir), "trainer.max_epochs=2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "last.ckpt: cannot be saved (File too large)" in error
    assert (run_dir / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not list(run_dir.rglob("*.partial"))
    assert main(["--resume", str(run_dir), "trainer.max_epochs=2"]) == 0
    assert state_of(run_dir)["global_step"] == 8


ENDLESS = ("trainer.max_epochs=null", "trainer.max_steps=1000000", "logging.checkpoint_every=3", "data.num_workers=1")


@pytest.fixture
def stopped_by(config_file: Path, pretrained: Path, tmp_path: Path) -> Callable[[int], tuple[Path, int]]:
    """Starts `main.py` as a process group, signals all of it after three steps, gives run directory and exit code."""

    def run(number: int) -> tuple[Path, int]:
        command = [
            sys.executable,
            "main.py",
            "-b",
            str(config_file),
            "-l",
            str(tmp_path),
            "-n",
            "stopped",
            "--pretrained-model",
            str(pretrained),
            *ENDLESS,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            deadline = time.monotonic() + 600
            while not list(tmp_path.glob("*/checkpoints/step0000003.ckpt")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(process.pid, number)
            code = process.wait(timeout=300)
        finally:
            process.kill()
        (run_dir,) = tmp_path.glob("*_stopped")
        return run_dir, code

    return run


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bits(
    config_file: Path, pretrained: Path, fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    """The real thing: SIGKILL to other processes at random moments of a shuffled, augmented run with workers,
    accumulation and an average, each time started again by the same command."""
    overrides = [
        "trainer.max_epochs=null",
        "trainer.max_steps=90",
        "trainer.accumulate_grad_batches=2",
        "data.batch_size=2",
        "data.num_workers=2",
        "model.unet.dropout=0.1",
        "logging.checkpoint_every=3",
    ]
    command = [
        sys.executable,
        "main.py",
        "-b",
        str(config_file),
        "-l",
        str(tmp_path),
        "-n",
        "job",
        "--resume",
        "auto",
        "--pretrained-model",
        str(pretrained),
        *overrides,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng, last, steps, deadline = random.Random(0), None, [], time.monotonic() + 500
    while not steps or steps[-1] < 90:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        moment = None
        while process.poll() is None:
            assert time.monotonic() < deadline
            found = next((path.stat().st_mtime_ns for path in tmp_path.glob("*_job/checkpoints/last.ckpt")), None)
            if moment is None and found != last:  # it has begun to take steps of its own
                moment = time.monotonic() + rng.uniform(0, 1)
            if len(steps) < 3 and moment is not None and time.monotonic() > moment:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.005)
        (run_dir,) = tmp_path.glob("*_job")
        last = (run_dir / "checkpoints" / "last.ckpt").stat().st_mtime_ns
        steps.append(state_of(run_dir)["global_step"])
    assert steps == sorted(set(steps)) and len(steps) == 4, steps  # three were killed on their way
    fit(make_config(*overrides), tmp_path / "whole")
    assert_same_state(state_of(run_dir), state_of(tmp_path / "whole"))


def test_a_signal_to_the_whole_group_spares_the_workers(stopped_by: Callable[[int], tuple[Path, int]]) -> None:
    """Ctrl-C in a terminal reaches them as well, and the step in progress still needs them."""
    run_dir, code = stopped_by(signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert state_of(run_dir)["global_step"] >= 3


def damage(path: Path, how: str) -> None:
    """Spoil this name of a file and leave its other names, the periodic checkpoints, alone."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "changed byte":
        content[len(content) // 2] = (content[len(content) // 2] + 1) % 256
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["truncated", "changed byte", "empty"])
def test_of_damaged_checkpoints_the_one_before_is_used(
    how: str, fit: Fit, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    fit(make_config("trainer.max_epochs=1", "logging.checkpoint_every=2"), run_dir)
    folder = run_dir / "checkpoints"
    damage(folder / "last.ckpt", how)
    damage(folder / "step0000004.ckpt", how)
    words = ["--resume", str(run_dir), "trainer.max_epochs=2"]
    assert main(words) == 0
    err = capsys.readouterr().err
    assert err.count("trying the one before") == 2
    whole = tmp_path / "whole"
    fit(make_config("trainer.max_epochs=2", "logging.checkpoint_every=2"), whole)
    assert_same_state(state_of(run_dir), state_of(whole))

    damage(folder / "last.ckpt", how)
    assert main(["--resume", str(folder / "last.ckpt")]) == 2
    assert "for the last whole checkpoint" in capsys.readouterr().err
    for path in folder.glob("*.ckpt"):
        damage(path, how)
    assert main(words) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def test_resume_auto_is_for_jobs_that_are_started_again(
    config_file: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-b", str(config_file), "-l", str(tmp_path), "-n", "job", "--pretrained-model", str(pretrained)]
    words += ["--resume", "auto"]
    assert main([*words, "trainer.max_epochs=1"]) == 0
    (run_dir,) = tmp_path.iterdir()
    steps = state_of(run_dir)["global_step"]
    other = tmp_path / "2999-01-01T00-00-00_other" / "checkpoints"
    other.mkdir(parents=True)
    (other / "last.ckpt").write_bytes((run_dir / "checkpoints" / "last.ckpt").read_bytes())
    unborn = tmp_path / "2999-01-01T00-00-00_job" / "checkpoints"  # killed before its first checkpoint
    unborn.mkdir(parents=True)
    assert main([*words, "trainer.max_epochs=2"]) == 0
    assert state_of(run_dir)["global_step"] == 2 * steps
    assert len(list(tmp_path.iterdir())) == 3
