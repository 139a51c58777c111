"""The web page: what one may ask of it, its API on a real server, and the page itself in a real browser."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.editing.editor import Editor
from ldm.files import UserError
from ldm.web import page as web_page
from ldm.web.page import data_url, serving
from ldm.web.service import HOLE_PREFIX, Edited, EditService, Limits, Progress
from scripts import web_demo

REPOSITORY = Path(web_demo.__file__).parent.parent
HOLE = (30, 20, 55, 45)
QUICK = {"num_steps": 2, "n_samples": 1}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_files(tmp_path / "files")


def write_files(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = {name: folder / f"{name}.png" for name in ("scene", "mask", "exemplar")}
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(paths["scene"])
    mask = Image.new("L", (90, 60))
    mask.paste(255, HOLE)
    mask.save(paths["mask"])
    Image.fromarray(rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)).save(paths["exemplar"])
    return paths


@pytest.fixture(scope="module")
def editor(tiny_folder: Path) -> Editor:
    return Editor.from_pretrained(tiny_folder)


@pytest.fixture
def service(editor: Editor, tiny_folder: Path, tmp_path: Path) -> EditService:
    return make_service(editor, tmp_path / "edits", checkpoint=tiny_folder)


def make_service(editor: Editor, folder: Path, limits: Limits | None = None, **source: Any) -> EditService:
    folder.mkdir(exist_ok=True)
    return EditService(editor, folder, limits, **source)


class SlowEditor(Editor):
    """Takes its time for each step, so that there is one to cancel or wait for, and counts them."""

    steps = 0

    def paint(self, *args: Any, on_step: Callable, **sampling: Any) -> Any:
        def slow(*step: Any) -> None:
            self.steps += 1
            time.sleep(0.04)
            on_step(*step)

        return super().paint(*args, on_step=slow, **sampling)


def edit(service: EditService, files: dict[str, Path], **values: Any) -> Edited:
    *steps, edited = service.edit(files["scene"], files["mask"], files["exemplar"], QUICK | values)
    assert all(isinstance(step, Progress) for step in steps)
    assert isinstance(edited, Edited)
    return edited


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def changed(before: Path | str, after: Path | str) -> np.ndarray:
    return (pixels(before) != pixels(after)).any(-1)


# ---- settings ----


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sampler", "plms", "plms"),
        ("num_steps", 7.0, 7),  # JSON has one kind of number
        ("guidance_scale", 3, 3.0),
        ("crop_margin", 0, 0.0),
        ("whole_image", True, True),
    ],
)
def test_settings_take_their_type(service: EditService, name: str, value: Any, expected: Any) -> None:
    got = service.settings[name].check(value)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sampler", "euler", "sampler: got 'euler', expected one of ddpm"),
        ("sampler", 3, "sampler: got 3"),
        ("num_steps", 0, "a whole number from 1 to 250"),
        ("num_steps", 2.5, "num_steps: got 2.5"),
        ("num_steps", True, "num_steps: got True"),
        ("seed", 2**31, "seed: got 2147483648"),
        ("seed", None, "seed: got None"),
        ("seed", 1.5, "seed: got 1.5"),
        ("feather", 1.5, "feather: got 1.5, expected a whole number from -1 to 64"),
        ("sampler", "x" * 10**6, "sampler: got 'xxx"),
        ("n_samples", 9, "from 1 to 8"),
        ("guidance_scale", float("nan"), "guidance_scale: got nan"),
        ("guidance_scale", float("inf"), "a number from 1 to 15"),
        ("crop_margin", "1", "crop_margin: got '1'"),
        ("whole_image", 1, "expected true or false"),
    ],
)
def test_settings_out_of_bounds(service: EditService, name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        service.settings[name].check(value)
    assert len(str(caught.value)) < 200


def test_settings_are_those_of_the_editor_and_the_command_line(service: EditService) -> None:
    from ldm.editing.cli import build_parser
    from ldm.editing.settings import COLUMNS

    options = build_parser("")._option_string_actions
    for setting in service.settings.values():
        assert setting.name in COLUMNS
        assert setting.option in options
        assert setting.check(setting.default) == setting.default
    assert service.settings["crop_margin"].default == service.editor.model.config.crop_margin


# ---- uploads ----


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(form: str, size: tuple[int, int] = (40, 30)) -> bytes:
    content = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(content, form)
    return content.getvalue()


MALFORMED = {
    "text": (b"not a picture at all\n" * 40, "not a picture that can be read here; save it as PNG or JPEG"),
    "empty": (b"", "not a picture"),
    "script": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not a picture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "tiff": (encoded("tiff"), "not a picture"),
    "truncated PNG": (encoded("png")[:-400], "damaged"),
    "truncated JPEG": (encoded("jpeg", (200, 150))[:-1000], "damaged"),
    "no pixels": (png_of_size(64, 64), "damaged"),
    "zero sized": (png_of_size(0, 0), "not a picture"),
    "bomb": (png_of_size(60_000, 60_000), "too many pixels; reduce its size first"),
    "large": (png_of_size(8_000, 8_000), "8000 x 8000, expected at most 30 million pixels"),
    "strip": (png_of_size(400_000, 2), "the long side at most 10954"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_uploads(service: EditService, tmp_path: Path, kind: str) -> None:
    content, message = MALFORMED[kind]
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        service.open_upload(path)
    assert str(caught.value).startswith("photo.png: ") and "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_content_and_not_the_name_says_what_a_file_is(service: EditService, tmp_path: Path, form: str) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(encoded(form))
    assert service.open_upload(path).size == (40, 30)


def test_uploads_that_were_removed(service: EditService, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scene.png: no longer here, files are kept for 90 minutes"):
        service.open_upload(tmp_path / "scene.png")


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (None, "no hole yet; paint"),
        ({"path": "/etc/passwd"}, "no hole yet"),
        ("/etc/passwd", "no hole yet"),
        (HOLE_PREFIX + "%%%", "not base64"),
        (HOLE_PREFIX + "A" * 2**26, "the hole: got 67108886 bytes, expected at most 40 MB"),
    ],
)
def test_bad_holes(service: EditService, drawn: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        service.save_hole(drawn)


# ---- edits ----


def test_edit_changes_the_hole_only_and_keeps_its_settings(service: EditService, files: dict[str, Path]) -> None:
    edited = edit(service, files, seed=7, n_samples=2)
    assert [path.name for path in edited.files] == ["scene_7.png", "scene_8.png"]
    where = changed(files["scene"], edited.files[1])
    inside = np.zeros_like(where)
    inside[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = True
    assert where[inside].mean() > 0.9 and not where[~inside].any()
    with Image.open(edited.files[1]) as result:
        record = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
    assert (record["seed"], record["num_steps"], record["image"]) == (8, 2, "scene.png")


def test_a_hole_drawn_on_a_smaller_copy(service: EditService, files: dict[str, Path]) -> None:
    with Image.open(files["mask"]) as mask:
        drawn = data_url(mask.resize((45, 30)))
    edited = edit(service, files | {"mask": service.save_hole(drawn)})
    with Image.open(edited.hole_mask) as used:
        assert used.size == (90, 60) and used.getbbox() == (30, 20, 56, 46)


def test_previews_are_the_crops(service: EditService, files: dict[str, Path]) -> None:
    first, *_ = service.edit(files["scene"], files["mask"], files["exemplar"], QUICK | {"n_samples": 3})
    assert isinstance(first, Progress) and first.preview
    assert (first.step, first.num_steps) == (1, 2)
    assert first.preview.size == (3 * 32, 32)


def test_refusals(service: EditService, files: dict[str, Path], tmp_path: Path) -> None:
    black, tall = tmp_path / "black.png", tmp_path / "tall.png"
    Image.new("L", (90, 60)).save(black)
    Image.new("L", (60, 90), 255).save(tall)
    for mask, values, message in (
        (black, {}, "black.png: empty"),
        (tall, {}, "the mask is 60 x 90, the scene 90 x 60; give a mask of the scene's size"),
        (files["mask"], {"colour": 1}, "got the setting colour"),
        (files["mask"], {"num_steps": 251}, "num_steps: got 251"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(service, files | {"mask": mask}, **values)
    assert not list(service.folder.iterdir())


def test_a_closed_edit_ends_and_the_next_begins(editor: Editor, files: dict[str, Path], tmp_path: Path) -> None:
    slow = SlowEditor(editor.model)
    service = make_service(slow, tmp_path / "edits")
    work = service.edit(files["scene"], files["mask"], files["exemplar"], QUICK | {"num_steps": 250})
    next(work)
    work.close()
    edit(service, files)
    assert slow.steps < 20  # a few until it was closed, one until that was noticed, two of the next edit


def test_time_limit(editor: Editor, files: dict[str, Path], tmp_path: Path) -> None:
    service = make_service(editor, tmp_path / "edits", Limits(seconds=0.0))
    with pytest.raises(UserError, match="stopped at step 1 of 2: longer than the limit of 0 s; use fewer"):
        edit(service, files)


def test_out_of_memory(service: EditService, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Editor, "edit", fail)
    with pytest.raises(UserError, match="out of memory; use fewer candidates"):
        edit(service, files)


def test_files_that_nobody_uses_are_removed(service: EditService, files: dict[str, Path]) -> None:
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


def make_calls(edited: Edited, folder: Path) -> None:
    """Run both texts of an edit where its files are."""
    (folder / "inference.py").symlink_to(REPOSITORY / "inference.py")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{environment.get('PYTHONPATH', '')}"
    for command in (["python", "-c", edited.python], ["bash", "-c", edited.shell]):
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


FURTHER = {"feather": 3, "separate": True, "reference_background": "grey", "reference_fit": "pad"}


@pytest.mark.parametrize("values", [{}, FURTHER | {"n_samples": 2, "seed": 5, "sampler": "ddim", "whole_image": True}])
def test_the_calls_repeat_the_edit(
    service: EditService, tmp_path: Path, values: dict[str, Any], files: dict[str, Path]
) -> None:
    folder = files["scene"].parent
    if values:
        service.watermark = "mine"
        for name in ("scene", "mask"):
            with Image.open(files[name]) as picture:
                picture.resize((360, 240)).save(files[name])
    files["scene"] = files["scene"].rename(folder / "it's a scene.png")  # quoted in both languages
    edited = edit(service, files, **values)
    make_calls(edited, folder)
    for seed, path in enumerate(edited.files, start=values.get("seed", 0)):
        for other in (folder / f"result_{seed}.png", folder / "results" / path.name):
            assert np.abs(pixels(path) - pixels(other)).max() <= 1, other


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
    with Image.open(edited.files[0]) as result:
        record = json.loads(result.text["parameters"])  # pyright: ignore[reportAttributeAccessIssue]
    assert (edited.files[0].name, record["image"], record["reference"]) == ("scene_0.png", "scene.png", "exemplar.png")


def test_separate_parts(service: EditService, files: dict[str, Path]) -> None:
    with Image.open(files["mask"]) as mask:
        mask.paste(255, (70, 5, 85, 20))
        mask.save(files["mask"])
    together, apart = (edit(service, files, separate=separate).files[0] for separate in (False, True))
    assert changed(together, apart)[5:20, 70:85].any()  # each part had a crop of its own


def test_flagged_candidates_are_withheld(editor: Editor, tmp_path: Path, files: dict[str, Path]) -> None:
    verdicts = [["found something", None], ["found something"] * 2]

    def content_filter(pictures: Any) -> list[str | None]:
        shown = verdicts.pop(0)
        return [reason for reason in shown for _ in range(len(pictures) // 2)]  # whole and closer view of each

    service = EditService(editor, tmp_path, content_filter=content_filter)
    values = QUICK | {"n_samples": 2, "seed": 4}
    *steps, edited = service.edit(files["scene"], files["mask"], files["exemplar"], values)
    assert isinstance(edited, Edited) and edited.num_withheld == 1
    assert [path.name for path in edited.files] == ["scene_5.png"]
    assert all(isinstance(step, Progress) and step.preview is None for step in steps)  # nobody has judged these
    with pytest.raises(UserError, match="withheld: found something; another seed"):
        list(service.edit(files["scene"], files["mask"], files["exemplar"], values))


def test_text_in_place_of_an_exemplar(text_folder: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    """With a model that reads text only; a prompt that starts like an option is none."""
    service = make_service(Editor.from_pretrained(text_folder), tmp_path / "edits", checkpoint=text_folder)
    values = QUICK | {"prompt": "--a 'red' car", "num_steps": 3}
    *_, edited = service.edit(files["scene"], files["mask"], None, values)
    *_, other = service.edit(files["scene"], files["mask"], None, values | {"prompt": "a dog"})
    assert isinstance(edited, Edited) and isinstance(other, Edited)
    assert changed(edited.files[0], other.files[0]).any()
    folder = files["scene"].parent
    make_calls(edited, folder)
    for path in (folder / "result_0.png", folder / "results" / "scene_0.png"):
        assert np.abs(pixels(edited.files[0]) - pixels(path)).max() <= 1, path
    with pytest.raises(UserError, match="this model reads text only; leave it out"):
        list(service.edit(files["scene"], files["mask"], files["exemplar"], values))
    with pytest.raises(UserError, match="prompt: got 1001 characters, expected a text of at most 1000"):
        list(service.edit(files["scene"], files["mask"], None, {"prompt": "a" * 1001}))


def test_an_exemplar_is_asked_for(service: EditService, files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no exemplar yet; this model needs one"):
        list(service.edit(files["scene"], files["mask"], None, QUICK))


def test_calls_name_model_device_and_precision(editor: Editor, tmp_path: Path) -> None:
    model, config, decoder = Path("my model.ckpt"), Path("v1.yaml"), Path("vae")
    service = EditService(editor, tmp_path, checkpoint=model, config=config, decoder=decoder)
    options = {name: setting.default for name, setting in service.settings.items()}
    options |= {"whole_image": True, "feather": None}
    python, shell = service.calls(("a.png", "b.png", "c.png"), options)
    assert "feather" not in python + shell and "prepare_exemplar" not in python
    assert "Editor.from_pretrained('my model.ckpt', config='v1.yaml', decoder='vae')" in python
    words = shlex.split(shell)
    assert words[words.index("--checkpoint") + 1] == "my model.ckpt" and "--whole-image" in words
    assert words[words.index("--decoder") + 1] == "vae"


# ---- the command line ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--auth", "ada"], "--auth: expected USER:PASSWORD"),
        (["--config", "v1.yaml"], "--config without --checkpoint"),
        (["--max-seconds", "0"], "limits: expected more than 0"),
        (["--max-seconds", "inf"], "limits: expected more than 0, and finite numbers"),
        (["--keep-minutes", "60"], "a request may wait for 85 minutes"),
        (["--port", "70000"], "--port: got 70000, expected a number from 1 to 65535"),
        (["--port", "-1"], "--port: got -1"),
    ],
)
def test_wrong_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        web_demo.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom scripts import web_demo\n"
        "try: web_demo.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'PIL', 'gradio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_modules_import_without_gradio() -> None:
    code = "import sys, ldm.web.page, ldm.web.service; print('gradio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_gradio_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(variable, "")
    monkeypatch.delitem(sys.modules, "gradio.themes", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert web_demo.main([]) == 2
    assert "error: Gradio is missing; pip install" in capsys.readouterr().err


# ---- the API, on a real server ----


@contextlib.contextmanager
def running(model: Any, limits: Limits, source: Path, **options: Any) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(variable, "")  # put back to what it was
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options["port"] = free.getsockname()[1]
        with serving(lambda folder: EditService(model, folder, limits, checkpoint=source), **options) as url:
            yield url


@pytest.fixture(scope="module")
def slow_editor(editor: Editor) -> SlowEditor:
    return SlowEditor(editor.model)


@pytest.fixture(scope="module")
def url(slow_editor: SlowEditor, tiny_folder: Path) -> Iterator[str]:
    limits = Limits(pixels=1_000_000, megabytes=1, waiting=2)
    with running(slow_editor, limits, tiny_folder) as address:
        yield address


@pytest.fixture
def client(url: str, tmp_path: Path) -> Any:
    return connect(url, tmp_path)


def connect(url: str, folder: Path, **options: Any) -> Any:
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(url, verbose=False, download_files=folder / "downloads", **options)


def sent(files: dict[str, Path]) -> dict[str, Any]:
    from gradio_client import handle_file

    return {"scene" if name == "scene" else "hole_mask" if name == "mask" else name: handle_file(str(path))
            for name, path in files.items()}  # fmt: skip


def test_api(client: Any, files: dict[str, Path]) -> None:
    results, python, shell = client.predict(**sent(files), n_samples=2, num_steps=2, seed=3, api_name="/edit")
    assert [Path(path).name for path in results] == ["scene_3.png", "scene_4.png"]
    where = changed(files["scene"], results[0])
    assert where.any() and not np.delete(where, np.s_[HOLE[1] : HOLE[3]], axis=0).any()
    with Image.open(results[0]) as result:
        assert json.loads(result.text["parameters"])["seed"] == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert "num_steps=2" in python and "--seed 3" in shell


def test_api_names_one_endpoint_and_its_keywords(client: Any, url: str) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/edit"]
    names = [parameter["parameter_name"] for parameter in endpoints["/edit"]["parameters"]]
    assert names[:3] == ["scene", "hole_mask", "exemplar"]
    described = {p["parameter_name"]: (p["python_type"]["type"], p["parameter_default"], p["parameter_has_default"])
                 for p in endpoints["/edit"]["parameters"]}  # fmt: skip
    assert described["scene"] == ("filepath", None, False)
    assert described["guidance_scale"] == ("float", 5.0, True)
    assert described["seed"] == ("int", 0, True)
    assert described["whole_image"] == ("bool", False, True)
    assert described["reference_fit"] == ("Literal['squash', 'pad']", "squash", True)


def test_api_errors_are_one_line(client: Any, files: dict[str, Path]) -> None:
    from gradio_client.exceptions import AppError

    bad = files["scene"].with_name("bad.png")
    bad.write_bytes(b"nothing")
    large = files["scene"].with_name("large.png")
    large.write_bytes(png_of_size(2_000, 2_000))
    for changes, values, message in (
        ({"scene": bad}, {}, "bad.png: not a picture"),
        ({"exemplar": large}, {}, "large.png: 2000 x 2000, expected at most 1 million pixels"),
        ({}, {"num_steps": 2.5}, "num_steps: got 2.5, expected a whole number from 1 to 250"),
        ({}, {"num_steps": "abc"}, "num_steps: got 'abc', expected a whole number"),
        ({}, {"guidance_scale": None}, "guidance_scale: got None, expected a number from 1 to 15"),
        ({}, {"guidance_scale": [1]}, "guidance_scale: got [1]"),
        ({}, {"seed": 1.5}, "seed: got 1.5, expected a whole number"),
        ({}, {"sampler": "euler"}, "sampler: got 'euler', expected one of"),
        ({}, {"whole_image": "no"}, "whole_image: got 'no', expected true or false"),
        ({}, {"scene": None}, "scene: got nothing; send a picture file"),
        ({}, {"scene": 3}, "scene: got 3; send a picture file"),
        ({}, {"hole_mask": "/etc/hostname"}, "hole_mask: got '/etc/hostname'; send a picture file"),
        ({}, {"exemplar": {"path": "/etc/hostname"}}, "exemplar: got {'path': '/etc/hostname'}; send a picture file"),
    ):
        with pytest.raises(AppError, match=re.escape(message)) as caught:
            client.predict(**sent(files | changes) | values, api_name="/edit")
        assert "\n" not in str(caught.value)


def test_api_takes_no_file_of_the_server(client: Any, url: str, files: dict[str, Path]) -> None:
    httpx = pytest.importorskip("httpx")
    (endpoint,) = client.view_api(return_format="dict", print_info=False)["named_endpoints"].values()
    settings = [parameter["parameter_default"] for parameter in endpoint["parameters"][3:]]
    contents = [("files", (path.name, path.read_bytes())) for path in files.values()]
    uploads = httpx.post(f"{url}gradio_api/upload", files=contents).json()
    for paths, answer in ((map(str, files.values()), "event: error"), (uploads, "event: complete")):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths] + settings
        event = httpx.post(f"{url}gradio_api/call/edit", json={"data": data}).json()["event_id"]
        assert answer in httpx.get(f"{url}gradio_api/call/edit/{event}", timeout=60).text


def test_large_files_are_turned_away(url: str) -> None:
    httpx = pytest.importorskip("httpx")
    answers = [httpx.post(f"{url}gradio_api/upload", files={"files": bytes(size)}) for size in (2**19, 2**20 + 1)]
    assert [answer.status_code for answer in answers] == [200, 413]
    assert "exceeded maximum allowed size" in answers[1].text


def test_the_queue_has_an_end(client: Any, files: dict[str, Path]) -> None:
    jobs = [client.submit(**sent(files), num_steps=80, n_samples=1, api_name="/edit") for _ in range(6)]
    errors = [str(job.exception(timeout=120) or "") for job in jobs]
    assert any("queue is full" in error.lower() for error in errors)
    assert errors.count("") >= 2  # the others were served, one after the other


def test_password_and_temporary_files(
    editor: Editor, tiny_folder: Path, tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_page, "SWEEP_SECONDS", 0.2)
    with running(editor, Limits(keep_seconds=3), tiny_folder, auth=("ada", "secret")) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        at_first = set(folder.rglob("*"))
        with pytest.raises(Exception, match=r"(?i)auth|401|login|credentials"):
            connect(address, tmp_path)
        client = connect(address, tmp_path, auth=("ada", "secret"))
        client.predict(**sent(files), **QUICK, api_name="/edit")
        assert list(folder.rglob("scene_0.png"))
        for _ in range(150):  # files go after 3 s, the folders that they leave empty after 3 more
            if set(folder.rglob("*")) == at_first:
                break
            time.sleep(0.1)
        assert set(folder.rglob("*")) == at_first
    assert not folder.exists()


def test_api_of_a_model_that_reads_text(text_folder: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    with running(Editor.from_pretrained(text_folder), Limits(), text_folder) as address:
        client = connect(address, tmp_path)
        del files["exemplar"]
        results, python, _ = client.predict(**sent(files), **QUICK, prompt="a dog", api_name="/edit")
        assert changed(files["scene"], results[0]).any() and "prompt='a dog'" in python


def test_a_taken_port_is_one_line(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    for variable in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(variable, "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert web_demo.main(["--checkpoint", str(tiny_folder), "--device", "cpu", "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: 127.0.0.1:{port}: taken, or not an address of this machine; see --port\n"
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


def test_documented_example(url: str, files: dict[str, Path]) -> None:
    text = (REPOSITORY / "docs" / "web.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gradio_client" in block)
    code = code.replace("http://127.0.0.1:7860/", url)
    folder = files["scene"].parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=120)
    assert changed(folder / "scene.png", folder / "edited.png").any()


# ---- the page, in a real browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")
    if not executable:
        pytest.skip("no chromium on the PATH; Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, opened; afterwards: nothing was asked of another server, and no script failed."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    asked, failed = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#exemplar .picture.plain")
    page.wait_for_selector("#upload-exemplar input[type=file]", state="attached")  # the last part of the page
    yield page
    page.close()
    assert asked and not [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not failed


def upload(page: Any, part: str, path: Path) -> None:
    page.locator(f"#{part} input[type=file]").set_input_files(path)


def fill(page: Any, setting: str, value: int) -> None:
    field = page.locator(f"#{setting} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def drag(page: Any, *points: tuple[float, float]) -> None:
    """Drag over the scene; points are shares of its width and height."""
    box = page.locator("#scene canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def show_pictures(page: Any, files: dict[str, Path]) -> None:
    for part in ("scene", "exemplar"):
        upload(page, part, files[part])
        page.wait_for_selector(f"#{part} .picture.full")


def run(page: Any, num_steps: int = 2) -> None:
    fill(page, "num_steps", num_steps)
    page.locator("#run").click()


def downloaded(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator(button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def wait_until_done(page: Any) -> None:
    page.wait_for_selector("#status:has-text('Done.')")
    page.wait_for_selector("#run:not([disabled])")


@pytest.mark.slow
def test_paint_a_box_and_run(page: Any, files: dict[str, Path], tmp_path: Path) -> None:
    show_pictures(page, files)
    page.locator("#scene [data-tool=box]").click()
    drag(page, (0.2, 0.25), (0.6, 0.75))
    run(page)
    wait_until_done(page)
    result = downloaded(page, "#download", tmp_path)
    hole = pixels(downloaded(page, "#download-mask", tmp_path))[..., 0] >= 128
    assert result.name == "scene_0.png"
    rows, columns = np.nonzero(hole)
    # The picture is 90 x 60: an edge may fall on either side of a pixel.
    for got, expected in zip((columns.min(), rows.min(), columns.max(), rows.max()), (18, 15, 53, 44), strict=True):
        assert abs(got - expected) <= 1
    assert hole.sum() == (np.ptp(columns) + 1) * (np.ptp(rows) + 1)
    where = changed(files["scene"], result)
    assert where[hole].mean() > 0.9 and not where[~hole].any()
    page.locator("#calls button").first.click()
    call = page.locator("#python .cm-content").inner_text()
    assert "num_steps=2" in call and "feather" not in call


@pytest.mark.slow
def test_brush_eraser_undo_and_candidates(page: Any, files: dict[str, Path], tmp_path: Path) -> None:
    show_pictures(page, files)
    drag(page, (0.2, 0.5), (0.8, 0.5))
    drag(page, (0.5, 0.1), (0.5, 0.9))
    page.locator("#scene [data-do=undo]").click()
    page.locator("#scene [data-tool=eraser]").click()
    drag(page, (0.8, 0.5), (0.6, 0.5))
    run(page)
    wait_until_done(page)
    hole = pixels(downloaded(page, "#download-mask", tmp_path))[..., 0] >= 128
    assert hole[30, 18:42].all() and not hole[:, 60:].any() and not hole[:20].any()
    page.locator("#candidates .thumbnail-item").nth(1).click()
    page.wait_for_selector("#candidates .thumbnail-item.selected >> nth=0")
    name = ""
    for _ in range(50):  # the button follows the choice a moment later
        if (name := downloaded(page, "#download", tmp_path).name) == "scene_1.png":
            break
    assert name == "scene_1.png"


@pytest.mark.slow
def test_an_example_and_its_preview(page: Any) -> None:
    page.locator("#examples .thumbnail-item").first.click()
    page.wait_for_selector("#scene .picture.full")
    page.wait_for_selector("#exemplar .picture.full")
    run(page, 60)
    page.wait_for_selector("#status img")
    wait_until_done(page)
    assert page.locator("#slider img").count() == 2


@pytest.mark.slow
def test_a_prompt_on_the_page(browser: Any, text_folder: Path, files: dict[str, Path]) -> None:
    with running(Editor.from_pretrained(text_folder), Limits(), text_folder) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(address)
        page.wait_for_selector("#status:has-text('Paint the hole, write a prompt, run.')")
        assert not page.locator("#exemplar").is_visible()
        upload(page, "scene", files["scene"])
        page.wait_for_selector("#scene .picture.full")
        drag(page, (0.3, 0.3), (0.6, 0.6))
        page.locator("#prompt textarea").fill("a red car")
        run(page)
        wait_until_done(page)
        page.locator("#calls button").first.click()
        assert "prompt='a red car'" in page.locator("#python .cm-content").inner_text()
        page.close()


@pytest.mark.slow
def test_cancel(page: Any, slow_editor: SlowEditor, files: dict[str, Path]) -> None:
    before = slow_editor.steps
    show_pictures(page, files)
    drag(page, (0.3, 0.3), (0.6, 0.6))
    run(page, 250)
    page.wait_for_selector("#status .progress")
    page.locator("#cancel").click()
    page.wait_for_selector("#status:has-text('Stopped.')")
    assert slow_editor.steps - before < 250
    page.wait_for_selector("#run:not([disabled])")
    run(page)  # the model is free again
    wait_until_done(page)


@pytest.mark.slow
def test_cancel_while_waiting(page: Any, client: Any, slow_editor: SlowEditor, files: dict[str, Path]) -> None:
    before = slow_editor.steps
    show_pictures(page, files)
    drag(page, (0.3, 0.3), (0.6, 0.6))
    other = client.submit(**sent(files), num_steps=150, n_samples=1, api_name="/edit")
    while slow_editor.steps == before and not other.done():
        time.sleep(0.05)
    run(page)
    page.wait_for_selector("#status:has-text('queue')")
    page.locator("#cancel").click()
    page.wait_for_selector("#status:has-text('Stopped.')")
    page.wait_for_selector("#run:not([disabled])")
    assert not other.done()
    other.result(timeout=120)
    assert slow_editor.steps == before + 150  # the cancelled one had none


@pytest.mark.slow
def test_errors_on_the_page(page: Any, files: dict[str, Path], tmp_path: Path) -> None:
    def expect(text: str) -> None:
        page.wait_for_selector(f".toast-body:has-text('{text}')")
        page.locator(".toast-close").first.click()
        page.wait_for_selector(".toast-body", state="detached")

    page.locator("#run").click()
    expect("two pictures are needed")
    for kind in ("text", "truncated PNG", "bomb", "strip"):
        path = tmp_path / f"{kind}.png"
        path.write_bytes(MALFORMED[kind][0])
        upload(page, "scene", path)
        expect(f"{kind}.png: ")
        assert page.locator("#scene .picture.full").count() == 0
    large = tmp_path / "large.png"
    large.write_bytes(bytes(2**20 + 1))
    upload(page, "scene", large)
    page.wait_for_selector("#scene .complaint:has-text('large.png: 1.0 MB, expected at most 1')")
    show_pictures(page, files)
    page.locator("#run").click()
    expect("no hole yet")
    drag(page, (0.3, 0.3), (0.6, 0.6))
    run(page)
    wait_until_done(page)
