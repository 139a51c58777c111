"""Many edits at once: each row exactly once, whatever fails, stops, or shares the work."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from ldm.editing.batch import match_folders, read_jobs
from ldm.editing.settings import EditSettings
from ldm.files import UserError

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
    assert inference.main([*words, str(folder / "exemplars")]) == 2
    assert "masks: " in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_rows(tiny_folder: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "inference.py"]
    command += ["--jobs", str(folder / "jobs.csv"), "--checkpoint", str(tiny_folder), "--outdir", str(folder / "out")]
    root = Path(inference.__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    subprocess.run([*command, "--steps", "2", "--device", "cpu"], cwd=root, env=env, check=True, timeout=300)
    assert report(folder / "out") == {f"r{i}": "done" for i in range(ROWS)}
    assert len(list((folder / "out").glob("report-*-of-2.jsonl"))) == 2
    assert set(pictures(folder / "out")) == {f"r{i}" for i in range(ROWS)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("jobs.csv", "scene,reference,colour\na.png,b.png,red\n", "row 1: got colour, expected some of"),
        ("jobs.csv", "scene,seed\na.png,3\n", "row 1: lacks reference or prompt"),
        ("jobs.csv", "scene,reference,seed\na.png,b.png,many\n", "row 1: seed: got 'many'"),
        ("jobs.csv", "scene,reference,sampler\na.png,b.png,magic\n", "row 1: sampler: got 'magic'"),
        ("jobs.csv", "scene,reference,n_samples\na.png,b.png,2\n", "row 1: several samples"),
        ("jobs.csv", "name,scene,reference\nx,a.png,b.png\nx,a.png,b.png\n", "'x' is there twice"),
        ("jobs.csv", "name,scene,reference\n../x,a.png,b.png\n", "is no file name"),
        ("jobs.csv", "scene,reference\n", "holds no rows"),
        ("jobs.jsonl", '{"scene": "a.png"', "not a readable table"),
        ("jobs.jsonl", "3\n", "row 1: got 3"),
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
