"""Every annotation format to the same index."""

from __future__ import annotations

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ldm.config import DataConfig
from ldm.data.annotations import (
    OPEN_IMAGES_CSV,
    READERS,
    Unusable,
    held_out,
    image_header,
    open_index,
    write_index,
)
from ldm.data.box_index import SKIPPED_EXIF, BoxIndex
from ldm.files import UserError
from ldm.images import Box
from scripts import read_bbox

SIZE = (100, 80)
BOX = Box(10, 20, 60, 70)  # of every image
OUTLINE = [(10, 20), (60, 20), (60, 70)]


def write_jpeg(path: Path, size: tuple[int, int] = (80, 60), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 50).convert("RGB").save(path, "JPEG", **options)
    return path


def images(folder: Path, names: tuple[str, ...] = ("a", "b"), suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", SIZE, (90, 120, 30)).save(folder / f"{name}{suffix}")


def open_images_texts(root: Path) -> DataConfig:
    for split in ("train", "validation"):
        images(root / "images" / split)
        (root / "bbox" / split).mkdir(parents=True)
        for name in "ab":
            (root / "bbox" / split / f"{name}.txt").write_text("10.0 20.0 60.0 70.0\n0 0 1 1\n")
    return DataConfig(root=str(root))


def open_images_csv(root: Path) -> DataConfig:
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "validation"):
        images(root / "images" / split)
        rows = ["ImageID,XMin,XMax,YMin,YMax", *(f"{name},0.1,0.6,0.25,0.875" for name in "ba"), "a,0,0.01,0,0.01"]
        (root / "annotations" / OPEN_IMAGES_CSV[split]).write_text("\n".join(rows))
    return DataConfig(root=str(root))


def coco(root: Path) -> DataConfig:
    images(root)
    for split in ("train", "val"):
        content = {
            "images": [{"id": i, "file_name": f"{n}.jpg", "width": 100, "height": 80} for i, n in enumerate("ab")],
            "annotations": [
                {"image_id": 0, "bbox": [10, 20, 50, 50], "segmentation": [[*np.ravel(OUTLINE).tolist()]]},
                {"image_id": 0, "bbox": [0, 0, 1, 1], "segmentation": []},
                {"image_id": 0, "bbox": [0, 0, 50, 50], "segmentation": {"counts": [1]}, "iscrowd": 1},
                {"image_id": 1, "bbox": [10, 20, 50, 50], "segmentation": {"counts": "abc", "size": [80, 100]}},
            ],
        }
        (root / f"{split}.json").write_text(json.dumps(content))
    return DataConfig("coco", str(root), str(root / "train.json"), str(root / "val.json"))


def voc(root: Path) -> DataConfig:
    images(root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("a\nb  1\n")
    for name in "ab":
        box = "<xmin>11</xmin><ymin>21</ymin><xmax>60</xmax><ymax>70</ymax>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>100</width><height>80</height></size>"
            f"<object><name>x</name><bndbox>{box}</bndbox></object></annotation>"
        )
    return DataConfig("voc", str(root))


