"""The page in a browser and the API beside it: a layout over `service` with Gradio, which evaluates annotations."""

import base64
import inspect
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.components.api_component import Api
from gradio.processing_utils import encode_pil_to_bytes
from gradio.themes import Default
from gradio_client.utils import is_file_obj_with_meta
from PIL import Image, ImageOps

from ldm.editing.editor import EXAMPLE_PARTS, bundled_examples
from ldm.editing.hole_masks import as_hole
from ldm.images import open_image
from ldm.web.service import Edited, EditService, Progress

HERE = Path(__file__).parent
INTRODUCTION = """# Paint by Example
Paint over a part of the scene, {condition} what is to be there instead, and run. Nothing outside the hole changes."""
DISPLAY_SIDE = 1280  # longest side of the copies that the browser shows, pixels
PAINT = (255, 61, 127)  # colour of a hole
PRIVATE: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
AT_ONCE: dict[str, Any] = dict(queue=False, **PRIVATE)
ON_MODEL: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1)
THUMBNAILS: dict[str, Any] = dict(height="auto", allow_preview=False, interactive=False, show_label=False, buttons=[])
# What Gradio calls the keys of a JSON schema.
GRADIO_NAMES = dict(default="value", title="label", description="info", enum="choices", maxLength="max_length")
CODE: dict[str, Any] = dict(interactive=False, wrap_lines=True, show_line_numbers=False)
LAUNCH: dict[str, Any] = dict(css_paths=HERE / "page.css", footer_links=["api"], prevent_thread_lock=True, quiet=True)
LAUNCH |= dict.fromkeys(("share", "ssr_mode", "mcp_server", "run_history", "enable_monitoring"), False)
LAUNCH["theme"] = Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


