"""Every annotation format to the same index; Open Images' CSV to text files."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ldm.data.annotations import (
    OPEN_IMAGES_CSV,
    READERS,
    AnnotationSource,
    BoxFilesReport,
    UnusableImageError,
    held_out,
    open_index,
    stored_size,
    write_box_files,
    write_index,
)
from ldm.data.box_index import BoxIndex
from ldm.files import UserError
from ldm.images import Box

ROOT = Path(__file__).parents[2]
SIZE = (100, 80)
BOX = Box(10, 20, 60, 70)  # of every image
OUTLINE = [(10, 20), (60, 20), (60, 70)]


def images(folder: Path, names: tuple[str, ...] = ("a", "b"), suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", SIZE, (90, 120, 30)).save(folder / f"{name}{suffix}")


def open_images_texts(root: Path) -> AnnotationSource:
    for split in ("train", "validation"):
        images(root / "images" / split)
        (root / "bbox" / split).mkdir(parents=True)
        for name in "ab":
            (root / "bbox" / split / f"{name}.txt").write_text("10.0 20.0 60.0 70.0\n0 0 1 1\n")
    return AnnotationSource(root)


def open_images_csv(root: Path) -> AnnotationSource:
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "validation"):
        images(root / "images" / split)
        rows = ["ImageID,XMin,XMax,YMin,YMax", *(f"{name},0.1,0.6,0.25,0.875" for name in "ba"), "a,0,0.01,0,0.01"]
        (root / "annotations" / OPEN_IMAGES_CSV[split]).write_text("\n".join(rows))
    return AnnotationSource(root)


def coco(root: Path) -> AnnotationSource:
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
    return AnnotationSource(root, root / "train.json", root / "val.json")


def voc(root: Path) -> AnnotationSource:
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
    return AnnotationSource(root)


def yolo(root: Path) -> AnnotationSource:
    for split in ("train", "val"):
        images(root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        corners = " ".join(f"{x / 100} {y / 80}" for x, y in OUTLINE)
        (root / "labels" / split / "a.txt").write_text(f"3 {corners}\n0 0.005 0.005 0.01 0.01\n")
        (root / "labels" / split / "b.txt").write_text("0 0.35 0.5625 0.5 0.625\n")
    return AnnotationSource(root)


def masks(root: Path) -> AnnotationSource:
    names = tuple(f"p{k}" for k in range(150))  # a share is held out by name
    images(root / "images", names, ".png")
    (root / "masks").mkdir()
    mask = Image.new("L", SIZE)
    mask.paste(255, BOX)
    ImageDraw.Draw(mask).point((90, 5), 255)  # a speck is no object
    for name in names:
        mask.save(root / "masks" / f"{name}.png")
    return AnnotationSource(root)


LAYOUTS: dict[str, tuple[str, Callable[[Path], AnnotationSource]]] = {
    "open_images texts": ("open_images", open_images_texts),
    "open_images csv": ("open_images", open_images_csv),
    "coco": ("coco", coco),
    "voc": ("voc", voc),
    "yolo": ("yolo", yolo),
    "masks": ("masks", masks),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_format_gives_the_same_boxes(layout: str, split: str, tmp_path: Path) -> None:
    kind, make = LAYOUTS[layout]
    index = open_index(kind, make(tmp_path), split)
    names = [index[i].name for i in range(len(index))]
    assert len(names) == len(set(names)) >= 2
    for i, name in enumerate(names):
        entry = index[i]
        with Image.open(Path(index.metadata["images"]) / name) as picture:
            assert entry.size == picture.size == SIZE
        assert entry.boxes == [BOX], "of two boxes one is too small"
        assert not entry.mask or (Path(index.metadata["images"]) / entry.mask).is_file()
    assert index.has_shapes == (kind in ("coco", "yolo", "masks"))
    if kind in ("coco", "yolo"):
        np.testing.assert_allclose(index[0].shapes[0][0], OUTLINE, atol=1e-4)
        assert index[1].shapes == [[]]


def test_all_formats_are_tried() -> None:
    assert {kind for kind, _ in LAYOUTS.values()} == set(READERS)


def test_an_undivided_set_is_divided_by_name(tmp_path: Path) -> None:
    source = masks(tmp_path)
    indexes = {split: open_index("masks", source, split) for split in ("train", "validation")}
    names = {split: {index[i].name for i in range(len(index))} for split, index in indexes.items()}
    assert len(names["train"]) == 142 and len(names["validation"]) == 8
    assert not names["train"] & names["validation"]


@given(st.sets(st.text(min_size=1), max_size=300), st.sets(st.text(min_size=1), max_size=10))
def test_held_out_share(names: set[str], added: set[str]) -> None:
    chosen = held_out(names)
    assert chosen <= names
    assert len(chosen) == min(max(round(0.05 * len(names)), 8), len(names) // 4)
    # what is added moves at most as many
    assert len(chosen - held_out(names | added)) <= len(added)


def test_the_index_is_written_once_and_again_after_a_change(tmp_path: Path) -> None:
    source = yolo(tmp_path)
    open_index("yolo", source, "train")
    path = tmp_path / "index" / "yolo-train.safetensors"
    first = path.stat().st_mtime_ns
    open_index("yolo", source, "train")
    assert path.stat().st_mtime_ns == first
    images(tmp_path / "images" / "train", ("c",))
    (tmp_path / "labels" / "train" / "c.txt").write_text("0 0.35 0.5625 0.5 0.625\n")
    assert len(open_index("yolo", source, "train")) == 3


def test_another_folder_for_the_index(tmp_path: Path) -> None:
    source = voc(tmp_path / "data")
    open_index("voc", source, "train", tmp_path / "elsewhere")
    assert not (tmp_path / "data" / "index").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.index"):
        open_index("voc", source, "train", tmp_path / "file")


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = yolo(tmp_path)
    folder = tmp_path / "images" / "train"
    images(folder, ("c", "d", "e", "f"))
    labels = tmp_path / "labels" / "train"
    for name in "cde":
        (labels / f"{name}.txt").write_text("0 0.35 0.5625 0.5 0.625\n")
    (labels / "f.txt").write_text("0 0.35 nonsense\n")
    whole = (folder / "c.jpg").read_bytes()
    (folder / "c.jpg").write_bytes(whole[:200])
    (folder / "d.jpg").write_bytes(b"<html>")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(folder / "e.jpg", exif=exif)
    with caplog.at_level(logging.WARNING):
        writer = write_index(tmp_path / "i.safetensors", "yolo", source, "train")
    assert writer.images == 2
    assert "f.txt" in caplog.text and "nonsense" in caplog.text
    assert writer.dropped == {
        "boxes of less than 2% of their image": 1,
        "images unreadable": 2,
        "images rotated by EXIF orientation; save them upright": 1,
        "annotations that cannot be read": 1,
    }


def test_an_image_of_another_size_than_annotated_is_left_out(tmp_path: Path) -> None:
    source = coco(tmp_path)
    Image.new("RGB", (80, 100)).save(tmp_path / "b.jpg")
    index = open_index("coco", source, "train")
    assert [index[i].name for i in range(len(index))] == ["a.jpg"]
    assert json.loads(index.metadata["dropped"])["images of another size than annotated"] == 1


@pytest.mark.parametrize(
    ("kind", "prepare", "place"),
    [
        ("coco", lambda root: AnnotationSource(root), r"data\.annotations"),
        ("coco", lambda root: AnnotationSource(root, root / "x.json"), r"x\.json"),
        (
            "coco",
            lambda root: (root / "x.json").write_text("{") and AnnotationSource(root, root / "x.json"),
            r"x\.json",
        ),
        (
            "coco",
            lambda root: (root / "x.json").write_text("{}") and AnnotationSource(root, root / "x.json"),
            r"x\.json",
        ),
        ("voc", AnnotationSource, "Annotations"),
        ("yolo", AnnotationSource, "images"),
        ("masks", AnnotationSource, "masks"),
        ("open_images", AnnotationSource, r"dataset/README\.md"),
        ("labelme", AnnotationSource, "open_images, coco, voc, yolo, masks"),
    ],
)
def test_errors_name_the_place(
    kind: str, prepare: Callable[[Path], AnnotationSource], place: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=place):
        open_index(kind, prepare(tmp_path), "train")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_index_says_where_its_images_are(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    write_index(path, "voc", voc(tmp_path), "train")
    assert BoxIndex(path).metadata["images"] == str(tmp_path / "JPEGImages")


def test_three_ways_to_the_same_index(tmp_path: Path) -> None:
    """read_bbox writes the index that reading its text files, or the CSV, would give."""
    spec = importlib.util.spec_from_file_location("read_bbox_script", ROOT / "scripts" / "read_bbox.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source = open_images_csv(tmp_path)
    of_csv = entries(open_index("open_images", source, "train"))
    (tmp_path / "index" / "open_images-train.safetensors").unlink()
    assert script.main(["--root", str(tmp_path)]) == 0
    path = tmp_path / "index" / "open_images-train.safetensors"
    written = path.stat().st_mtime_ns
    of_script = entries(open_index("open_images", source, "train"))
    assert path.stat().st_mtime_ns == written, "valid as it is"
    path.unlink()
    of_texts = entries(open_index("open_images", source, "train"))
    assert of_csv == of_script == of_texts


def entries(index: BoxIndex) -> list[object]:
    return [index[i] for i in range(len(index))]


# ---- text files of Open Images ----


HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"


def row(image: str, x_min: float, x_max: float, y_min: float, y_max: float) -> str:
    return f"{image},xclick,/m/011k07,1,{x_min},{x_max},{y_min},{y_max},1,0,0,0,0"


def write_csv(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def write_jpeg(path: Path, size: tuple[int, int] = (80, 60), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 50).convert("RGB").save(path, "JPEG", **options)
    return path


def convert(root: Path, rows: list[str], split: str = "validation", **options: bool) -> BoxFilesReport:
    csv_path = write_csv(root / "annotations" / OPEN_IMAGES_CSV[split], rows)
    return write_box_files(csv_path, root / "images", split, root / "bbox" / split, **options)


def test_kept_boxes_and_their_text(tmp_path: Path) -> None:
    """Rows worked out by hand; areas of exactly 2 % and 80 % are kept, numbers are Python's shortest text."""
    write_jpeg(tmp_path / "images/validation/a.jpg", (640, 480))
    write_jpeg(tmp_path / "images/validation/b.jpg", (640, 480))
    rows = [
        row("a", 0.0, 0.2, 0.0, 0.1),  # 0.020000000000000004
        row("a", 0.0, 0.1, 0.0, 0.2),
        row("a", 0.0, 0.1, 0.0, 0.199),  # too small
        row("a", 0.0, 1.0, 0.0, 0.8),
        row("a", 0.0, 1.0, 0.0, 0.8001),  # too large
        row("a", 0.094531, 0.235391, 0.083333, 0.25),
        row("b", 0.0, 1.0, 0.0, 1.0),  # too large: b has no text file
    ]
    report = convert(tmp_path, rows)
    assert (report.rows, report.boxes, report.written, report.list_path) == (7, 4, 1, None)
    assert [path.name for path in (tmp_path / "bbox/validation").iterdir()] == ["a.txt"]
    assert (tmp_path / "bbox/validation/a.txt").read_text().splitlines() == [
        "0.0 0.0 128.0 48.0",
        "0.0 0.0 64.0 96.0",
        "0.0 0.0 640.0 384.0",
        f"{0.094531 * 640} {0.083333 * 480} {0.235391 * 640} 120.0",
    ]


