from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import inference
from ldm.editing.cli import parse, run_command, use_bundled_example
from ldm.editing.editor import EXAMPLE_PARTS, Editor
from ldm.editing.progress import edit_progress
from ldm.editing.watermark import read_watermark

REPOSITORY = Path(inference.__file__).parent


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
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(tiny_folder, files, out, "--seed", "7", "--n-samples", "2", "--feather", "1") == 0
    assert sorted(p.name for p in out.iterdir()) == ["scene_7.png", "scene_7_grid.png", "scene_8.png"]
    assert f"wrote {out / 'scene_7.png'}" in capsys.readouterr().out
    with Image.open(out / "scene_8.png") as result, Image.open(files["scene"]) as scene:
        settings = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
        before, after = np.asarray(scene), np.asarray(result)
    assert settings["seed"] == 8 and settings["num_steps"] == 2 and settings["sampler"] == "dpm_solver_pp"
    assert settings["precision"] == "float32"  # what `auto` is on the CPU
    outside = np.ones((60, 90), bool)
    outside[19:46, 29:56] = False
    assert np.array_equal(before[outside], after[outside])
    assert not np.array_equal(before, after)
    with Image.open(out / "scene_7_grid.png") as grid:
        assert grid.width > 4 * 128 and grid.height == 256
    assert run(tiny_folder, files, out, "--n-samples", "4", "--overwrite") == 0
    with Image.open(out / "scene_0_grid.png") as grid:  # scene, hole, exemplar and three of four; the fourth below
        assert grid.width == 5 * 384 + 128 + 5 * 8 and grid.height == 2 * 256 + 8


