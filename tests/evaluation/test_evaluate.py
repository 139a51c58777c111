"""From runs of a benchmark to their metrics, by the command line."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.cocoee import Bench
from ldm.evaluation.evaluate import Evaluation, Run, exemplar_labels
from ldm.files import UserError
from tests.evaluation.conftest import COLOURS, IDS, colours, edit, evaluate

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


def results(folder: Path, ids: Sequence[object] = IDS, suffix: str = "png", size: int = 32) -> Path:
    """Write a result of one colour for each id."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, id_ in enumerate(ids):
        Image.new("RGB", (size, size), COLOURS[k]).save(folder / f"{id_}.{suffix}")
    return folder


def measured(bench: Path, *runs: Path, **options: Any) -> Evaluation:
    return Evaluation(Bench(bench), [Run.read(run) for run in runs], colours(""), **options)


@pytest.fixture
def own_bench(bench: Path, tmp_path: Path) -> Path:
    """A copy of the benchmark, to be damaged."""
    return Path(shutil.copytree(bench, tmp_path / "bench"))


def test_what_all_runs_hold_is_measured(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        Run.read(tmp_path / "nowhere")
    run = results(tmp_path / "run", IDS[1:2])
    with pytest.raises(UserError, match="1 items"):
        measured(bench, run)
    results(run, IDS[3:4])
    evaluation = measured(bench, run, results(tmp_path / "all"))
    assert evaluation.ids == list(evaluation.boxes) == [IDS[1], IDS[3]]
    assert list(evaluation.left_out.counts.values()) == [3] and IDS[0] in str(evaluation.left_out)
    with pytest.raises(UserError, match=IDS[0]):
        measured(bench, run, strict=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def other_size(path: Path) -> None:
    Image.new("RGB", (30, 40)).save(path)


def empty(path: Path) -> None:
    Image.new("L", (32, 32)).save(path)


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("run/{}.png", cut),
        ("run/{}.png", other_size),
        ("run/{}.png", lambda path: path.write_text("no image")),
        ("run/{}.png", Path.unlink),
        ("bench/GT_5/{}_GT.png", cut),
        ("bench/GT_5/{}_GT.png", other_size),
        ("bench/Mask_bbox_5/{}_mask.png", cut),
        ("bench/Mask_bbox_5/{}_mask.png", other_size),
        ("bench/Mask_bbox_5/{}_mask.png", empty),
        ("bench/Ref_5/{}_ref.png", cut),
        ("bench/Ref_5/{}_ref.png", Path.unlink),
    ],
)
@pytest.mark.parametrize("cache", ["none", "cache"])
def test_an_item_that_is_damaged_is_left_out_and_named(
    own_bench: Path,
    tmp_path: Path,
    part: str,
    damage: Callable[[Path], None],
    cache: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, record = results(tmp_path / "run"), tmp_path / "m.json"
    damage(tmp_path / part.format(IDS[2]))
    folder = str(tmp_path / cache) if cache != "none" else cache
    assert evaluate(own_bench, run, "--json", record, "--cache", folder) == 0
    written = json.loads(record.read_text())
    assert written["ids"] == [id_ for id_ in IDS if id_ != IDS[2]]
    assert any(IDS[2] in warning for warning in written["warnings"])
    assert IDS[2] in capsys.readouterr().err
    assert all(figure["n"] == N - 1 for figure in written["runs"]["run"]["figures"].values())
    assert evaluate(own_bench, run, "--strict") == 2
    assert IDS[2] in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--results-only"]])
def test_masks_of_another_size_are_judged_alike_in_editing_and_measuring(
    own_bench: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (own_bench / "Mask_bbox_5").iterdir():
        mask = Image.open(path)
        mask.resize((40, 32) if IDS[1] in path.name else (64, 64), Image.Resampling.NEAREST).save(path)
    assert edit(own_bench, tmp_path / "run", "--method", "copy-paste", *options) == 1
    editing = capsys.readouterr().err
    assert evaluate(own_bench, tmp_path / "run", "--json", tmp_path / "m.json") == 0
    assert json.loads((tmp_path / "m.json").read_text())["ids"] == [id_ for id_ in IDS if id_ != IDS[1]]
    for error in (editing, capsys.readouterr().err):
        assert "(64, 64)" in error and IDS[1] in error  # resized; of another aspect


def test_results_of_another_size_everywhere_are_of_another_bench(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bench, results(tmp_path, size=64)) == 2
    error = capsys.readouterr().err.strip()
    assert "64x64" in error and "32x32" in error and "\n" not in error


@pytest.mark.parametrize(
    ("ids", "suffix"), [(IDS, "jpg"), (IDS, "webp"), (IDS, "bmp"), ([int(id_) for id_ in IDS], "png")]
)
def test_results_in_any_format_with_or_without_zeros(
    bench: Path, tmp_path: Path, ids: list[object], suffix: str
) -> None:
    evaluation = measured(bench, results(tmp_path / "run", ids, suffix))
    assert evaluation.ids == IDS and not evaluation.left_out
    assert sum(evaluation.lossy.counts.values()) == (N if suffix == "jpg" else 0)
    if suffix == "jpg":
        with pytest.raises(UserError, match="JPEG"):
            measured(bench, tmp_path / "run", strict=True)


def test_results_that_are_not_called_by_ids(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"000000000007\.png"):
        measured(bench, results(tmp_path, [f"{id_}_0" for id_ in IDS]))


def test_two_results_of_an_item_are_named_and_one_counts(
    bench: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = results(tmp_path / "run")
    for name in ("1.png", f"{IDS[1]}.jpg"):
        Image.new("RGB", (32, 32)).save(run / name)
    evaluation = measured(bench, run)
    assert evaluation.ids == IDS
    assert [evaluation.runs[0].images[id_].name for id_ in IDS[:2]] == [f"{id_}.png" for id_ in IDS[:2]]
    assert all(name in caplog.text for name in ("1.png", f"{IDS[1]}.jpg"))


def test_an_id_that_is_listed_twice_counts_once(own_bench: Path, tmp_path: Path) -> None:
    run, figures = results(tmp_path / "run"), []
    metrics = "--metrics", "fid", "clip", "identification", "background", "copying"
    for listed in (IDS, [IDS[0], *IDS, IDS[2]]):
        np.save(own_bench / "id_list.npy", np.array(listed))
        assert evaluate(own_bench, run, *metrics, "--json", tmp_path / "m.json") == 0
        figures.append(json.loads((tmp_path / "m.json").read_text())["runs"])
    assert figures[0] == figures[1]


def test_real_images_that_cannot_be_read_are_left_out_and_named(bench: Path, own_bench: Path, tmp_path: Path) -> None:
    run, real = results(tmp_path / "run"), own_bench / "GT_5"
    clean = tmp_path / "clean.json", tmp_path / "m.json"
    metrics = "--metrics", "fid", "kid", "--real"
    assert evaluate(bench, run, *metrics, bench / "GT_5", "--json", clean[0]) == 0
    shutil.copy(real / f"{IDS[0]}_GT.png", real / "cut.png")
    cut(real / "cut.png")
    assert evaluate(bench, run, *metrics, real, "--json", clean[1]) == 0
    first, second = (json.loads(path.read_text()) for path in clean)
    assert not first["warnings"] and "cut.png" in "".join(second["warnings"])
    assert first["fid"] == second["fid"]
    assert evaluate(bench, run, *metrics, real, "--strict") == 2


def test_statistics_of_another_network_are_named(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, real = results(tmp_path / "run"), tmp_path / "real.npz"
    np.savez(real, mu=np.zeros(12), sigma=np.eye(12), n=9, network=np.str_("another"))
    words = "--metrics", "fid", "--real", real
    assert evaluate(bench, run, *words) == 0
    assert evaluate(bench, run, *words, "--strict") == 2
    assert all('"another"' in line and '"mean colours"' in line for line in capsys.readouterr().err.splitlines())


def test_settings_that_are_no_settings_are_named(bench: Path, tmp_path: Path) -> None:
    run = results(tmp_path / "run" / "results").parent
    (run / "settings.json").write_text("[1]")
    with pytest.raises(UserError, match=r"settings\.json"):
        Run.read(run)


@pytest.mark.parametrize("option", ["--json", "--markdown", "--write-real"])
def test_where_nothing_can_be_written_nothing_is_measured(
    bench: Path, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = results(tmp_path / "run")
    (tmp_path / "file").write_text("")
    monkeypatch.delattr(Evaluation, "measure")
    assert evaluate(bench, run, option, tmp_path / "file" / "m.npz") == 2


def test_a_figure_that_is_not_finite_is_refused(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = measured(bench, results(tmp_path / "run"), names=["clip"])
    monkeypatch.setattr("ldm.evaluation.evaluate.cosine_scores", lambda a, _: np.full(len(a), np.nan))
    with pytest.raises(UserError, match="run: got nan"):
        evaluation.measure()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (9, 8, 7)])
def test_results_of_one_colour_are_measured_or_refused_in_a_line(
    bench: Path, tmp_path: Path, colour: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for id_ in IDS:
        Image.new("RGB", (32, 32), colour).save(run / f"{id_}.png")
    for metric in ("fid", "kid", "precision-recall", "clip", "identification", "foreground-fid", "background"):
        code = evaluate(bench, run, "--metrics", metric)
        assert code == 0 or (colour == (0, 0, 0) and metric in ("clip", "identification"))  # cosines of nothing
        captured = capsys.readouterr()
        assert "nan" not in captured.out and captured.err.count("\n") == (code > 0)


def test_papers_figures_stand_beside_complete_runs_only(bench: Path, tmp_path: Path) -> None:
    network = colours("")
    network.name = "CLIP ViT-B/32 (OpenAI)"
    for ids, expected in ((IDS, 84.97), (IDS[1:], None)):
        run = Run.read(results(tmp_path / f"{len(ids)}", ids))
        evaluation = Evaluation(Bench(bench), [run], network, names=["clip"], num_resamples=5)
        evaluation.measure()
        assert evaluation.metrics[run.name]["clip-paper"].paper == expected


def test_bench_items_know_their_cut_outs(tmp_path: Path) -> None:
    ids = ["000000000001", "000000000012"]
    assert exemplar_labels(tmp_path, ids) is None
    (tmp_path / "items.csv").write_text("ID,Cutout,XMin\n1,a.png,0\n12,b.png,0\n")
    assert exemplar_labels(tmp_path, ids) == ["a.png", "b.png"]
    with pytest.raises(UserError, match="000000000013"):
        exemplar_labels(tmp_path, ["000000000013"])
    rows = "\ufeffID ; Cutout;\r\n1.0;a.png;\r\n;;\r\n12; b.png;\r\n"  # as spreadsheets write it
    (tmp_path / "items.csv").write_bytes(rows.encode())
    assert exemplar_labels(tmp_path, ids) == ["a.png", "b.png"]
    for row in ("x,b.png", "12,"):
        (tmp_path / "items.csv").write_text(f"ID,Cutout\n1,a.png\n{row}\n")
        with pytest.raises(UserError, match="row 2"):
            exemplar_labels(tmp_path, ids)


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
