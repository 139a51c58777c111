from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.cocoee import Bench
from ldm.files import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("GT_3", "Ref_3", "Mask_bbox_3"):
        (tmp_path / folder).mkdir()
    for i, id_ in enumerate((7, 139, 285)):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"GT_3/{id_:012d}_GT.png")
        Image.new("RGB", (9, 5), (0, i, 0)).save(tmp_path / f"Ref_3/{id_:012d}_ref.png")
        Image.new("L", (40, 30), 255).save(tmp_path / f"Mask_bbox_3/{id_:012d}_mask.png")
    np.save(tmp_path / "id_list.npy", np.array([7, 139, 285]))
    return tmp_path


def test_items_in_the_list_s_order(root: Path) -> None:
    bench = Bench(root)
    assert bench.ids == ["000000000007", "000000000139", "000000000285"]
    items = list(bench)
    assert len(items) == len(bench) == 3
    assert [item.id for item in items] == bench.ids
    item = items[2]
    assert item.scene.getpixel((0, 0)) == (2, 0, 0) and item.exemplar.size == (9, 5)
    assert item.hole_mask.mode == "L" and item.hole_mask.size == item.scene.size


def test_ids_may_be_text(root: Path) -> None:
    np.save(root / "id_list.npy", np.array(["000000000285", "7"]))
    assert Bench(root).ids == ["000000000285", "000000000007"]


@pytest.mark.parametrize(
    "listed",
    [
        np.array([7.0, 139.0]),
        np.array([["7.0"], ["139"]]),
        np.array([b"000000000007", b"139"]),
        np.array([7, 139, 7, 7], dtype=np.uint16),
        np.array([[7, 139], [139, 7]]),
    ],
)
def test_ids_of_any_type_count_once(root: Path, listed: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    np.save(root / "id_list.npy", listed)
    assert Bench(root).ids == ["000000000007", "000000000139"]
    assert ("000000000007" in caplog.text) == (listed.size > 2)


@pytest.mark.parametrize("entry", [1.5, float("nan"), float("inf"), "7_GT", "cat", ""])
def test_an_entry_that_is_no_id_is_named(root: Path, entry: Any) -> None:
    np.save(root / "id_list.npy", np.array([7, entry]))
    with pytest.raises(UserError, match="entry 2"):
        Bench(root)


def test_parts_in_any_format_with_or_without_zeros(root: Path) -> None:
    scene = root / "GT_3/000000000139_GT.png"
    Image.open(scene).save(root / "GT_3/139_GT.bmp")
    scene.unlink()
    (root / "GT_3/notes_GT.txt").write_text("")
    bench = Bench(root)
    assert bench.item(bench.ids[1]).scene.getpixel((0, 0)) == (1, 0, 0)
    assert bench.paths("000000000999")[0] == root / "GT_3/000000000999_GT.png"  # as errors name it


def test_unusable_folders_are_one_clear_line(root: Path) -> None:
    def fails(message: str) -> None:
        with pytest.raises(UserError, match=message):
            Bench(root)

    np.save(root / "id_list.npy", np.array([], dtype=int))
    fails("no ids")
    np.save(root / "id_list.npy", np.array([{}]), allow_pickle=True)  # reading it would execute what is in it
    fails("whole numbers")
    (root / "id_list.npy").write_bytes(b"")
    fails("whole numbers")
    (root / "id_list.npy").unlink()
    fails(r"id_list\.npy: no such file")
    (root / "GT_4").mkdir()
    fails("GT_3, GT_4")
    (root / "GT_3").rename(root / "elsewhere")
    (root / "GT_4").rmdir()
    fails("one folder GT_…, got none")
    with pytest.raises(UserError, match="no such folder"):
        Bench(root / "nowhere")


def test_unusable_items_name_their_file(root: Path) -> None:
    Image.new("L", (30, 40)).save(root / "Mask_bbox_3/000000000139_mask.png")
    (root / "Ref_3/000000000285_ref.png").unlink()
    bench = Bench(root)
    with pytest.raises(UserError, match=r"000000000139_mask\.png: "):
        bench.item(bench.ids[1])
    with pytest.raises(UserError, match=r"000000000285_ref\.png"):
        bench.item(bench.ids[2])
    Image.new("L", (80, 60), 255).save(root / "Mask_bbox_3/000000000007_mask.png")
    with pytest.warns(match="resized"):  # as in an edit
        assert bench.item(bench.ids[0]).hole_mask.size == (40, 30)
    Image.new("L", (40, 30)).save(root / "Mask_bbox_3/000000000007_mask.png")
    with pytest.raises(UserError, match=r"000000000007_mask\.png: got an empty mask"):
        bench.item(bench.ids[0])
    for path in (root / "Ref_3").iterdir():
        path.rename(path.with_name(f"exemplar-{path.name}"))
    with pytest.raises(UserError, match=r"000000000007_ref\.png"):
        Bench(root)
