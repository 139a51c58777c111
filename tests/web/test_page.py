"""The page in a real browser, and its API on a real server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.editing.editor import Editor
from ldm.web.service import Limits
from tests.web.conftest import HOLE, QUICK, REPOSITORY, SlowEditor, changed, pixels, running

pytestmark = pytest.mark.slow

# ---- the API ----


@pytest.fixture(scope="module")
def slow_editor(editor: Editor) -> SlowEditor:
    return SlowEditor(editor.model)


@pytest.fixture(scope="module")
def url(slow_editor: SlowEditor, tiny_folder: Path) -> Iterator[str]:
    limits = Limits(pixels=1_000_000, megabytes=1, waiting=2)
    with running(slow_editor, tiny_folder, limits) as address:
        yield address


@pytest.fixture
def client(url: str, tmp_path: Path) -> Any:
    return connect(url, tmp_path)


def connect(url: str, folder: Path, **options: Any) -> Any:
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(url, verbose=False, download_files=folder / "downloads", **options)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    assert "num_steps=2" in python and "--seed=3" in shell


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
    Image.new("L", (2_000, 2_000)).save(large)
    for changes, values, message in (
        ({"scene": bad}, {}, "bad.png: "),
        ({"exemplar": large}, {}, "large.png: 2000 x 2000"),
        ({}, {"num_steps": "abc"}, "num_steps: got 'abc'"),
        ({}, {"sampler": None}, "sampler: got None"),
        ({}, {"scene": None}, "scene: got None"),
        ({}, {"hole_mask": "/etc/hostname"}, "hole_mask: got '/etc/hostname'"),
        ({}, {"exemplar": {"path": "/etc/hostname"}}, "exemplar: got {'path': '/etc/hostname'}"),
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


def test_the_queue_has_an_end(client: Any, slow_editor: SlowEditor, files: dict[str, Path]) -> None:
    before = slow_editor.steps
    with slow_editor.held():
        jobs = [client.submit(**sent(files), **QUICK, api_name="/edit")]
        wait_until(lambda: slow_editor.steps > before)
        jobs += [client.submit(**sent(files), **QUICK, api_name="/edit") for _ in range(4)]
        wait_until(lambda: sum(job.done() for job in jobs) == 2)
    errors = [str(job.exception(timeout=120) or "") for job in jobs]
    assert sum("queue is full" in error.lower() for error in errors) == 2
    assert errors.count("") == 3  # one was being edited, two waited


def test_password_and_temporary_files(
    editor: Editor, tiny_folder: Path, tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    monkeypatch.setattr("scripts.web_demo.SWEEP_SECONDS", 0.2)
    with running(editor, tiny_folder, Limits(keep_seconds=2), auth=("ada", "secret")) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        at_first = set(folder.rglob("*"))
        with pytest.raises(Exception, match=r"(?i)auth|401|login|credentials"):
            connect(address, tmp_path)
        client = connect(address, tmp_path, auth=("ada", "secret"))
        client.predict(**sent(files), **QUICK, api_name="/edit")
        assert list(folder.rglob("scene_0.png"))
        for _ in range(150):  # files go after 2 s, the folders that they leave empty after 2 more
            if set(folder.rglob("*")) == at_first:
                break
            time.sleep(0.1)
        assert set(folder.rglob("*")) == at_first
    assert not folder.exists()


def test_documented_example(url: str, files: dict[str, Path]) -> None:
    text = (REPOSITORY / "docs" / "web.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gradio_client" in block)
    code = code.replace("http://127.0.0.1:7860/", url)
    folder = files["scene"].parent
    with contextlib.chdir(folder):
        exec(code, {})
    assert changed(folder / "scene.png", folder / "edited.png").any()


# ---- the page, in a real browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser whose pages share a cache."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")
    if not executable:
        pytest.skip("no chromium on the PATH; Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = started.new_context(viewport={"width": 1280, "height": 1000})
        context.set_default_timeout(60_000)
        yield context


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, opened; afterwards: nothing was asked of another server, and no script failed."""
    page = browser.new_page()
    asked, failed = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    open_page(page, url)
    page.wait_for_selector("#exemplar .picture.plain")
    yield page
    page.close()
    assert asked and not [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not failed


def open_page(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#scene .chosen", state="attached")  # its script has run
    page.wait_for_selector("#upload-exemplar input[type=file]", state="attached")  # the last part of the page


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


def show_images(page: Any, files: dict[str, Path]) -> None:
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


def test_paint_a_box_and_run(page: Any, files: dict[str, Path], tmp_path: Path) -> None:
    show_images(page, files)
    page.locator("#scene [data-tool=box]").click()
    drag(page, (0.2, 0.25), (0.6, 0.75))
    run(page)
    wait_until_done(page)
    result = downloaded(page, "#download", tmp_path)
    hole = pixels(downloaded(page, "#download-mask", tmp_path))[..., 0] >= 128
    assert result.name == "scene_0.png"
    rows, columns = np.nonzero(hole)
    # The scene is 90 x 60: an edge may fall on either side of a pixel.
    for got, expected in zip((columns.min(), rows.min(), columns.max(), rows.max()), (18, 15, 53, 44), strict=True):
        assert abs(got - expected) <= 1
    assert hole.sum() == (np.ptp(columns) + 1) * (np.ptp(rows) + 1)
    where = changed(files["scene"], result)
    assert where[hole].mean() > 0.9 and not where[~hole].any()
    page.locator("#calls button").first.click()
    call = page.locator("#python .cm-content").inner_text()
    assert "num_steps=2" in call and "feather" not in call


def test_brush_eraser_undo_and_candidates(page: Any, files: dict[str, Path], tmp_path: Path) -> None:
    show_images(page, files)
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


def test_an_example_and_its_preview(page: Any, slow_editor: SlowEditor) -> None:
    page.locator("#examples .thumbnail-item").first.click()
    page.wait_for_selector("#scene .picture.full")
    page.wait_for_selector("#exemplar .picture.full")
    with slow_editor.held():
        run(page)
        page.wait_for_selector("#status img")
    wait_until_done(page)
    assert page.locator("#slider img").count() == 2


def test_a_model_that_reads_text(browser: Any, text_folder: Path, tmp_path: Path, files: dict[str, Path]) -> None:
    del files["exemplar"]
    with running(Editor.from_pretrained(text_folder), text_folder) as address:
        client = connect(address, tmp_path)
        results, python, _ = client.predict(**sent(files), **QUICK, prompt="a dog", api_name="/edit")
        assert changed(files["scene"], results[0]).any() and "prompt='a dog'" in python
        page = browser.new_page()
        open_page(page, address)
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


def test_cancel(page: Any, slow_editor: SlowEditor, files: dict[str, Path]) -> None:
    before = slow_editor.steps
    show_images(page, files)
    drag(page, (0.3, 0.3), (0.6, 0.6))
    run(page, 250)
    page.wait_for_selector("#status .progress")
    page.locator("#cancel").click()
    page.wait_for_selector("#status:has-text('Stopped.')")
    assert slow_editor.steps - before < 250
    run(page)  # at once: the button is enabled only when the model is free again
    wait_until_done(page)


def test_cancel_while_waiting(page: Any, client: Any, slow_editor: SlowEditor, files: dict[str, Path]) -> None:
    before = slow_editor.steps
    show_images(page, files)
    drag(page, (0.3, 0.3), (0.6, 0.6))
    with slow_editor.held():
        other = client.submit(**sent(files), **QUICK, api_name="/edit")
        wait_until(lambda: slow_editor.steps > before)
        run(page)
        page.wait_for_selector("#status:has-text('queue')")
        page.locator("#cancel").click()
        page.wait_for_selector("#status:has-text('Stopped.')")
        page.wait_for_selector("#run:not([disabled])")
        assert not other.done()
    other.result(timeout=120)
    assert slow_editor.steps == before + 2  # the cancelled one had none


def test_errors_on_the_page(page: Any, files: dict[str, Path], tmp_path: Path) -> None:
    def expect(text: str) -> None:
        page.wait_for_selector(f".toast-body:has-text('{text}')")
        page.locator(".toast-close").first.click()
        page.wait_for_selector(".toast-body", state="detached")

    page.locator("#run").click()
    expect("an exemplar")
    whole = files["scene"].read_bytes()
    Image.new("L", (2_000, 2_000)).save(tmp_path / "many.png")
    for name, content in (("text.png", b"not an image"), ("truncated.png", whole[:-400]), ("many.png", None)):
        path = tmp_path / name
        if content:
            path.write_bytes(content)
        upload(page, "scene", path)
        expect(f"{name}: ")
        assert page.locator("#scene .picture.full").count() == 0
    large = tmp_path / "large.png"
    large.write_bytes(bytes(2**20 + 1))
    upload(page, "scene", large)
    page.wait_for_selector("#scene .complaint:has-text('large.png: 1.0 MB, expected at most 1')")
    show_images(page, files)
    page.locator("#run").click()
    expect("no hole yet")
    drag(page, (0.3, 0.3), (0.6, 0.6))
    run(page)
    wait_until_done(page)
