"""Edits on behalf of remote users: settings, uploads, limits, and the calls that repeat an edit."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.editing.editor import Editor
from ldm.editing.settings import CONTROLS, OPTIONS
from ldm.files import UserError
from ldm.web.service import HOLE_PREFIX, Edited, EditService, Limits, Progress, Source, check
from tests.web.conftest import HOLE, LIMITS, QUICK, SlowEditor, changed, pixels, run_calls


@pytest.fixture
def service(editor: Editor, tiny_folder: Path, tmp_path: Path) -> EditService:
    return make_service(editor, tmp_path / "edits", source=Source(str(tiny_folder)))


def make_service(editor: Editor, folder: Path, limits: Limits = LIMITS, **options: Any) -> EditService:
    folder.mkdir()
    return EditService(editor, folder, limits, **options)


def edit(service: EditService, files: dict[str, Path], **values: Any) -> Edited:
    *steps, edited = service.edit(files["scene"], files["mask"], files.get("exemplar"), QUICK | values)
    assert all(isinstance(step, Progress) for step in steps)
    assert isinstance(edited, Edited)
    return edited


def record(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]


# ---- settings ----


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sampler", "plms", "plms"),
        ("num_steps", 7.0, 7),  # JSON has one kind of number
        ("guidance_scale", 3, 3.0),
        ("crop_margin", 0, 0.0),
        ("whole_image", True, True),
        ("feather", -1, None),  # automatic
        ("feather", None, None),
        ("feather", 0, 0),
    ],
)
def test_settings_take_their_type(service: EditService, name: str, value: Any, expected: Any) -> None:
    got = check(name, value, service.settings[name])
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampler", "euler"),
        ("sampler", 3),
        ("sampler", "x" * 10**6),
        ("num_steps", 0),
        ("num_steps", 251),
        ("num_steps", 2.5),
        ("num_steps", True),
        ("seed", 2**64),
        ("seed", None),
        ("seed", [1, 2, 3]),
        ("feather", 1.5),
        ("feather", -2),
        ("n_samples", 9),
        ("guidance_scale", float("nan")),
        ("guidance_scale", 15.5),
        ("crop_margin", "1"),
        ("whole_image", 1),
    ],
)
def test_settings_out_of_bounds(service: EditService, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{name}: got {re.escape(repr(value)[:80])}") as caught:
        check(name, value, service.settings[name])
    assert len(str(caught.value)) < 200


def test_settings_are_those_of_the_controls(service: EditService) -> None:
    prompts = {"prompt", "negative_prompt"}  # for models that read text
    assert service.settings.keys() == set(CONTROLS) - prompts
    for name in ("crop_margin", "guidance_scale"):
        assert service.settings[name]["default"] == getattr(service.editor.model.config, name)
    for name, schema in service.settings.items():
        check(name, schema["default"], schema)


# ---- uploads ----


def saved_as(form: str) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(content, form)
    return content.getvalue()


BAD_UPLOADS = {
    "text": b"not an image at all\n" * 40,
    "another format": saved_as("tiff"),
    "truncated": saved_as("png")[:-400],
}


@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_bad_uploads(service: EditService, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(BAD_UPLOADS[kind])
    with pytest.raises(UserError, match=r"^photo\.png: ") as caught:
        service.open_upload(path)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_large_uploads(editor: Editor, tmp_path: Path) -> None:
    """Their number of pixels counts, whatever their shape."""
    exact = make_service(editor, tmp_path / "exact", Limits(pixels=12_000))
    service = make_service(editor, tmp_path / "edits", Limits(pixels=11_999))
    for size in ((120, 100), (6000, 2)):
        Image.new("RGB", size).save(tmp_path / "photo.png")
        assert exact.open_upload(tmp_path / "photo.png").size == size
        with pytest.raises(UserError, match=rf"photo\.png: {size[0]} x {size[1]}, "):
            service.open_upload(tmp_path / "photo.png")


def test_far_too_large_uploads(service: EditService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UserError, match=r"^photo\.png: "):
        service.open_upload(tmp_path / "photo.png")


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_format_is_that_of_the_content(service: EditService, tmp_path: Path, form: str) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(saved_as(form))
    assert service.open_upload(path).size == (40, 30)


def test_uploads_that_were_removed(service: EditService, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^scene\.png: .* 90 minutes"):
        service.open_upload(tmp_path / "scene.png")


@pytest.mark.parametrize(
    "drawn", [None, {"path": "/etc/passwd"}, "/etc/passwd", *(HOLE_PREFIX + end for end in ("A" * 2**20, "A", "Ä"))]
)
def test_bad_holes(editor: Editor, tmp_path: Path, drawn: Any) -> None:
    service = make_service(editor, tmp_path / "edits", Limits(megabytes=1))
    with pytest.raises(UserError, match="hole"):
        service.save_hole(drawn)
    assert not list(service.folder.iterdir())


# ---- edits ----


def test_edit_changes_the_hole_only_and_keeps_its_settings(service: EditService, files: dict[str, Path]) -> None:
    edited = edit(service, files, seed=7, n_samples=2)
    assert [path.name for path in edited.files] == ["scene_7.png", "scene_8.png"]
    where = changed(files["scene"], edited.files[1])
    inside = np.zeros_like(where)
    inside[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = True
    assert where[inside].mean() > 0.9 and not where[~inside].any()
    settings = record(edited.files[1])
    assert (settings["seed"], settings["num_steps"], settings["image"]) == (8, 2, "scene.png")
    assert settings.keys() >= OPTIONS.keys()


@pytest.mark.parametrize("name", ["scene", "exemplar"])
def test_transparent_images_are_edited_as_by_the_editor(
    service: EditService, files: dict[str, Path], name: str
) -> None:
    """The transparent part overlaps the hole, where a feather fades into it."""
    with Image.open(files[name]) as image:
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (image.width // 2, 0, image.width, image.height))
        image.putalpha(alpha)
        image.save(files[name])
    edited = edit(service, files, feather=6, seed=3)
    result = service.editor.edit(*files.values(), num_steps=2, seed=3, feather=6)
    assert isinstance(result, Image.Image)
    assert np.array_equal(pixels(edited.files[0]), np.asarray(result))


def test_a_hole_drawn_on_a_smaller_copy(service: EditService, files: dict[str, Path]) -> None:
    with Image.open(files["mask"]) as mask:
        mask.resize((45, 30)).save(files["mask"])
    edited = edit(service, files)
    with Image.open(edited.hole_mask) as used:
        assert used.size == (90, 60) and used.getbbox() == (30, 20, 56, 46)


def test_previews_are_the_crops(service: EditService, files: dict[str, Path]) -> None:
    *events, _ = service.edit(*files.values(), values=QUICK | {"n_samples": 3})
    first = next(event for event in events if isinstance(event, Progress) and event.step)
    assert (first.phase, first.step, first.num_steps) == ("painting", 1, 2)
    assert first.preview and first.preview.size == (3 * 32, 32)


def test_phases_and_a_clock_that_moves(
    editor: Editor, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.web.service.TICK", 0.01)
    slow = SlowEditor(editor.model)
    phases, seconds = list[str](), list[float]()
    with slow.held():
        for event in make_service(slow, tmp_path / "edits").edit(*files.values(), values=QUICK):
            if isinstance(event, Edited):
                break
            phases.append(event.phase)
            seconds.append(event.seconds)
            if len(phases) > 20:  # the edit is held after its first step
                slow.gate.set()
    assert sorted(set(phases), key=phases.index)[-3:] == ["encoding", "painting", "decoding"]
    assert seconds == sorted(seconds) and seconds[-1] > seconds[0]


def test_refusals(service: EditService, files: dict[str, Path], tmp_path: Path) -> None:
    black, tall = tmp_path / "black.png", tmp_path / "tall.png"
    Image.new("L", (90, 60)).save(black)
    Image.new("L", (60, 90), 255).save(tall)
    for changes, values, message in (
        ({"mask": black}, {}, r"^black\.png: "),
        ({"mask": tall}, {}, "60 x 90, the scene 90 x 60; .* EXIF"),
        ({}, {"num_steps": 251}, "num_steps: got 251"),
    ):
        with pytest.raises(UserError, match=message):
            edit(service, files | changes, **values)
    assert not list(service.folder.iterdir())


def test_a_closed_edit_ends_and_the_next_begins(editor: Editor, files: dict[str, Path], tmp_path: Path) -> None:
    slow = SlowEditor(editor.model)
    service = make_service(slow, tmp_path / "edits")
    work = service.edit(*files.values(), values=QUICK | {"num_steps": 250})
    next(work)
    work.close()
    edit(service, files)
    assert slow.steps < 20  # a few until it was closed, one until that was noticed, two of the next edit


def test_a_closed_service_has_no_threads(editor: Editor, files: dict[str, Path], tmp_path: Path) -> None:
    import threading

    before = set(threading.enumerate())
    service = make_service(editor, tmp_path / "edits")
    edit(service, files)
    service.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError):
        edit(service, files)


def test_time_limit(editor: Editor, files: dict[str, Path], tmp_path: Path) -> None:
    service = make_service(editor, tmp_path / "edits", Limits(seconds=0.0))
    with pytest.raises(UserError, match=r"step 1 of 2: .* 0 s"):
        edit(service, files)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory, out of memory"), UserError),
        (MemoryError(), UserError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
    ],
)
def test_out_of_memory(
    service: EditService, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Editor, "paint", fail)
    with pytest.raises((UserError, RuntimeError, MemoryError)) as caught:
        edit(service, files)
    assert caught.type is expected


def test_old_files_are_removed(service: EditService, files: dict[str, Path]) -> None:
    used, spared = (Path(shutil.copy(files["scene"], service.folder / name)) for name in ("scene.png", "spared.png"))
    old, recent = (edit(service, files).files[0].parent for _ in range(2))
    for path in (used, spared, *old.iterdir()):
        os.utime(path, (0, 0))
    edit(service, files | {"scene": used})
    service.sweep({spared})
    assert used.exists() and spared.exists() and len(list(recent.iterdir())) == 2
    assert not list(old.iterdir())
    os.utime(old, (0, 0))
    service.sweep({spared})
    assert not old.exists()


def test_components_have_their_own_crops(service: EditService, files: dict[str, Path]) -> None:
    with Image.open(files["mask"]) as mask:
        mask.paste(255, (70, 5, 85, 20))
        mask.save(files["mask"])
    together, apart = (edit(service, files, per_component=apart).files[0] for apart in (False, True))
    assert changed(together, apart)[5:20, 70:85].any()


def test_flagged_candidates_are_withheld(editor: Editor, tmp_path: Path, files: dict[str, Path]) -> None:
    verdicts = [["found something", None], ["found something"] * 2]

    def content_filter(images: Any) -> list[str | None]:
        shown = verdicts.pop(0)
        return [reason for reason in shown for _ in range(len(images) // 2)]  # whole and closer view of each

    service = EditService(editor, tmp_path, content_filter=content_filter)
    values = QUICK | {"n_samples": 2, "seed": 4}
    *steps, edited = service.edit(*files.values(), values=values)
    assert isinstance(edited, Edited) and edited.num_unsafe == 1
    assert [path.name for path in edited.files] == ["scene_5.png"]
    assert all(isinstance(step, Progress) and step.preview is None for step in steps)  # nobody has judged these
    with pytest.raises(UserError, match="found something"):
        list(service.edit(*files.values(), values=values))


# ---- the calls ----


FURTHER = {"feather": 3, "per_component": True, "reference_background": "grey", "reference_fit": "pad"}


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, FURTHER | {"n_samples": 2, "seed": 5, "sampler": "ddim", "whole_image": True}])
def test_the_calls_repeat_the_edit(
    service: EditService, tmp_path: Path, values: dict[str, Any], files: dict[str, Path]
) -> None:
    folder = files["scene"].parent
    if values:
        service.source = Source(service.source.checkpoint, watermark="mine")
        for name in ("scene", "mask"):
            with Image.open(files[name]) as image:
                image.resize((360, 240)).save(files[name])
    files["scene"] = files["scene"].rename(folder / "it's a scene.png")  # quoted in both languages
    edited = edit(service, files, **values)
    run_calls(edited, folder)
    for seed, path in enumerate(edited.files, start=values.get("seed", 0)):
        for other in (folder / f"result_{seed}.png", folder / "results" / path.name):
            assert np.array_equal(pixels(path), pixels(other)), other


@pytest.mark.parametrize(
    ("scene", "exemplar"), [("image.png", "Image.png"), ("mask.png", "dog.png"), ("-a.png", "dog.png")]
)
def test_the_calls_tell_the_files_apart(
    service: EditService, files: dict[str, Path], scene: str, exemplar: str
) -> None:
    for part, name in (("scene", scene), ("exemplar", exemplar)):
        (files[part].parent / part).mkdir()
        files[part] = files[part].rename(files[part].parent / part / name)
    edited = edit(service, files)
    assert "'scene.png', 'mask.png', 'exemplar.png'" in edited.python
    assert "--image scene.png --mask mask.png --reference exemplar.png" in edited.shell
    settings = record(edited.files[0])
    assert (edited.files[0].name, settings["image"], settings["reference"]) == (
        "scene_0.png",
        "scene.png",
        "exemplar.png",
    )


@pytest.mark.slow
def test_text_in_place_of_an_exemplar(text_folder: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    """With a model that reads text only, and a prompt that starts like an option."""
    source = Source(str(text_folder))
    service = make_service(Editor.from_pretrained(text_folder), tmp_path / "edits", source=source)
    exemplar = files.pop("exemplar")
    edited = edit(service, files, prompt="--a 'red' car", num_steps=3)
    other = edit(service, files, prompt="a dog", num_steps=3)
    assert changed(edited.files[0], other.files[0]).any()
    folder = files["scene"].parent
    run_calls(edited, folder)
    for path in (folder / "result_0.png", folder / "results" / "scene_0.png"):
        assert np.array_equal(pixels(edited.files[0]), pixels(path)), path
    with pytest.raises(UserError, match="exemplar"):
        edit(service, files | {"exemplar": exemplar})
    with pytest.raises(UserError, match="prompt: got 1001"):
        edit(service, files, prompt="a" * 1001)


def test_calls_name_model_filter_and_watermark(editor: Editor, tmp_path: Path, files: dict[str, Path]) -> None:
    for name in ("scene", "mask"):
        with Image.open(files[name]) as image:
            image.resize((360, 240)).save(files[name])
    service = EditService(editor, tmp_path)
    service.source = Source("my model.ckpt", "v1.yaml", "vae", "checker", "mine")
    edited = edit(service, files, whole_image=True, match_colors=False)
    assert "feather" not in edited.python + edited.shell
    assert "Editor.from_pretrained('my model.ckpt', config='v1.yaml', decoder='vae')" in edited.python
    assert "add_watermark(image, 'mine')" in edited.python
    words = shlex.split(edited.shell)
    for option, value in (("--checkpoint", "my model.ckpt"), ("--decoder", "vae"), ("--safety", "checker")):
        assert words[words.index(option) + 1] == value
    assert {"--whole-image", "--no-match-colors"} < set(words)
