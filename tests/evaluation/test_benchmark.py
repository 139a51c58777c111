"""Editing a benchmark by its command line."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.editing.settings import EditSettings
from ldm.evaluation.benchmark import PROTOCOLS, BenchmarkRun
from ldm.evaluation.cocoee import Bench
from ldm.files import UserError
from tests.evaluation.conftest import COLOURS, FAST, IDS, edit


def pictures(outdir: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted((outdir / "results").iterdir())}


def same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Rounding differs between batch sizes by less than one grey level."""
    assert list(got) == list(expected)
    for id_, picture in got.items():
        assert np.abs(picture - expected[id_]).max() <= 1, id_


@pytest.mark.parametrize("batch_size", [3, 7])
def test_every_item_once_whatever_the_batch(
    bench: Path, tiny_folder: Path, one_by_one: Path, tmp_path: Path, batch_size: int
) -> None:
    assert sorted(pictures(one_by_one)) == IDS
    options = ["--checkpoint", str(tiny_folder), *FAST, "--batch-size", str(batch_size), "--results-only"]
    assert edit(bench, tmp_path, *options) == 0
    same(pictures(tmp_path), pictures(one_by_one))
    assert not (tmp_path / "grid").exists()


@pytest.mark.slow
def test_every_item_once_in_two_processes(bench: Path, tiny_folder: Path, one_by_one: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(tiny_folder), *FAST, "--devices", "2", "--batch-size", "2"]
    assert edit(bench, tmp_path, *options) == 0
    same(pictures(tmp_path), pictures(one_by_one))


