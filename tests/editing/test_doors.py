"""One edit through every way in: the same pixels."""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import Editor
from ldm.editing import cli
from ldm.evaluation.benchmark import PROTOCOLS, BenchmarkRun
from ldm.evaluation.cocoee import Bench
from ldm.web.service import Edited, EditService, Source

SIZE = (96, 64)
ID = "000000000001"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of one item, whose scene is transparent inside and outside the hole."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("doors")
    for part in ("GT_1", "Ref_1", "Mask_bbox_1"):
        (root / part).mkdir()
    scene = Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (30, 20, 50, 30))  # in the hole
    alpha.paste(90, (45, 25, 75, 60))  # across its edge
    alpha.paste(0, (2, 2, 12, 12))  # outside
    scene.putalpha(alpha)
    scene.save(root / "GT_1" / f"{ID}_GT.png")
    mask = Image.new("L", SIZE)
    mask.paste(255, (24, 16, 60, 48))
    mask.save(root / "Mask_bbox_1" / f"{ID}_mask.png")
    exemplar = Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8))
    exemplar.putalpha(Image.linear_gradient("L").resize(exemplar.size))
    exemplar.save(root / "Ref_1" / f"{ID}_ref.png")
    np.save(root / "id_list.npy", np.array([int(ID)]))
    return root


def files(folder: Path) -> tuple[Path, Path, Path]:
    return Bench(folder).paths(ID)


def by_python(model: Path, folder: Path, out: Path) -> Path:
    edited = Editor.from_pretrained(model).edit(*files(folder))
    assert isinstance(edited, Image.Image)
    edited.save(out / "python.png")
    return out / "python.png"


def by_command_line(model: Path, folder: Path, out: Path) -> Path:
    scene, mask, exemplar = map(str, files(folder))
    words = ["--image", scene, "--mask", mask, "--reference", exemplar, "--skip_grid"]
    assert cli.main([*words, "--checkpoint", str(model), "--device", "cpu", "--outdir", str(out)]) == 0
    return out / f"{ID}_GT_0.png"


def by_table(model: Path, folder: Path, out: Path) -> Path:
    with open(out / "jobs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("name", "scene", "mask", "reference"), ("row", *files(folder))])
    words = ["--jobs", str(out / "jobs.csv"), "--checkpoint", str(model), "--device", "cpu", "--outdir", str(out)]
    assert cli.main(words) == 0
    return out / "row.png"


def by_benchmark(model: Path, folder: Path, out: Path) -> Path:
    weights = model / "model.safetensors"
    run = BenchmarkRun(Bench(folder), out, settings=PROTOCOLS["ours"], checkpoint=weights, device="cpu")
    assert run.edit() == {}
    return out / "results" / f"{ID}.png"


def by_page(model: Path, folder: Path, out: Path) -> Path:
    with closing(EditService(Editor.from_pretrained(model), out, source=Source(str(model)))) as service:
        *_, edited = service.edit(*files(folder), {"n_samples": 1})
    assert isinstance(edited, Edited)
    return edited.files[0]


@pytest.mark.parametrize("door", [by_command_line, by_table, by_benchmark, by_page])
def test_all_doors_lead_to_the_same_image(
    door: Callable[[Path, Path, Path], Path], tiny_folder: Path, folder: Path, tmp_path: Path
) -> None:
    expected = np.asarray(Image.open(by_python(tiny_folder, folder, tmp_path)))
    found = np.asarray(Image.open(door(tiny_folder, folder, tmp_path)))
    assert np.array_equal(found, expected)
    assert (found[4:10, 4:10] == 128).all()  # transparent outside the hole: mid-grey
