from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from ldm.config import (
    AutoencoderConfig,
    Config,
    ExemplarEncoderConfig,
    ModelConfig,
    ScheduleConfig,
    UNetConfig,
    dump_config,
)
from ldm.samplers import SAMPLERS

REPOSITORY = Path(inference.__file__).parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model with random weights, small enough to sample in well under a second."""
    from ldm.checkpoint.io import write_safetensors
    from ldm.latent_diffusion import load_model

    config = Config(
        model=ModelConfig(
            image_size=32,
            schedule=ScheduleConfig(name="cosine"),
            unet=UNetConfig(
                model_channels=32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[1], context_dim=16
            ),
            first_stage=AutoencoderConfig(ch=32, ch_mult=[1, 1], num_res_blocks=1),
            exemplar_encoder=ExemplarEncoderConfig(
                image_size=14, patch_size=7, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2
            ),
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.yaml").write_text(dump_config(config))
    torch.manual_seed(0)
    write_safetensors(folder / "model.safetensors", load_model(config).state_dict())
    return folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    paths = {name: tmp_path / f"{name}.png" for name in ("scene", "mask", "exemplar")}
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(paths["scene"])
    mask = Image.new("L", (90, 60))
    mask.paste(255, (30, 20, 55, 45))
    mask.save(paths["mask"])
    Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(paths["exemplar"])
    return paths


def run(model: Path, files: dict[str, Path], outdir: Path, *options: str) -> int:
    image, mask, exemplar = (str(files[name]) for name in ("scene", "mask", "exemplar"))
    given = ["--image", image, "--mask", mask, "--reference", exemplar, "--checkpoint", str(model)]
    return inference.main([*given, "--outdir", str(outdir), "--steps", "2", "--device", "cpu", *options])


def test_writes_result_grid_and_settings(
    tiny_model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(tiny_model, files, out, "--seed", "7", "--n-samples", "2", "--feather", "1") == 0
    assert sorted(p.name for p in out.iterdir()) == ["scene_7.png", "scene_7_grid.png", "scene_8.png"]
    assert f"wrote {out / 'scene_7.png'}" in capsys.readouterr().out
    with Image.open(out / "scene_8.png") as result, Image.open(files["scene"]) as scene:
        settings = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
        before, after = np.asarray(scene), np.asarray(result)
    assert settings["seed"] == 8 and settings["num_steps"] == 2 and settings["sampler"] == "dpm_solver_pp"
    outside = np.ones((60, 90), bool)
    outside[19:46, 29:56] = False
    assert np.array_equal(before[outside], after[outside])
    assert not np.array_equal(before, after)
    with Image.open(out / "scene_7_grid.png") as grid:
        assert grid.width > 4 * 128 and grid.height == 256


def test_never_overwrites_without_saying(
    tiny_model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(tiny_model, files, out) == 0
    first = (out / "scene_0.png").read_bytes()
    assert run(tiny_model, files, out, "--guidance-scale", "2") == 0
    assert (out / "scene_0.png").read_bytes() == first
    assert (out / "scene_0_v2.png").is_file() and (out / "scene_0_grid_v2.png").is_file()
    assert "kept the earlier results" in capsys.readouterr().out
    assert run(tiny_model, files, out, "--guidance-scale", "2", "--overwrite") == 0
    assert f"overwrote {out / 'scene_0.png'}" in capsys.readouterr().out
    assert (out / "scene_0.png").read_bytes() != first
    assert not (out / "scene_0_v3.png").exists()


def test_equal_seed_equal_picture_whatever_the_batch(tiny_model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    assert run(tiny_model, files, tmp_path / "three", "--seed", "4", "--n-samples", "3") == 0
    assert run(tiny_model, files, tmp_path / "one", "--seed", "5") == 0
    pictures = [np.asarray(Image.open(tmp_path / name / "scene_5.png")).astype(int) for name in ("three", "one")]
    # The batch size may choose another kernel, whose float32 rounding can tip a pixel to the next grey level.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_the_original_command_line(tiny_model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = (
        f"--plms --outdir {out} --config {tiny_model / 'config.yaml'} --ckpt {tiny_model / 'model.safetensors'} "
        f"--image_path {files['scene']} --mask_path {files['mask']} --reference_path {files['exemplar']} "
        "--seed 321 --scale 5"
    )
    rest = "--H 512 --W 512 --C 4 --f 8 --n_samples 1 --n_iter 2 --fixed_code --skip_save --precision autocast"
    assert inference.main(f"{command} {rest} --ddim_eta 0.0 --device cpu".split()) == 0
    with Image.open(out / "scene_321.png") as result:
        settings = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
    assert (settings["sampler"], settings["num_steps"], settings["guidance_scale"]) == ("plms", 50, 5.0)
    assert (out / "scene_322.png").is_file()  # the second iteration
    assert inference.main(f"{command} --ddim_steps 3 --device cpu --overwrite".split()) == 0
    with Image.open(out / "scene_321.png") as result:
        assert json.loads(result.text["parameters"])["num_steps"] == 3  # pyright: ignore[reportAttributeAccessIssue]


def test_bundled_example_is_the_first_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.editing.BUNDLED_MODEL", tmp_path)
    for name, parts in (("a", ["scene"]), ("c", inference.EXAMPLE_PARTS), ("b", inference.EXAMPLE_PARTS)):
        (tmp_path / "examples" / name).mkdir(parents=True)
        for part in parts:
            (tmp_path / "examples" / name / f"{part}.png").touch()
    assert inference.bundled_example().name == "b"


def test_no_arguments_edit_the_bundled_example(
    tiny_model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = tmp_path / "mini" / "examples" / "teapot"
    example.mkdir(parents=True)
    for name, path in files.items():
        path.rename(example / f"{name}.png")
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / "mini" / name).symlink_to(tiny_model / name)
    monkeypatch.setattr("ldm.editing.BUNDLED_MODEL", tmp_path / "mini")
    monkeypatch.chdir(tmp_path)
    assert inference.main([]) == 0
    assert (tmp_path / "results" / "teapot_0.png").is_file()


def bad_mask(files: dict[str, Path]) -> list[str]:
    Image.new("L", (90, 60)).save(files["mask"])
    return []


def corrupt_exemplar(files: dict[str, Path]) -> list[str]:
    files["exemplar"].write_bytes(files["exemplar"].read_bytes()[:60])
    return []


def missing_scene(files: dict[str, Path]) -> list[str]:
    files["scene"].unlink()
    return []


def wrong_checkpoint(files: dict[str, Path]) -> list[str]:
    return ["--checkpoint", str(files["scene"]), "--config", str(REPOSITORY / "configs" / "mini.yaml")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_mask, "mask.png: empty"),
        (corrupt_exemplar, "exemplar.png: damaged"),
        (missing_scene, "scene.png: no such file"),
        (wrong_checkpoint, "scene.png"),
        (lambda _: ["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt: no such"),
        (lambda _: ["--precision", "fp16"], "float16 on the CPU"),
        (lambda _: ["--steps", "5000"], "num_steps: got 5000"),
        (lambda _: ["--feather", "-2"], "feather=-2"),
        (lambda files: ["--outdir", str(files["scene"])], "scene.png"),
    ],
)
def test_errors_are_one_line(
    spoil, message: str, tiny_model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = spoil(files)
    assert run(tiny_model, files, tmp_path / "out", *extra) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image", "a.png"], "give all three"),
        (["--config", "configs/v1.yaml"], "--config without --checkpoint"),
        (["--eta", "1"], "only --sampler ddim"),
        (["--n-samples", "0"], "expected 1 or more"),
        (["--steps", "-1"], "expected 1 or more"),
    ],
)
def test_wrong_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        inference.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_mask_of_another_size_is_a_plain_warning(
    tiny_model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(files["mask"]).resize((45, 30)).save(files["mask"])
    assert run(tiny_model, files, tmp_path / "out") == 0
    assert "warning: the mask is 45x30" in capsys.readouterr().err


def test_sampler_names_are_the_samplers() -> None:
    assert set(inference.SAMPLER_NAMES) == set(SAMPLERS) == set(inference.DEFAULT_STEPS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, inference\n"
        "try: inference.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'PIL', 'transformers', 'pytorch_lightning', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_editing_imports_neither_lightning_nor_transformers() -> None:
    code = "import sys, ldm.editing; print({'transformers', 'pytorch_lightning', 'cv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the benchmark's command lines ----


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Four discs of different colours on noise; each exemplar is its disc, cut out and brightened."""
    rng = np.random.default_rng(0)
    root = tmp_path / "bench"
    for folder in ("GT_4", "Ref_4", "Mask_bbox_4"):
        (root / folder).mkdir(parents=True)
    ids = np.arange(1, 5)
    np.save(root / "id_list.npy", ids)
    for id_, colour in zip(ids, ((200, 40, 30), (30, 180, 60), (40, 60, 220), (230, 220, 50)), strict=True):
        scene = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        scene[8:24, 8:24] = colour
        mask = Image.new("L", (32, 32))
        mask.paste(255, (8, 8, 24, 24))
        Image.fromarray(scene).save(root / "GT_4" / f"{id_:012d}_GT.png")
        Image.new("RGB", (20, 20), colour).save(root / "Ref_4" / f"{id_:012d}_ref.png")
        mask.save(root / "Mask_bbox_4" / f"{id_:012d}_mask.png")
    return root