def test_same_as_pandas_and_a_decoded_image(tmp_path: Path) -> None:
    """Against the original's way: pandas' numbers, a decoded image's size, the same condition and text."""
    pd, cv2 = pytest.importorskip("pandas"), pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(20):
        write_jpeg(tmp_path / f"images/validation/{i:016x}.jpg", tuple(rng.integers(30, 90, 2).tolist()))
        for _ in range(int(rng.integers(0, 30))):
            (x0, x1), (y0, y1) = np.sort(rng.random((2, 2)))
            rows.append(row(f"{i:016x}", *(round(v, 6) for v in (x0, x1, y0, y1))))
    report = convert(tmp_path, rows)
    table = pd.read_csv(tmp_path / "annotations" / OPEN_IMAGES_CSV["validation"])
    expected = {}
    for image, group in table.groupby("ImageID"):
        height, width = cv2.imread(str(tmp_path / f"images/validation/{image}.jpg")).shape[:2]
        boxes = zip(group.XMin.tolist(), group.XMax.tolist(), group.YMin.tolist(), group.YMax.tolist(), strict=True)
        kept = [b for b in boxes if 0.02 <= (b[1] - b[0]) * (b[3] - b[2]) <= 0.8]
        if kept:
            expected[image] = "".join(f"{a * width} {c * height} {b * width} {d * height}\n" for a, b, c, d in kept)
    got = {path.stem: path.read_text() for path in (tmp_path / "bbox/validation").iterdir()}
    assert got == expected
    assert report.written == len(expected) > 10


