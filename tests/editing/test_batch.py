"""Many edits at once: each row exactly once, whatever fails, stops, or shares the work."""

from __future__ import annotations

import csv
import errno
import json
import os
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import inference
from ldm.editing import batch
from ldm.editing.batch import Report, edit_many, match_folders, read_jobs
from ldm.editing.editor import Editor
from ldm.editing.request import EditRequest
from ldm.editing.settings import EditSettings
from ldm.files import UserError
from ldm.images import save_png
from ldm.latent_diffusion import LatentDiffusion

ROWS = 7
SIZES = [(90, 60), (64, 64), (40, 120), (33, 47), (200, 90), (70, 70), (51, 80)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scenes of different sizes with masks and exemplars of the same names, and a table of them."""
    rng, root = np.random.default_rng(0), tmp_path / "work"
    for part in ("scenes", "masks", "exemplars"):
        (root / part).mkdir(parents=True)
    rows = []
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / "scenes" / f"{i}.png")
        mask = Image.new("L", (width, height))
        mask.paste(255, (5, 6, 25, 30))
        mask.save(root / "masks" / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(root / "exemplars" / f"{i}.png")
        rows.append({"name": f"r{i}", "scene": f"scenes/{i}.png", "reference": f"exemplars/{i}.png", "seed": i})
        rows[-1] |= {"box": "5,6,25,30"} if i % 2 else {"mask": f"masks/{i}.png"}
    write_table(root / "jobs.csv", rows)
    return root


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)


def run(model: Path, folder: Path, out: str, *options: str, table: str = "jobs.csv") -> int:
    words = ["--jobs", str(folder / table), "--checkpoint", str(model), "--outdir", str(folder / out)]
    return inference.main([*words, "--steps", "2", "--device", "cpu", "--batch-size", "3", *options])


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*.png")}


def report(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for path in folder.glob("report*.jsonl") for line in path.read_text().splitlines()]
    assert len({line["name"] for line in lines}) == len(lines)
    return {line["name"]: line["status"] for line in lines}


def test_rows_are_the_edits_that_they_say(tiny_folder: Path, folder: Path) -> None:
    assert run(tiny_folder, folder, "out") == 0
    made = pictures(folder / "out")
    assert set(made) == {f"r{i}" for i in range(ROWS)} and set(report(folder / "out").values()) == {"done"}
    for i in (1, 4):  # of different sizes, in different batches
        words = ["--image", str(folder / "scenes" / f"{i}.png"), "--mask", str(folder / "masks" / f"{i}.png")]
        words += ["--reference", str(folder / "exemplars" / f"{i}.png"), "--checkpoint", str(tiny_folder)]
        options = [
            "--seed",
            str(i),
            "--steps",
            "2",
            "--device",
            "cpu",
            "--outdir",
            str(folder / "alone"),
            "--skip_grid",
        ]
        assert inference.main([*words, *options]) == 0
        # another batch size may choose other kernels, whose rounding can tip a pixel to the next grey level
        assert np.abs(pictures(folder / "alone")[f"{i}_{i}"] - made[f"r{i}"]).max() <= 1


def test_stopped_work_goes_on_where_results_are_missing_or_damaged(tiny_folder: Path, folder: Path) -> None:
    assert run(tiny_folder, folder, "out") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.png")}
    damaged, missing = folder / "out" / "r3.png", folder / "out" / "r5.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    missing.unlink()
    assert run(tiny_folder, folder, "out") == 0
    made = {name for name, status in report(folder / "out").items() if status == "done"}
    assert made == {"r3", "r5"}
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.png")}
    assert {name for name in before if before[name] != after[name]} == {"r3.png", "r5.png"}
    assert run(tiny_folder, folder, "out", "--guidance-scale", "2") == 0
    assert set(report(folder / "out").values()) == {"done"}  # other settings, other pictures


def test_a_row_that_fails_leaves_the_others(
    tiny_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "scenes" / "2.png").write_bytes(b"no picture")
    rows = list(csv.DictReader((folder / "jobs.csv").read_text().splitlines()))
    rows[1]["box"] = "500,500,600,600"
    rows[4]["num_steps"] = "5000"  # more than the model has timesteps
    write_table(folder / "jobs.csv", [dict(row) for row in rows])
    assert run(tiny_folder, folder, "out") == 1
    failed = {name for name, status in report(folder / "out").items() if status == "failed"}
    assert failed == {"r1", "r2", "r4"}
    assert set(pictures(folder / "out")) == {f"r{i}" for i in (0, 3, 5, 6)}
    told = capsys.readouterr()
    assert "failed: r2: " in told.err and "2.png: " in told.err
    assert "4 done, 0 there already, 3 failed" in told.out


def test_a_flagged_row_has_no_result(tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def content_filter(pictures: Sequence[Image.Image]) -> list[str | None]:
        seen.append(pictures[0].size)
        return ["found something" if len(seen) == 1 else None] * len(pictures)

    monkeypatch.setattr("ldm.editing.safety.load_filter", lambda *_: content_filter)
    assert run(tiny_folder, folder, "out", "--safety", "--workers", "1") == 1
    rows = [json.loads(line) for line in (folder / "out" / "report.jsonl").read_text().splitlines()]
    flagged = [row for row in rows if row["status"] == "failed"]
    assert [row["reason"] for row in flagged] == ["withheld: found something"]
    assert set(pictures(folder / "out")) == {f"r{i}" for i in range(ROWS)} - {flagged[0]["name"]}
    assert run(tiny_folder, folder, "out", "--watermark", "me") == 1  # too small for a mark
    assert set(report(folder / "out").values()) == {"failed"}


def test_prompts_of_rows(text_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of their own, rows of the command line's, and one that the model does not read."""
    common = {"mask": "masks/1.png", "scene": "scenes/1.png"}
    rows = [
        {"name": "dog", **common, "prompt": "a dog"},
        {"name": "cat", **common, "prompt": "a cat"},
        {"name": "not", **common, "prompt": "a dog", "negative_prompt": "cat"},
        {"name": "default", **common},
        {"name": "picture", **common, "reference": "exemplars/1.png"},
    ]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--checkpoint", str(text_folder), "--steps", "2", "--device", "cpu"]
    bulk = ["--jobs", str(folder / "jobs.jsonl"), "--outdir", str(folder / "out"), "--prompt", "a cat"]
    assert inference.main([*words, *bulk]) == 1
    assert "failed: picture: " in capsys.readouterr().err
    made = pictures(folder / "out")
    assert np.array_equal(made["cat"], made["default"])
    assert all((made[a] != made[b]).any() for a, b in (("dog", "cat"), ("dog", "not"), ("cat", "not")))
    files = ["--image", str(folder / "scenes" / "1.png"), "--mask", str(folder / "masks" / "1.png"), "--skip_grid"]
    assert inference.main([*words, *files, "--prompt", "a dog", "--outdir", str(tmp_path / "alone")]) == 0
    # another batch size may choose other kernels, whose rounding can tip a pixel to the next grey level
    assert np.abs(pictures(tmp_path / "alone")["1_0"] - made["dog"]).max() <= 1


def test_folders_are_matched_by_name(tiny_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--image", str(folder / "scenes"), "--mask", str(folder / "masks"), "--steps", "2", "--device", "cpu"]
    words += ["--checkpoint", str(tiny_folder), "--outdir", str(folder / "out"), "--reference"]
    assert inference.main([*words, str(folder / "exemplars")]) == 0
    assert set(pictures(folder / "out")) == {str(i) for i in range(ROWS)}
    assert [job.reference for job in match_folders(*(folder / p for p in ("scenes", "masks")), folder / "jobs.csv")]
    (folder / "masks" / "4.png").unlink()
    words[words.index(str(folder / "out"))] = str(folder / "more")
    assert inference.main([*words, str(folder / "exemplars"), "--strict"]) == 2
    assert "4.png" in capsys.readouterr().err and not (folder / "more").exists()
    assert inference.main([*words, str(folder / "exemplars")]) == 1
    assert set(pictures(folder / "more")) == {str(i) for i in range(ROWS)} - {"4"}
    assert report(folder / "more")["4.png"] == "failed"


def test_two_processes_share_the_rows(tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--jobs", str(folder / "jobs.csv"), "--checkpoint", str(tiny_folder), "--outdir", str(folder / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert inference.main([*words, "--steps", "2", "--device", "cpu"]) == 0
    assert report(folder / "out") == {f"r{i}": "done" for i in range(ROWS)}
    assert len(list((folder / "out").glob("report-*-of-2.jsonl"))) == 2
    assert set(pictures(folder / "out")) == {f"r{i}" for i in range(ROWS)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("jobs.csv", "scene,reference,colour\na.png,b.png,red\n", "got the column colour, expected some of"),
        ("jobs.csv", "scene,seed\na.png,3\n", "row 1: lacks reference or prompt"),
        ("jobs.csv", "scene,reference,seed\na.png,b.png,many\n", "row 1: seed: got 'many'"),
        ("jobs.csv", "scene,reference,sampler\na.png,b.png,magic\n", "row 1: sampler: got 'magic'"),
        ("jobs.csv", "scene,reference,n_samples\na.png,b.png,2\n", "row 1: several samples"),
        ("jobs.csv", "name,scene,reference\nx,a.png,b.png\nx,a.png,b.png\n", "'x' is there twice"),
        ("jobs.csv", "name,scene,reference\n../x,a.png,b.png\n", "name: got '../x'"),
        ("jobs.csv", "scene,reference\n", "holds no rows"),
        ("jobs.jsonl", '{"scene": "a.png"', "row 1: no JSON object"),
        ("jobs.jsonl", '3\n{"scene": "a.png", "reference": "b.png"}\n', "row 1: no JSON object"),
        ("jobs.csv", "scene,reference\na.png,b.png\na.png,b.png,c.png\n", "row 2: "),
    ],
)
def test_tables_that_are_none(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_jobs(tmp_path / name)


def test_boxes_and_outlines_as_lists(tiny_folder: Path, folder: Path) -> None:
    hole: dict[str, object]
    for name, hole in (("a", {"box": [5, 6, 25, 30]}), ("b", {"polygon": [[5, 6], [24, 6], [24, 29], [5, 29]]})):
        row = {"name": name, "scene": "scenes/0.png", "reference": "exemplars/0.png", **hole}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        assert run(tiny_folder, folder, "out", table=f"{name}.jsonl") == 0
    made = pictures(folder / "out")
    assert np.array_equal(made["a"], made["b"])


def test_json_lines_and_defaults(tmp_path: Path) -> None:
    rows = [
        {"scene": "a.png", "reference": "/b.png"},
        {"scene": "a.png", "reference": "b.png", "seed": 4, "feather": 2},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_jobs(tmp_path / "jobs.jsonl", EditSettings(seed=9, match_colors=False))
    assert (first.name, first.scene, first.reference) == ("000001_a", str(tmp_path / "a.png"), "/b.png")
    assert first.settings == EditSettings(seed=9, match_colors=False)
    assert second.settings == EditSettings(seed=4, match_colors=False, feather=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "a.png"], "names all files itself"),
        (["--n-samples", "2"], "--n-samples: not for many"),
        (["--seed", "1", "2"], "--seed: not for many"),
        (["--rank", "--separate"], "--sort-by-similarity, --per-component: not for many"),
        (["--batch-size", "0"], "expected 1 or more"),
    ],
)
def test_options_that_are_for_single_edits(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        inference.main(["--jobs", "jobs.csv", *options])
    assert message in capsys.readouterr().err


WRONG: dict[str, dict[str, object]] = {
    "seed": {"seed": 2**64},
    "negative": {"seed": -(2**63) - 1},
    "many-steps": {"num_steps": 10**9},
    "no-number": {"guidance_scale": "nan"},
    "infinite": {"guidance_scale": "inf"},
    "margin": {"context_margin": "1e308"},
    "sampler": {"sampler": "euler_a"},
    "eta": {"eta": "0.5"},
    "box": {"mask": "", "box": "nan,0,1,1"},
    "far": {"mask": "", "box": "1e300,0,1e301,1"},
    "missing": {"scene": "nowhere.png"},
    "directory": {"scene": "."},
    "damaged": {"scene": "damaged.png"},
    "black": {"mask": "black.png"},
    "steps-of-model": {"num_steps": 5000},
    "a/b": {},
    "..\0": {},
    "x" * 252: {},
    "é" * 126: {},
    "first": {},
}
RIGHT: dict[str, dict[str, object]] = {
    "first": {},
    "largest": {"seed": 2**64 - 1},
    "smallest": {"seed": -(2**63), "shape": "arbitrary"},
    "spreadsheet": {"seed": "7.0"},
    "wide": {"mask": "", "box": "-5,-5,1e9,1e9"},
    "x" * 251: {},
    "é" * 125: {},
    "suffix.PNG": {},
}


def test_wrong_rows_fail_alone(tiny_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "damaged.png").write_bytes((folder / "scenes" / "0.png").read_bytes()[:400])
    Image.new("L", SIZES[0]).save(folder / "black.png")
    common = {"scene": "scenes/0.png", "mask": "masks/0.png", "reference": "exemplars/0.png"}
    right, wrong = ([{**common, "name": name, **row} for name, row in rows.items()] for rows in (RIGHT, WRONG))
    mixed = [row for pair in zip_longest(right, wrong) for row in pair if row]  # the last is the second called first
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert run(tiny_folder, folder, "out", table="jobs.jsonl") == 1
    told = capsys.readouterr().err
    made = {name.removesuffix(".PNG") for name in RIGHT}
    assert set(pictures(folder / "out")) == made
    states = report(folder / "out")
    assert {name for name, state in states.items() if state == "done"} == made
    assert states.keys() - made == WRONG.keys() - {"first"} | {f"row {len(mixed)}"}
    assert all(f"failed: {name}: " in told for name in ("seed", "margin", "directory", f"row {len(mixed)}"))
    assert "2 failed: seed: " in told  # counted by reason, without values

    assert run(tiny_folder, folder, "strict", "--strict", table="jobs.jsonl") == 2
    assert "row 2: " in capsys.readouterr().err and not (folder / "strict").exists()
    (folder / "jobs.jsonl").write_text(json.dumps({**common, "reference": "nowhere.png"}))
    assert run(tiny_folder, folder, "strict", "--strict", table="jobs.jsonl") == 2
    assert "nowhere.png" in capsys.readouterr().err and not (folder / "strict").exists()


def test_columns_of_no_meaning(folder: Path) -> None:
    """A row by a spreadsheet, with an index and notes."""
    text = "\ufeff;name; Scene ;scene;reference;seed\r\n0;a.png;x;a.png;b.png;1.0\r\n;;;;;\r\n1;;;c.png;d.png;\r\n"
    (folder / "t.csv").write_text(text, newline="", encoding="utf-8")
    with pytest.raises(UserError, match=r"Scene.*reference_mask"):
        read_jobs(folder / "t.csv")
    jobs = read_jobs(folder / "t.csv", ignore_columns=True)
    assert [(job.name, Path(job.scene).name, job.settings.seed) for job in jobs] == [
        ("a", "a.png", 1),
        ("000003_c", "c.png", 0),
    ]


def test_lines_that_are_no_rows_fail_alone(tmp_path: Path) -> None:
    lines = ['{"name": "a", "scene": "s", "reference": "r"}', "broken", "[1]", '{"scene":' + "[" * 100_000]
    lines += ['{"name": "b", "scene": "s", "reference": "r", "seed": 1' + "0" * 400 + "}", '{"name": "\\ud800"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    wrong = Report()
    assert [job.name for job in read_jobs(tmp_path / "t.jsonl", report=wrong)] == ["a"]
    assert wrong.failed.keys() == {"row 2", "row 3", "row 4", "b", "\ud800"}
    wrong.write(tmp_path / "report.jsonl")
    assert report(tmp_path).keys() == wrong.failed.keys()


def copy(request: EditRequest) -> Image.Image:
    return request.scene.copy()


def test_a_batch_that_fails_is_painted_again_one_by_one(
    tiny_model: LatentDiffusion, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, paint = Editor(tiny_model), Editor.paint

    def fail(self: Editor, image: Tensor, keep_mask: Tensor, pixel_values: Tensor, seeds: list[int], **options: Any):
        if 3 in seeds:
            raise UserError("the third cannot be painted")
        return paint(self, image, keep_mask, pixel_values, seeds, **options)

    monkeypatch.setattr(Editor, "paint", fail)
    jobs = read_jobs(folder / "jobs.csv", EditSettings(num_steps=1))
    done = edit_many(editor, jobs, folder / "out", metadata={}, batch_size=ROWS)
    assert done.failed == {"r3": "the third cannot be painted"} and len(done.done) == ROWS - 1


def test_a_full_disk_ends_the_run_with_a_report(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = batch.save_png

    def save_some(image: Image.Image, path: Path, text: dict[str, str]) -> None:
        if path.stem == "r1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, path, text)

    monkeypatch.setattr(batch, "save_png", save_some)
    assert run(tiny_folder, folder, "out", "--workers", "1", "--batch-size", "1") == 2
    assert "No space left" in capsys.readouterr().err
    states = report(folder / "out")
    assert states["r1"] == "failed" and states["r6"] == "waiting" and states["r0"] == "done" and len(states) == ROWS
    assert not [path for path in (folder / "out").iterdir() if not path.stat().st_size]
    monkeypatch.undo()
    assert run(tiny_folder, folder, "out") == 0
    assert set(pictures(folder / "out")) == {f"r{i}" for i in range(ROWS)}


def test_results_of_another_run_stay(folder: Path) -> None:
    """Runs of the same and of another table write a name between its first look and the result."""
    jobs, out = read_jobs(folder / "jobs.csv"), folder / "out"

    def interfere(job: batch.Job, _: Image.Image) -> None:
        theirs = {"r1": job, "r2": replace(job, scene="another")}
        if job.name == "r0":  # before the last one is read
            theirs["r0"] = replace(jobs[6], scene="another")
        if job.name in ("r0", "r1", "r2"):
            text = {"parameters": theirs[job.name].parameters({})}
            save_png(Image.new("RGB", (3, 3)), out / f"{job.name.replace('r0', 'r6')}.png", text)

    done = edit_many(copy, jobs, out, metadata={}, on_result=interfere, batch_size=1, workers=1)
    assert done.skipped == ["r1"] and set(done.failed) == {"r2", "r6"} and len(done.done) == ROWS - 3
    assert all(Image.open(out / f"{name}.png").size == (3, 3) for name in ("r1", "r2", "r6"))


def test_scenes_are_never_replaced_by_results(folder: Path) -> None:
    before = (folder / "scenes" / "2.png").read_bytes()
    jobs = match_folders(*(folder / part for part in ("scenes", "masks", "exemplars")))
    done = edit_many(copy, jobs, folder / "masks" / ".." / "scenes", metadata={})
    assert done.failed.keys() == {str(i) for i in range(ROWS)}
    assert (folder / "scenes" / "2.png").read_bytes() == before


def test_folders_that_cannot_be_written_are_told_before_painting(folder: Path) -> None:
    with pytest.raises(UserError, match=r"jobs\.csv"):
        edit_many(copy, read_jobs(folder / "jobs.csv"), folder / "jobs.csv", metadata={})


def test_folders_as_people_have_them(tmp_path: Path) -> None:
    """Endings of all kinds, capitals, hidden files, masks among the scenes, and what has no partner or two."""
    scenes = tmp_path / "scenes"
    masks, things, out = scenes / "masks", tmp_path / "things", scenes / "out"
    for folder in (scenes, masks, things, out):
        folder.mkdir()
    image = Image.new("RGB", (8, 8))
    forms = {
        "a.JPG": "JPEG",
        "b.tif": "TIFF",
        "C.bmp": "BMP",
        "d.jfif": "JPEG",
        "e": "PNG",
        "f.gif": "GIF",
        "g.png": "PNG",
    }
    forms |= {"h.png": "PNG", "h.jpg": "JPEG", "i.png": "PNG", "I.png": "PNG", "._j.png": "PNG", "k.png": "PNG"}
    for name, form in forms.items():
        image.save(scenes / name, form)
    for stem in "abcdefghikz":
        image.save(masks / f"{stem}.bmp")
        image.save(things / f"{stem}.webp")
    (masks / "g.bmp").unlink()
    image.save(things / "k.gif")
    image.save(out / "a.png")
    wrong = Report()
    with pytest.warns(UserWarning) as told:
        jobs = match_folders(scenes, masks, things, apart=[out], report=wrong)
    assert [job.name for job in jobs] == ["C", "a", "b", "d", "e", "f", "i"]
    assert all(Path(file).stem.casefold() == job.name.casefold() for job in jobs for file in job.files)
    assert wrong.failed.keys() == {"I.png", "g.png", "h.png", "h.jpg", "k.png"}
    assert "h.jpg and h.png" in wrong.failed["h.png"] and "k.gif and k.webp" in wrong.failed["k.png"]
    assert len(told) == 2 and all("z." in str(one.message) for one in told)
    with pytest.raises(UserError, match=r"\.png: "):
        match_folders(scenes, masks, things, apart=[out])


@pytest.mark.parametrize("name", ["{}.png", "{}.jpg.png", "{}.JPG.png"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_folders_match_by_names_as_other_programs_and_systems_write_them(name: str, form: str, tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "masks").mkdir()
    image = Image.new("RGB", (8, 8))
    for scene in ("Tür", "ga が", "b.1"):
        image.save(tmp_path / "scenes" / unicodedata.normalize("NFD", f"{scene}.jpg"))
        image.save(tmp_path / "masks" / unicodedata.normalize(form, name.format(scene)))
    image.save(tmp_path / "thing.png")
    with warnings.catch_warnings(action="error"):
        jobs = match_folders(tmp_path / "scenes", tmp_path / "masks", tmp_path / "thing.png")
    for job in jobs:
        assert job.mask is not None
        mask = Path(job.mask).name
        assert unicodedata.normalize("NFC", mask) == name.format(unicodedata.normalize("NFC", job.name))
    assert len(jobs) == 3
