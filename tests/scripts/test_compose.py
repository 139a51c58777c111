"""Composed scenes: boxes, determinism, hold-out, layout, errors."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ldm.data.annotations import OPEN_IMAGES_CSV
from ldm.files import UserError
from scripts.scenes.compose import (
    SceneSettings,
    compose_dataset,
    compose_scene,
    find_pictures,
    main,
    photo_patch,
)

SIZE = 32
COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 0, 255),
    (0, 255, 255),
    (250, 120, 0),
    (120, 0, 250),
]


def cutout(colour: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> Image.Image:
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).ellipse((2, 2, size[0] - 3, size[1] - 3), fill=(*colour, 255))
    return image


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cut-outs of clear colours in two folders, six grey photographs."""
    root = tmp_path_factory.mktemp("material")
    for index, colour in enumerate(COLOURS):
        path = root / "cutouts" / "ab"[index % 2] / f"object{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cutout(colour).save(path)
    (root / "backgrounds").mkdir()
    for index in range(6):
        Image.new("RGB", (90, 70), (40 * index,) * 3).save(root / "backgrounds" / f"place{index}.jpg")
    (root / "LICENSES.md").write_text("drawn by the tests")
    return root


def compose(
    material: Path,
    out: Path,
    *,
    extras: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    **changes: float | tuple[str, ...],
) -> Path:
    options = {"count": 12, "size": SIZE, "seed": 3, "bench": 4, **changes}
    compose_dataset(
        material / "cutouts",
        material / "backgrounds",
        out,
        SceneSettings(**options),  # pyright: ignore[reportArgumentType]
        extras_dir=extras,
        workers=workers,
        overwrite=overwrite,
    )
    return out


@pytest.fixture(scope="module")
def dataset(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose(material, tmp_path_factory.mktemp("dataset") / "out")


@pytest.fixture(scope="module")
def extras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extras")
    for index in range(3):
        cutout((200, 200, 40 * index)).save(root / f"drawing{index}.png")
    return root


def files_in(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def rows_of(root: Path, split: str) -> list[dict[str, str]]:
    with (root / "annotations" / OPEN_IMAGES_CSV[split]).open(newline="") as file:
        return list(csv.DictReader(file))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), width=st.integers(30, 90), height=st.integers(30, 90))
def test_the_box_is_the_extent_of_the_object(seed: int, width: int, height: int) -> None:
    """On black, where no shadow shows, every pixel of the object lies in its box and the box touches them."""
    scene = compose_scene(
        np.random.default_rng(seed), [("red", cutout((255, 0, 0), (width, height)))], Image.new("RGB", (80, 80)), 64
    )
    (shown,) = scene.objects
    x_min, y_min, x_max, y_max = shown.box
    red = np.asarray(scene.image)[..., 0].astype(int)
    red = red / red.max()  # brightness is matched to the background
    inside = np.zeros_like(red, dtype=bool)
    inside[y_min:y_max, x_min:x_max] = True
    # The box ends where alpha falls below 0.2; a level of rounding on either side.
    assert red[~inside].max(initial=0) < 0.22
    for edge in (red[y_min, :], red[y_max - 1, :], red[:, x_min], red[:, x_max - 1]):
        assert edge.max() > 0.18
    # 25 % to 75 % of the side; the soft edge of an enlarged cut-out may lose 2 px, whole pixels may add 1.
    assert 16 - 2 <= max(x_max - x_min, y_max - y_min) <= 48 + 1
    assert not shown.occluded


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_later_objects_cover_little_of_earlier_ones(seed: int) -> None:
    objects = [(str(index), cutout(colour)) for index, colour in enumerate(COLOURS[:3])]
    scene = compose_scene(np.random.default_rng(seed), objects, Image.new("RGB", (80, 80), "grey"), 64)
    assert scene.objects[0].name == "0"
    apart = compose_scene(np.random.default_rng(seed), objects, Image.new("RGB", (80, 80)), 64, max_overlap=0.0)
    boxes = [shown.box for shown in apart.objects]
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            width = min(one[2], other[2]) - max(one[0], other[0])
            height = min(one[3], other[3]) - max(one[1], other[1])
            assert min(width, height) <= 1  # boxes apart at working size may share a pixel at the final one


