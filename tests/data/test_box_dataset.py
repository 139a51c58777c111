from __future__ import annotations

import json
import logging
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from ldm import images
from ldm.config import DataConfig, load_config
from ldm.data.annotations import OPEN_IMAGES_CSV, open_index, write_index
from ldm.data.box_dataset import BoxDataset, SampleRecipe, crop, open_captions, reduced_window
from ldm.data.box_index import AnnotatedImage, BoxIndex, Entry, IndexWriter, Object
from ldm.data.datamodule import box_dataset
from ldm.data.shards import Shards
from ldm.files import UserError
from ldm.images import TURNS, Box
from scripts import inspect_dataset, read_bbox
from scripts.make_shards import write_shards
from tests.data.test_annotations import coco, voc
from tests.data.test_annotations import images as write_images
from tests.procweights import GOLDEN, read_golden

SIZES = [(96, 72), (72, 96), (64, 64), (120, 40), (9, 7)]


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def add(root: Path, name: str, image: Image.Image, boxes: list[str], folder: str = "validation") -> None:
    for path in (root / "images" / folder, root / "bbox" / "validation"):
        path.mkdir(parents=True, exist_ok=True)
    image.save(root / "images" / folder / f"{name}.jpg", "JPEG", quality=95)
    (root / "bbox/validation" / f"{name}.txt").write_text("".join(f"{box}\n" for box in boxes))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i, (width, height) in enumerate(SIZES):
        boxes = [f"{0.2 * width} {0.3 * height} {0.6 * width} {0.8 * height}", f"0.0 0.0 {float(width)} {0.5 * height}"]
        add(tmp_path, f"{i:016x}", photo((width, height), i), boxes)
    return tmp_path


def make(
    root: Path,
    split: str = "validation",
    image_size: int = 32,
    seed: int = 0,
    max_samples: int | None = None,
    **options: Any,
) -> BoxDataset:
    recipe = SampleRecipe(image_size, exemplar_size=28, data=DataConfig(**options))
    return BoxDataset(open_index(DataConfig(root=str(root)), split), recipe, seed=seed, max_samples=max_samples)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("arbitrary", [0.0, 1.0])
def test_shapes_ranges_and_the_hole(root: Path, arbitrary: float) -> None:
    dataset = make(root, p_arbitrary_mask=arbitrary)
    assert len(dataset) == len(SIZES)
    for epoch in range(5):
        for sample in (dataset[epoch, i] for i in range(len(dataset))):
            image, keep = sample["image"], sample["keep_mask"]
            assert image.shape == sample["masked_image"].shape == (3, 32, 32)
            assert keep.shape == (1, 32, 32) and sample["exemplar"].shape == (3, 28, 28)
            assert all(value.dtype == torch.float32 for name, value in sample.items() if name != "key")
            assert image.abs().max() <= 1 and keep.min() == 0 and keep.max() <= 1
            torch.testing.assert_close(sample["masked_image"], image * keep, rtol=0, atol=0)
            assert sample["exemplar"].isfinite().all()


def test_items_depend_on_seed_epoch_and_index_alone(root: Path) -> None:
    dataset, again = make(root, seed=3), make(root, seed=3)
    first = [dataset[0, i] for i in range(5)]
    assert all(same(again[0, i], first[i]) for i in reversed(range(5)))
    assert all(same(again[0, i], first[i]) for i in range(5))
    assert not any(same(again[1, i], first[i]) for i in range(4))  # the last image has too few choices
    assert not any(same(make(root, seed=4)[0, i], first[i]) for i in range(4))


def test_crops_as_in_editing_show_more_of_the_hole(tmp_path: Path) -> None:
    add(tmp_path, "0" * 16, photo((400, 300)), ["150 100 210 160"])
    near = make(tmp_path, crop_margin_range=[0.05, 0.1], p_arbitrary_mask=0.0)
    paper = make(tmp_path, p_arbitrary_mask=0.0)

    def hole_shares(dataset: BoxDataset) -> list[float]:
        return [1 - dataset[epoch, 0]["keep_mask"].mean().item() for epoch in range(20)]

    # 60 pixels, with a twentieth to a tenth on both sides: at least (1 / 1.2)^2 of the square
    assert min(hole_shares(near)) > 0.65
    assert max(hole_shares(paper)) < 0.6


