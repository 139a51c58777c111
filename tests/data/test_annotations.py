"""Every annotation format to the same index."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
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


def open_images_csv(root: Path, label: str = "/m/0") -> DataConfig:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        images(root / "images" / split)
        rows = [*(f"{name},{label},0.1,0.6,0.25,0.875" for name in "ba"), f"a,{label},0,0.01,0,0.01"]
        rows = ["ImageID,LabelName,XMin,XMax,YMin,YMax", *rows]
        (root / "annotations" / OPEN_IMAGES_CSV[split]).write_text("\n".join(rows))
    assert read_bbox.main(["--root", str(root)]) == 0
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
    names = tuple(f"p{k}" for k in range(32))  # a share is held out by name
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
    assert len(names["train"]) == 24 and len(names["validation"]) == 8
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
    assert len(BoxIndex(tmp_path / "i.safetensors")) == 2
    assert writer.left_out.places == {
        "no images": ["d.jpg"],
        "images truncated": ["train/c.jpg"],
        SKIPPED_EXIF: ["train/e.jpg"],
        "boxes of less than 2% of their image": [f"{labels / 'a.txt'}:2"],
        "annotations that cannot be read": [f"{labels / 'f.txt'}:1: could not convert string to float: 'nonsense'"],
    }
    left_out = BoxIndex(tmp_path / "i.safetensors").left_out
    assert len(left_out) == 5 and "1 images truncated (train/c.jpg)" in left_out


def test_an_image_of_another_size_than_annotated_is_left_out(tmp_path: Path) -> None:
    source = coco(tmp_path)
    Image.new("RGB", (80, 100)).save(tmp_path / "b.jpg")
    index = open_index(source, "train")
    assert [index[i].name for i in range(len(index))] == ["a.jpg"]
    assert "1 images of another size than annotated (b.jpg)" in index.left_out


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


def test_two_ways_to_the_same_index(tmp_path: Path) -> None:
    """read_bbox writes the index that reading its text files would give, with the names of classes."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "class-descriptions.csv").write_text("/m/1,traffic light\n")
    source = open_images_csv(tmp_path, label="/m/1")
    path = tmp_path / "index" / "open_images-train.safetensors"
    written = path.stat().st_mtime_ns
    of_script = open_index(source, "train")
    assert path.stat().st_mtime_ns == written, "valid as it is"
    assert of_script[0].labels == ("traffic light",)
    assert entries(of_script) == entries(open_index(source, "train", rebuild=True))


def test_text_files_of_an_interrupted_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images_csv(tmp_path)
    monkeypatch.setattr(read_bbox, "tqdm", lambda found, **_: [next(found), None])
    with pytest.raises(TypeError):
        read_bbox.main(["--root", str(tmp_path), "--overwrite", "--splits", "train"])
    with pytest.raises(UserError, match=r"train: .*interrupted.*read_bbox\.py"):
        open_index(source, "train", rebuild=True)
    monkeypatch.undo()
    assert read_bbox.main(["--root", str(tmp_path)]) == 0
    assert len(open_index(source, "train", rebuild=True)) == 2


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


# ---- as tools write them ----

GOOD = {
    "id": 7,
    "image_id": 1,
    "category_id": 3,
    "bbox": [10, 20, 50, 50],
    "segmentation": [np.ravel(OUTLINE).tolist()],
}


def coco_file(root: Path, annotations: list[object], images_: list[object] | None = None, **more: object) -> DataConfig:
    """Two pictures, of which one has a good annotation and the other one those given; all are read for both splits."""
    images(root)
    listed = [{"id": i, "file_name": f"{n}.jpg", "width": 100, "height": 80} for i, n in enumerate("ab")]
    content = {"images": listed if images_ is None else images_, "annotations": [GOOD, *annotations], **more}
    (root / "i.json").write_text(json.dumps({"categories": [{"id": 3, "name": "cup"}], **content}))
    return DataConfig("coco", str(root), str(root / "i.json"), str(root / "i.json"))


