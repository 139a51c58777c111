"""The page in a browser and the API beside it: a layout over `edits` with Gradio, which is imported when it is built.

Gradio looks at the types of an event's parameters, so annotations here are values and not put off to be strings.
"""

import base64
import inspect
import io
import logging
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.data.transforms import open_image
from ldm.editing import EXAMPLE_PARTS, as_hole, bundled_examples
from ldm.web.edits import HOLE_PREFIX, Edited, EditService, Progress, Setting

if TYPE_CHECKING:
    import gradio

HERE = Path(__file__).parent
INTRODUCTION = """# Paint by Example
Paint over a part of the scene, show what is to be there instead, and run. Nothing outside the hole changes."""
DISPLAY_SIDE = 1280  # pixels, longest, of the copies that the browser shows
ACCENT = (255, 61, 127)  # of a painted hole
STYLE = """
.gradio-container { max-width: 1240px !important; margin: auto; }
.progress { display: flex; flex-direction: column; gap: 0.5rem; align-items: center; }
.progress progress { width: 100%; accent-color: var(--color-accent); }
.progress img { width: 100%; max-height: 14rem; object-fit: contain; margin: 0; }
"""

Inputs = tuple[Path, Path, Path, dict[str, Any]]


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
        OSError: the port is taken.
        ModuleNotFoundError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also of Gradio's own parts, which do not see the page's setting
    with tempfile.TemporaryDirectory(prefix="paint-by-example-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        import gradio as gr

        edits = Path(folder) / "edits"
        edits.mkdir()
        service = make_service(edits)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio looks whether it is there, at each start
        page = build_page(service)
        page.queue(max_size=service.limits.waiting, api_open=False)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                auth=auth,
                max_file_size=service.limits.megabytes * 2**20,
                theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
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
            yield url
        finally:
            page.close(verbose=False)


def build_page(service: EditService) -> "gradio.Blocks":
    """The page and the API endpoint `/edit` of a service."""
    import gradio as gr

    examples = bundled_examples()
    keep = service.limits.keep_seconds
    private = dict(api_visibility="private", show_progress="hidden")
    model = dict(concurrency_id="model", concurrency_limit=1)

    with gr.Blocks(title="Paint by Example", analytics_enabled=False, delete_cache=(60, keep)) as page:
        gr.Markdown(INTRODUCTION)
        files = {part: gr.State(time_to_live=keep) for part in ("scene", "exemplar")}
        results = gr.State([], time_to_live=keep)
        with gr.Row():
            with gr.Column(scale=3):
                gr.Markdown("### Scene")
                scene = picture("scene", painted=True)
                gr.Markdown("### Exemplar")
                exemplar = picture("exemplar", painted=False)
                gallery_of_examples = gr.Gallery(
                    [example_tile(folder) for folder in examples],
                    label="Examples",
                    columns=4,
                    height=150,
                    allow_preview=False,
                    format="jpeg",
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                    visible=bool(examples),
                )
            with gr.Column(scale=2):
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run")
                    cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
                status = gr.HTML(elem_id="status")
                slider = gr.ImageSlider(label="Before and after", format="png", interactive=False, visible=False)
                gallery = gr.Gallery(
                    label="Candidates", columns=4, height=170, allow_preview=False, interactive=False, visible=False,
                    buttons=[], elem_id="candidates",
                )  # fmt: skip
                with gr.Row():
                    download = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
                    hole_mask = gr.DownloadButton("Download the mask", visible=False, elem_id="download-mask")
                with gr.Accordion("Settings", open=True):
                    settings = [control(setting) for setting in service.settings.values()]
                with gr.Accordion("The same call in Python and shell", open=False):
                    python = gr.Code(label="Python", language="python", interactive=False, elem_id="python")
                    shell = gr.Code(label="Shell", language="shell", interactive=False, elem_id="shell")

        def show_example(event: gr.SelectData) -> tuple[str, str, Any, Any]:
            paths = {part: examples[event.index] / f"{part}.png" for part in EXAMPLE_PARTS}
            hole = display_copy(as_hole(paths["mask"]))
            return (
                str(paths["scene"]),
                str(paths["exemplar"]),
                gr.HTML(picture=data_url(display_copy(open_image(paths["scene"]))), value=data_url(hole)),
                gr.HTML(picture=data_url(display_copy(open_image(paths["exemplar"]))), value=None),
            )

        def take_upload(path: str) -> tuple[str, Any]:
            with plain_errors():
                copy = display_copy(service.open_upload(path))
            return path, gr.HTML(picture=data_url(copy), value=None)

        def paint(scene_file: str | None, hole: Any, exemplar_file: str | None, *values: Any) -> Iterator[dict]:
            """A run from the page: what changes on it, step by step."""
            with plain_errors():
                if not scene_file or not exemplar_file:
                    raise ValueError("two pictures are needed; drop a scene and an exemplar, or pick an example")
                work = service.edit(
                    Path(scene_file), service.save_hole(hole), Path(exemplar_file), named(service, values)
                )
                while True:
                    try:
                        progress = next(work)
                    except StopIteration as stop:
                        edited: Edited = stop.value
                        break
                    yield {status: progress_bar(progress)}
            written = [str(path) for path in edited.files]
            yield {
                status: "",
                results: written,
                gallery: gr.Gallery(written, visible=len(written) > 1, selected_index=0),
                hole_mask: gr.DownloadButton(value=str(edited.hole_mask), visible=True),
                python: edited.python,
                shell: edited.shell,
                **chosen(scene_file, written[0]),
            }

        def chosen(scene_file: str, result: str) -> dict:
            before, after = (display_copy(open_image(path)) for path in (scene_file, result))
            return {
                slider: gr.ImageSlider((before, after), visible=True),
                download: gr.DownloadButton(value=result, visible=True),
            }

        def choose(event: gr.SelectData, scene_file: str, written: list[str]) -> dict:
            return chosen(scene_file, written[event.index])

        def running(is_running: bool) -> Callable[[], tuple]:
            return lambda: (gr.Button(interactive=not is_running), gr.Button(interactive=is_running))

        for part, shown in (("scene", scene), ("exemplar", exemplar)):
            upload = gr.UploadButton(visible="hidden", elem_id=f"upload-{part}", file_types=["image"])
            upload.upload(take_upload, upload, [files[part], shown], **private)
        gallery_of_examples.select(show_example, None, [*files.values(), scene, exemplar], **private)
        gallery.select(choose, [files["scene"], results], [slider, download], **private)
        buttons = dict(outputs=[run, cancel], queue=False, **private)
        changed = [status, results, gallery, slider, download, hole_mask, python, shell]
        run.click(running(True), **buttons)
        painting = run.click(
            paint, [files["scene"], scene, files["exemplar"], *settings], changed,
            api_visibility="private", show_progress="minimal", show_progress_on=status, **model,
        )  # fmt: skip
        painting.then(running(False), **buttons)
        cancel.click(running(False), cancels=[painting], **buttons)
        cancel.click(lambda: "Cancelled.", None, status, queue=False, **private)
        add_api(service, settings, model)
    return page


def add_api(service: EditService, settings: "list[gradio.components.Component]", model: dict[str, Any]) -> None:
    """The endpoint `/edit`, with the page's settings as keywords."""
    import gradio as gr

    names = ("scene", "hole_mask", "exemplar")
    inputs = [gr.File(visible=False, label=name) for name in names]
    outputs = [
        gr.File(visible=False, file_count="multiple", label="results"),
        gr.Textbox(visible=False, label="python"),
        gr.Textbox(visible=False, label="shell"),
    ]

    def edit(*given: Any) -> tuple[list[str], str, str]:
        paths, values = given[: len(names)], given[len(names) :]
        with plain_errors():
            missing = [name for name, path in zip(names, paths, strict=True) if not path]
            if missing:
                raise ValueError(f"{missing[0]}: got nothing; send a picture file")
            work = service.edit(*(Path(path) for path in paths), named(service, values))
            edited = finished(work)
        return [str(path) for path in edited.files], edited.python, edited.shell

    # Gradio names an endpoint's keywords after the function's.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in (*names, *service.settings)]
    edit.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    trigger = gr.Button(visible=False)
    trigger.click(edit, [*inputs, *settings], outputs, api_name="edit", show_progress="hidden", **model)


def finished(work: Generator[Progress, None, Edited]) -> Edited:
    """What an edit returns in the end."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def named(service: EditService, values: tuple[Any, ...]) -> dict[str, Any]:
    """The settings' values by name."""
    return dict(zip(service.settings, values, strict=True))


def picture(part: str, *, painted: bool) -> "gradio.HTML":
    """A place for a picture, to be painted on if `painted`; its value is the hole as PNG data URL, or None."""
    import gradio as gr

    html, css, js = ((HERE / f"picture.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js"))
    return gr.HTML(
        None, html_template=html, css_template=css, js_on_load=js, apply_default_css=False, elem_id=part,
        picture=None, painted=painted, upload=f"upload-{part}",
    )  # fmt: skip


def control(setting: Setting) -> "gradio.components.Component":
    """The control of a setting."""
    import gradio as gr

    common = dict(value=setting.default, label=setting.label, info=setting.info or None, elem_id=setting.name)
    if isinstance(setting.default, bool):
        return gr.Checkbox(**common)
    if isinstance(setting.default, str):
        return gr.Dropdown(list(setting.choices), **common)
    if setting.step:
        return gr.Slider(setting.low, setting.high, step=setting.step, **common)
    return gr.Number(minimum=setting.low, maximum=setting.high, precision=0, **common)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors about a request reach who made it, in one line; others end in the server's log only."""
    import gradio as gr

    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False, title="This cannot be edited") from None


def progress_bar(progress: Progress) -> str:
    """HTML: how far an edit is; the last picture stays where there is no new one."""
    bar = f'<progress max="{progress.num_steps}" value="{progress.step}"></progress>'
    image = f'<img src="{data_url(progress.preview)}" alt="preview">' if progress.preview else ""
    return f'<div class="progress">{bar}<span>step {progress.step} of {progress.num_steps}</span>{image}</div>'


def display_copy(image: Image.Image) -> Image.Image:
    """A picture no longer than what the browser shows."""
    copy = image.copy()
    copy.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
    return copy


def data_url(image: Image.Image) -> str:
    """A picture as PNG in a data URL."""
    content = io.BytesIO()
    image.save(content, "png")
    return HOLE_PREFIX + base64.b64encode(content.getvalue()).decode()


def example_tile(folder: Path) -> Image.Image:
    """An example at a glance: the scene with its hole painted, the exemplar in the corner."""
    scene, exemplar = (open_image(folder / f"{part}.png") for part in ("scene", "exemplar"))
    scene.paste(ACCENT, mask=as_hole(folder / "mask.png"))
    exemplar.thumbnail((scene.width // 2, scene.height // 2))
    scene.paste(exemplar, (0, scene.height - exemplar.height))
    return scene
