"""From runs of a benchmark to their metrics, by the command line."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.cocoee import Bench
from ldm.evaluation.evaluate import Run, common_ids, exemplar_labels
from ldm.files import UserError
from tests.evaluation.conftest import IDS, evaluate

N = len(IDS)


def test_figures_of_what_is_known(record: Path) -> None:
    runs = json.loads(record.read_text())["runs"]
    assert list(runs) == ["tiny", "copy-paste", "true picture"]
    for name in ("copy-paste", "true picture"):  # both show the exemplar itself, and are the scene itself
        figures = runs[name]["figures"]
        assert figures["identification"]["value"] == 1.0
        assert figures["clip"]["value"] == pytest.approx(100, abs=0.1)
        assert figures["fid"]["value"] == pytest.approx(0, abs=1e-3)
        assert figures["precision"]["value"] == figures["recall"]["value"] == 1.0
    pasted, tiny = runs["copy-paste"]["figures"], runs["tiny"]["figures"]
    assert pasted["background-max"]["value"] == 0 and "background-psnr" not in pasted
    assert tiny["background-max"]["value"] > 0 and tiny["background-psnr"]["value"] < 40 and tiny["fid"]["value"] > 1
    assert tiny["diversity"]["value"] > 1
    assert "copying" not in tiny  # exemplars that are the true regions show no copies
    for figure in (*pasted.values(), *tiny.values()):
        assert figure["n"] == N or figure["name"] == "background SSIM"
        assert figure["low"] is None or figure["low"] <= figure["value"] <= figure["high"]
        assert figure["paper"] is None  # none of this is what the paper measured


def test_a_hole_that_the_papers_crop_leaves_nothing_of(bench: Path, tmp_path: Path) -> None:
    """A slanted hole: its first pixel in the order of reading is the rightmost."""
    slanted = tmp_path / "bench"
    slanted.mkdir()
    for part in bench.iterdir():
        (slanted / part.name).symlink_to(part)
    (slanted / "Mask_bbox_5").unlink()
    (slanted / "Mask_bbox_5").mkdir()
    for k, id_ in enumerate(IDS):
        mask = Image.open(bench / "Mask_bbox_5" / f"{id_}_mask.png")
        if k == 0:
            mask = Image.fromarray(np.uint8(255) * np.eye(32, dtype=np.uint8)[::-1])
        mask.save(slanted / "Mask_bbox_5" / f"{id_}_mask.png")
    out = tmp_path / "m.json"
    runs = tmp_path / "runs"
    runs.mkdir()
    for id_ in IDS:
        Image.open(bench / "GT_5" / f"{id_}_GT.png").save(runs / f"{id_}.png")
    assert evaluate(slanted, runs, "--metrics", "clip", "--json", out) == 0
    figures = json.loads(out.read_text())["runs"]["runs"]["figures"]
    assert figures["clip"]["n"] == N and figures["clip-paper"]["n"] == N - 1


def test_a_record_says_what_was_measured_with_what(record: Path, tiny_folder: Path) -> None:
    from ldm.checkpoint.io import sha256_file

    written = json.loads(record.read_text())
    settings = written["runs"]["tiny"]["settings"]
    assert settings["checkpoint_sha256"] == sha256_file(tiny_folder / "model.safetensors")
    assert settings["sampler"] == "dpm_solver_pp" and settings["seed"] == 0
    assert written["runs"]["tiny"]["timing"]["pictures"] == N
    assert written["identification"] == written["runs"]["tiny"]["figures"]["identification"]["value"]
    assert written["ids"] == IDS and len(written["runs"]["tiny"]["per_item"]["clip"]) == N
    assert {"torch", "transformers", "python", "paint-by-example"} <= set(written["versions"])
    table = record.with_suffix(".md").read_text()
    assert "| FID (mean colours) ↓ |" in table and "the bench's true pictures; n = 5" in table


def test_statistics_are_read_once(
    bench: Path, pasted: Path, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.json"
    options = ["--real", record.with_name("real.npz"), "--json", out]
    assert evaluate(bench, pasted, "--metrics", "fid", *options) == 0
    figures = json.loads(out.read_text())["runs"]["copy-paste"]["figures"]
    assert figures["fid"]["value"] == pytest.approx(0, abs=1e-3)
    assert "real: real.npz" in figures["fid"]["how"]
    assert evaluate(bench, pasted, "--metrics", "kid", *options) == 2
    assert "real.npz" in capsys.readouterr().err


def test_quality_score_of_a_fitted_mixture(bench: Path, pasted: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    gmm, out = tmp_path / "gmm.safetensors", tmp_path / "qs.json"
    fit = importlib.import_module("scripts.fit_quality_gmm")
    options = ["--features", "colours", "--components", "1", "--covariance", "diag", "--cache", "none"]
    assert fit.main([str(bench / "GT_5"), "--out", str(gmm), *options]) == 0
    assert evaluate(bench, pasted, "--metrics", "qs", "--gmm", gmm, "--json", out) == 0
    figure = json.loads(out.read_text())["runs"]["copy-paste"]["figures"]["qs"]
    assert figure["name"].startswith("QS (refitted GMM: not comparable with the paper")
    assert 0 <= figure["value"] <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "lpips"], "metrics: got lpips"),
        (["--metrics", "qs"], "--gmm"),
        (["--metrics", "dino"], "--dino"),
        (["--metrics", "diversity"], "--other-seeds"),
        (["--metrics", "inception"], "--inception"),
        (["--focus", "a.png"], "no measured item shows a.png"),
        (["--focus", "a.png", "--metrics", "clip"], "--focus"),
        (["--features", "vgg"], "vgg"),
        (["--gmm", "nowhere.pkl"], "nowhere.pkl"),
        (["--real", "nowhere"], "nowhere"),
    ],
)
def test_wrong_questions(
    bench: Path, pasted: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bench, pasted, *options) == 2
    assert message in capsys.readouterr().err


def test_what_all_runs_hold_is_measured(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        Run.read(tmp_path / "nowhere")
    made = Bench(bench)
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (32, 32)).save(run / f"{IDS[1]}.png")
    with pytest.raises(UserError, match="1 items"):
        common_ids(made, [Run.read(run)])
    Image.new("RGB", (32, 32)).save(run / f"{IDS[3]}.png")
    assert common_ids(made, [Run.read(run), Run("true picture", None)]) == [IDS[1], IDS[3]]


def test_a_picture_of_another_size_is_of_another_bench(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for id_, side in zip(IDS, (32, 32, 30, 32, 32), strict=True):
        Image.new("RGB", (side, side)).save(tmp_path / f"{id_}.png")
    assert evaluate(bench, tmp_path) == 2
    assert f"{IDS[2]}.png: got (30, 30) pixels" in capsys.readouterr().err


def test_bench_items_know_their_cut_outs(tmp_path: Path) -> None:
    ids = ["000000000001", "000000000012"]
    assert exemplar_labels(tmp_path, ids) is None
    (tmp_path / "items.csv").write_text("ID,Cutout,XMin\n1,a.png,0\n12,b.png,0\n")
    assert exemplar_labels(tmp_path, ids) == ["a.png", "b.png"]
    with pytest.raises(UserError, match="000000000013"):
        exemplar_labels(tmp_path, ["000000000013"])


def test_identification_of_single_objects(bench: Path, pasted: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "bench"
    shutil.copytree(bench, labelled)
    rows = [f"{int(id_)},{'a.png' if k < 2 else 'b.png'}" for k, id_ in enumerate(IDS)]
    (labelled / "items.csv").write_text("\n".join(["ID,Cutout", *rows]))
    options = ["--metrics", "identification", "--focus", "a.png", "--json", tmp_path / "m.json"]
    assert evaluate(labelled, pasted, *options) == 0
    run = json.loads((tmp_path / "m.json").read_text())["runs"]["copy-paste"]
    figure = run["figures"]["identification: a.png"]
    assert (figure["name"], figure["value"], figure["n"]) == ("identification of a.png", 1.0, 2)
    assert run["per_item"]["identification"] == [1.0] * N