def other(**changes: object) -> dict[str, object]:
    return {key: value for key, value in (GOOD | {"id": 8, "image_id": 0} | changes).items() if value != "absent"}


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (other(bbox="absent"), "annotations without a box"),
        (other(bbox=[]), "annotations without a box"),
        (other(bbox=None), "annotations without a box"),
        (other(bbox=[10, 20, 50]), "annotations that cannot be read"),
        (other(bbox={"x": 1}), "annotations that cannot be read"),
        (other(bbox=[10, 20, None, 50]), "annotations that cannot be read"),
        (other(bbox=[10, 20, float("nan"), 50]), "boxes with corners that are not finite"),
        (other(bbox=[10, 20, float("inf"), 50]), "boxes with corners that are not finite"),
        (other(bbox=[10, 20, -5, 50]), "boxes without area"),
        (other(bbox=[110, 20, 50, 50]), "boxes outside their image"),
        (other(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotations that cannot be read"),
        (other(segmentation=[[float("nan")] * 6]), "polygons with corners that are not finite"),
        (other(image_id=99), "annotations of images that are not listed"),
        (other(image_id="absent"), "annotations of images that are not listed"),
        (other(image_id=[0]), "annotations of images that are not listed"),
        (None, "annotations of images that are not listed"),
        (other(iscrowd=1), "crowds"),
        (other(bbox=[0, 0, 2, 2]), "boxes of less than 2% of their image"),
    ],
)
def test_an_odd_annotation_costs_itself_alone(annotation: object, reason: str, tmp_path: Path) -> None:
    data = coco_file(tmp_path, [annotation])
    index = open_index(data, "train")
    assert [index[i].name for i in range(len(index))] == ["b.jpg"] and index[0].labels == ("cup",)
    place = "annotation 1" if annotation is None else "annotation 8"
    assert any(line.startswith(f"1 {reason} ({place}") for line in index.left_out)
    data.strict = True
    if reason in ("crowds", "boxes of less than 2% of their image"):  # no faults
        open_index(data, "train")
    else:
        with pytest.raises(UserError, match=reason):
            open_index(data, "train")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": "0"},
        {"image_id": 0.0},
        {"image_id": "0.0", "category_id": "3"},
        {"category_id": 3.0},
        {"bbox": ["10", "20", "50", "50.0"]},
        {"segmentation": GOOD["segmentation"][0]},
        {"id": "absent", "iscrowd": "0"},
        {"score": 0.9},
    ],
)
def test_ids_texts_and_polygons_of_any_kind(changes: dict[str, object], tmp_path: Path) -> None:
    index = open_index(coco_file(tmp_path, [other(**changes)]), "train")
    assert index.left_out == []
    a, b = index[0], index[1]
    assert (a.boxes, a.labels) == (b.boxes, b.labels)
    np.testing.assert_array_equal(a.shapes[0][0], b.shapes[0][0])


@pytest.mark.parametrize(
    "size", [{}, {"width": -1, "height": -1}, {"width": 0, "height": 80}, {"width": None}, {"width": "?"}]
)
@pytest.mark.parametrize("segmentation", [None, [], "absent", {"counts": "abc", "size": [80, 100]}, {"counts": [1]}])
def test_without_size_or_shape(size: dict[str, object], segmentation: object, tmp_path: Path) -> None:
    listed = [{"id": i, "file_name": f"{n}.jpg"} | size for i, n in enumerate("ab")]
    index = open_index(coco_file(tmp_path, [other(segmentation=segmentation)], listed, categories=None), "train")
    assert index[0].boxes == index[1].boxes == [BOX] and index[0].size == SIZE
    assert index[0].shapes == [[]] and not index.has_labels


def test_an_image_that_is_not_described_costs_itself_alone(tmp_path: Path) -> None:
    odd = [None, {"id": 5}, {"file_name": "a.jpg"}, {"id": 6, "file_name": "none.jpg"}]
    data = coco_file(tmp_path, [], [{"id": "1", "file_name": "b.jpg", "width": "100", "height": 80.0}, *odd])
    index = open_index(data, "train")
    assert [index[i].name for i in range(len(index))] == ["b.jpg"]
    assert sum(int(line.split()[0]) for line in index.left_out) == 4


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding: str, tmp_path: Path) -> None:
    for kind, folder in ((coco, "coco"), (yolo, "yolo"), (voc, "voc"), (open_images_texts, "open_images")):
        (tmp_path / folder).mkdir()
        data = kind(tmp_path / folder)
        before = entries(open_index(data, "train"))
        for path in (tmp_path / folder).rglob("*"):
            if path.suffix in (".json", ".txt", ".xml"):
                path.write_bytes(path.read_text().replace("\n", "\r\n").encode(encoding))
        assert repr(entries(open_index(data, "train", rebuild=True))) == repr(before)


