"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.config import ConfigError
from ldm.data.box_dataset import sample_key
from ldm.data.datamodule import EpochSampler
from ldm.training.cli import main, parse_args, resolve_run
from scripts import make_shards
from tests.training.conftest import ENDLESS, TRAIN_SAMPLES, Fit, MakeConfig, SignalAt, column, last, wait_for_third_step

pytestmark = pytest.mark.slow


class Recorder(Callback):
    """Records which samples a run was trained on, and after which steps it validated, batch by batch."""

    def __init__(self) -> None:
        self.keys: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.keys.append(batch["key"].tolist())

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.validated.append(trainer.global_step)


def assert_same_state(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit-identical average, trained weights, optimizer, schedule, position and losses of timesteps."""
    for part in ("state_dict", "current_model_state", "timesteps"):
        assert got.get(part, {}).keys() == expected.get(part, {}).keys()
        for name, tensor in expected.get(part, {}).items():
            assert torch.equal(got[part][name], tensor), (part, name)
    for name, moments in expected["optimizer_states"][0]["state"].items():
        for key, tensor in moments.items():
            assert torch.equal(got["optimizer_states"][0]["state"][name][key], tensor), (name, key)
    for part in ("lr_schedulers", "global_step", "DataModule", "averaging_state"):
        assert got[part] == expected[part], part
    assert got["optimizer_states"][0]["param_groups"] == expected["optimizer_states"][0]["param_groups"]


BY_EPOCHS = ("trainer.max_epochs=3",)
EVERY_STEP = ("logging.checkpoint_every=1", "logging.keep_last=99")


@pytest.fixture(scope="module")
def uninterrupted(
    fit: Fit, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[list[int]]]]:
    """Folder and samples of a run that saves after every step, made once for each set of overrides."""
    done: dict[tuple[str, ...], tuple[Path, list[list[int]]]] = {}

    def run(overrides: tuple[str, ...]) -> tuple[Path, list[list[int]]]:
        if overrides not in done:
            run_dir, recorder = tmp_path_factory.mktemp("uninterrupted"), Recorder()
            assert fit(make_config(*overrides, *EVERY_STEP), run_dir, callbacks=[recorder])[1] == 0
            done[overrides] = run_dir, recorder.keys
        return done[overrides]

    return run


@pytest.fixture(scope="module")
def shards(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    words = ["--out", str(folder), "--megabytes", "1", "data.kind=open_images", f"data.root={dataset}"]
    assert make_shards.main(words) == 0
    return f"data.root={folder}"


@pytest.mark.parametrize(
    ("overrides", "stops"),
    [
        # four steps in an epoch: in the first, at its end, in the second, in the validation at its end
        pytest.param(BY_EPOCHS, [SignalAt(2), SignalAt(4), SignalAt(6), SignalAt(8, in_validation=True)], id="epochs"),
        pytest.param(  # where a validation is due, at the end of the second epoch, in a validation
            (
                "trainer.max_epochs=null",
                "trainer.max_steps=10",
                "trainer.val_check_interval=3",
                "trainer.check_val_every_n_epoch=null",
            ),
            [SignalAt(6), SignalAt(8), SignalAt(9, in_validation=True)],
            id="steps",
        ),
        pytest.param(  # five steps in an epoch, the last one with one batch
            ("trainer.max_epochs=2", "trainer.accumulate_grad_batches=2", "data.batch_size=1"),
            [SignalAt(3), SignalAt(5), SignalAt(7)],
            id="accumulated gradients",
        ),
        pytest.param(
            ("trainer.max_epochs=2", "data.num_workers=2", "model.unet.dropout=0.2"),
            [SignalAt(4), SignalAt(6)],
            id="workers and dropout",
        ),
        pytest.param(("training.lora_rank=4",), [SignalAt(5)], id="LoRA"),
        # With two timesteps each has its ten losses after a few steps, and later draws depend on them.
        pytest.param(
            (
                "training.timesteps=loss_aware",
                "model.schedule.num_timesteps=2",
                "trainer.max_epochs=5",
                "data.batch_size=4",
                "trainer.log_every_n_steps=3",  # the losses of two steps are not read yet
            ),
            [SignalAt(8)],
            id="losses of timesteps",
        ),
        pytest.param(
            ("data.kind=shards", "trainer.max_epochs=2", "data.num_workers=2"),
            [SignalAt(4), SignalAt(7)],
            id="shards and workers",
        ),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_bit_identical(
    overrides: tuple[str, ...],
    stops: list[SignalAt],
    uninterrupted: Callable[..., tuple[Path, list[list[int]]]],
    shards: str,
    fit: Fit,
    make_config: MakeConfig,
    tmp_path: Path,
) -> None:
    """One run, stopped several times; at every stop and at the end it is where the uninterrupted one was."""
    if "data.kind=shards" in overrides:
        overrides = (*overrides, shards)
    whole, expected_keys = uninterrupted(overrides)
    resume, keys, at_step = None, [], {}
    for stop in stops:
        recorder = Recorder()
        run, code = fit(make_config(*overrides), tmp_path, resume=resume, callbacks=[recorder, stop])
        assert code == 128 + signal.SIGTERM
        assert run.trainer.global_step == stop.step  # it ended at once
        assert recorder.validated.count(stop.step) == stop.in_validation  # nothing more is validated after the signal
        keys += recorder.keys
        at_step = torch.load(whole / "checkpoints" / f"step{stop.step:07d}.ckpt", weights_only=True)
        assert_same_state(last(tmp_path), at_step)
        resume = tmp_path / "checkpoints" / "last.ckpt"
    recorder = Recorder()
    assert fit(make_config(*overrides), tmp_path, resume=resume, callbacks=[recorder])[1] == 0
    assert keys + recorder.keys == expected_keys
    assert_same_state(last(tmp_path), last(whole))
    if "data.kind=shards" in overrides:
        assert len({key for keys in expected_keys for key in keys}) == 8 * 2  # no sample twice
    if "training.timesteps=loss_aware" in overrides:
        assert int(at_step["timesteps"]["counts"].min()) >= 10  # the draws after the stop depend on the losses


@pytest.fixture(scope="module")
def one_epoch(fit: Fit, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one epoch")
    fit(make_config("trainer.max_epochs=1", *EVERY_STEP), run_dir)
    return run_dir


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt", "step0000003.ckpt"])
def test_every_kind_of_checkpoint_can_be_resumed(
    name: str, one_epoch: Path, uninterrupted: Callable[..., Any], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    """The best one, written after validation; the last one of a finished run, to be extended; one inside an epoch."""
    whole, expected_keys = uninterrupted(BY_EPOCHS)
    path, after = one_epoch / "checkpoints" / name, Recorder()
    step = torch.load(path, weights_only=True)["global_step"]
    fit(make_config("trainer.max_epochs=2"), tmp_path, resume=path, callbacks=[after])
    assert after.keys == expected_keys[step:8]
    assert_same_state(last(tmp_path), torch.load(whole / "checkpoints" / "step0000008.ckpt", weights_only=True))


def test_overrides_win_over_the_checkpoint(
    uninterrupted: Callable[..., Any], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    path = uninterrupted(BY_EPOCHS)[0] / "checkpoints" / "step0000003.ckpt"
    config = make_config("trainer.max_epochs=1", "training.base_lr=2.0e-4", "training.weight_decay=0.5")
    fit(config, tmp_path, resume=path)
    states = torch.load(path, weights_only=True), last(tmp_path)
    before, after = (state["optimizer_states"][0]["param_groups"][0] for state in states)
    assert (before["lr"], before["weight_decay"]) == (1e-3, 0.01)
    assert (after["lr"], after["weight_decay"]) == (2e-4, 0.5)


@pytest.mark.parametrize(
    ("stop", "size", "then"),
    [
        (2, 1, [1] * 5),
        (2, 3, [3]),
        (1, 5, [5]),  # the only batch of its size
        (3, 4, []),  # less than a batch is left
        (4, 3, []),  # the epoch had ended
    ],
)
def test_another_batch_size_neither_repeats_nor_skips_samples(
    stop: int, size: int, then: list[int], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Stopped after `stop` batches of two of an epoch's nine samples, and twice more after that."""
    two_epochs = ("trainer.max_epochs=2", "trainer.limit_val_batches=0")
    before, checkpoint = Recorder(), tmp_path / "checkpoints" / "last.ckpt"
    run, _ = fit(make_config(*two_epochs), tmp_path, callbacks=[before, SignalAt(stop)])
    order = [
        int(sample_key([23, *item])) for epoch in (0, 1) for item in EpochSampler(TRAIN_SAMPLES, seed=23, epoch=epoch)
    ]
    first, second = order[:TRAIN_SAMPLES], order[TRAIN_SAMPLES:]
    assert [*chain(*before.keys)] == first[: 2 * stop]
    after, steps = [], stop
    while steps < stop + len(then) + TRAIN_SAMPLES // size:
        recorder = Recorder()
        stops = [SignalAt(steps + 1)] if len(after) < 3 else []
        run, _ = fit(
            make_config(*two_epochs, f"data.batch_size={size}"),
            tmp_path,
            resume=checkpoint,
            callbacks=[recorder, *stops],
        )
        after += recorder.keys
        assert run.trainer.global_step > steps
        steps = run.trainer.global_step
    sizes = [*then, *[size] * (TRAIN_SAMPLES // size)]
    assert [len(keys) for keys in after] == sizes
    seen = [*chain(*after)]
    assert seen[: sum(then)] == first[2 * stop :][: sum(then)]
    assert seen[sum(then) :] == second[: TRAIN_SAMPLES // size * size]
    assert last(tmp_path)["DataModule"]["epoch"] == 2


def test_curves_of_a_resumed_run_are_appended(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    fit(make_config(), tmp_path, callbacks=[SignalAt(3)])
    events = {path.name for path in tmp_path.glob("events.out.tfevents*")}
    fit(make_config(), tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    step, loss = header.split(",").index("step"), header.split(",").index("train/loss")
    steps = [int(row.split(",")[step]) for row in rows if row.split(",")[loss]]
    assert steps == list(range(8))
    assert len(column(tmp_path, "val/loss")) == 2
    assert events < {path.name for path in tmp_path.glob("events.out.tfevents*")}


def test_a_full_disk_leaves_the_checkpoint_before(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "trainer.max_steps=1"]) == 0
    (run_dir,) = tmp_path.iterdir()
    before = (run_dir / "checkpoints" / "last.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # Python ignores the signal that comes with it
    try:
        capsys.readouterr()
        assert main(["--resume", str(run_dir), "trainer.max_steps=2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "last.ckpt: " in error and "File too large" in error
    assert (run_dir / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not list(run_dir.rglob("*.partial"))
    assert main(["--resume", str(run_dir), "trainer.max_steps=2"]) == 0
    assert last(run_dir)["global_step"] == 2


def test_a_process_that_is_killed_again_and_again_ends_with_the_same_bits(
    command: list[str], fork: Callable[..., Any], fit: Fit, make_config: MakeConfig, tmp_path: Path
) -> None:
    """SIGKILL to other processes at random moments of a shuffled, augmented run with workers, accumulation and an
    average, each time started again by the same command."""
    overrides = ["trainer.max_epochs=null", "trainer.max_steps=24", "trainer.accumulate_grad_batches=2"]
    overrides += ["data.batch_size=1", "data.num_workers=2", "model.unet.dropout=0.1", "logging.checkpoint_every=3"]
    rng, saved, steps, kills, deadline = random.Random(0), None, [0], 0, time.monotonic() + 300
    run_dir = Path()
    while steps[-1] < 24:
        process, moment = fork([*command, "--resume", "auto", *overrides]), None
        while process.is_alive():
            assert time.monotonic() < deadline
            found = next((path.stat().st_mtime_ns for path in tmp_path.glob("*_run/checkpoints/last.ckpt")), None)
            if moment is None and found != saved:  # it has begun to take steps of its own
                moment = time.monotonic() + rng.uniform(0, 0.2)
            if kills < 3 and moment is not None and time.monotonic() > moment:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
            time.sleep(0.005)
        (run_dir,) = tmp_path.glob("*_run")
        saved = (run_dir / "checkpoints" / "last.ckpt").stat().st_mtime_ns
        steps.append(last(run_dir)["global_step"])
    assert kills > 1 and steps == sorted(set(steps)), steps  # all of them got further than the one before
    fit(make_config(*overrides), tmp_path / "whole")
    assert_same_state(last(run_dir), last(tmp_path / "whole"))


def test_a_signal_to_the_whole_group_spares_the_workers(
    command: list[str], fork: Callable[..., Any], tmp_path: Path
) -> None:
    """Ctrl-C in a terminal reaches them as well, and the step in progress still needs them."""
    process = fork([*command, *ENDLESS, "data.num_workers=1"])
    wait_for_third_step(tmp_path, process.is_alive)
    os.killpg(process.pid, signal.SIGINT)
    process.join(300)
    assert process.exitcode == 128 + signal.SIGINT
    (run_dir,) = tmp_path.glob("*_run")
    assert last(run_dir)["global_step"] >= 3


def damage(path: Path, how: str) -> None:
    """Spoil this name of a file and leave its other names, the periodic checkpoints, alone."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "changed byte":
        content[len(content) // 2] = (content[len(content) // 2] + 1) % 256
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["truncated", "changed byte", "empty"])
def test_of_damaged_checkpoints_the_one_before_is_used(
    how: str, uninterrupted: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = uninterrupted(BY_EPOCHS)
    run_dir = tmp_path / "run"
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(whole / "config.yaml", run_dir)
    for source, name in (("step0000009", "last"), ("step0000009", "step0000009"), ("step0000008", "step0000008")):
        shutil.copy(whole / "checkpoints" / f"{source}.ckpt", folder / f"{name}.ckpt")
    damage(folder / "last.ckpt", how)
    damage(folder / "step0000009.ckpt", how)
    capsys.readouterr()
    words = ["--resume", str(run_dir)]
    assert resolve_run(parse_args(words))[2] == folder / "step0000008.ckpt"
    warnings = capsys.readouterr().err.splitlines()
    assert [name in line for name, line in zip(("last", "step0000009"), warnings, strict=True)] == [True, True]
    if how == "truncated":
        assert main([*words, *BY_EPOCHS]) == 0
        assert_same_state(last(run_dir), last(whole))
        damage(folder / "last.ckpt", how)
    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        resolve_run(parse_args(["--resume", str(folder / "last.ckpt")]))
    for path in folder.glob("*.ckpt"):
        damage(path, how)
    with pytest.raises(ConfigError, match=str(folder)):
        resolve_run(parse_args(words))


def test_resume_auto_is_for_jobs_that_are_started_again(command: list[str], tmp_path: Path) -> None:
    command += ["--resume", "auto"]
    assert main([*command, "trainer.max_steps=1"]) == 0
    (run_dir,) = tmp_path.iterdir()
    other = tmp_path / "2999-01-01T00-00-00_other" / "checkpoints"
    other.mkdir(parents=True)
    shutil.copy(run_dir / "checkpoints" / "last.ckpt", other)
    unborn = tmp_path / "2999-01-01T00-00-00_run" / "checkpoints"  # killed before its first checkpoint
    unborn.mkdir(parents=True)
    assert main([*command, "trainer.max_steps=2"]) == 0
    assert last(run_dir)["global_step"] == 2
    assert len(list(tmp_path.iterdir())) == 3