def edited_at(path: Path, scene: Path) -> tuple[int, int, int, int]:
    """The box of what differs from the scene."""
    with Image.open(path) as result, Image.open(scene) as before:
        return ImageChops.difference(result, before).getbbox() or (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "box"),
    [
        (["--box", "30,20,55,45"], (30, 20, 55, 45)),
        (["--box", "5,6,15,16", "--box", "60,40,80,55"], (5, 6, 80, 55)),
        (["--polygon", "10,10 40,10 40,30 10,30"], (10, 10, 41, 31)),
        (["--box", "30,20,55,45", "--grow", "4"], (26, 16, 59, 49)),
        (["--polygon", "30,20,55,20,42,45", "--shape", "box"], (30, 20, 56, 46)),
    ],
)
def test_holes_without_a_mask(
    options: list[str], box: tuple[int, int, int, int], tiny_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--image", str(files["scene"]), "--reference", str(files["exemplar"]), "--checkpoint", str(tiny_folder)]
    words += ["--outdir", str(tmp_path / "out"), "--steps", "2", "--device", "cpu", "--skip_grid"]
    assert inference.main([*words, *options]) == 0
    assert edited_at(tmp_path / "out" / "scene_0.png", files["scene"]) == box


def test_the_transparent_part_is_the_hole(tiny_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    scene = Image.open(files["scene"]).convert("RGBA")
    words = ["--reference", str(files["exemplar"]), "--checkpoint", str(tiny_folder), "--device", "cpu", "--skip_grid"]
    words += ["--outdir", str(tmp_path), "--steps", "2", "--image"]
    assert inference.main([*words, str(files["scene"])]) == 2  # nothing is transparent
    scene.paste((0, 0, 0, 0), (10, 20, 30, 50))
    scene.save(tmp_path / "cut.png")
    assert inference.main([*words, str(tmp_path / "cut.png")]) == 0
    assert edited_at(tmp_path / "cut_0.png", files["scene"]) == (10, 20, 30, 50)


def test_an_exemplar_for_each_part(tiny_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(red)
    Image.new("RGB", (8, 8), (0, 0, 255)).save(blue)
    both = ["--box", "5,6,25,26", "--box", "60,30,80,50"]
    words = ["--image", str(files["scene"]), "--checkpoint", str(tiny_folder), "--steps", "2", "--device", "cpu"]
    for name, references in (("ab", [red, blue]), ("ba", [blue, red])):
        assert (
            inference.main([*words, *both, "--outdir", str(tmp_path / name), "--reference", *map(str, references)]) == 0
        )
    alone = ["--box", "5,6,25,26", "--outdir", str(tmp_path / "a"), "--reference", str(red)]
    assert inference.main([*words, *alone]) == 0
    ab, ba, a = (np.asarray(Image.open(tmp_path / name / "scene_0.png")) for name in ("ab", "ba", "a"))
    assert not np.array_equal(ab[30:50, 60:80], ba[30:50, 60:80])
    assert np.array_equal(ab[:27], a[:27])  # the first part is what it is alone
    three = [*both, "--reference", str(red), str(blue), str(red), "--outdir", str(tmp_path / "three")]
    assert inference.main([*words, *three]) == 2


def test_listed_seeds_and_the_most_similar_first(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    assert run(tiny_folder, files, tmp_path / "out", "--seed", "9", "4", "6", "--rank") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "  seed " in line]
    assert {line[2] for line in lines} == {"9", "4", "6"}
    scores = [float(line[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    with Image.open(tmp_path / "out" / "scene_4.png") as picture:
        settings = json.loads(picture.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
    assert settings["seed"] == 4 and settings["similarity"] in scores


def test_flagged_results_are_withheld(
    tiny_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdicts = {"all": ["found something"] * 4, "first": ["found something", None, None, None]}
    monkeypatch.setattr(
        "ldm.editing.safety.load_filter", lambda name, _: lambda pictures: verdicts[name][: len(pictures)]
    )
    for name, kept in (("all", []), ("first", ["scene_3_grid.png", "scene_4.png"])):
        assert run(tiny_folder, files, tmp_path / name, "--seed", "3", "--n-samples", "2", "--safety", name) == 1
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == kept
        assert "seed 3: found something" in capsys.readouterr().err


def test_watermark_and_weights_can_be_told(tiny_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("scene", "mask"):
        with Image.open(files[name]) as picture:
            picture.resize((360, 240)).save(files[name])
    assert run(tiny_folder, files, tmp_path / "out", "--watermark", "made here") == 0
    with Image.open(tmp_path / "out" / "scene_0.png") as result:
        settings = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
        assert read_watermark(result, len("made here")) == b"made here"
    digest = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert settings["checkpoint_sha256"] == digest and settings["watermark"] == "made here"


def test_a_scene_too_small_for_a_mark_is_told_before_painting(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_folder, files, tmp_path / "out", "--watermark") == 2
    assert "90 x 60" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memory_is_kept_by_commands_alone(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[None]()
    monkeypatch.setattr("ldm.editing.cli.keep_freed_memory", lambda: calls.append(None))
    Editor.from_pretrained(tiny_folder).edit(*files.values(), num_steps=1)
    assert run(tiny_folder, files, tmp_path, "--no-keep-memory") == 0
    assert not calls
    assert run(tiny_folder, files, tmp_path) == 0
    assert calls


@pytest.mark.parametrize("words", [[], ["--compile"]])
def test_the_unet_is_compiled_on_request(
    words: list[str], tiny_folder: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[object]()
    monkeypatch.setattr("ldm.models.unet.UNetModel.compile", lambda self, **_: calls.append(self))
    assert run(tiny_folder, files, tmp_path, *words) == 0
    assert len(calls) == len(words)


@pytest.mark.parametrize("command", [["--n_iter", "2"], ["--box", "5,6,15,16", "--box", "60,40,80,55", "--separate"]])
def test_the_bar_names_the_phases(
    command: list[str], tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two rounds of two steps: seeds one after the other, or parts of the hole."""
    given = ["--image", str(files["scene"]), "--reference", str(files["exemplar"]), "--checkpoint", str(tiny_folder)]
    given += [] if "--box" in command else ["--mask", str(files["mask"])]
    given += ["--outdir", str(tmp_path), "--steps", "2", "--device", "cpu"]
    assert inference.main([*given, *command]) == 0
    shown = capfd.readouterr().err
    phases = ["loading", "encoding", "painting", "decoding"]
    places = [shown.index(phase) for phase in phases]
    assert places == sorted(places)
    assert "4/4" in shown


def test_the_clock_moves_during_a_long_step(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ldm.editing.progress.REDRAW_SECONDS", 0.01)
    with edit_progress(1, 20) as progress:
        progress["on_phase"]("encoding")
        before, waited = capfd.readouterr().err, ""
        while waited.count("encoding") < 3:  # nothing is counted meanwhile
            waited += capfd.readouterr().err
    assert "encoding" in before


def test_never_overwrites_without_saying(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(tiny_folder, files, out) == 0
    first = (out / "scene_0.png").read_bytes()
    assert run(tiny_folder, files, out, "--guidance-scale", "2") == 0
    assert (out / "scene_0.png").read_bytes() == first
    assert (out / "scene_0_v2.png").is_file() and (out / "scene_0_grid_v2.png").is_file()
    assert "earlier" in capsys.readouterr().out
    assert run(tiny_folder, files, out, "--guidance-scale", "2", "--overwrite") == 0
    assert f"overwrote {out / 'scene_0.png'}" in capsys.readouterr().out
    assert (out / "scene_0.png").read_bytes() != first
    assert not (out / "scene_0_v3.png").exists()


def test_equal_seed_equal_picture_whatever_the_batch(tiny_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    assert run(tiny_folder, files, tmp_path / "three", "--seed", "4", "--n-samples", "3") == 0
    assert run(tiny_folder, files, tmp_path / "one", "--seed", "5") == 0
    pictures = [np.asarray(Image.open(tmp_path / name / "scene_5.png")).astype(int) for name in ("three", "one")]
    # The batch size may choose another kernel, whose float32 rounding can tip a pixel to the next grey level.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_the_original_command_line(tiny_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = (
        f"--plms --outdir {out} --config {tiny_folder / 'config.yaml'} --ckpt {tiny_folder / 'model.safetensors'} "
        f"--image_path {files['scene']} --mask_path {files['mask']} --reference_path {files['exemplar']} "
        "--seed 321 --scale 5"
    )
    rest = "--H 512 --W 512 --C 4 --f 8 --n_samples 1 --n_iter 2 --fixed_code --skip_save --precision autocast"
    assert parse(command.split(), "")[1].steps == 50
    ours = "--guidance-interval 0.2 0.8 --device cpu"
    assert inference.main(f"{command} {rest} --ddim_eta 0.0 --ddim_steps 3 {ours}".split()) == 0
    with Image.open(out / "scene_321.png") as result:
        settings = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
    assert (settings["sampler"], settings["num_steps"], settings["guidance_scale"]) == ("plms", 3, 5.0)
    assert settings["guidance_interval"] == [0.2, 0.8]
    assert (out / "scene_322.png").is_file()  # the second iteration


def test_bundled_example_is_the_first_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.editing.editor.BUNDLED_MODEL", tmp_path)
    for name, parts in (("a", ["scene"]), ("c", EXAMPLE_PARTS), ("b", EXAMPLE_PARTS)):
        (tmp_path / "examples" / name).mkdir(parents=True)
        for part in parts:
            (tmp_path / "examples" / name / f"{part}.png").touch()
    assert use_bundled_example(parse([], "")[0]) == "b"


def test_no_arguments_edit_the_bundled_example(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = tmp_path / "mini" / "examples" / "teapot"
    example.mkdir(parents=True)
    for name, path in files.items():
        path.rename(example / f"{name}.png")
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / "mini" / name).symlink_to(tiny_folder / name)
    monkeypatch.setattr("ldm.editing.editor.BUNDLED_MODEL", tmp_path / "mini")
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
        (lambda _: ["--precision", "bf16"], "use fp32"),
        (lambda _: ["--steps", "5000"], "num_steps: got 5000"),
        (lambda files: ["--outdir", str(files["scene"])], "scene.png"),
    ],
)
def test_errors_are_one_line(
    spoil,
    message: str,
    tiny_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ldm.editing.editor.has_bf16", lambda: False)
    extra = spoil(files)
    assert run(tiny_folder, files, tmp_path / "out", *extra) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not list((tmp_path / "out").glob("*"))


def test_the_place_of_the_results_is_tried_before_painting(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", lambda *_, **__: pytest.fail("painted"))
    assert run(tiny_folder, files, files["scene"]) == 2
    assert "scene.png" in capsys.readouterr().err
    long = tmp_path / f"{'n' * 250}.png"
    Image.open(files["scene"]).save(long)
    assert run(tiny_folder, files | {"scene": long}, tmp_path / "out") == 2
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_named_by_the_file_that_it_lacks_room_for(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def full(self: Image.Image, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(tiny_folder, files, tmp_path / "out") == 2
    assert "scene_0.png" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_the_process_is_set_up_once(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("ldm.editing.cli.keep_freed_memory", lambda: calls.append(1))
    assert run(tiny_folder, files, tmp_path / "out") == 0
    assert calls == [1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image", "a.png"], "give all three"),
        (["--config", "configs/v1.yaml"], "--config without --checkpoint"),
        (["--eta", "1"], "only ddim"),
        (["--feather", "-2"], "feather: got -2"),
        (["--image", "a.png", "--reference", "b.png", "--box", "1,2,x,3"], "1,2,x,3"),
        (["--image", "a.png", "--reference", "b.png", "--mask", "c.png", "--box", "1,2,3,4"], "give either"),
        (["--seed", "1", "2", "--n-samples", "3"], "got 2 seeds for 3 samples"),
        (["--grow", "-1"], "dilate: got -1"),
        (["--n-samples", "0"], "n_samples: got 0"),
        (["--steps", "-1"], "num_steps: got -1"),
        (["--guidance-scale", "nan"], "guidance_scale: got nan"),
        (["--mode", "relight", "--image", "a.png"], "scripts/relight.py"),
        (["--guess-mode"], "--guess-mode: goes with --control"),
    ],
)
def test_wrong_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        inference.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("has", [True, False])
def test_the_remedy_for_lack_of_memory_does_not_slow_down(
    has: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise MemoryError

    monkeypatch.setattr("ldm.editing.editor.has_bf16", lambda: has)
    monkeypatch.setattr("ldm.editing.editor.pick_device", lambda _: torch.device("cpu"))
    assert run_command(fail, "fewer samples") == 2
    assert ("bf16" in capsys.readouterr().err) == has


def test_mask_of_another_size_is_a_plain_warning(
    tiny_folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(files["mask"]).resize((45, 30)).save(files["mask"])
    assert run(tiny_folder, files, tmp_path / "out") == 0
    assert "(45, 30)" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, inference\n"
        "try: inference.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'PIL', 'transformers', 'pytorch_lightning', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_bundled_edit_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """Nor looks for garbage in modules. sympy takes a second: torch needs it for operations on the meta device."""
    words = ["--steps", "1", "--device", "cpu", "--outdir", str(tmp_path / "out")]
    unneeded = ("ldm.evaluation", "ldm.training", "transformers", "sympy", "pytorch_lightning", "cv2")
    code = (
        f"import gc, sys, inference\nassert inference.main({words}) == 0\n"
        "print(gc.isenabled() and gc.get_freeze_count() > 100_000)\n"
        f"print([name for name in sys.modules if name.startswith({unneeded})])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["True", "[]"]
