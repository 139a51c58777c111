from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.images import find_images

script = importlib.import_module("scripts.create_square_gt_for_fid")


def test_squares_for_fid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "coco", tmp_path / "square"
    (source / "sub").mkdir(parents=True)
    ramp = np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (60, 1, 3))
    Image.fromarray(ramp).save(source / "sub" / "wide.png")
    Image.fromarray(ramp.transpose(1, 0, 2)).save(source / "tall.png")
    Image.new("L", (8, 8), 7).save(source / "grey.jpg")
    command = [str(source), str(target), "--size", "30", "--workers", "1"]
    assert script.main(command) == 0
    wide = np.asarray(Image.open(target / "sub" / "wide.png"))
    assert wide.shape == (30, 30, 3)
    # The middle half of the ramp, which runs from 30 to 90.
    assert np.allclose(wide[15, :, 0], np.linspace(30.5, 88.5, 30), atol=1.5)
    assert np.array_equal(np.asarray(Image.open(target / "tall.png")), wide.transpose(1, 0, 2))
    assert Image.open(target / "grey.png").mode == "RGB"
    stamp = (target / "tall.png").stat().st_mtime_ns
    (target / "grey.png").unlink()
    assert script.main(command) == 0
    assert (target / "grey.png").exists() and (target / "tall.png").stat().st_mtime_ns == stamp
    assert [path.name for path in find_images(target)] == ["grey.png", "wide.png", "tall.png"]
    assert script.main([str(tmp_path / "none"), str(target)]) == 2
    assert "none: " in capsys.readouterr().err


def test_each_image_for_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Endings of all kinds, a damaged image, two of one stem, and the results of an earlier run below the source."""
    target = tmp_path / "square"
    image = Image.effect_noise((40, 40), 99)
    for name, form in {
        "a.JPG": "JPEG",
        "b.jfif": "JPEG",
        "c": "PNG",
        "d.bmp": "BMP",
        "e.gif": "GIF",
        "e.tif": "TIFF",
    }.items():
        image.save(tmp_path / name, form)
    (tmp_path / "damaged.png").write_bytes((tmp_path / "c").read_bytes()[:500])
    command = [str(tmp_path), str(target), "--size", "4"]
    for _ in range(2):
        assert script.main(command) == 1
        told = capsys.readouterr()
        assert "5 images" in told.out and "e.tif" in told.err and "e.gif" in told.err and "damaged.png" in told.err
        assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert script.main([*command, "--strict"]) == 2


def test_a_target_that_cannot_be_written_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    assert script.main([str(tmp_path), str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
