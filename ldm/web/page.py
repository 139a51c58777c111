"""The page in a browser and the API beside it: a layout over `edits` with Gradio, which is imported when it is built.

Gradio looks at the types of an event's parameters, so annotations here are values and not put off to be strings.
"""

import base64
import inspect
import io
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ldm.editing.editor import EXAMPLE_PARTS, bundled_examples
from ldm.editing.hole_masks import as_hole
from ldm.images import open_image
from ldm.web.service import Edited, EditService, Progress, Setting

if TYPE_CHECKING:
    import gradio
    from gradio.components import Component

HERE = Path(__file__).parent
INTRODUCTION = """# Paint by Example
Paint over a part of the scene, {say} what is to be there instead, and run. Nothing outside the hole changes."""
DISPLAY_SIDE = 1280  # pixels, longest, of the copies that the browser shows
PAINT = (255, 61, 127)  # of a hole
HINT = "Paint the hole, {say}, run."
SWEEP_SECONDS = 60.0  # between two looks for files that are old
STYLE = """
.gradio-container { max-width: 1240px !important; margin: auto; }
#scene .html-container, #exemplar .html-container, #status .html-container { padding: 0; }
#upload-scene, #upload-exemplar, footer .divider { display: none; }
#examples .grid-wrap, #candidates .grid-wrap { min-height: 0; height: auto; max-height: none; }
#examples .thumbnail-lg, #candidates .thumbnail-lg { aspect-ratio: 3 / 2; }
#candidates img { object-fit: contain; }
#settings .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); }
.progress { display: flex; flex-direction: column; gap: 0.5rem; align-items: center; }
.progress .bar { width: 100%; height: 0.5rem; border-radius: 1rem; background: var(--background-fill-secondary); }
.progress .bar div { height: 100%; border-radius: 1rem; background: var(--color-accent); }
.progress img { width: 100%; max-height: 14rem; object-fit: contain; margin: 0; }
"""