@pytest.mark.parametrize("place", ["", "images", "train2017", "JPEGImages", "deep/er", "../annotations"])
@pytest.mark.parametrize(
    "written",
    [
        "x/a.jpg",
        r"x\a.jpg",
        "./x/a.jpg",
        r"C:\photos\x\a.jpg",
        "/home/me/x/a.jpg",
        "https://host/x/a.jpg?token=1/2",
        "x%2Fa.jpg",
        "a.jpg",
        "x/A.JPG",
    ],
)
def test_images_are_found_where_tools_keep_them(place: str, written: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("x/a", "x/b"):
        images((root / place / name).parent, (name[-1],))
    (root / "deep").mkdir(exist_ok=True)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    listed = [
        {"id": i, "file_name": written.replace("a.", f"{n}.").replace("A.", f"{n.upper()}.")}
        for i, n in enumerate("ab")
    ]
    path = tmp_path / "annotations" / "i.json"
    path.write_text(json.dumps({"images": listed, "annotations": [GOOD, other()]}))
    if (place == "../annotations" and "x" not in written.lower().replace(".jpg", "").split("photos")[-1]) or (
        place == "../annotations" and "A." in written
    ):
        pytest.skip("beside the annotations only the path itself is looked up")
    index = open_index(DataConfig("coco", str(root), str(path), str(path)), "train")
    assert len(index) == 2 and not index.left_out
    for i, name in enumerate("ab"):
        assert (Path(index.metadata["images"]) / index[i].name).samefile(root / place / "x" / f"{name}.jpg")


def test_what_is_not_found_is_told_with_where_it_was_looked_for(tmp_path: Path) -> None:
    data = coco_file(tmp_path, [], [{"id": i, "file_name": f"z/{i}.jpg"} for i in range(20)])
    with pytest.raises(UserError, match=r"z/0.jpg") as error:
        open_index(data, "train")
    for folder in (tmp_path, tmp_path / "images", tmp_path / "train2017"):
        assert str(error.value).count(f"{folder},") == 1
    for folder in ("p", "q"):
        images(tmp_path / folder, tuple("01"))
    with pytest.raises(UserError, match="2 images whose name several have"):
        open_index(data, "train")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.35 0.5625 0.5 0.625 0.93", ""),
        ("cup 0.35 0.5625 0.5 0.625", ""),
        ("  0\t0.35  0.5625 0.5 0.625 ", ""),
        ("0,0.35,0.5625,0.5,0.625", "lines of neither a box nor the corners"),
        ("0 35 45 50 50", "lines in pixels"),
        ("0 10 20 60 20 60 70", "lines in pixels"),
        ("0 0.1 0.2 0.3", "lines of neither a box nor the corners"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "lines of neither a box nor the corners"),
        ("0", "lines of neither a box nor the corners"),
        ("0 nan 0.5 0.5 0.5", "boxes with corners that are not finite"),
        ("0 0.35 0.5625 half 0.625", "annotations that cannot be read"),
    ],
)
def test_an_odd_label_line_costs_itself_alone(line: str, reason: str, tmp_path: Path) -> None:
    data = yolo(tmp_path)
    path = tmp_path / "labels" / "train" / "b.txt"
    path.write_text(f"0 0.35 0.5625 0.5 0.625\n\n{line}\n")
    index = open_index(data, "train")
    assert index[1].boxes == [BOX, BOX][: 1 if reason else 2]
    assert not reason or any(text.startswith(f"1 {reason}") and f"{path}:3" in text for text in index.left_out)


@pytest.mark.parametrize("name", ["c.bmp", "c.TIF", "c.JPG", "c.jfif", "c.gif", "c", "c.dat"])
@pytest.mark.parametrize("kind", [yolo, masks])
def test_pictures_of_any_format(kind: Callable[[Path], DataConfig], name: str, tmp_path: Path) -> None:
    data, folder = kind(tmp_path), tmp_path / "images" / ("train" if kind is yolo else "")
    form = {".bmp": "BMP", ".TIF": "TIFF", ".gif": "GIF"}.get(Path(name).suffix, "JPEG")
    Image.new("RGB", SIZE, (90, 120, 30)).save(folder / name, form)
    if kind is yolo:
        (tmp_path / "labels" / "train" / "c.txt").write_text("0 0.35 0.5625 0.5 0.625")
    else:
        (tmp_path / "masks" / "p0.png").rename(tmp_path / "masks" / "c.PNG")
    both = [open_index(data, split) for split in ("train", "validation")]
    assert name in {Path(index[i].name).name for index in both for i in range(len(index))}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda size: Image.new("L", size, 1), "masks without white"),
        (lambda size: Image.new("L", (9, 9), 255), "images of another size than annotated"),
        (None, "images without a mask"),
    ],
)
def test_odd_masks(mask: Callable[[tuple[int, int]], Image.Image] | None, reason: str, tmp_path: Path) -> None:
    data = masks(tmp_path)
    paths = sorted((tmp_path / "masks").iterdir())
    for path in paths[::2]:
        path.unlink()
        if mask:
            mask(SIZE).save(path)
    index = open_index(data, "train")
    assert any(reason in line for line in index.left_out) and 0 < len(index) < 100


