"""What people are shown of their data before they train on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import inspect_dataset

COLOURS = [(200, 40, 40), (40, 160, 60), (50, 60, 200), (220, 200, 40)]


@pytest.fixture
def coco(tmp_path: Path) -> list[str]:
    """Twelve images with a coloured object on grey; one more has a speck, one is missing."""
    images, annotations = [], []
    for i in range(14):
        picture = Image.new("RGB", (60, 40), (120, 120, 120))
        x, y, side = (10 + i, 8, 20) if i < 12 else (5, 5, 3)
        picture.paste(COLOURS[i % 4], (x, y, x + side, y + side))
        if i < 13:
            picture.save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 60, "height": 40})
        outline = [x, y, x + side, y, x + side, y + side, x, y + side]
        annotations.append({"image_id": i, "bbox": [x, y, side, side], "segmentation": [outline]})
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    sizes = ["model.image_size=32", "model.exemplar_encoder.image_size=28"]
    return ["data.kind=coco", f"data.root={tmp_path}", f"data.annotations={path}", *sizes]


def test_numbers_and_sheet(coco: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    options = ["--sheet", str(sheet), "data.augment_exemplar=false", "data.grey_background=true"]
    assert inspect_dataset.main([*coco, *options]) == 0
    out = capsys.readouterr().out
    train, validation = out[: out.index("validation:")], out[out.index("validation:") :]
    counts = [int(text.split(":")[1].split()[0]) for text in (train, validation)]
    assert sum(counts) == 12
    assert "shape known: 100% of boxes" in out
    assert "box, width over height: 1.00 (5%)" in out
    assert "left out: 1 boxes of less than 2% of their image" in out
    assert "left out: 1 images missing" in out
    assert f"{sheet}: {counts[0]} samples" in out

    picture = np.asarray(Image.open(sheet))
    assert picture.shape == (-(-counts[0] // 4) * 36 - 4, 4 * (3 * 32 + 4) - 4, 3)
    scene, masked, exemplar = (picture[:32, 32 * k : 32 * (k + 1)] for k in range(3))
    assert not np.array_equal(scene, masked)
    assert any(np.abs(exemplar[16, 16].astype(int) - colour).max() < 12 for colour in COLOURS)  # the object itself


def test_rebuild(coco: list[str], tmp_path: Path) -> None:
    sheet = tmp_path.with_name(f"{tmp_path.name}-sheet.png")  # beside the images it would be a change of them
    options = [*coco, "--sheet", str(sheet), "--splits", "train"]
    assert inspect_dataset.main(options) == 0
    index = tmp_path / "index" / "coco-train.safetensors"
    first = index.stat().st_mtime_ns
    assert inspect_dataset.main(options) == 0
    assert index.stat().st_mtime_ns == first
    assert inspect_dataset.main([*options, "--rebuild"]) == 0
    assert index.stat().st_mtime_ns > first


def test_overrides_may_follow_any_option(coco: list[str], tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("data: {augment_exemplar: false}\n")
    assert inspect_dataset.main(["--splits", "train", *coco, "--base", str(base), "data.grey_background=true"]) == 0
    assert (tmp_path / "index" / "coco-train.png").is_file()


def test_a_sheet_that_exists_stays(coco: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheets" / "a.b.png"
    sheet.parent.mkdir()
    sheet.write_text("another one")
    options = [*coco, "--splits", "train", "--sheet", str(sheet)]
    for number in (2, 3):
        assert inspect_dataset.main(options) == 0
        assert f"{sheet.with_name(f'a.b-{number}.png')}: " in capsys.readouterr().out
    assert sheet.read_text() == "another one" and len(list(sheet.parent.iterdir())) == 3
    assert inspect_dataset.main([*options, "--overwrite"]) == 0
    assert Image.open(sheet).format == "PNG" and len(list(sheet.parent.iterdir())) == 3


def test_a_sheet_that_cannot_be_written_is_found_before_the_index_is_read(
    coco: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "instances.json"  # a file, not a folder
    assert inspect_dataset.main([*coco, "--sheet", str(place / "sheet.png")]) == 2
    error = capsys.readouterr().err
    assert f"{place}: cannot write there" in error and error.count("\n") == 1
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.kind=cached"], "inspect what the cache was made from"),
        (["data.kind=coco", "data.root=/nowhere", "data.annotations=/nowhere/a.json"], "/nowhere"),
        (["data.kind=pascal"], "data.kind"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_dataset.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