@contextmanager
def serving(
    make_service: Callable[[Path], EditService],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
) -> Iterator[str]:
    """Serve the page inside the block; its temporary files are gone afterwards.

    Args:
        make_service: makes the service, given a folder for its files.
        host: the address to listen at.
        port: None takes the first free one from 7860 on.
        auth: user and password to ask for; None asks for none.

    Yields:
        The page's address.

    Raises:
        OSError: the address cannot be had.
        ModuleNotFoundError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also of Gradio's own parts, which do not see the page's setting
    with tempfile.TemporaryDirectory(prefix="paint-by-example-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        from gradio.themes import Default

        service = make_service(Path(folder))
        logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio looks whether it is there, at each start
        page = build_page(service)
        spared, stopped = set(service.folder.rglob("*")), threading.Event()  # the page's own pictures stay

        def sweep() -> None:
            while not stopped.wait(SWEEP_SECONDS):
                service.sweep(spared)

        page.queue(max_size=service.limits.waiting, api_open=False)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                auth=auth,
                max_file_size=service.limits.megabytes * 2**20,
                theme=Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
                css=STYLE,
                footer_links=["api"],
                share=False,
                ssr_mode=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                prevent_thread_lock=True,
                quiet=True,
            )
        except OSError:
            raise OSError(
                f"{host}:{port or '7860 to 7959'}: taken, or not an address of this machine; see --port"
            ) from None
        threading.Thread(target=sweep, name="sweep", daemon=True).start()
        try:
            yield url
        finally:
            stopped.set()
            page.close(verbose=False)


def build_page(service: EditService) -> "gradio.Blocks":
    """The page and the API endpoint `/edit` of a service."""
    import gradio as gr

    examples = bundled_examples()
    private: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    thumbnails: dict[str, Any] = dict(allow_preview=False, interactive=False, show_label=False, buttons=[])
    model: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1)
    shows, writes = service.editor.model.reads_exemplars, service.editor.model.reads_text
    texts = [setting for setting in service.settings.values() if setting.is_text]

    with gr.Blocks(title="Paint by Example", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION.format(say=" and ".join(["show"] * shows + ["say"] * writes)))
        files = {part: gr.State() for part in ("scene", "exemplar")}
        results = gr.State()  # the scene that was edited and the candidates
        with gr.Row():
            with gr.Column(scale=3):
                gr.Markdown("### Scene")
                scene = picture("scene", service.limits.megabytes, painted=True)
                with gr.Row(visible=bool(texts)):
                    written = {setting.name: control(setting) for setting in texts}
                with gr.Row():
                    with gr.Column(visible=shows):
                        gr.Markdown("### Exemplar")
                        exemplar = picture("exemplar", service.limits.megabytes, painted=False)
                    with gr.Column(visible=bool(examples)):
                        gr.Markdown("### Examples")
                        gallery_of_examples = gr.Gallery(
                            [example_tile(folder) for folder in examples], columns=2, height="auto", elem_id="examples",
                            format="jpeg", **thumbnails,
                        )  # fmt: skip
            with gr.Column(scale=2):
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run")
                    cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
                say = " and ".join(["choose an exemplar"] * shows + ["write a prompt"] * writes)
                status = gr.HTML(HINT.format(say=say), elem_id="status")
                slider = gr.ImageSlider(label="Before and after", format="png", interactive=False, elem_id="slider")
                gallery = gr.Gallery(columns=4, height="auto", elem_id="candidates", visible=False, **thumbnails)
                with gr.Row():
                    download = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
                    hole_mask = gr.DownloadButton("Download the mask", visible=False, elem_id="download-mask")
        with gr.Accordion("Settings"), gr.Row(elem_id="settings"):
            settings = [written.get(name) or control(setting) for name, setting in service.settings.items()]
        with gr.Accordion("The same call in Python and shell", open=False, elem_id="calls"):
            gr.Markdown(
                "To be run in a folder that holds the pictures under the names given here, the mask among them."
            )
            with gr.Row():
                code: dict[str, Any] = dict(interactive=False, wrap_lines=True, show_line_numbers=False)
                python = gr.Code(label="Python", language="python", elem_id="python", **code)
                shell = gr.Code(label="Shell", language="shell", elem_id="shell", **code)

        def show_example(event: gr.SelectData) -> tuple[str, str | None, Any, Any]:
            paths = {part: examples[event.index] / f"{part}.png" for part in EXAMPLE_PARTS}
            hole = display_copy(as_hole(paths["mask"]))
            return (
                str(paths["scene"]),
                str(paths["exemplar"]) if shows else None,
                gr.HTML(picture=data_url(display_copy(open_image(paths["scene"]))), value=data_url(hole)),
                gr.HTML(picture=data_url(display_copy(open_image(paths["exemplar"]))), value=None),
            )

        def take_upload(path: str) -> tuple[str, Any]:
            with plain_errors():
                copy = display_copy(service.open_upload(path))
            return path, gr.HTML(picture=data_url(copy), value=None)

        def begin(*uploads: str | None) -> tuple[Any, Any]:
            service.touch(uploads)  # they may have to wait
            return buttons(True)

        def buttons(is_running: bool) -> tuple[Any, Any]:
            return gr.Button(interactive=not is_running), gr.Button(interactive=is_running)

        def stopped() -> tuple[Any, Any, str]:
            return *buttons(False), "Stopped."

        def paint(scene_file: str | None, hole: Any, exemplar_file: str | None, *values: Any) -> Iterator[dict]:
            """A run from the page: what changes on it, step by step."""
            with plain_errors():
                if not scene_file or not (exemplar_file or writes):
                    needed = "two pictures are needed; drop a scene and an exemplar" if shows else "drop a scene"
                    raise ValueError(f"{needed}, or pick an example")
                exemplar_path = Path(exemplar_file) if exemplar_file else None
                files = Path(scene_file), service.save_hole(hole), exemplar_path
                with closing(service.edit(*files, named(service, values))) as work:
                    for event in work:
                        is_done = isinstance(event, Edited)
                        yield finished(event, scene_file) if is_done else {status: progress_bar(event)}

        def finished(edited: Edited, scene_file: str) -> dict:
            written = [str(path) for path in edited.files]
            return {
                status: f"Done; {edited.num_withheld} withheld by the content filter."
                if edited.num_withheld
                else "Done.",
                results: [scene_file, *written],
                gallery: gr.Gallery(written, visible=len(written) > 1, selected_index=0),
                hole_mask: gr.DownloadButton(value=str(edited.hole_mask), visible=True),
                python: edited.python,
                shell: edited.shell,
                **chosen(scene_file, written[0]),
            }

        def chosen(scene_file: str, result: str) -> dict:
            before, after = (display_copy(service.open_upload(path)) for path in (scene_file, result))
            return {
                slider: (before, after),
                download: gr.DownloadButton(value=result, visible=True),
            }

        def choose(event: gr.SelectData, edited: list[str]) -> dict:
            with plain_errors():
                return chosen(edited[0], edited[1 + event.index])

        for part, shown in (("scene", scene), ("exemplar", exemplar)):
            with gr.Column(elem_id=f"upload-{part}"):
                upload = gr.UploadButton()
            upload.upload(take_upload, upload, [files[part], shown], **private)
        gallery_of_examples.select(show_example, None, [*files.values(), scene, exemplar], **private)
        gallery.select(choose, results, [slider, download], **private)
        changed = [status, results, gallery, slider, download, hole_mask, python, shell]
        at_once: dict[str, Any] = dict(queue=False, **private)
        # One after the other: an edit that fails at once must not be overtaken by the buttons' first change.
        painting = run.click(begin, [*files.values()], [run, cancel], **at_once).then(
            paint, [files["scene"], scene, files["exemplar"], *settings], changed,
            api_visibility="private", show_progress="minimal", show_progress_on=status, **model,
        )  # fmt: skip
        painting.success(lambda: buttons(False), None, [run, cancel], **at_once)
        painting.failure(stopped, None, [run, cancel, status], **at_once)
        cancel.click(stopped, None, [run, cancel, status], cancels=[painting], **at_once)
        add_api(service, model)
    return page


def add_api(service: EditService, model: dict[str, Any]) -> None:
    """The endpoint `/edit`, with the page's settings as keywords."""
    import gradio as gr

    # What is sent comes as it is, for our own checks: the page's components would fail on wrong types.
    from gradio.components.api_component import Api
    from gradio_client.utils import is_file_obj_with_meta

    reads = service.editor.model
    names = ("scene", "hole_mask", *(("exemplar",) if reads.reads_exemplars else ()))
    inputs = [Api(None, gr.File(render=False).api_info(), name) for name in names]
    inputs += [Api(setting.default, api_type(setting), setting.label) for setting in service.settings.values()]
    outputs = [
        gr.File(visible=False, file_count="multiple", label="results"),
        gr.Textbox(visible=False, label="python"),
        gr.Textbox(visible=False, label="shell"),
    ]

    def file(name: str, sent: Any) -> Path | None:
        if is_file_obj_with_meta(sent):  # an upload: Gradio has looked whether it is
            return Path(sent["path"])
        if sent is None and name == "exemplar" and reads.reads_text:
            return None
        raise ValueError(f"{name}: got {'nothing' if sent is None else f'{sent!r:.80}'}; send a picture file")

    def edit(*given: Any) -> tuple[list[str], str, str]:
        with plain_errors():
            files = {name: file(name, sent) for name, sent in zip(names, given, strict=False)}
            scene, hole_mask = files["scene"], files["hole_mask"]
            assert scene and hole_mask
            values = named(service, given[len(names) :])
            *_, edited = service.edit(scene, hole_mask, files.get("exemplar"), values)
        assert isinstance(edited, Edited)
        return [str(path) for path in edited.files], edited.python, edited.shell

    # Gradio names an endpoint's keywords after the function's.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in (*names, *service.settings)]
    edit.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    trigger = gr.Button(visible=False)
    trigger.click(edit, inputs, outputs, api_name="edit", show_progress="hidden", **model)