def test_bench_is_edited_resumed_and_measured(
    tiny_model: Path, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, evaluate = script("inference_test_bench"), script("evaluate")
    model = ["--checkpoint", str(tiny_model), "--steps", "2", "--device", "cpu", "--batch-size", "3"]
    for kind in ("own", "null", "other"):
        assert edit.main([str(bench), "--outdir", str(tmp_path / kind), "--exemplar", kind, *model]) == 0
    results = tmp_path / "own" / "results"
    names = [f"{id_:012d}.png" for id_ in range(1, 5)]
    assert sorted(path.name for path in results.iterdir()) == names
    scene, result = (np.asarray(Image.open(p)) for p in (bench / "GT_4" / "000000000003_GT.png", results / names[2]))
    outside = np.ones((32, 32), bool)
    outside[8:24, 8:24] = False
    assert np.array_equal(scene[outside], result[outside])

    # A stopped run goes on: what is there stays, what is missing comes out as before.
    before, stamp = np.asarray(Image.open(results / names[3])).astype(int), (results / names[0]).stat().st_mtime_ns
    (results / names[3]).unlink()
    assert edit.main([str(bench), "--outdir", str(tmp_path / "own"), *model]) == 0
    assert "3 of 4 are there already" in capsys.readouterr().out
    assert (results / names[0]).stat().st_mtime_ns == stamp
    # Rounding differs between batch sizes by less than one grey level.
    assert np.abs(np.asarray(Image.open(results / names[3])).astype(int) - before).max() <= 1
    # Other settings do not continue a folder.
    assert edit.main([str(bench), "--outdir", str(tmp_path / "own"), *model, "--guidance-scale", "2"]) == 2
    assert "choose another --outdir" in capsys.readouterr().err

    pytest.importorskip("efficientnet_lite_pytorch")
    runs = [str(tmp_path / "own"), "--null", str(tmp_path / "null"), "--other", str(tmp_path / "other" / "results")]
    figures = tmp_path / "metrics" / "figures.json"
    assert evaluate.main([str(bench), *runs, "--json", str(figures), "--device", "cpu"]) == 0
    assert "copy-paste" in capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert written["n"] == 4
    assert written["identification"] == written["runs"]["results"]["identification"]["value"]
    for name in ("copy-paste", "true picture"):  # the exemplar itself, resized
        assert written["runs"][name]["identification"]["value"] == 1.0
    assert set(written["runs"]) == {"results", "null token", "other exemplar", "copy-paste", "true picture"}


def test_evaluate_measures_what_all_runs_hold(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = script("evaluate")
    assert evaluate.main([str(bench), str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    run_ = tmp_path / "run"
    run_.mkdir()
    Image.new("RGB", (32, 32)).save(run_ / "000000000002.png")
    assert evaluate.main([str(bench), str(run_)]) == 2
    assert "got 1 items of the benchmark in common" in capsys.readouterr().err
    Image.new("RGB", (30, 32)).save(run_ / "000000000004.png")
    assert evaluate.main([str(bench), str(run_)]) == 2
    assert "000000000004.png: got (30, 32) pixels" in capsys.readouterr().err


def test_bench_items_know_their_cut_outs(tmp_path: Path) -> None:
    evaluate = script("evaluate")
    ids = ["000000000001", "000000000012"]
    assert evaluate.exemplar_labels(tmp_path, ids) is None
    (tmp_path / "items.csv").write_text("ID,Cutout,XMin\n1,a.png,0\n12,b.png,0\n")
    assert evaluate.exemplar_labels(tmp_path, ids) == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="lists no item 000000000013"):
        evaluate.exemplar_labels(tmp_path, ["000000000013"])