class Page:
    """The page and the API endpoint `/edit` of a service; `blocks` is Gradio's description of both."""

    def __init__(self, service: EditService) -> None:
        self.service, self.examples = service, bundled_examples()
        self.reads_exemplars, self.reads_text = service.editor.model.reads_exemplars, service.editor.model.reads_text
        words = [("show", "choose an exemplar")] * self.reads_exemplars + [("say", "write a prompt")] * self.reads_text
        verbs, requests = (" and ".join(column) for column in zip(*words, strict=True))
        with gr.Blocks(title="Paint by Example", analytics_enabled=False) as self.blocks:
            gr.Markdown(INTRODUCTION.format(condition=verbs))
            with gr.Row():
                with gr.Column(scale=3):
                    self.add_inputs()
                with gr.Column(scale=2):
                    self.results = gr.State()  # the scene that was edited and the candidates
                    with gr.Row():
                        self.run = gr.Button("Run", variant="primary", elem_id="run")
                        self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
                    self.status = gr.HTML(f"Paint the hole, {requests}, run.", elem_id="status")
                    shown: dict[str, Any] = dict(format="png", interactive=False, elem_id="slider")
                    self.slider = gr.ImageSlider(label="Before and after", **shown)
                    self.gallery = gr.Gallery(columns=4, elem_id="candidates", visible=False, **THUMBNAILS)
                    with gr.Row():
                        self.download = gr.DownloadButton("Download PNG", visible=False, elem_id="download")
                        self.hole_mask = gr.DownloadButton("Download the mask", visible=False, elem_id="download-mask")
            with gr.Accordion("Settings"), gr.Row(elem_id="settings"):
                rest = [(name, schema) for name, schema in service.settings.items() if name not in self.controls]
                self.controls |= {name: control(name, schema) for name, schema in rest}
            with gr.Accordion("The same call in Python and shell", open=False, elem_id="calls"):
                gr.Markdown("Run it in a folder that holds the images and the mask under the names used here.")
                with gr.Row():
                    self.python = gr.Code(label="Python", language="python", elem_id="python", **CODE)
                    self.shell = gr.Code(label="Shell", language="shell", elem_id="shell", **CODE)
            self.connect()
            add_api(service)

    def add_inputs(self) -> None:
        megabytes, settings = self.service.limits.megabytes, self.service.settings.items()
        self.files = {part: gr.State() for part in ("scene", "exemplar")}
        gr.Markdown("### Scene")
        self.scene = image_field("scene", megabytes, painted=True)
        with gr.Row(visible=self.reads_text):
            self.controls = {name: control(name, schema) for name, schema in settings if "maxLength" in schema}
        with gr.Row():
            with gr.Column(visible=self.reads_exemplars):
                gr.Markdown("### Exemplar")
                self.exemplar = image_field("exemplar", megabytes, painted=False)
            with gr.Column(visible=bool(self.examples)):
                gr.Markdown("### Examples")
                tiles = [example_tile(folder) for folder in self.examples]
                self.tiles = gr.Gallery(tiles, columns=2, elem_id="examples", format="jpeg", **THUMBNAILS)

    def connect(self) -> None:
        for part, field in (("scene", self.scene), ("exemplar", self.exemplar)):
            with gr.Column(elem_id=f"upload-{part}"):
                upload = gr.UploadButton()
            upload.upload(self.take_upload, upload, [self.files[part], field], **PRIVATE)
        self.tiles.select(self.show_example, None, [*self.files.values(), self.scene, self.exemplar], **PRIVATE)
        # one after the other: an edit that fails at once must not be overtaken by the buttons' first change
        inputs = [self.files["scene"], self.scene, self.files["exemplar"], *self.controls.values()]
        outputs = [self.status, self.results, self.gallery, self.slider, self.download, self.hole_mask]
        outputs += [self.python, self.shell, self.run, self.cancel]
        shown: dict[str, Any] = dict(api_visibility="private", show_progress="minimal", show_progress_on=self.status)
        click = self.run.click(self.begin, [*self.files.values()], [self.run, self.cancel], **AT_ONCE)
        painting = click.then(self.paint, inputs, outputs, **shown, **ON_MODEL)
        # Gradio reports a cancelled edit as failed when the server has ended it, and drops clicks on Run until then
        stopped = [self.status, self.run, self.cancel]
        painting.failure(lambda: {self.status: "Stopped.", **self.buttons(False)}, None, stopped, **AT_ONCE)
        self.cancel.click(None, cancels=[painting])
        self.gallery.select(self.choose, self.results, [self.slider, self.download], **PRIVATE)

    def take_upload(self, path: str) -> tuple[str, Any]:
        with plain_errors():
            return path, gr.HTML(picture=data_url(self.service.open_upload(path)), value=None)

    def show_example(self, event: gr.SelectData) -> tuple[str, str | None, Any, Any]:
        scene, mask, exemplar = (self.examples[event.index] / f"{part}.png" for part in EXAMPLE_PARTS)
        painted = gr.HTML(picture=data_url(open_image(scene)), value=data_url(as_hole(mask)))
        plain = gr.HTML(picture=data_url(open_image(exemplar)), value=None)
        return str(scene), str(exemplar) if self.reads_exemplars else None, painted, plain

    def buttons(self, is_running: bool) -> dict:
        return {self.run: gr.Button(interactive=not is_running), self.cancel: gr.Button(interactive=is_running)}

    def begin(self, *uploads: str | None) -> dict:
        self.service.touch(uploads)  # they may have to wait
        return self.buttons(True)

    def paint(self, scene: str | None, hole: Any, exemplar: str | None, *values: Any) -> Iterator[dict]:
        """Run an edit and yield the changes on the page, step by step."""
        with plain_errors():
            if not scene or not (exemplar or self.reads_text):
                needed = "a scene and an exemplar" if self.reads_exemplars else "a scene"
                raise ValueError(f"{needed} needed; drop them here, or pick an example")
            files = Path(scene), self.service.save_hole(hole), Path(exemplar) if exemplar else None
            settings = dict(zip(self.controls, values, strict=True))
            with closing(self.service.edit(*files, settings)) as work:
                for event in work:
                    yield self.finish(event, scene) if isinstance(event, Edited) else {self.status: progress_bar(event)}

    def finish(self, edited: Edited, scene: str) -> dict:
        files = [str(path) for path in edited.files]
        unsafe = f"; {edited.num_unsafe} withheld by the content filter" if edited.num_unsafe else ""
        return {
            self.status: f"Done{unsafe}.",
            self.results: [scene, *files],
            self.gallery: gr.Gallery(files, visible=len(files) > 1, selected_index=0),
            self.hole_mask: gr.DownloadButton(value=str(edited.hole_mask), visible=True),
            self.python: edited.python,
            self.shell: edited.shell,
            **self.show_result(scene, files[0]),
            **self.buttons(False),
        }

    def show_result(self, scene: str, result: str) -> dict:
        pair = tuple(display_copy(self.service.open_upload(path)) for path in (scene, result))
        return {self.slider: pair, self.download: gr.DownloadButton(value=result, visible=True)}

    def choose(self, event: gr.SelectData, results: list[str]) -> dict:
        with plain_errors():
            return self.show_result(results[0], results[1 + event.index])