def test_rows_of_an_image_may_be_anywhere(tmp_path: Path) -> None:
    for name in "ab":
        write_jpeg(tmp_path / f"images/validation/{name}.jpg", (100, 100))
    convert(tmp_path, [row("b", 0, 0.5, 0, 0.5), row("a", 0, 0.5, 0, 0.5), "", row("b", 0.25, 0.5, 0, 0.5)])
    assert (tmp_path / "bbox/validation/b.txt").read_text() == "0.0 0.0 50.0 50.0\n25.0 0.0 50.0 50.0\n"


def test_images_may_be_in_open_images_sixteen_folders(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/train_0/0a.jpg")
    write_jpeg(tmp_path / "images/train_f/fa.jpg")
    write_jpeg(tmp_path / "images/train/deeper/1a.jpg")
    assert convert(tmp_path, [row(n, 0, 0.5, 0, 0.5) for n in ("0a", "1a", "fa")], "train").written == 3


def test_resumes_and_overwrites(tmp_path: Path) -> None:
    for name in "abc":
        write_jpeg(tmp_path / f"images/validation/{name}.jpg")
    rows = [row(n, 0, 0.5, 0, 0.5) for n in "abc"]
    convert(tmp_path, rows)
    out = tmp_path / "bbox/validation"
    (out / "a.txt").write_text("mine")
    (out / "b.txt").write_text("")  # as after a power failure
    (out / "c.txt").unlink()
    report = convert(tmp_path, rows)
    assert (report.written, report.resumed) == (2, 1)
    assert (out / "a.txt").read_text() == "mine"
    assert (out / "b.txt").read_text() == (out / "c.txt").read_text() == "0.0 0.0 40.0 30.0\n"
    assert convert(tmp_path, rows, overwrite=True).written == 3
    assert (out / "a.txt").read_text() == "0.0 0.0 40.0 30.0\n"
    assert sorted(path.name for path in out.iterdir()) == ["a.txt", "b.txt", "c.txt"]


def test_unusable_images_are_reported(tmp_path: Path) -> None:
    images = tmp_path / "images/validation"
    whole = write_jpeg(images / "good.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[:-500])
    (images / "header_cut.jpg").write_bytes(whole[:100])
    (images / "text.jpg").write_text("not found")
    (images / "empty.jpg").write_bytes(b"")
    names = ["good", "cut", "header_cut", "text", "empty", "absent"]
    report = convert(tmp_path, [row(n, 0, 0.5, 0, 0.5) for n in names])
    assert report.written == 1
    assert report.problems == {"truncated": 1, "unreadable": 3, "missing": 1}
    assert report.list_path is not None
    assert dict(line.split("\t") for line in report.list_path.read_text().splitlines()) == {
        "cut": "truncated",
        "header_cut": "unreadable",
        "text": "unreadable",
        "empty": "unreadable",
        "absent": "missing",
    }


def test_unusable_annotations_are_one_clear_line(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    with pytest.raises(UserError, match=r"bbox\.csv: .*zero"):
        convert(tmp_path, [row("a", 0, 0.5, 0, 0.5), "a,xclick,/m/01,1,zero,0.5,0,0.5"])
    with pytest.raises(UserError, match=r"bbox\.csv: row 2 "):
        convert(tmp_path, [row("a", 0, 0.5, 0, 0.5), "a,xclick"])
    csv_path = write_csv(tmp_path / "other.csv", [], header="id,x,y")
    with pytest.raises(UserError, match=r"other\.csv: .*id, x, y; lacks ImageID, XMax, XMin, YMax, YMin"):
        write_box_files(csv_path, tmp_path / "images", "validation", tmp_path / "out")
    (tmp_path / "empty.csv").write_text("")
    for name in ("nowhere", "empty"):
        with pytest.raises(UserError, match=name):
            write_box_files(tmp_path / f"{name}.csv", tmp_path / "images", "validation", tmp_path / "out")
    with pytest.raises(UserError, match="test/"):
        write_box_files(csv_path, tmp_path / "images", "test", tmp_path / "out")


# ---- sizes ----


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}, {"icc_profile": bytes(200_000)}])
def test_stored_size(tmp_path: Path, options: dict[str, object]) -> None:
    assert stored_size(write_jpeg(tmp_path / "x.jpg", (123, 45), **options)) == (123, 45)