def test_without_augmentation_the_exemplar_is_squashed_and_nothing_else_changes(root: Path) -> None:
    plain, augmented = make(root, augment_exemplar=False), make(root)
    changed = 0
    for i in range(len(plain)):
        got, other = plain[0, i], augmented[0, i]
        assert all(torch.equal(got[key], other[key]) for key in ("image", "masked_image", "keep_mask"))
        changed += not torch.equal(got["exemplar"], other["exemplar"])
    assert changed > 0
    # The square image is always shown whole, so its one box's content is the same in every epoch.
    (root / "bbox/validation" / f"{2:016x}.txt").unlink()
    (root / "bbox/validation" / f"{2:016x}.txt").write_text("12.0 19.0 38.0 51.0\n")
    plain = make(root, augment_exemplar=False)
    exemplars = [plain[epoch, 2]["exemplar"] for epoch in range(4)]
    assert all(torch.equal(exemplar, exemplars[0]) for exemplar in exemplars)


def test_workers_give_the_same_items(root: Path) -> None:
    dataset = make(root)
    keys = [(epoch, i) for epoch in (0, 1) for i in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=2)  # type: ignore[arg-type]
    assert all(same(item, dataset[key]) for key, item in zip(keys, loader, strict=True))


def test_no_image_is_squashed(tmp_path: Path) -> None:
    """A disc stays a disc, be it cropped or padded; padding is mid-grey and kept."""
    for name, size, box in (("wide", (240, 120), "90 40 130 80"), ("long", (240, 120), "20 10 230 110")):
        x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
        disc = ((x - 110) ** 2 + (y - 60) ** 2 < 20**2) * np.uint8(255)
        add(tmp_path, name, Image.fromarray(disc).convert("RGB"), [box])
    dataset = make(tmp_path, image_size=120, p_arbitrary_mask=0.0)
    for epoch in range(10):
        for index in (0, 1):
            sample = dataset[epoch, index]
            ys, xs = torch.nonzero(sample["image"][0] > 0.5, as_tuple=True)
            width, height = (xs.max() - xs.min()).item(), (ys.max() - ys.min()).item()
            assert abs(width - height) <= 2, "edges are soft, and JPEG's too"
        long, wide = dataset[epoch, 0], dataset[epoch, 1]
        for edge in (0, -1):
            assert (long["image"][:, edge] - 0).abs().max() < 0.01 and long["keep_mask"][:, edge].min() == 1
            assert wide["image"][:, edge].mean() < -0.9


def test_hole_covers_the_object_and_the_exemplar_shows_it(tmp_path: Path) -> None:
    """A red square on blue: no red is left outside the hole, and the exemplar is mostly red."""
    image = Image.new("RGB", (160, 120), (0, 0, 255))
    image.paste((255, 0, 0), (50, 40, 90, 80))
    add(tmp_path, "a", image, ["50.0 40.0 90.0 80.0"])
    dataset = make(tmp_path, image_size=64)
    for epoch in range(30):
        sample = dataset[epoch, 0]
        outside = sample["masked_image"][0] * (sample["keep_mask"][0] == 1)
        assert outside.max() < 0.2, "JPEG's and the resize's soft edges only"
        std, mean = torch.tensor(images.CLIP_STD), torch.tensor(images.CLIP_MEAN)
        exemplar = sample["exemplar"] * std[:, None, None] + mean[:, None, None]
        assert (exemplar[0] > exemplar[2]).float().mean() > 0.35  # of a padded 44 px crop it fills 83 %, less if warped