def add_api(service: EditService) -> None:
    """Add the endpoint `/edit`, with the page's settings as keywords."""
    model = service.editor.model
    names = ("scene", "hole_mask", *["exemplar"] * model.reads_exemplars)
    # `Api` passes on what is sent as it is, for our own checks: the page's components would fail on wrong types.
    inputs = [Api(None, gr.File(render=False).api_info(), name) for name in names]
    inputs += [Api(schema["default"], schema, schema["title"]) for schema in service.settings.values()]
    outputs = [gr.File(visible=False, file_count="multiple", label="results")]
    outputs += [gr.Textbox(visible=False, label=label) for label in ("python", "shell")]

    def edit(*sent: Any) -> tuple[list[str], str, str]:
        files: dict[str, Any] = dict.fromkeys(("scene", "hole_mask", "exemplar"))
        with plain_errors():
            for name, value in zip(names, sent, strict=False):
                if is_file_obj_with_meta(value):  # an upload: Gradio has checked that it is one
                    files[name] = Path(value["path"])
                elif value is not None or name != "exemplar" or not model.reads_text:
                    raise ValueError(f"{name}: got {value!r:.80}; send an image file")
            settings = dict(zip(service.settings, sent[len(names) :], strict=True))
            *_, edited = service.edit(*files.values(), values=settings)
        assert isinstance(edited, Edited)
        return [str(path) for path in edited.files], edited.python, edited.shell

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in (*names, *service.settings)]
    edit.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]: Gradio reads it
    gr.Button(visible=False).click(edit, inputs, outputs, api_name="edit", show_progress="hidden", **ON_MODEL)


def image_field(part: str, megabytes: int, *, painted: bool) -> gr.HTML:
    """A place for an image, to be painted on if `painted`; its value is the hole as PNG data URL, or None."""
    html, css, js = ((HERE / f"picture.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js"))
    templates: dict[str, Any] = dict(html_template=html, css_template=css, js_on_load=js, apply_default_css=False)
    properties: dict[str, Any] = dict(picture=None, painted=painted, upload=f"upload-{part}", megabytes=megabytes)
    return gr.HTML(None, elem_id=part, **templates, **properties)


def control(name: str, schema: Mapping[str, Any]) -> Component:
    """Make the control of a setting from its JSON schema."""
    kinds = {"enum": gr.Dropdown, "maxLength": gr.Textbox, "step": gr.Slider, "minimum": gr.Number}
    kind: Any = next((kinds[key] for key in kinds if key in schema), gr.Checkbox)
    options = {GRADIO_NAMES.get(key, key): value for key, value in schema.items() if key != "type"}
    return kind(**options, elem_id=name, min_width=240)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show errors about a request to its user, in one line; others end in the server's log only."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def progress_bar(progress: Progress) -> str:
    """Return the progress of an edit as HTML, with its preview."""
    share = 100 * progress.step / max(progress.num_steps, 1)
    bar = f'<div class="bar"><div style="width: {share:.1f}%"></div></div>'
    image = f'<img src="{data_url(progress.preview, "jpeg")}" alt="preview">' if progress.preview else ""
    steps = f" · step {progress.step} of {progress.num_steps}" if progress.num_steps else ""
    return f'<div class="progress">{bar}<span>{progress.phase}{steps} · {progress.seconds:.0f} s</span>{image}</div>'


def display_copy(image: Image.Image) -> Image.Image:
    """Return a copy in the size that the browser shows."""
    copy = image.copy()
    copy.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
    return copy


def data_url(image: Image.Image, form: str = "png") -> str:
    """Encode an image in the size that the browser shows as data URL."""
    return f"data:image/{form};base64," + base64.b64encode(encode_pil_to_bytes(display_copy(image), form)).decode()


def example_tile(folder: Path) -> Image.Image:
    """Show an example in one image: the scene with its hole painted, the exemplar in the corner."""
    scene, exemplar = (open_image(folder / f"{part}.png") for part in ("scene", "exemplar"))
    scene.paste(PAINT, mask=as_hole(folder / "mask.png").point([level * 3 // 5 for level in range(256)]))
    exemplar.thumbnail((scene.width // 2, scene.height // 2))
    scene.paste(ImageOps.expand(exemplar, border=4, fill="white"), (0, scene.height - exemplar.height - 8))
    return scene