def test_a_covered_object_has_the_box_of_what_is_seen() -> None:
    for seed in range(40):
        objects = [("red", cutout((255, 0, 0))), ("green", cutout((0, 255, 0)))]
        scene = compose_scene(np.random.default_rng(seed), objects, Image.new("RGB", (80, 80)), 64, max_overlap=0.9)
        if scene.objects[0].occluded:
            break
    else:
        pytest.fail("no occlusion in 40 scenes")
    x_min, y_min, x_max, y_max = scene.objects[0].box
    red = np.asarray(scene.image)[..., 0] > 128
    assert red[y_min:y_max, x_min:x_max].sum() == red.sum()


def test_hue_jitter_recolours_but_keeps_the_shape() -> None:
    background = Image.new("RGB", (80, 80))
    hues = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scene = compose_scene(rng, [("red", cutout((255, 0, 0)))], background, 64, hue_jitter=0.5, hue_jitter_share=1.0)
        x_min, y_min, x_max, y_max = scene.objects[0].box
        centre = scene.image.getpixel(((x_min + x_max) // 2, (y_min + y_max) // 2))
        assert isinstance(centre, tuple)
        assert max(centre) > 100
        hues.add(int(np.argmax(centre)))
    assert hues == {0, 1, 2}


def test_layout_is_that_of_open_images(dataset: Path) -> None:
    classes = {
        row["LabelName"] for row in csv.DictReader((dataset / "annotations/oidv6-class-descriptions.csv").open())
    }
    for split, count in (("train", 12), ("validation", 8), ("test", 8)):
        images = {path.stem for path in (dataset / "images" / split).glob("*.jpg")}
        assert len(images) == count
        assert all(len(name) == 16 and int(name, 16) >= 0 for name in images)
        rows = rows_of(dataset, split)
        assert {row["ImageID"] for row in rows} == images
        assert {row["LabelName"] for row in rows} <= classes
        for row in rows:
            assert 0 <= float(row["XMin"]) < float(row["XMax"]) <= 1
            assert 0 <= float(row["YMin"]) < float(row["YMax"]) <= 1
        with Image.open(next((dataset / "images" / split).iterdir())) as image:
            assert (image.format, image.size) == ("JPEG", (SIZE, SIZE))
    assert (dataset / "LICENSES.md").read_text() == "drawn by the tests"
    assert not list(dataset.rglob(".*"))  # no temporary files, no parts


def test_coco_instances_have_the_same_boxes_and_outlines_within_them(dataset: Path) -> None:
    for split in ("train", "validation", "test"):
        content, rows = json.loads((dataset / f"annotations/{split}.json").read_bytes()), rows_of(dataset, split)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        labels = {category["id"]: category["name"] for category in content["categories"]}
        assert len(content["annotations"]) == len(rows)
        for row, annotation in zip(rows, content["annotations"], strict=True):
            assert names[annotation["image_id"]] == f"{split}/{row['ImageID']}.jpg"
            assert f"/c/{labels[annotation['category_id']]}" == row["LabelName"]
            x, y, width, height = annotation["bbox"]
            edges = [float(row[name]) * SIZE for name in ("XMin", "YMin", "XMax", "YMax")]
            assert [x, y, x + width, y + height] == pytest.approx(edges, abs=1e-3)
            corners = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
            assert (corners.min(0) == (x, y)).all()
            assert (corners.max(0) == (x + width - 1, y + height - 1)).all()


def test_chosen_objects_are_shown_alone(material: Path, tmp_path: Path) -> None:
    out = compose(material, tmp_path / "out", objects=("a/object2.png",))
    for split in ("train", "validation", "test"):
        rows = rows_of(out, split)
        assert {row["LabelName"] for row in rows} == {"/c/a/object2"} and len(rows) == len({r["ImageID"] for r in rows})
    with (out / "bench" / "items.csv").open(newline="") as file:
        assert {row["Cutout"] for row in csv.DictReader(file)} == {"a/object2.png"}
    compose(material, out, objects=("a/object2.png",))  # which is finished
    with pytest.raises(UserError, match=r"a/nothing\.png"):
        compose(material, tmp_path / "other", objects=("a/nothing.png",))


def test_bench_has_the_cocoee_layout(dataset: Path) -> None:
    bench = dataset / "bench"
    ids = np.load(bench / "id_list.npy")
    assert ids.tolist() == [1, 2, 3, 4]
    with (bench / "items.csv").open(newline="") as file:
        items = {int(row["ID"]): row for row in csv.DictReader(file)}
    for item in ids.tolist():
        scene = Image.open(bench / "GT_4" / f"{item:012d}_GT.png")
        hole_mask = Image.open(bench / "Mask_bbox_4" / f"{item:012d}_mask.png")
        exemplar = Image.open(bench / "Ref_4" / f"{item:012d}_ref.png")
        assert scene.size == hole_mask.size == (SIZE, SIZE)
        assert (scene.mode, hole_mask.mode, exemplar.mode) == ("RGB", "L", "RGB")
        assert set(np.unique(np.asarray(hole_mask))) <= {0, 255}
        row = {key: int(value) for key, value in items[item].items() if key not in ("ID", "Cutout")}
        assert hole_mask.getbbox() == (row["HoleXMin"], row["HoleYMin"], row["HoleXMax"], row["HoleYMax"])
        assert row["HoleXMin"] <= row["XMin"] < row["XMax"] <= row["HoleXMax"]
        assert row["HoleYMin"] <= row["YMin"] < row["YMax"] <= row["HoleYMax"]
        # The exemplar shows the object that is in the hole: these cut-outs are told apart by colour.
        box = row["XMin"], row["YMin"], row["XMax"], row["YMax"]
        assert dominant(scene.crop(box)) == dominant(exemplar)


def dominant(image: Image.Image) -> tuple[bool, ...]:
    centre = np.asarray(image)[image.height // 3 : -image.height // 3, image.width // 3 : -image.width // 3]
    mean = centre.reshape(-1, 3).mean(axis=0)
    return tuple((mean > mean.max() / 2).tolist())


def test_held_out_pictures_are_never_trained_on(dataset: Path) -> None:
    held_out = json.loads((dataset / "settings.json").read_text())["held_out_cutouts"]
    forbidden = {f"/c/{Path(name).with_suffix('').as_posix()}" for name in held_out}
    assert 1 <= len(forbidden) < len(COLOURS)
    shown = {split: {row["LabelName"] for row in rows_of(dataset, split)} for split in OPEN_IMAGES_CSV}
    assert not (shown["train"] | shown["validation"]) & forbidden
    assert shown["test"] <= forbidden
    with (dataset / "bench/items.csv").open(newline="") as file:
        assert {row["Cutout"] for row in csv.DictReader(file)} <= set(held_out)


def test_hold_out_keeps_copies_together_and_ignores_the_seed(tmp_path: Path, material: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(12):
        image = cutout((255, 255, 255))
        noise = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        colours = Image.fromarray(noise).resize(image.size, Image.Resampling.NEAREST)
        colours.putalpha(image.getchannel("A"))
        colours.save(tmp_path / f"{index}.png")
        colours.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / f"{index}_mirror.png")
    pictures, skipped = find_pictures(tmp_path, "cutouts", 0.3)
    assert not skipped
    held_out = {name.split(".")[0].removesuffix("_mirror") for name in pictures.held_out}
    assert len(pictures.held_out) == 2 * len(held_out) == 2 * len(pictures.distinct)
    assert 0.3 <= len(pictures.held_out) / 24 <= 0.4
    assert not held_out & {name.split(".")[0].removesuffix("_mirror") for name in pictures.train}


def test_scenes_do_not_depend_on_the_number_of_workers(material: Path, dataset: Path, tmp_path: Path) -> None:
    assert files_in(compose(material, tmp_path / "two", workers=2)) == files_in(dataset)


def test_another_seed_gives_other_scenes_with_the_same_hold_out(material: Path, dataset: Path, tmp_path: Path) -> None:
    other = compose(material, tmp_path / "other", seed=4)
    key = "held_out_cutouts"
    assert (
        json.loads((other / "settings.json").read_text())[key]
        == json.loads((dataset / "settings.json").read_text())[key]
    )
    assert not set(files_in(other / "images").values()) & set(files_in(dataset / "images").values())


def test_an_interrupted_run_is_continued(
    material: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.scenes.compose._CHUNK", 5)
    replace, written = os.replace, []

    def fail_in_the_middle(source: Path, target: Path) -> None:
        written.append(target)
        if len(written) == 14:  # settings, classes, licences and a chunk (with its rows) come before
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        compose(material, tmp_path / "out")
    monkeypatch.setattr(os, "replace", replace)
    finished = next(path for path in (tmp_path / "out/images/train").glob("*.jpg"))
    before = finished.stat().st_mtime_ns
    assert not (tmp_path / "out/annotations" / OPEN_IMAGES_CSV["train"]).exists()
    assert files_in(compose(material, tmp_path / "out")) == files_in(dataset)
    untouched = [path for path in (tmp_path / "out/images/train").glob("*.jpg") if path.stat().st_mtime_ns <= before]
    assert len(untouched) >= 1  # the finished chunk was not composed again


def test_a_finished_dataset_is_left_alone(material: Path, tmp_path: Path) -> None:
    out = compose(material, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.jpg")}
    compose(material, out)
    assert {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.jpg")} == before


def test_other_settings_need_overwrite(material: Path, tmp_path: Path) -> None:
    out = compose(material, tmp_path / "out")
    with pytest.raises(UserError, match=r"seed 3 \(now 4\)"):
        compose(material, out, seed=4)
    (out / "mine.txt").write_text("kept")
    compose(material, out, seed=4, count=5, overwrite=True)
    assert len(list((out / "images/train").iterdir())) == 5
    assert (out / "mine.txt").exists()


def test_foreign_folders_are_never_replaced(material: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="images from elsewhere"):
        compose(material, tmp_path, overwrite=True)


def test_unusable_files_are_listed_and_skipped(material: Path, tmp_path: Path) -> None:
    for index, colour in enumerate(COLOURS[:3]):
        cutout(colour).save(tmp_path / f"{index}.png")
    Image.new("RGB", (30, 30)).save(tmp_path / "flat.png")
    Image.new("RGBA", (30, 30), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (30, 30)).save(tmp_path / "nothing.png")
    cutout((255, 0, 0), (300, 6)).save(tmp_path / "thin.png")
    cutout((255, 0, 0)).quantize(8).save(tmp_path / "palette.png")
    cutout((9, 99, 200)).save(tmp_path / "bare", "PNG")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "._0.png").write_bytes(b"no picture, either")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    pictures, skipped = find_pictures(tmp_path, "cutouts", 0.3)
    assert {*pictures.train, *pictures.held_out} == {"0.png", "1.png", "2.png", "palette.png", "bare"}
    assert len(skipped) == 5
    for name, reason in (("flat", "alpha channel"), ("opaque", "opaque all over"), ("nothing", "transparent all over")):
        assert any(f"{name}.png" in line and reason in line for line in skipped)
    for name in ("thin", "cut"):
        assert any(f"{name}.png" in line for line in skipped)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cutouts", "nowhere"], "no such folder"),
        (["--cutouts", "empty"], "holds no images"),
        (["--cutouts", "backgrounds"], "expected at least 2"),
        (["--size", "3"], "--size: got 3"),
        (["--hue-jitter", "0.7"], "--hue-jitter: got 0.7"),
        (["--count", "0"], "--count: got 0"),
    ],
)
def test_errors_of_the_command_line(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    (material / "empty").mkdir(exist_ok=True)
    command = ["--cutouts", "cutouts", "--backgrounds", "backgrounds", *options]
    command = [str(material / word) if not word.startswith("-") and word.isalpha() else word for word in command]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error


def test_the_command_line_composes(material: Path, tmp_path: Path) -> None:
    command = ["--cutouts", str(material / "cutouts"), "--backgrounds", str(material / "backgrounds")]
    assert main([*command, "--out", str(tmp_path / "out"), "--count", "2", "--size", "16"]) == 0
    assert len(list((tmp_path / "out/images/train").iterdir())) == 2
    assert not (tmp_path / "out/bench").exists()


def test_extras_and_patches_are_for_training_alone(material: Path, extras: Path, dataset: Path, tmp_path: Path) -> None:
    mixed = compose(material, tmp_path / "out", extras=extras, count=40, extra_share=0.4, patch_share=0.3)
    kinds = [row["LabelName"].split("/")[2] for row in rows_of(mixed, "train")]
    # about 80 objects: shares within four standard errors of 0.055
    assert 0.18 < kinds.count("extra") / len(kinds) < 0.62
    assert 0.08 < kinds.count("patch") / len(kinds) < 0.52
    known = {row["LabelName"] for row in rows_of(mixed, "train")}
    with (mixed / "annotations" / "oidv6-class-descriptions.csv").open(newline="") as file:
        assert known <= {row["LabelName"] for row in csv.DictReader(file)}
    for split in ("validation", "test"):
        assert {row["LabelName"].split("/")[2] for row in rows_of(mixed, split)} <= {"a", "b"}
    # whatever training shows, the bench is the same
    assert files_in(mixed / "bench") == files_in(dataset / "bench")


def test_the_bench_may_have_its_own_size(material: Path, dataset: Path, tmp_path: Path) -> None:
    larger = compose(material, tmp_path / "out", count=1, size=2 * SIZE, bench_size=SIZE)
    assert files_in(larger / "bench") == files_in(dataset / "bench")
    (scene,) = (larger / "images/train").iterdir()
    with Image.open(scene) as picture:
        assert picture.size == (2 * SIZE, 2 * SIZE)


def test_extras_must_be_given(material: Path, extras: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--extra-cutouts"):
        compose(material, tmp_path / "out", extra_share=0.5)
    with pytest.raises(UserError, match="sum of at most 1"):
        compose(material, tmp_path / "out", extras=extras, extra_share=0.7, patch_share=0.5)
    with pytest.raises(UserError, match="no such folder"):
        compose(material, tmp_path / "out", extras=tmp_path / "nothing", extra_share=0.5)
    assert not (tmp_path / "out").exists()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), width=st.integers(32, 300), height=st.integers(32, 300))
def test_a_patch_is_a_piece_of_its_photograph(seed: int, width: int, height: int) -> None:
    rows, columns = np.mgrid[:height, :width]
    photograph = Image.fromarray(np.stack([rows % 256, columns % 256, rows * 0 + 9], axis=-1).astype(np.uint8))
    patch = photo_patch(np.random.default_rng(seed), photograph)
    assert 16 <= min(patch.size) <= max(patch.size) <= max(16, min(width, height) // 2 + 1)
    pixels = np.asarray(patch).astype(int)
    inside = pixels[..., 3] == 255
    assert set(np.unique(pixels[..., 3])) == {0, 255}
    assert 0.05 < inside.mean() < 1.0
    assert (pixels[inside][:, 2] == 9).all()
    assert (np.diff(pixels[..., 0], axis=0) % 256 == 1).all()  # unscaled, unturned
    assert (np.diff(pixels[..., 1], axis=1) % 256 == 1).all()
