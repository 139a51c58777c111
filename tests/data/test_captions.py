"""Captions: from the annotations' classes, whatever format they came in, or from a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.config import ConfigError, load_config
from ldm.data.box_index import BoxIndex, IndexWriter
from ldm.data.captions import CaptionError, open_captions, read_captions
from ldm.data.datamodule import DataModule, box_dataset
from ldm.data.read_bbox import ANNOTATIONS
from ldm.data.readers import Source, write_index
from scripts import inspect_dataset, read_bbox
from tests.data.test_readers import coco, images, voc


def labels(kind: str, source: Source, path: Path) -> list[tuple[str, ...]]:
    write_index(path, kind, source, "train")
    index = BoxIndex(path)
    return [index[i].labels for i in range(len(index))]


def open_images(root: Path, *, descriptions: bool = True) -> Source:
    folder = root / "annotations"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        images(root / "images" / split)
        rows = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax", "b,x,/m/2,1,0.1,0.6,0.25,0.875"]
        rows += [
            "a,x,/m/1,1,0.1,0.6,0.25,0.875",
            "a,x,/m/1,1,0,0.01,0,0.01",
            "a,x,/m/2,1,0.5,1,0.5,1",
            "a,x,/m/9,1,0,1,0,.5",
        ]
        (folder / ANNOTATIONS[split]).write_text("\n".join(rows))
    if descriptions:
        (folder / "class-descriptions-boxable.csv").write_text('/m/1,Dog\n/m/2,"Cake, cut"\n')
    return Source(root)


def test_classes_of_every_format(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    # of image a the second box is too small to be used
    assert labels("open_images", open_images(tmp_path / "o"), path) == [("Dog", "Cake, cut", ""), ("Cake, cut",)]
    source = coco(tmp_path / "coco")
    assert labels("coco", source, path) == [(), ()]  # names nothing
    assert source.annotations is not None
    text = source.annotations.read_text().replace('"bbox"', '"category_id": 7, "bbox"')
    source.annotations.write_text(text[:-1] + ', "categories": [{"id": 7, "name": "dog"}]}')
    assert labels("coco", source, path) == [("dog",), ("dog",)]
    assert labels("voc", voc(tmp_path / "voc"), path) == [("x",), ("x",)]


def test_the_caption_is_of_the_box_that_is_the_hole(tmp_path: Path) -> None:
    source = open_images(tmp_path)
    overrides = [f"data.root={source.root}", "data.captions=classes", "model.image_size=16"]
    dataset = box_dataset(load_config(overrides=overrides), "train")
    assert {dataset[epoch, 0]["caption"] for epoch in range(20)} == {"dog", "cake, cut", ""}
    assert dataset[0, 1]["caption"] == "cake, cut"


def test_text_files_of_boxes_get_their_classes_with_the_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = open_images(tmp_path, descriptions=False).root
    words = [f"data.root={root}", "data.captions=classes", "model.image_size=16"]
    inspect = [*words, "--splits", "train", "--sheet", str(tmp_path / "sheet.png")]
    assert read_bbox.main(["--root", str(root), "--splits", "train"]) == 0
    assert inspect_dataset.main(inspect) == 2
    assert "got an index without classes" in capsys.readouterr().err
    (root / "annotations" / "class-descriptions-boxable.csv").write_text("LabelName,DisplayName\n/m/2,Cake\n")
    assert read_bbox.main(["--root", str(root), "--splits", "train"]) == 0
    assert inspect_dataset.main(inspect) == 0
    assert "captions:  | cake …" in capsys.readouterr().out  # the first box of a is of a class without a name


def test_edges_are_hard_where_the_model_wants_them(tmp_path: Path) -> None:
    config = load_config(overrides=[f"data.root={open_images(tmp_path).root}", "model.image_size=16"])
    soft = box_dataset(config, "train")[0]
    config.model.input_channels = ["x_t", "hole_mask", "z_masked"]
    hard = box_dataset(config, "train")[0]
    assert len(soft["keep_mask"].unique()) > 2 and hard["keep_mask"].unique().tolist() == [0, 1]
    assert ((soft["keep_mask"] > 0.5) == (hard["keep_mask"] == 1)).all()
    assert (hard["masked_image"] == hard["image"] * hard["keep_mask"]).all()


def index_of(folder: Path) -> BoxIndex:
    with IndexWriter(folder / "i.safetensors", {"images": "pictures"}) as writer:
        for name in ("a.jpg", "sub/b.jpg"):
            writer.add(name, (100, 100), [(10, 10, 60, 60)])
    return BoxIndex(folder / "i.safetensors")


def test_a_table(tmp_path: Path) -> None:
    index, table = index_of(tmp_path), tmp_path / "captions.csv"
    table.write_text('file_name,caption,by\na.jpg,"a dog, asleep",me\nsub/b.jpg,\n')
    caption = open_captions(str(table), index, 2)
    assert [caption(index[i], 0) for i in range(2)] == ["a dog, asleep", ""]
    table.write_text("file_name,caption\na.jpg,dog\n")
    assert open_captions(str(table), index, 1)(index[0], 0) == "dog"  # the second one is not used
    with pytest.raises(CaptionError, match=r"captions\.csv: lacks 1 of 2 images, sub/b\.jpg first; .*below pictures"):
        open_captions(str(table), index, 2)
    with pytest.raises(CaptionError, match="got an index without classes"):
        open_captions("classes", index, 2)
    table.write_text("a.jpg,dog\n")
    with pytest.raises(CaptionError, match=r"got the columns a\.jpg, dog, expected file_name and caption"):
        read_captions(table)
    with pytest.raises(CaptionError, match="not a readable CSV"):
        read_captions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.condition=text"], r"data\.captions: got none for a model that reads text"),
        (["data.captions=classes", "data.kind=shards"], r"data\.captions: got 'classes' with data\.kind shards"),
        (["model.input_channels=[x_t,hole_mask,z_masked]", "data.kind=cached"], r"data\.kind: got cached, whose masks"),
    ],
)
def test_data_that_a_model_cannot_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataModule(load_config(overrides=overrides))
