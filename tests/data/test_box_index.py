"""The index of boxes: what goes in comes out, and what cannot be used is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.box_index import AnnotatedImage, BoxIndex, IndexWriter, Object
from ldm.data.masks import clip_box
from ldm.files import UserError

outlines = st.lists(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 300)), min_size=3, max_size=6), max_size=2)
images = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
        st.lists(
            st.tuples(st.floats(-20, 300), st.floats(-20, 200), st.floats(60, 250), st.floats(60, 250), outlines),
            min_size=1,
            max_size=4,
        ),
        st.sampled_from(["", "masks/ä.png"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=25)
@given(images)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, found: list[Any]) -> None:
    path = tmp_path_factory.mktemp("index") / "i.safetensors"
    size, expected = (400, 300), []
    writer = IndexWriter(path, {"made_of": "examples"})
    try:
        for name, boxes, mask in found:
            corners = [(round(x, 3), round(y, 3), round(x + w, 3), round(y + h, 3)) for x, y, w, h, _ in boxes]
            shapes = [[np.array(outline, np.float32) for outline in box[4]] for box in boxes]
            objects = [Object(box, outlines=shape) for box, shape in zip(corners, shapes, strict=True)]
            writer.add(AnnotatedImage(name, size, objects, mask))
            kept = [k for k, (a, b, c, d) in enumerate(corners) if 0.02 <= (c - a) * (d - b) / 120_000 <= 0.8]
            kept = [k for k in kept if corners[k][0] < 400 and corners[k][1] < 300]
            if kept:
                expected.append((name, [clip_box(*corners[k], size) for k in kept], [shapes[k] for k in kept], mask))
        writer.write()
    except UserError:
        assert not expected and not path.exists()
        return
    index = BoxIndex(path)
    assert len(index) == len(expected) and index.num_boxes == sum(len(boxes) for _, boxes, _, _ in expected)
    assert index.metadata["made_of"] == "examples"
    assert index.has_shapes == any(any(shapes) or mask for _, _, shapes, mask in expected)
    for entry, (name, boxes, shapes, mask) in zip((index[i] for i in range(len(index))), expected, strict=True):
        assert (entry.name, entry.size, entry.boxes, entry.mask) == (name, size, boxes, mask)
        assert [[o.tolist() for o in got] for got in entry.shapes] == [[o.tolist() for o in s] for s in shapes]
    with pytest.raises(IndexError):
        index[len(index)]


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path / "i.safetensors")
    boxes = [
        (10, 10, 50, 50),
        (0, 0, 5, 5),
        (0, 0, 100, 99),
        (50, 50, 20, 60),
        (float("nan"), 0, 9, 9),
        (120, 0, 150, 90),
    ]
    objects = [Object(box) for box in boxes]
    writer.add(AnnotatedImage("a.jpg", (100, 100), objects))
    writer.add(AnnotatedImage("b.jpg", (100, 100), [Object((0, 0, 1, 1))]))
    writer.add(AnnotatedImage("c.jpg", (70_000, 100), objects))
    writer.write()
    expected = {
        "boxes of less than 2% of their image": 2,
        "boxes of more than 80% of their image": 1,
        "boxes without area": 1,
        "boxes with corners that are not finite": 1,
        "boxes outside their image": 1,
        "images without a usable box": 1,
        "images of more than 65535 pixels a side": 1,
    }
    assert writer.left_out.counts == expected
    index = BoxIndex(tmp_path / "i.safetensors")
    assert {line.split(" (")[0] for line in index.left_out} == {
        f"{count} {reason}" for reason, count in expected.items()
    }
    assert len(index) == index.num_boxes == 1 and not index.has_shapes


def test_nothing_is_written_of_nothing(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path / "i.safetensors")
    writer.add(AnnotatedImage("a.jpg", (100, 100), [Object((0, 0, 1, 1))]))
    with pytest.raises(UserError, match=r"1 boxes .*2%"):
        writer.write()
    assert not list(tmp_path.iterdir())


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    with pytest.raises(UserError, match=r"i\.safetensors"):
        BoxIndex(path)
    writer = IndexWriter(path)
    writer.add(AnnotatedImage("a.jpg", (100, 100), [Object((0, 0, 50, 50))]))
    writer.write()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="--rebuild"):
        BoxIndex(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(UserError, match=r"9.* 1"):
        BoxIndex(path)