def named(service: EditService, values: tuple[Any, ...]) -> dict[str, Any]:
    """The settings' values by name."""
    return dict(zip(service.settings, values, strict=True))


def picture(part: str, megabytes: int, *, painted: bool) -> "gradio.HTML":
    """A place for a picture, to be painted on if `painted`; its value is the hole as PNG data URL, or None."""
    import gradio as gr

    html, css, js = ((HERE / f"picture.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js"))
    return gr.HTML(
        None, html_template=html, css_template=css, js_on_load=js, apply_default_css=False, elem_id=part,
        picture=None, painted=painted, upload=f"upload-{part}", megabytes=megabytes,
    )  # fmt: skip


def control(setting: Setting) -> "Component":
    """The control of a setting."""
    import gradio as gr

    common: dict[str, Any] = dict(
        value=setting.default, label=setting.label, info=setting.info or None, elem_id=setting.name, min_width=240
    )
    if isinstance(setting.default, bool):
        return gr.Checkbox(**common)
    if setting.is_text:
        return gr.Textbox(max_length=round(setting.high), **common)
    if isinstance(setting.default, str):
        return gr.Dropdown(list(setting.choices), **common)
    if setting.step:
        return gr.Slider(setting.low, setting.high, step=setting.step, **common)
    return gr.Number(minimum=setting.low, maximum=setting.high, **common)


def api_type(setting: Setting) -> dict[str, Any]:
    """JSON schema of a setting, for the API's documentation."""
    if isinstance(setting.default, bool):
        return {"type": "boolean"}
    if isinstance(setting.default, str):
        return {"type": "string", "enum": list(setting.choices)} if setting.choices else {"type": "string"}
    return {"type": "integer" if isinstance(setting.default, int) else "number"}


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors about a request reach who made it, in one line; others end in the server's log only."""
    import gradio as gr

    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def progress_bar(progress: Progress) -> str:
    """HTML: how far an edit is, and what it looks like by now."""
    bar = f'<div class="bar"><div style="width: {100 * progress.step / progress.num_steps:.1f}%"></div></div>'
    image = f'<img src="{data_url(display_copy(progress.preview), "jpeg")}" alt="preview">' if progress.preview else ""
    return f'<div class="progress">{bar}<span>step {progress.step} of {progress.num_steps}</span>{image}</div>'


def display_copy(image: Image.Image) -> Image.Image:
    """A picture no longer than what the browser shows."""
    copy = image.copy()
    copy.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
    return copy


def data_url(image: Image.Image, form: str = "png") -> str:
    """A picture as data URL."""
    content = io.BytesIO()
    image.save(content, form)
    return f"data:image/{form};base64," + base64.b64encode(content.getvalue()).decode()


def example_tile(folder: Path) -> Image.Image:
    """An example at a glance: the scene with its hole painted, the exemplar in the corner."""
    scene, exemplar = (open_image(folder / f"{part}.png") for part in ("scene", "exemplar"))
    scene.paste(PAINT, mask=as_hole(folder / "mask.png").point([level * 3 // 5 for level in range(256)]))
    exemplar.thumbnail((scene.width // 2, scene.height // 2))
    scene.paste(ImageOps.expand(exemplar, border=4, fill="white"), (0, scene.height - exemplar.height - 8))
    return scene