def yolo(root: Path) -> DataConfig:
    for split in ("train", "val"):
        images(root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        corners = " ".join(f"{x / 100} {y / 80}" for x, y in OUTLINE)
        (root / "labels" / split / "a.txt").write_text(f"3 {corners}\n0 0.005 0.005 0.01 0.01\n")
        (root / "labels" / split / "b.txt").write_text("0 0.35 0.5625 0.5 0.625\n")
    return DataConfig("yolo", str(root))


def masks(root: Path) -> DataConfig:
    names = tuple(f"p{k}" for k in range(150))  # a share is held out by name
    images(root / "images", names, ".png")
    (root / "masks").mkdir()
    mask = Image.new("L", SIZE)
    mask.paste(255, BOX)
    ImageDraw.Draw(mask).point((90, 5), 255)  # a speck is no object
    for name in names:
        mask.save(root / "masks" / f"{name}.png")
    return DataConfig("masks", str(root))


LAYOUTS = {
    "open_images texts": open_images_texts,
    "open_images csv": open_images_csv,
    "coco": coco,
    "voc": voc,
    "yolo": yolo,
    "masks": masks,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_format_gives_the_same_boxes(layout: str, split: str, tmp_path: Path) -> None:
    data = LAYOUTS[layout](tmp_path)
    index = open_index(data, split)
    names = [index[i].name for i in range(len(index))]
    assert len(names) == len(set(names)) >= 2
    for i, name in enumerate(names):
        entry = index[i]
        with Image.open(Path(index.metadata["images"]) / name) as picture:
            assert entry.size == picture.size == SIZE
        assert entry.boxes == [BOX], "of two boxes one is too small"
        assert not entry.mask or (Path(index.metadata["images"]) / entry.mask).is_file()
    assert index.has_shapes == (data.kind in ("coco", "yolo", "masks"))
    if data.kind in ("coco", "yolo"):
        np.testing.assert_allclose(index[0].shapes[0][0], OUTLINE, atol=1e-4)
        assert index[1].shapes == [[]]


def test_all_formats_are_tried() -> None:
    assert {layout.split()[0] for layout in LAYOUTS} == set(READERS)


def test_an_undivided_set_is_divided_by_name(tmp_path: Path) -> None:
    source = masks(tmp_path)
    indexes = {split: open_index(source, split) for split in ("train", "validation")}
    names = {split: {index[i].name for i in range(len(index))} for split, index in indexes.items()}
    assert len(names["train"]) == 142 and len(names["validation"]) == 8
    assert not names["train"] & names["validation"]


@given(st.sets(st.text(min_size=1), max_size=300), st.sets(st.text(min_size=1), max_size=10))
def test_held_out_share(names: set[str], added: set[str]) -> None:
    chosen = held_out(names)
    assert chosen <= names
    assert len(chosen) == min(max(round(0.05 * len(names)), 8), len(names) // 4 or len(names) // 2)
    # what is added moves at most as many
    assert len(chosen - held_out(names | added)) <= len(added)


def test_the_index_is_written_once_and_again_after_a_change(tmp_path: Path) -> None:
    source = yolo(tmp_path)
    open_index(source, "train")
    path = tmp_path / "index" / "yolo-train.safetensors"
    first = path.stat().st_mtime_ns
    open_index(source, "train")
    assert path.stat().st_mtime_ns == first
    images(tmp_path / "images" / "train", ("c",))
    (tmp_path / "labels" / "train" / "c.txt").write_text("0 0.35 0.5625 0.5 0.625\n")
    assert len(open_index(source, "train")) == 3


@pytest.mark.parametrize("kind", ["voc", "yolo", "masks"])
@pytest.mark.parametrize("is_linked", [False, True])
def test_a_file_that_is_corrected_in_place_counts(kind: str, is_linked: bool, tmp_path: Path) -> None:
    source, folder = LAYOUTS[kind](tmp_path), {"voc": "Annotations", "yolo": "labels/train", "masks": "masks"}[kind]
    if is_linked:
        (tmp_path / folder).rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
        (tmp_path / folder).symlink_to(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    before = [box for i in range(2) for box in open_index(source, "train")[i].boxes]
    stat = (tmp_path / folder).stat()
    for path in (tmp_path / folder).iterdir():
        if kind == "masks":
            mask = Image.new("L", SIZE)
            mask.paste(255, (20, 20, 60, 70))
            mask.save(path)
        else:
            path.write_text(path.read_text().replace(">11<", ">21<").replace("0.35 0.5625", "0.36 0.5625"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    os.utime(tmp_path / folder, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [box for i in range(2) for box in open_index(source, "train")[i].boxes] != before


@pytest.mark.parametrize("name", ["{}.png", "{}.jpg.png"])
def test_masks_match_by_names_as_other_programs_and_systems_write_them(name: str, tmp_path: Path) -> None:
    mask = Image.new("L", SIZE)
    mask.paste(255, BOX)
    (tmp_path / "masks").mkdir()
    for image in ("ä", "b.1", "c", "d"):
        images(tmp_path / "images", (unicodedata.normalize("NFD", image),))
        mask.save(tmp_path / "masks" / unicodedata.normalize("NFC", name.format(image)))
    assert open_index(DataConfig("masks", str(tmp_path)), "train").num_boxes == 3  # and one for validation


def test_an_index_among_the_data_is_not_a_change(tmp_path: Path) -> None:
    source = replace(yolo(tmp_path), index=str(tmp_path / "lists"))
    open_index(source, "train")
    first = (tmp_path / "lists" / "yolo-train.safetensors").stat().st_mtime_ns
    open_index(source, "train")
    assert (tmp_path / "lists" / "yolo-train.safetensors").stat().st_mtime_ns == first


def test_another_folder_for_the_index(tmp_path: Path) -> None:
    source = voc(tmp_path / "data")
    source.index = str(tmp_path / "elsewhere")
    open_index(source, "train")
    assert not (tmp_path / "data" / "index").exists()
    (tmp_path / "file").write_text("")
    source.index = str(tmp_path / "file")
    with pytest.raises(UserError, match=r"data\.index"):
        open_index(source, "train")


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path) -> None:
    source = yolo(tmp_path)
    source.exif = "skip"
    folder = tmp_path / "images" / "train"
    images(folder, ("c", "d", "e", "f"))
    labels = tmp_path / "labels" / "train"
    for name in "cde":
        (labels / f"{name}.txt").write_text("0 0.35 0.5625 0.5 0.625\n")
    (labels / "f.txt").write_text("0 0.35 nonsense\n")
    whole = write_jpeg(folder / "c.jpg").read_bytes()
    (folder / "c.jpg").write_bytes(whole[:-200])
    (folder / "d.jpg").write_bytes(b"<html>")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(folder / "e.jpg", exif=exif)
    writer = write_index(tmp_path / "i.safetensors", source, "train")
    assert writer.images == 2
    assert writer.unwanted.counts == {SKIPPED_EXIF: 1, "boxes of less than 2% of their image": 1}
    faults = {"no images": ["d.jpg"], "images truncated": ["train/c.jpg"]}
    assert writer.faults.places == {**faults, "boxes with words where numbers belong": [f"{labels / 'f.txt'}:1"]}
    left_out = BoxIndex(tmp_path / "i.safetensors").left_out
    assert len(left_out) == 5 and "1 images truncated (train/c.jpg)" in left_out


def test_an_image_of_another_size_than_annotated_is_left_out(tmp_path: Path) -> None:
    source = coco(tmp_path)
    Image.new("RGB", (80, 100)).save(tmp_path / "b.jpg")
    index = open_index(source, "train")
    assert [index[i].name for i in range(len(index))] == ["a.jpg"]
    assert json.loads(index.metadata["dropped"])["images of another size than annotated"] == 1


@pytest.mark.parametrize(
    ("kind", "content", "place"),
    [
        ("coco", None, r"data\.annotations"),
        ("coco", "", r"x\.json"),
        ("coco", "{", r"x\.json"),
        ("coco", "{}", r"x\.json"),
        ("voc", None, "Annotations"),
        ("yolo", None, "images"),
        ("masks", None, "masks"),
        ("open_images", None, r"dataset/README\.md"),
        ("cached", None, "open_images, coco, voc, yolo, masks"),
    ],
)
def test_errors_name_the_place(kind: str, content: str | None, place: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "x.json").write_text(content)
    annotations = None if content is None else str(tmp_path / "x.json")
    with pytest.raises(UserError, match=place):
        open_index(DataConfig(kind, str(tmp_path), annotations), "train")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_index_says_where_its_images_are(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    write_index(path, voc(tmp_path), "train")
    assert BoxIndex(path).metadata["images"] == str(tmp_path / "JPEGImages")


def test_three_ways_to_the_same_index(tmp_path: Path) -> None:
    """read_bbox writes the index that reading its text files, or the CSV, would give."""
    source = open_images_csv(tmp_path)
    of_csv = entries(open_index(source, "train"))
    (tmp_path / "index" / "open_images-train.safetensors").unlink()
    assert read_bbox.main(["--root", str(tmp_path)]) == 0
    path = tmp_path / "index" / "open_images-train.safetensors"
    written = path.stat().st_mtime_ns
    of_script = entries(open_index(source, "train"))
    assert path.stat().st_mtime_ns == written, "valid as it is"
    path.unlink()
    of_texts = entries(open_index(source, "train"))
    assert of_csv == of_script == of_texts


def entries(index: BoxIndex) -> list[object]:
    return [index[i] for i in range(len(index))]


# ---- sizes ----


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"icc_profile": bytes(200_000)}])
def test_image_header(tmp_path: Path, options: dict[str, object]) -> None:
    assert image_header(write_jpeg(tmp_path / "x.jpg", (123, 45), **options)) == ((123, 45), 1)


def test_image_header_of_images_that_exif_rotates(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_jpeg(tmp_path / "x.jpg", (123, 45), exif=exif)
    assert image_header(path, ignore_exif=True) == ((123, 45), 1)
    assert image_header(path) == ((123, 45), 6)


def test_image_header_of_any_prefix_is_an_error(tmp_path: Path) -> None:
    content = write_jpeg(tmp_path / "x.jpg", (40, 30)).read_bytes()
    path = tmp_path / "prefix.jpg"
    for length in range(0, len(content) - 2, 7):
        path.write_bytes(content[:length])
        with pytest.raises(Unusable):
            image_header(path)
    for behind in (300, 3000):
        path.write_bytes(content + bytes(behind))
        assert image_header(path) == ((40, 30), 1)
