"""From a bench to its figures, by the command lines: edit, measure, report."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from ldm.editing.settings import EditSettings
from ldm.evaluation.benchmark import PROTOCOLS, BenchmarkConfig, edit_bench
from ldm.evaluation.cocoee import Bench
from ldm.evaluation.evaluate import Run, common_ids, exemplar_labels
from ldm.files import UserError
from ldm.images import find_images

REPOSITORY = Path(__file__).parents[2]
COLOURS = ((200, 40, 30), (30, 180, 60), (40, 60, 220), (230, 220, 50), (220, 60, 210))
N = len(COLOURS)
IDS = [f"{k:012d}" for k in range(1, N + 1)]
# Two steps of the fastest sampler: these tests are about which pictures are made, not about their looks.
FAST = ["--steps", "2", "--sampler", "dpm_solver_pp", "--device", "cpu"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of different colours on noise; each exemplar is its square, cut out."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("made") / "bench"
    for folder in ("GT_5", "Ref_5", "Mask_bbox_5"):
        (root / folder).mkdir(parents=True)
    np.save(root / "id_list.npy", np.arange(1, N + 1))
    for id_, colour in zip(IDS, COLOURS, strict=True):
        scene = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        scene[8:24, 8:24] = colour
        mask = Image.new("L", (32, 32))
        mask.paste(255, (8, 8, 24, 24))
        Image.fromarray(scene).save(root / "GT_5" / f"{id_}_GT.png")
        Image.new("RGB", (20, 20), colour).save(root / "Ref_5" / f"{id_}_ref.png")
        mask.save(root / "Mask_bbox_5" / f"{id_}_mask.png")
    return root


def pictures(outdir: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted((outdir / "results").iterdir())}


def edit(bench: Path, outdir: Path, *options: str) -> int:
    return script("inference_test_bench").main([str(bench), "--outdir", str(outdir), *options])


@pytest.fixture(scope="module")
def one_by_one(bench: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outdir = tmp_path_factory.mktemp("one")
    assert edit(bench, outdir, "--checkpoint", str(tiny_folder), *FAST, "--batch-size", "1") == 0
    return outdir


# ---- editing ----


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
    command = [sys.executable, "scripts/inference_test_bench.py", str(bench), "--outdir", str(tmp_path), *FAST]
    command += ["--checkpoint", str(tiny_folder), "--devices", "2", "--batch-size", "2"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    same(pictures(tmp_path), pictures(one_by_one))


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
    assert "no: no such folder" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_names_itself(bench: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bench"
    broken.mkdir()
    for folder in bench.iterdir():
        (broken / folder.name).symlink_to(folder)
    (broken / "Ref_5").unlink()
    (broken / "Ref_5").mkdir()
    with pytest.raises(ValueError, match=rf"{IDS[0]}_ref.png: no such file"):
        edit_bench(Bench(broken), tmp_path / "out", BenchmarkConfig(method="copy-paste"), device="cpu")


def test_a_folder_of_settings_that_cannot_be_read(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json: damaged"):
        edit_bench(Bench(bench), tmp_path, BenchmarkConfig(method="copy-paste"), device="cpu")


# ---- measuring ----


@pytest.fixture(scope="module")
def pasted(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outdir = tmp_path_factory.mktemp("pasted") / "copy-paste"
    assert edit(bench, outdir, "--method", "copy-paste", "--device", "cpu") == 0
    return outdir


@pytest.fixture(scope="module")
def record(bench: Path, pasted: Path, one_by_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is known of a model's run, of pasting, and of the true pictures."""
    pytest.importorskip("efficientnet_lite_pytorch")
    path = tmp_path_factory.mktemp("figures") / "new" / "metrics.json"
    metrics = ["fid", "clip", "identification", "background", "copying"]
    metrics += ["foreground-fid", "kid", "precision-recall", "diversity"]
    options = ["--metrics", *metrics, "--other-seeds", str(pasted), "--resamples", "50", "--device", "cpu"]
    options += [
        "--cache",
        str(path.parent.parent / "cache.sqlite"),
        "--write-real",
        str(path.parent.parent / "real.npz"),
    ]
    runs = [f"tiny={one_by_one}", str(pasted)]
    files = ["--json", str(path), "--markdown", str(path.with_suffix(".md"))]
    assert script("evaluate").main([str(bench), *runs, *options, *files]) == 0
    return path