def test_stored_size_of_images_that_exif_rotates(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_jpeg(tmp_path / "x.jpg", (123, 45), exif=exif)
    assert stored_size(path, ignore_exif=True) == (123, 45)
    with pytest.raises(UnusableImageError, match="EXIF"):
        stored_size(path)


def test_stored_size_of_any_prefix_is_an_error(tmp_path: Path) -> None:
    content = write_jpeg(tmp_path / "x.jpg", (40, 30)).read_bytes()
    path = tmp_path / "prefix.jpg"
    for length in range(0, len(content) - 2, 7):
        path.write_bytes(content[:length])
        with pytest.raises(UnusableImageError):
            stored_size(path)
    path.write_bytes(content + bytes(300))
    assert stored_size(path) == (40, 30)


# ---- command line ----


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/read_bbox.py", *args], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_command_line(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    write_csv(tmp_path / "annotations" / OPEN_IMAGES_CSV["validation"], [row(n, 0, 0.5, 0, 0.5) for n in "ab"])
    done = run("--root", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "2 rows, 2 boxes kept; 1 files written" in done.stdout
    assert "1 missing; listed in" in done.stdout
    for args in (["--root", str(tmp_path), "--splits", "train"], ["--root", str(tmp_path / "nowhere")]):
        failed = run(*args)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