VOC_BOX = "<bndbox><xmin>11.0</xmin><ymin>21</ymin><xmax>60.0</xmax><ymax>70.0</ymax></bndbox>"
VOC_SHAPE = "<polygon><x1>10</x1><y1>20</y1><x2>60</x2><y2>20</y2><x3>60</x3><y3>70</y3></polygon>"
VOC_POINTS = "<polygon><pt><x>11</x><y>21</y></pt><pt><x>60</x><y>21</y></pt><pt><x>60</x><y>70</y></pt></polygon>"


@pytest.mark.parametrize(
    ("head", "thing", "reason"),
    [
        ("<filename>b.jpg</filename>", VOC_BOX, ""),
        (r"<filename>D:\p\b.jpg</filename>", VOC_BOX, ""),
        ("<filename>b</filename>", VOC_BOX, ""),
        ("<filename>b.png</filename>", VOC_BOX, ""),
        ("<size><width>100.0</width><height>80</height></size>", VOC_BOX, ""),
        ("<size><width>0</width><height>0</height></size>", VOC_BOX + "<difficult>1</difficult>", ""),
        ("<size><width>-1</width></size>", VOC_BOX + "<truncated>1</truncated>", ""),
        ("", VOC_SHAPE + VOC_BOX, ""),
        ("", VOC_POINTS, ""),
        ("", "", "objects without a box"),
        ("", VOC_BOX.replace("<xmax>60.0</xmax>", ""), "objects without a box"),
        ("", VOC_BOX.replace("60.0", "wide"), "annotations that cannot be read"),
        ("", VOC_BOX.replace("60.0", "nan"), "boxes with corners that are not finite"),
        ("", VOC_BOX.replace("60.0", "<"), "annotations that cannot be read"),
        (
            "<filename>b.jpg</filename><size><width>80</width><height>100</height></size>",
            VOC_BOX,
            "images of another size",
        ),
    ],
)
def test_odd_xml(head: str, thing: str, reason: str, tmp_path: Path) -> None:
    data = voc(tmp_path)
    path = tmp_path / "Annotations" / "b.xml"
    path.write_text(f"<annotation>{head}<object><name>cup</name>{thing}</object></annotation>")
    index = open_index(data, "train")
    assert [index[i].name for i in range(len(index))] == ["a.jpg", "b.jpg"][: 1 if reason else 2]
    if reason:
        assert any(line.startswith(f"1 {reason}") for line in index.left_out)
    else:
        assert index[1].boxes == [BOX] and index[1].labels == ("cup",)
        assert bool(index[1].shapes[0]) == ("polygon" in thing)


def test_of_few_images_one_is_for_validation(tmp_path: Path) -> None:
    data = yolo(tmp_path)
    for folder in ("images", "labels"):
        (tmp_path / folder / "train").rename(tmp_path / folder / "all")
        shutil.rmtree(tmp_path / folder / "val")
    assert [len(open_index(data, split)) for split in ("train", "validation")] == [1, 1]


# ---- photographs that EXIF rotates ----


def rotated(root: Path, annotated: str | None, orientation: int = 6, name: str = "b.jpg") -> DataConfig:
    """A second picture, 80 x 100 as stored, that EXIF turns; `annotated` as stored, upright, or without size."""
    data = coco_file(root, [])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (80, 100) if orientation >= 5 else (100, 80)).save(root / name, exif=exif)
    size = {"stored": (80, 100), "upright": (100, 80)}.get(annotated or "")
    described = {"width": size[0], "height": size[1]} if size else {}
    content = json.loads((root / "i.json").read_text())
    content["images"][1] = {"id": 1, "file_name": name, **described}
    content["annotations"].append(other())
    (root / "i.json").write_text(json.dumps(content))
    return data