@pytest.mark.slow
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
    pytest.importorskip("efficientnet_lite_pytorch")
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
    options = ["--metrics", "clip", "--cache", "none", "--device", "cpu", "--resamples", "10", "--json", str(out)]
    runs = tmp_path / "runs"
    runs.mkdir()
    for id_ in IDS:
        Image.open(bench / "GT_5" / f"{id_}_GT.png").save(runs / f"{id_}.png")
    assert script("evaluate").main([str(slanted), str(runs), *options]) == 0
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
    assert "| FID (EfficientNet-Lite0 (ImageNet)) ↓ |" in table and "the bench's true pictures; n = 5" in table


def test_statistics_are_read_once(
    bench: Path, pasted: Path, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, out = record.parent.parent / "real.npz", tmp_path / "again.json"
    options = ["--real", str(real), "--cache", "none", "--resamples", "20", "--device", "cpu", "--json", str(out)]
    assert script("evaluate").main([str(bench), str(pasted), "--metrics", "fid", *options]) == 0
    figures = json.loads(out.read_text())["runs"]["copy-paste"]["figures"]
    assert figures["fid"]["value"] == pytest.approx(0, abs=1e-3)
    assert "real: real.npz" in figures["fid"]["how"]
    assert script("evaluate").main([str(bench), str(pasted), "--metrics", "kid", *options]) == 2
    assert "real.npz" in capsys.readouterr().err


def test_quality_score_of_a_fitted_mixture(bench: Path, pasted: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("efficientnet_lite_pytorch")
    gmm, out = tmp_path / "gmm.safetensors", tmp_path / "qs.json"
    options = ["--features", "efficientnet-lite0", "--components", "1", "--covariance", "diag", "--cache", "none"]
    assert script("fit_quality_gmm").main([str(bench / "GT_5"), "--out", str(gmm), *options]) == 0
    options = ["--metrics", "qs", "--gmm", str(gmm), "--cache", "none", "--device", "cpu", "--json", str(out)]
    assert script("evaluate").main([str(bench), str(pasted), *options]) == 0
    figure = json.loads(out.read_text())["runs"]["copy-paste"]["figures"]["qs"]
    assert figure["name"].startswith("QS (refitted GMM: not comparable with the paper")
    assert 0 <= figure["value"] <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "lpips"], "metrics: got lpips"),
        (["--metrics", "qs"], "--gmm FILE"),
        (["--metrics", "dino"], "--dino"),
        (["--metrics", "diversity"], "--other-seeds"),
        (["--metrics", "inception"], "--inception FILE"),
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
    pytest.importorskip("efficientnet_lite_pytorch")
    assert script("evaluate").main([str(bench), str(pasted), "--cache", "none", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_all_runs_hold_is_measured(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        Run.read(tmp_path / "nowhere")
    made = Bench(bench)
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (32, 32)).save(run / f"{IDS[1]}.png")
    with pytest.raises(UserError, match="got 1 items of the benchmark in common"):
        common_ids(made, [Run.read(run)])
    Image.new("RGB", (32, 32)).save(run / f"{IDS[3]}.png")
    assert common_ids(made, [Run.read(run), Run("true picture", None)]) == [IDS[1], IDS[3]]


def test_a_picture_of_another_size_is_of_another_bench(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for id_, side in zip(IDS, (32, 32, 30, 32, 32), strict=True):
        Image.new("RGB", (side, side)).save(tmp_path / f"{id_}.png")
    assert script("evaluate").main([str(bench), str(tmp_path), "--cache", "none", "--device", "cpu"]) == 2
    assert f"{IDS[2]}.png: got (30, 30) pixels" in capsys.readouterr().err


def test_bench_items_know_their_cut_outs(tmp_path: Path) -> None:
    ids = ["000000000001", "000000000012"]
    assert exemplar_labels(tmp_path, ids) is None
    (tmp_path / "items.csv").write_text("ID,Cutout,XMin\n1,a.png,0\n12,b.png,0\n")
    assert exemplar_labels(tmp_path, ids) == ["a.png", "b.png"]
    with pytest.raises(UserError, match="lists no item 000000000013"):
        exemplar_labels(tmp_path, ["000000000013"])


def test_identification_of_single_objects(bench: Path, pasted: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    labelled = tmp_path / "bench"
    shutil.copytree(bench, labelled)
    rows = [f"{int(id_)},{'a.png' if k < 2 else 'b.png'}" for k, id_ in enumerate(IDS)]
    (labelled / "items.csv").write_text("\n".join(["ID,Cutout", *rows]))
    options = ["--metrics", "identification", "--focus", "a.png", "--cache", "none", "--device", "cpu"]
    assert script("evaluate").main([str(labelled), str(pasted), *options, "--json", str(tmp_path / "m.json")]) == 0
    run = json.loads((tmp_path / "m.json").read_text())["runs"]["copy-paste"]
    figure = run["figures"]["identification: a.png"]
    assert (figure["name"], figure["value"], figure["n"]) == ("identification of a.png", 1.0, 2)
    assert run["per_item"]["identification"] == [1.0] * N


# ---- reporting ----


def test_the_page_needs_no_other_file(record: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert script("report").main([str(record), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 10
    assert "src='http" not in page and "href" not in page
    assert "worst" in page and IDS[0] in page and "copy-paste" in page
    assert Image.open(tmp_path / "figures.png").size[0] > 300


def test_sweeps_are_drawn_of_runs_that_differ_in_one_setting(record: Path) -> None:
    pytest.importorskip("matplotlib")
    from scripts.report import choose_samples, sweeps

    written = json.loads(record.read_text())
    assert sweeps(written) == {}
    run = written["runs"]["tiny"]
    written["runs"]["more"] = run | {"settings": run["settings"] | {"guidance_scale": 2.0}}
    assert list(sweeps(written)) == ["Guidance scale"]
    written["runs"]["longer"] = run | {"settings": run["settings"] | {"num_steps": 9}}
    assert list(sweeps(written)) == ["Guidance scale", "Steps: quality against time"]
    written["runs"]["within"] = run | {"settings": run["settings"] | {"guidance_interval": [0.2, 0.8]}}
    assert list(sweeps(written)) == ["Guidance scale", "Steps: quality against time"]
    assert choose_samples([3.0, 1.0, 2.0, 5.0, 4.0], "higher") == {
        "worst": [1, 2, 0],
        "median": [2, 0, 4],
        "best": [3, 4, 0],
    }
    assert choose_samples([3.0, 1.0], "lower")["best"] == [1, 0]


def test_a_record_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.json").write_text("[]")
    assert script("report").main([str(tmp_path / "m.json"), "--out", str(tmp_path / "out")]) == 2
    assert "m.json: not a record of scripts/evaluate.py" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- real pictures for FID ----


def test_squares_for_fid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "coco", tmp_path / "square"
    (source / "sub").mkdir(parents=True)
    ramp = np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (60, 1, 3))
    Image.fromarray(ramp).save(source / "sub" / "wide.png")
    Image.fromarray(ramp.transpose(1, 0, 2)).save(source / "tall.png")
    Image.new("L", (8, 8), 7).save(source / "grey.jpg")
    command = [str(source), str(target), "--size", "30", "--workers", "1"]
    assert script("create_square_gt_for_fid").main(command) == 0
    wide = np.asarray(Image.open(target / "sub" / "wide.png"))
    assert wide.shape == (30, 30, 3)
    # The middle half of the ramp, which runs from 30 to 90.
    assert np.allclose(wide[15, :, 0], np.linspace(30.5, 88.5, 30), atol=1.5)
    assert np.array_equal(np.asarray(Image.open(target / "tall.png")), wide.transpose(1, 0, 2))
    assert Image.open(target / "grey.png").mode == "RGB"
    stamp = (target / "tall.png").stat().st_mtime_ns
    (target / "grey.png").unlink()
    assert script("create_square_gt_for_fid").main(command) == 0
    assert (target / "grey.png").exists() and (target / "tall.png").stat().st_mtime_ns == stamp
    assert [path.name for path in find_images(target)] == ["grey.png", "wide.png", "tall.png"]
    assert script("create_square_gt_for_fid").main([str(tmp_path / "none"), str(target)]) == 2
    assert "none: no such folder" in capsys.readouterr().err