def test_reduced_decoding_changes_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large photographs are decoded at a fraction; against full decoding only the resampling differs."""
    image = photo((1600, 1200), 1)
    add(tmp_path, "a", image, ["400.0 300.0 1200.0 1000.0"])
    dataset = make(tmp_path)
    with Image.open(tmp_path / "images/validation/a.jpg") as file:
        decoded, reduction = dataset.recipe._decode(file, Box(200, 0, 1400, 1200), Box(390, 290, 1210, 1010))
    assert reduction == 8 and decoded.size == (200, 150)
    a = dataset[0, 0]
    monkeypatch.setattr(SampleRecipe, "_decode", lambda self, file, *_: (file.convert("RGB"), 1))
    b = dataset[0, 0]
    # the hole's edges may move by half a pixel of the reduced picture: of 4 edges of 32 pixels, at most 64 of 1024
    assert (a["keep_mask"] - b["keep_mask"]).abs().mean() < 64 / 1024
    assert (a["image"] - b["image"]).abs().max() < 0.06  # 8 grey levels
    assert (a["exemplar"] - b["exemplar"]).abs().mean() < 0.06


def test_crop_shows_the_window_that_the_original_showed() -> None:
    """Its tensors are reproduced by its own resize (bilinear, not antialiased) of our window, exactly."""
    window = Box(13, 37, 179, 203)
    golden = read_golden("data/tensors_64")["b_tall_s1/GT"]
    image = Image.open(GOLDEN / "data" / "b_tall.png").convert("RGB")
    cropped = images.levels_to_tensor(crop(image, Image.new("L", image.size), window, 166)[:3])
    resized = torch.nn.functional.interpolate(cropped[None], size=(64, 64), mode="bilinear")[0]
    torch.testing.assert_close(resized, golden, rtol=0, atol=1e-6)


@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 40), st.sampled_from([2, 4, 8]))
def test_a_window_of_a_reduced_picture_stays_a_square_inside(side: int, x: int, y: int, reduction: int) -> None:
    width, height = (max(edge + side, reduction) for edge in (x, y))
    size = -(-width // reduction), -(-height // reduction)  # what a JPEG decoder gives
    window = reduced_window(Box(x, y, x + side, y + side), size, reduction)
    assert window.clipped(*size) == window
    assert window.right - window.left == window.bottom - window.top
    assert abs(window.left * reduction - x) <= 1.5 * reduction


def test_the_hole_keeps_soft_edges() -> None:
    image, hole = Image.new("RGB", (8, 8), (10, 20, 30)), Image.new("L", (8, 8), 0)
    hole.paste(255, (0, 0, 3, 8))
    square = crop(image, hole, Box(0, 0, 8, 8), 4)
    assert square[:3].amax((1, 2)).tolist() == [10, 20, 30]
    row = square[3, 0].tolist()
    assert row[0] == 255 and 0 < row[1] < 255 and row[3] == 0
    outside = crop(image, hole, Box(-8, 0, 8, 16), 16)
    assert outside[:, 12, 2].tolist() == [*images.MID_GREY, 0]


def test_unreadable_files_are_skipped_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make(root)
    images = sorted((root / "images/validation").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:200])
    images[1].write_bytes(b"not a JPEG")
    photo((11, 12)).save(images[2])
    with caplog.at_level(logging.WARNING):
        items = [dataset[0, i] for i in range(3)]
    assert dataset.num_skipped >= 3
    assert all(images[i].name in caplog.text for i in range(3))
    assert "is 11 x 12, indexed as 64 x 64" in caplog.text
    again = BoxDataset(dataset.index, dataset.recipe)
    assert all(same(again[0, i], items[i]) for i in range(3))


def test_a_dataset_without_one_readable_image_stops(tmp_path: Path) -> None:
    add(tmp_path, "a", photo((20, 20)), ["0 0 10 10"])
    dataset = make(tmp_path)
    (tmp_path / "images/validation/a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="20 "):
        dataset[0, 0]


def test_fewer_samples(root: Path) -> None:
    assert len(make(root, max_samples=2)) == 2


@pytest.fixture
def shaped() -> Callable[[str], BinaryIO]:
    """A red disc on blue, 160 x 120, and its mask."""
    x, y = np.meshgrid(np.arange(160), np.arange(120))
    disc = (x - 70) ** 2 + (y - 60) ** 2 < 30**2
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 255 * disc, 255 * ~disc
    files = {}
    for name, array in (("disc.png", pixels), ("mask.png", 255 * disc.astype(np.uint8))):
        Image.fromarray(array).save(stream := BytesIO(), "PNG")
        files[name] = stream.getvalue()
    return lambda name: BytesIO(files[name])


OUTLINE = np.array([(70 + 30 * np.cos(a), 60 + 30 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 40)], np.float32)


@pytest.mark.parametrize("known_by", ["outline", "mask"])
def test_holes_of_the_object_s_own_shape(shaped: Callable[[str], BinaryIO], known_by: str) -> None:
    box = Box(40, 30, 101, 91)
    shapes, mask = ([[OUTLINE]], "") if known_by == "outline" else ([[]], "mask.png")
    entry = Entry("disc.png", (160, 120), [box], shapes, mask)
    recipe = SampleRecipe(120, 64, DataConfig(p_object_mask=1.0, grey_background=True, augment_exemplar=False))
    for seed in range(5):
        sample = recipe(entry, shaped, np.random.default_rng(seed))
        hole, red = sample["keep_mask"][0] < 0.5, sample["image"][0] > 0
        assert hole[red].all()
        assert hole.sum() < 1.25 * red.sum(), "no more than a thin rim around it"
        exemplar = images.exemplar_to_pixels(sample["exemplar"])
        assert (exemplar[:, 0, 0] - 0.004).abs().max() < 0.01, "mid-grey instead of blue"
        assert exemplar[0, 32, 32] > 0.99


def test_exemplars_get_new_backgrounds_as_often_as_asked(shaped: Callable[[str], BinaryIO]) -> None:
    box = Box(40, 30, 101, 91)
    known = Entry("disc.png", (160, 120), [box], [[OUTLINE]], "")
    recipe = SampleRecipe(64, 64, DataConfig(p_new_background=0.7, augment_exemplar=False))

    def corners(entry: Entry, seed: int) -> torch.Tensor:
        sample = recipe(entry, shaped, np.random.default_rng(seed))
        exemplar = images.exemplar_to_pixels(sample["exemplar"])
        assert exemplar[0, 32, 32] > 0.99, "the object itself stays"
        return exemplar[:, :: exemplar.shape[1] - 1, :: exemplar.shape[2] - 1]

    own = corners(known._replace(shapes=[[]]), 0)
    replaced = sum(bool((corners(known, seed) - own).abs().max() > 0.02) for seed in range(200))
    assert abs(replaced / 200 - 0.7) < 4 * (0.3 * 0.7 / 200) ** 0.5  # four standard deviations
    assert bool((corners(known._replace(shapes=[[]]), 5) == own).all())


def test_shapes_are_used_as_often_as_asked(shaped: Callable[[str], BinaryIO]) -> None:
    known = Entry("disc.png", (160, 120), [Box(40, 30, 101, 91)], [[OUTLINE]], "")
    unknown = known._replace(shapes=[[]])
    recipe = SampleRecipe(64, 32, DataConfig(p_object_mask=0.3, p_arbitrary_mask=0.0))

    def rectangles(entry: Entry) -> int:
        holes = (recipe(entry, shaped, np.random.default_rng(seed))["keep_mask"][0] < 1 for seed in range(200))
        # a disc fills 79 % of its box; of a rectangle the resize may round a corner away
        return sum(bool(hole.sum() > 0.95 * hole.any(0).sum() * hole.any(1).sum()) for hole in holes)

    assert abs(rectangles(known) / 200 - 0.7) < 4 * (0.3 * 0.7 / 200) ** 0.5  # four standard deviations
    assert rectangles(unknown) == 200


def test_a_mask_of_another_size_is_an_error(shaped: Callable[[str], BinaryIO]) -> None:
    entry = Entry("disc.png", (160, 120), [Box(40, 30, 101, 91)], [[]], "mask.png")
    Image.new("L", (10, 10)).save(stream := BytesIO(), "PNG")
    files = {"mask.png": stream.getvalue()}
    with pytest.raises(ValueError, match=r"mask\.png is 10 x 10"):
        SampleRecipe(32, 32, DataConfig(p_object_mask=1.0))(
            entry, lambda name: BytesIO(files[name]) if name in files else shaped(name), np.random.default_rng(0)
        )


# ---- captions ----


def labels(data: DataConfig, path: Path) -> list[tuple[str, ...]]:
    write_index(path, data, "train")
    index = BoxIndex(path)
    return [index[i].labels for i in range(len(index))]


def open_images_csv(root: Path, *, descriptions: bool = True) -> DataConfig:
    folder = root / "annotations"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        write_images(root / "images" / split)
        rows = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax", "b,x,/m/2,1,0.1,0.6,0.25,0.875"]
        rows += [
            "a,x,/m/1,1,0.1,0.6,0.25,0.875",
            "a,x,/m/1,1,0,0.01,0,0.01",
            "a,x,/m/2,1,0.5,1,0.5,1",
            "a,x,/m/9,1,0,1,0,.5",
        ]
        (folder / OPEN_IMAGES_CSV[split]).write_text("\n".join(rows))
    if descriptions:
        (folder / "class-descriptions-boxable.csv").write_text('/m/1,Dog\n/m/2,"Cake, cut"\n')
    assert read_bbox.main(["--root", str(root)]) == 0
    return DataConfig(root=str(root))


def test_classes_of_every_format(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    # of image a the second box is too small to be used
    assert labels(open_images_csv(tmp_path / "o"), path) == [("Dog", "Cake, cut", ""), ("Cake, cut",)]
    source = coco(tmp_path / "coco")
    assert labels(source, path) == [(), ()]  # names nothing
    assert source.annotations is not None
    text = Path(source.annotations).read_text().replace('"bbox"', '"category_id": 7, "bbox"')
    Path(source.annotations).write_text(text[:-1] + ', "categories": [{"id": 7, "name": "dog"}]}')
    assert labels(source, path) == [("dog",), ("dog",)]
    assert labels(voc(tmp_path / "voc"), path) == [("x",), ("x",)]


def test_the_caption_is_of_the_box_that_is_the_hole(tmp_path: Path) -> None:
    source = open_images_csv(tmp_path)
    overrides = [f"data.root={source.root}", "data.captions=classes", "model.image_size=16"]
    dataset = box_dataset(load_config(overrides=overrides), "train")
    assert {dataset[epoch, 0]["caption"] for epoch in range(20)} == {"dog", "cake, cut", ""}
    assert dataset[0, 1]["caption"] == "cake, cut"


def test_text_files_of_boxes_get_their_classes_with_the_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(open_images_csv(tmp_path, descriptions=False).root)
    words = [f"data.root={root}", "data.captions=classes", "model.image_size=16"]
    inspect = [*words, "--splits", "train", "--sheet", str(tmp_path / "sheet.png")]
    assert read_bbox.main(["--root", str(root), "--splits", "train"]) == 0
    assert inspect_dataset.main(inspect) == 2
    assert "data.captions" in capsys.readouterr().err
    (root / "annotations" / "class-descriptions-boxable.csv").write_text("LabelName,DisplayName\n/m/2,Cake\n")
    assert read_bbox.main(["--root", str(root), "--splits", "train"]) == 0
    assert inspect_dataset.main(inspect) == 0
    assert "captions:  | cake …" in capsys.readouterr().out  # the first box of a is of a class without a name


def test_edges_are_hard_where_the_model_wants_them(tmp_path: Path) -> None:
    config = load_config(overrides=[f"data.root={open_images_csv(tmp_path).root}", "model.image_size=16"])
    soft = box_dataset(config, "train")[0, 0]
    config.model.input_channels = ["x_t", "hole_mask", "z_masked"]
    hard = box_dataset(config, "train")[0, 0]
    assert len(soft["keep_mask"].unique()) > 2 and hard["keep_mask"].unique().tolist() == [0, 1]
    assert ((soft["keep_mask"] > 0.5) == (hard["keep_mask"] == 1)).all()
    assert (hard["masked_image"] == hard["image"] * hard["keep_mask"]).all()


def index_of(folder: Path) -> BoxIndex:
    writer = IndexWriter(folder / "i.safetensors", {"images": "pictures"})
    for name in ("a.jpg", "sub/b.jpg"):
        writer.add(AnnotatedImage(name, (100, 100), [Object((10, 10, 60, 60))]))
    writer.write()
    return BoxIndex(folder / "i.safetensors")


def test_a_table(tmp_path: Path) -> None:
    index, table = index_of(tmp_path), tmp_path / "captions.csv"
    table.write_text('file_name,caption,by\na.jpg,"a dog, asleep",me\nsub/b.jpg,\n')
    caption = open_captions(str(table), index, 2)
    assert [caption(index[i], 0) for i in range(2)] == ["a dog, asleep", ""]
    table.write_text("file_name,caption\na.jpg,dog\n")
    assert open_captions(str(table), index, 1)(index[0], 0) == "dog"  # the second one is not used
    with pytest.raises(UserError, match=r"captions\.csv: .*sub/b\.jpg"):
        open_captions(str(table), index, 2)
    with pytest.raises(UserError, match=r"i\.safetensors"):
        open_captions("classes", index, 2)
    table.write_text("a.jpg,dog\n")
    with pytest.raises(UserError, match=r"captions\.csv: .*file_name"):
        open_captions(str(table), index, 2)
    with pytest.raises(UserError, match=r"none\.csv"):
        open_captions(str(tmp_path / "none.csv"), index, 2)


@pytest.mark.parametrize(
    ("name", "size"), [("a.png", (90, 70)), ("a.tif", (90, 70)), ("a.jpg", (90, 70)), ("a.jpg", (403, 305))]
)
@pytest.mark.parametrize("orientation", TURNS)
def test_a_rotated_photograph_gives_the_samples_of_the_upright_one(
    name: str, size: tuple[int, int], orientation: int, tmp_path: Path
) -> None:
    """EXIF data turn the pixels; box and outline were drawn on the upright picture. In shards it is the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned").mkdir()
    photo(size).save(tmp_path / "turned" / name, exif=exif, quality=95)
    upright = images.open_image(tmp_path / "turned" / name)
    upright.save(tmp_path / "a.png")  # without EXIF data
    width, height = upright.size
    shape = [0.2 * width, 0.3 * height, 0.7 * width, 0.3 * height, 0.7 * width, 0.8 * height]
    datasets = []
    for folder, file_name in ((tmp_path / "turned", name), (tmp_path, "a.png")):
        annotation = {"image_id": 0, "bbox": [*shape[:2], 0.5 * width, 0.5 * height], "segmentation": [shape]}
        content = {"images": [{"id": 0, "file_name": file_name, "width": width, "height": height}]}
        path = folder / "i.json"
        path.write_text(json.dumps({**content, "annotations": [annotation]}))
        data = DataConfig("coco", str(folder), str(path), str(path), p_object_mask=0.5, grey_background=True)
        datasets.append(BoxDataset(open_index(data, "train"), SampleRecipe(32, 28, data)))
    turned, straight = datasets
    assert all(same(turned[epoch, 0], straight[epoch, 0]) for epoch in range(4))
    write_shards(turned.index, tmp_path / "shards", "train")
    assert same(Shards(str(tmp_path / "shards"), "train", turned.recipe)[0, 0], turned[0, 0])


def test_a_large_rotated_photograph_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    photo((1600, 1200)).save(tmp_path / "a.jpg", quality=95)
    recipe = SampleRecipe(32, 28)
    with Image.open(tmp_path / "a.jpg") as file:
        decoded, reduction = recipe._decode(file, Box(0, 200, 1200, 1400), Box(290, 390, 1010, 1210), orientation=6)
    assert reduction == 8 and decoded.size == (150, 200)
