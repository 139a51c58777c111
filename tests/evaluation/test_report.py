"""The page of a record of scripts/evaluate.py."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.conftest import IDS

report = importlib.import_module("scripts.report")


def test_the_page_needs_no_other_file(record: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([str(record), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 10
    assert "src='http" not in page and "href" not in page
    assert "worst" in page and IDS[0] in page and "copy-paste" in page
    assert Image.open(tmp_path / "figures.png").size[0] > 300


def test_sweeps_are_drawn_of_runs_that_differ_in_one_setting(record: Path) -> None:
    pytest.importorskip("matplotlib")
    written = json.loads(record.read_text())
    assert report.sweeps(written) == {}
    run = written["runs"]["tiny"]
    written["runs"]["more"] = run | {"settings": run["settings"] | {"guidance_scale": 2.0}}
    assert list(report.sweeps(written)) == ["Guidance scale"]
    written["runs"]["longer"] = run | {"settings": run["settings"] | {"num_steps": 9}}
    assert list(report.sweeps(written)) == ["Guidance scale", "Steps: quality against time"]
    written["runs"]["within"] = run | {"settings": run["settings"] | {"guidance_interval": [0.2, 0.8]}}
    assert list(report.sweeps(written)) == ["Guidance scale", "Steps: quality against time"]
    assert report.choose_samples([3.0, 1.0, 2.0, 5.0, 4.0], "higher") == {
        "worst": [1, 2, 0],
        "median": [2, 0, 4],
        "best": [3, 4, 0],
    }
    assert report.choose_samples([3.0, 1.0], "lower")["best"] == [1, 0]


def test_a_record_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.json").write_text("[]")
    assert report.main([str(tmp_path / "m.json"), "--out", str(tmp_path / "out")]) == 2
    assert "m.json: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