def test_started_processes_are_set_up_as_this_one(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[None]()
    monkeypatch.setattr("ldm.editing.cli.keep_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(BenchmarkRun, "edit", lambda run, _: pickle.loads(pickle.dumps(run.prepare))() and {})
    assert edit(bench, tmp_path, "--devices", "2") == 0
    assert len(calls) == 2


def test_a_stopped_run_goes_on(
    bench: Path, tiny_folder: Path, one_by_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", str(tiny_folder), *FAST, "--batch-size", "2"]
    assert edit(bench, tmp_path, *options, "--limit", "3") == 0
    kept, damaged = (tmp_path / "results" / f"{IDS[k]}.png" for k in (0, 1))
    stamp = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert edit(bench, tmp_path, *options) == 0
    same(pictures(tmp_path), pictures(one_by_one))
    assert kept.stat().st_mtime_ns == stamp
    # Nothing left to do is no error; other settings do not continue a folder.
    assert edit(bench, tmp_path, *options) == 0
    assert edit(bench, tmp_path, *options, "--guidance-scale", "2") == 2
    assert "guidance_scale: 5.0 => 2.0" in capsys.readouterr().err


def test_the_originals_folders(bench: Path, one_by_one: Path) -> None:
    for id_ in IDS:
        for part in ("GT", "inpaint", "mask", "ref"):
            assert (one_by_one / "source" / f"{id_}_{part}.png").is_file()
        assert Image.open(one_by_one / "grid" / f"grid-{id_}.png").size == (4 * 32, 32)


def test_protocols(bench: Path, tiny_folder: Path, one_by_one: Path, tmp_path: Path) -> None:
    """`paper` keeps the decoder's picture, `ours` the scene's pixels outside the hole."""
    assert edit(bench, tmp_path, "--checkpoint", str(tiny_folder), "--protocol", "ours", *FAST) == 0
    outside = np.ones((32, 32), bool)
    outside[8:24, 8:24] = False
    for id_ in IDS:
        scene = np.asarray(Image.open(bench / "GT_5" / f"{id_}_GT.png"))[outside]
        assert np.array_equal(pictures(tmp_path)[id_][outside], scene)
        assert not np.array_equal(pictures(one_by_one)[id_][outside], scene)
    assert PROTOCOLS["paper"].sampler == "plms" and PROTOCOLS["paper"].num_steps == 50
    assert PROTOCOLS["paper"].guidance_scale == 5.0
    assert PROTOCOLS["ours"] == EditSettings()


def test_the_originals_command_line(bench: Path, tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--plms", "--ddim_steps", "2", "--scale", "1.5", "--n_samples", "4", "--H", "512"]
    options += ["--precision", "autocast"]  # float32 on a CPU
    options += ["--guidance-interval", "0.2", "0.8"]  # ours stand beside the original's
    weights = ["--config", str(tiny_folder / "config.yaml"), "--ckpt", str(tiny_folder / "model.safetensors")]
    assert edit(bench, tmp_path, *weights, *options, "--fixed_code", "--skip_grid", "--device", "cpu") == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["sampler"], settings["num_steps"], settings["guidance_scale"]) == ("plms", 2, 1.5)
    assert settings["guidance_interval"] == [0.2, 0.8]


def test_context_margin_decides_what_the_model_sees(bench: Path, tiny_folder: Path, tmp_path: Path) -> None:
    weights = ["--checkpoint", str(tiny_folder / "model.safetensors"), "--protocol", "ours", "--steps", "2"]
    for margin in ("0.1", "0.5"):
        assert edit(bench, tmp_path / margin, *weights, "--limit", "1", "--context-margin", margin) == 0
        assert json.loads((tmp_path / margin / "settings.json").read_text())["crop_margin"] == float(margin)
    near, wide = ((tmp_path / margin / "results" / f"{IDS[0]}.png").read_bytes() for margin in ("0.1", "0.5"))
    assert near != wide


def test_exemplars_of_the_methods(bench: Path, tiny_folder: Path, one_by_one: Path, tmp_path: Path) -> None:
    shown = {"null-token": None, "other-exemplar": "Ref_5"}
    for method in shown:
        assert edit(bench, tmp_path / method, "--checkpoint", str(tiny_folder), *FAST, "--method", method) == 0
        assert sorted(pictures(tmp_path / method)) == IDS
        assert any((pictures(tmp_path / method)[id_] != pictures(one_by_one)[id_]).any() for id_ in IDS)
    source = Image.open(tmp_path / "other-exemplar" / "source" / f"{IDS[-1]}_ref.png")
    assert source.getpixel((0, 0)) == COLOURS[0]  # the last item's next one is the first


@pytest.mark.parametrize("method", ["copy-paste", "seamless-clone", "opencv-inpaint"])
def test_baselines_leave_the_rest_of_the_scene(bench: Path, tmp_path: Path, method: str) -> None:
    assert edit(bench, tmp_path, "--method", method, "--device", "cpu") == 0
    outside = np.ones((32, 32), bool)
    outside[8:24, 8:24] = False
    for id_, picture in pictures(tmp_path).items():
        scene = np.asarray(Image.open(bench / "GT_5" / f"{id_}_GT.png")).astype(int)
        assert np.array_equal(picture[outside], scene[outside])
        shows_exemplar = np.array_equal(picture, scene)  # of one colour, as the scene is inside the hole
        assert shows_exemplar == (method == "copy-paste")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "--method: got magic"),
        (["--batch-size", "0"], "expected 1 or more"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
    ],
)
def test_wrong_settings(
    bench: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(bench, tmp_path / "out", "--device", "cpu", *options) == 2
    assert message in capsys.readouterr().err


def test_a_bench_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(tmp_path / "no", tmp_path / "out") == 2
    assert "no: " in capsys.readouterr().err


def test_an_item_whose_painting_is_not_finite_fails_alone(
    bench: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldm.latent_diffusion import LatentDiffusion

    decode = LatentDiffusion.decode_latents
    seen = list[Tensor]()

    def spoilt(model: LatentDiffusion, z: Tensor, *known: Tensor) -> Tensor:
        """Spoil the image of one item, in the batch and alone."""
        seen.extend(z[1:2] if not seen else [])
        is_spoilt = (z - seen[0]).abs().amax((1, 2, 3)) < 1e-3
        return torch.where(is_spoilt[:, None, None, None], torch.nan, decode(model, z, *known))

    monkeypatch.setattr(LatentDiffusion, "decode_latents", spoilt)
    options = ["--checkpoint", str(tiny_folder), *FAST, "--batch-size", "3"]
    assert edit(bench, tmp_path, *options) == 1
    assert sorted(pictures(tmp_path)) == [IDS[0], *IDS[2:]]
    assert f"failed: {IDS[1]}: " in capsys.readouterr().err
    assert edit(bench, tmp_path / "strict", *options, "--strict") == 2


def cut_exemplar(bench: Path, folder: Path, *ids: str) -> Path:
    """Copy a benchmark and damage the exemplars of items."""
    broken = Path(shutil.copytree(bench, folder))
    for id_ in ids:
        path = broken / "Ref_5" / f"{id_}_ref.png"
        path.write_bytes(path.read_bytes()[:-30])
    return broken


@pytest.mark.parametrize("options", [["--method", "copy-paste"], ["--batch-size", "2", *FAST]])
def test_an_item_that_cannot_be_read_fails_alone(
    bench: Path, tiny_folder: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = cut_exemplar(bench, tmp_path / "bench", IDS[0], IDS[3])
    np.save(broken / "id_list.npy", [999, *map(int, IDS)])
    weights = [] if "--method" in options else ["--checkpoint", str(tiny_folder)]
    assert edit(broken, tmp_path / "out", *options, *weights, "--device", "cpu") == 1
    assert sorted(pictures(tmp_path / "out")) == [IDS[1], IDS[2], IDS[4]]
    captured = capsys.readouterr()
    assert all(f"{id_}: " in captured.err for id_ in (IDS[0], IDS[3], "000000000999"))
    assert "3 results" in captured.out and "3 items failed" in captured.out
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["pictures"] == 3


@pytest.mark.parametrize("method", ["model", "copy-paste"])
def test_the_first_failure_ends_a_strict_run(
    bench: Path, tiny_folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = cut_exemplar(bench, tmp_path / "bench", IDS[1], IDS[4])
    options = ["--method", method, "--strict", "--batch-size", "1", *FAST]
    assert edit(broken, tmp_path / "out", *options, "--checkpoint", str(tiny_folder)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {IDS[1]}: ") and f"{IDS[1]}_ref.png" in error
    assert not (tmp_path / "out" / "timing.json").exists()


@pytest.mark.slow
def test_several_processes_are_prepared_and_their_items_fail_alone(bench: Path, tmp_path: Path) -> None:
    broken = cut_exemplar(bench, tmp_path / "bench", IDS[0], IDS[3])
    options = {"method": "copy-paste", "device": "cpu", "prepare": partial(Path.touch, mark := tmp_path / "prepared")}
    run = BenchmarkRun(Bench(broken), tmp_path / "out", **options)
    replace(run, outdir=tmp_path / "alone").edit()
    assert not mark.exists()
    failed = run.edit(2)
    assert mark.exists()
    with pytest.raises(UserError, match=r"ref\.png"):
        replace(run, outdir=tmp_path / "strict", strict=True).edit(2)
    assert sorted(failed) == [IDS[0], IDS[3]] and all(f"{id_}_ref.png" in failed[id_] for id_ in failed)
    assert sorted(pictures(tmp_path / "out")) == [IDS[1], IDS[2], IDS[4]]


def test_a_folder_of_settings_that_cannot_be_read(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json: damaged"):
        BenchmarkRun(Bench(bench), tmp_path, method="copy-paste", device="cpu").edit()