@pytest.mark.parametrize(
    ("exif", "annotated", "size", "orientation"),
    [
        ("auto", "upright", (100, 80), 6),
        ("auto", "stored", (80, 100), 1),
        ("auto", None, (100, 80), 6),
        ("apply", "upright", (100, 80), 6),
        ("apply", None, (100, 80), 6),
        ("ignore", "stored", (80, 100), 1),
        ("ignore", None, (80, 100), 1),
    ],
)
def test_rotated_photographs(
    exif: str, annotated: str | None, size: tuple[int, int], orientation: int, tmp_path: Path
) -> None:
    data = rotated(tmp_path, annotated)
    data.exif = exif
    index = open_index(data, "train")
    assert [(index[i].size, index[i].orientation) for i in (0, 1)] == [(SIZE, 1), (size, orientation)]


@pytest.mark.parametrize(("exif", "annotated"), [("apply", "stored"), ("ignore", "upright"), ("skip", "upright")])
def test_rotated_photographs_that_are_left_out(exif: str, annotated: str, tmp_path: Path) -> None:
    data = rotated(tmp_path, annotated)
    data.exif = exif
    index = open_index(data, "train")
    assert len(index) == 1 and len(index.left_out) == 1 and "(b.jpg)" in index.left_out[0]
    data.exif = "auto"
    assert len(open_index(data, "train")) == 2, "the setting is part of the index"


@pytest.mark.parametrize(("annotated", "expected"), [("stored", 1), ("upright", 3)])
def test_where_both_sizes_fit_the_other_photographs_decide(annotated: str, expected: int, tmp_path: Path) -> None:
    """Turned by 180 degrees, an image has the same size: tools treat it as they treat the others."""
    data = rotated(tmp_path, annotated)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", SIZE).save(tmp_path / "a.jpg", exif=exif)
    index = open_index(data, "train")
    assert {index[i].name: index[i].orientation for i in (0, 1)}["a.jpg"] == expected


@pytest.mark.parametrize("value", [0, 9])
def test_exif_orientations_that_mean_nothing(value: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.new("RGB", SIZE).save(tmp_path / "x.png", exif=exif)
    assert image_header(tmp_path / "x.png") == (SIZE, 1)


@pytest.mark.parametrize("content", [{"images": [], "annotations": None}, {"images": 3, "annotations": []}, [], "text"])
def test_json_that_is_not_coco_is_refused_in_a_line(content: object, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.json"):
        open_index(DataConfig("coco", str(tmp_path), annotations=str(tmp_path / "a.json")), "train")


def test_images_that_share_an_id_are_left_out(tmp_path: Path) -> None:
    names = [("2", "b.jpg"), (2, "b.jpg"), (1, "a.jpg")]
    index = open_index(coco_file(tmp_path, [], [{"id": i, "file_name": name} for i, name in names]), "train")
    assert len(index) == 1 and any(line.startswith("2 images that share an id") for line in index.left_out)


def test_a_name_that_is_no_unicode_costs_its_image(tmp_path: Path) -> None:
    names = ["\ud800.jpg", "a.jpg", "b.jpg"]
    data = coco_file(tmp_path, [], [{"id": i, "file_name": name} for i, name in enumerate(names)])
    assert len(open_index(data, "train")) == 1


@pytest.mark.parametrize("text", ["", "/m/01\n", "/m/01,cup\n"])
def test_class_descriptions_that_say_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "class-descriptions.csv").write_text(text)
    assert len(open_index(open_images_csv(tmp_path, label="/m/02"), "train")) == 2


def test_one_picture_is_too_few_to_hold_one_out(tmp_path: Path) -> None:
    data = coco_file(tmp_path, [], [{"id": 1, "file_name": "b.jpg"}])
    data.val_annotations = None
    assert len(open_index(data, "train")) == 1
    with pytest.raises(UserError, match="too few images"):
        open_index(data, "validation")


def test_images_without_objects_are_not_held_out(tmp_path: Path) -> None:
    listed = [{"id": i, "file_name": f"{i}.jpg"} for i in range(40)]
    images(tmp_path, tuple(map(str, range(40))))
    data = coco_file(tmp_path, [other(image_id=2)], listed)  # of forty images two have objects
    data.val_annotations = None
    assert [len(open_index(data, split)) for split in ("train", "validation")] == [1, 1]
