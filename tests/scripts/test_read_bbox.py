"""Open Images' CSV to text files of boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm.data.annotations import OPEN_IMAGES_CSV
from ldm.files import UserError
from scripts.read_bbox import Report, main, read_bbox
from tests.data.test_annotations import write_jpeg

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"


def row(image: str, x_min: float, x_max: float, y_min: float, y_max: float) -> str:
    return f"{image},xclick,/m/011k07,1,{x_min},{x_max},{y_min},{y_max},1,0,0,0,0"


def write_csv(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def convert(root: Path, rows: list[str], split: str = "validation", **options: bool) -> Report:
    csv_path = write_csv(root / "annotations" / OPEN_IMAGES_CSV[split], rows)
    return read_bbox(csv_path, root / "images", split, root / "bbox" / split, **options)


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


@pytest.mark.parametrize("damaged", ["a,xclick,/m/01,1,zero,0.5,0,0.5", "a,xclick", row("a", float("nan"), 0.5, 0, 1)])
def test_a_damaged_row_costs_itself(damaged: str, tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    report = convert(tmp_path, [row("a", 0, 0.5, 0, 0.5), damaged, row("a", 0, 1, 0, 0.5)])
    assert (report.rows, report.boxes, report.written) == (3, 2, 1)
    assert list(report.skipped.counts.values()) == [1] and "row 2" in str(report.skipped)


@pytest.mark.parametrize(
    ("change", "encoding"), [((",", ";"), "utf-8"), ((",", ", "), "utf-8-sig"), (("", ""), "utf-16")]
)
def test_a_csv_of_another_program(change: tuple[str, str], encoding: str, tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    csv_path = write_csv(tmp_path / "annotations" / "boxes.csv", [row("a", 0, 0.5, 0, 0.5)])
    csv_path.write_bytes(csv_path.read_text().replace(*change).encode(encoding))
    report = read_bbox(csv_path, tmp_path / "images", "validation", tmp_path / "out")
    assert (report.rows, report.boxes, report.written) == (1, 1, 1)


def test_reversed_boxes_are_not_kept_and_pixels_are_told(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    report = convert(tmp_path, [row("a", 0, 0.5, 0, 0.5), row("a", 0.5, 0, 0.5, 0), row("a", 0.5, 0, 0, 0.5)])
    assert (report.rows, report.boxes) == (3, 1)
    with pytest.raises(UserError, match="fractions"):
        convert(tmp_path, [row("a", 10, 40, 10, 40)])


def test_damaged_names_of_classes_are_one_clear_line(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    write_csv(tmp_path / "annotations" / "class-descriptions.csv", ["/m/2,Cat,x,y"], header="/m/1,Dog")
    with pytest.raises(UserError, match=r"class-descriptions\.csv: .*saw 4\); mend"):
        convert(tmp_path, [row("a", 0, 0.5, 0, 0.5)])


def test_ids_of_digits_keep_their_zeros(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/0012.jpg")
    assert convert(tmp_path, [row("0012", 0, 0.5, 0, 0.5)]).written == 1


def test_unusable_annotations_are_one_clear_line(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    csv_path = write_csv(tmp_path / "other.csv", [], header="id,x,y")
    with pytest.raises(UserError, match=r"other\.csv: .*ImageID"):
        read_bbox(csv_path, tmp_path / "images", "validation", tmp_path / "out")
    (tmp_path / "empty.csv").write_text("")
    write_csv(tmp_path / "header.csv", [])
    for name in ("nowhere", "empty", "header"):
        with pytest.raises(UserError, match=name):
            read_bbox(tmp_path / f"{name}.csv", tmp_path / "images", "validation", tmp_path / "out")
    with pytest.raises(UserError, match="test/"):
        read_bbox(csv_path, tmp_path / "images", "test", tmp_path / "out")


# ---- command line ----


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jpeg(tmp_path / "images/validation/a.jpg")
    write_csv(tmp_path / "annotations" / OPEN_IMAGES_CSV["validation"], [row(n, 0, 0.5, 0, 0.5) for n in "ab"])
    assert main(["--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 rows, 2 boxes kept; 1 files written" in printed and "1 missing; listed in" in printed
    for args in (["--root", str(tmp_path), "--splits", "train"], ["--root", str(tmp_path / "nowhere")]):
        assert main(args) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
