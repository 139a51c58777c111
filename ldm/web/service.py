"""Edits for remote users: bounded settings, checked uploads, limits, the same call as text; independent of Gradio."""

import base64
import json
import math
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.editing.editor import DTYPES, EXAMPLE_PARTS, Editor, explained_out_of_memory, model_metadata
from ldm.editing.hole_masks import as_hole
from ldm.editing.request import EditRequest, make_request
from ldm.editing.safety import ContentFilter, unsafe_reasons
from ldm.editing.settings import CONTROLS, DEFAULTS, LABELS, OPTIONS, SLIDERS, EditSettings, check_setting, json_schema
from ldm.editing.watermark import add_watermark, check_watermark
from ldm.files import UserError
from ldm.images import UNREADABLE, open_image, open_upright, same_aspect, save_png, tensor_to_pil
from ldm.latent_diffusion import LatentDiffusion

FORMATS = ("PNG", "JPEG", "WEBP")  # formats of uploads, recognised by their content
HOLE_PREFIX = "data:image/png;base64,"
LONGEST_PROMPT = 1000  # characters; models read about the first 75 tokens
PREVIEW_SHARE = 0.1  # largest share of the time that goes into decoding previews
TICK = 1.0  # seconds between two reports of the progress, at most
PROMPTS = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    pixels: int = 30_000_000  # of an uploaded image
    megabytes: int = 40  # of an uploaded file
    seconds: float = 300  # from the model's first step to its last; checked after each step
    samples: int = 8  # candidates of one edit
    waiting: int = 16  # requests in the queue; further ones are turned away
    keep_seconds: int = 5400  # how long files stay after their last use; longer than the longest wait


@dataclass(frozen=True)
class Source:
    """Where the model comes from and what happens to its results, for metadata and the calls as text."""

    checkpoint: str | None = None  # None: the bundled model
    config: str | None = None  # None: the file beside the checkpoint
    decoder: str | None = None  # None: the checkpoint's own
    safety: str | None = None  # name of the content filter
    watermark: str | None = None  # text to mark results with


def offered_settings(model: LatentDiffusion, samples: int) -> dict[str, dict[str, Any]]:
    """Return JSON schemas of the settings that a model can use, with definite defaults and the page's bounds.

    A minimum below the setting's own stands for None, automatic, because sliders cannot be empty.
    """
    defaults = DEFAULTS | dict.fromkeys(PROMPTS, "") | {"n_samples": min(2, samples), "num_steps": EditSettings().steps}
    defaults |= {name: float(getattr(model.config, name)) for name in ("crop_margin", "guidance_scale")}
    unused = () if model.reads_text else PROMPTS
    unused += () if model.reads_exemplars else ("reference_background", "reference_fit")
    schemas, sliders = {}, SLIDERS | {"n_samples": (1, samples, 1)}
    for name in [name for name in CONTROLS if name not in unused]:
        title = LABELS.get(name, name.replace("_", " ").capitalize())
        schema = json_schema(name) | {"title": title, "default": defaults[name]}
        schema |= zip(("minimum", "maximum", "step"), sliders.get(name, ()), strict=False)
        if name in PROMPTS:
            schema["maxLength"] = LONGEST_PROMPT
        if defaults[name] is None:
            low, option = schema["minimum"], OPTIONS[name]
            schema |= {"default": low, "description": f"{option.help}; {low:g}: {option.default_text}"}
        schemas[name] = schema
    return schemas


def check(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """Return a setting's value in its own type; raise UserError if it has another or is out of the schema's bounds."""
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if value == low < OPTIONS[name].low:
        return None
    if isinstance(value, str) and len(value) > schema.get("maxLength", math.inf):
        raise UserError(f"{name}: got {len(value)} characters, expected at most {LONGEST_PROMPT}")
    return check_setting(name, value, (low, high))


class Progress(NamedTuple):
    """State of a running edit."""

    phase: str  # waiting, encoding, painting or decoding
    step: int = 0  # of painting
    num_steps: int = 0  # 0: not known yet
    preview: Image.Image | None = None  # the crops around the hole, side by side, when last decoded
    seconds: float = 0.0  # since the edit began to wait for the model


class Edited(NamedTuple):
    """A finished edit."""

    files: list[Path]  # PNG with the settings inside, one for each candidate that the content filter did not flag
    hole_mask: Path  # in the scene's size
    python: str  # the calls that repeat the edit
    shell: str
    num_unsafe: int  # candidates that the content filter flagged


@dataclass
class EditService:
    """One inpainting model for all users; one edit at a time."""

    editor: Editor
    folder: Path  # of its files
    limits: Limits = Limits()
    source: Source = Source()
    content_filter: ContentFilter | None = None  # nobody sees the candidates that it flags, nor any preview

    def __post_init__(self) -> None:
        if not self.editor.model.inpaints:
            raise UserError("the page edits, and this model relights; use scripts/relight.py")
        self.folder, self.settings = self.folder.resolve(), offered_settings(self.editor.model, self.limits.samples)
        # one worker: a cancelled edit ends its step before the next one begins
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edit")
        beside = ThreadPoolExecutor(1)  # the first edit paints while a large file is hashed
        self._metadata = beside.submit(model_metadata, self.source, self.editor.model.weight_dtype)
        beside.shutdown(wait=False)

    def close(self) -> None:
        """Cancel what waits, and wait for the running step."""
        self._worker.shutdown(cancel_futures=True)

    def save_hole(self, drawn: Any) -> Path:
        """Write the hole that a browser drew, a PNG as data URL, to a file."""
        if not isinstance(drawn, str) or not drawn.startswith(HOLE_PREFIX):
            raise UserError("no hole yet; paint over what is to be replaced, or drag a box around it")
        if len(drawn) > self.limits.megabytes * 2**20:
            raise UserError(f"the hole: got {len(drawn)} bytes, expected at most {self.limits.megabytes} MB")
        try:
            content = base64.b64decode(drawn.removeprefix(HOLE_PREFIX), validate=True)
        except ValueError as error:
            raise UserError(f"the hole: got no base64 ({error}); paint it again") from None
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "mask.png"
        path.write_bytes(content)
        return path

    def edit(
        self, scene: Path, hole_mask: Path, exemplar: Path | None, values: Mapping[str, Any]
    ) -> Generator[Progress | Edited, None, None]:
        """Edit uploads; yield the progress after each step and every TICK seconds, and the result.

        Closing the generator ends the edit. The mask may be smaller than the scene; defaults replace missing `values`.
        """
        offers = self.settings.items()
        checked = {name: check(name, values.get(name, offer["default"]), offer) for name, offer in offers}
        files = scene, hole_mask, exemplar
        self.touch(files)
        image, hole = self.open_upload(scene, open_upright), self.open_upload(hole_mask, as_hole)
        reference = exemplar and self.open_upload(exemplar, open_upright)
        if same_aspect(hole.size, image.size):  # drawn on a smaller copy of a large scene: nothing to warn of
            hole = hole.resize(image.size, Image.Resampling.NEAREST)
        request = make_request(image, reference, EditSettings(**checked), mask=hole)
        if self.source.watermark is not None:
            check_watermark(request.scene.size, self.source.watermark)
        events, cancelled = SimpleQueue[dict[str, Any]](), threading.Event()  # changes of the progress
        began, progress = time.monotonic(), Progress("waiting")
        work = self._worker.submit(self._paint, request, events, cancelled)
        work.add_done_callback(lambda _: events.put({}))
        try:
            while not (work.done() and events.empty()):
                with suppress(Empty):  # during a long step the clock goes on
                    progress = progress._replace(**events.get(timeout=TICK))
                yield progress._replace(seconds=time.monotonic() - began)
            with explained_out_of_memory("fewer candidates or a smaller scene"):
                results = work.result()
        finally:
            cancelled.set()
            work.cancel()
        yield self._save(results, request, files)

    def touch(self, files: Iterable[str | Path | None]) -> None:
        """Restart the age of uploads that a request waits for."""
        for file in files:
            with suppress(OSError):  # gone; opening it says so
                if file and Path(file).is_relative_to(self.folder):
                    os.utime(file)

    def open_upload(self, path: str | Path, reader: Callable[[Path], Image.Image] = open_image) -> Image.Image:
        """Read an uploaded image; the messages of UserErrors name it without its folder."""
        path = Path(path)
        try:
            with Image.open(path, formats=FORMATS) as header:  # reads no pixels
                width, height = header.size
            if width * height > self.limits.pixels:
                most = f"{self.limits.pixels / 1e6:g} million pixels"
                raise UserError(f"{path}: {width} x {height}, expected at most {most}; reduce its size first")
            return reader(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name)) from None
        except FileNotFoundError:
            kept = f"files are kept for {self.limits.keep_seconds // 60} minutes"
            raise UserError(f"{path.name}: no longer here, {kept}; upload or make it again") from None
        except (*UNREADABLE, EOFError):  # of damaged headers, too
            raise UserError(f"{path.name}: not readable here, or far too large; save it as PNG or JPEG") from None

    def _paint(self, request: EditRequest, events: SimpleQueue[Any], cancelled: threading.Event) -> list[Image.Image]:
        began = next_preview = time.monotonic()

        def tell(**changes: Any) -> None:
            if cancelled.is_set():
                raise CancelledError
            events.put(changes)

        def on_step(step: int, num_steps: int, _x_t: Tensor, x_0: Tensor) -> None:
            nonlocal next_preview
            changes: dict[str, Any] = {"step": step, "num_steps": num_steps}
            now, limit = time.monotonic(), self.limits.seconds
            if now - began > limit:
                raise UserError(f"step {step} of {num_steps}: longer than {limit:g} s; use fewer steps or candidates")
            if now >= next_preview and self.content_filter is None and not cancelled.is_set():
                row = torch.cat(tuple(self.editor.model.decode_latents(x_0)), dim=-1)
                changes["preview"], done = tensor_to_pil(row), time.monotonic()
                next_preview = done + (done - now) * (1 / PREVIEW_SHARE - 1)
            tell(**changes)

        return self.editor.edit_request(request, on_step=on_step, on_phase=lambda phase: tell(phase=phase))

    def _save(self, results: list[Image.Image], request: EditRequest, files: tuple[Path, Path, Path | None]) -> Edited:
        settings, source = request.settings, self.source
        reasons = unsafe_reasons(self.content_filter, results, request.hole)
        judged = zip(settings.seeds, results, reasons, strict=True)
        made = {seed: add_watermark(result, source.watermark) for seed, result, reason in judged if reason is None}
        if not made:
            raise UserError(f"withheld: {reasons[0]}; another seed or exemplar may pass")
        folder, names = Path(tempfile.mkdtemp(dir=self.folder)), call_names(*files)
        record = settings.record() | {"reference": None} | names | vars(source) | self._metadata.result()
        record |= {"checkpoint": source.checkpoint or "bundled", "config": source.config or "beside the checkpoint"}
        record |= {"device": self.editor.device.type}
        written = [folder / f"{Path(names['image']).stem}_{seed}.png" for seed in made]
        for path, (seed, result) in zip(written, made.items(), strict=True):
            save_png(result, path, {"parameters": json.dumps(record | {"seed": seed})})
        save_png(request.hole, folder / "mask.png")
        python, shell = self._python_call(names, settings), self._shell_call(names, settings)
        return Edited(written, folder / "mask.png", python, shell, len(results) - len(made))

    def _python_call(self, names: dict[str, str], settings: EditSettings) -> str:
        """Return the edit as a Python program, for a folder with the files under these names."""
        source, dtype, device = self.source, self.editor.model.weight_dtype, self.editor.device.type
        is_cast = dtype != torch.float32
        options = {"config": source.config, "decoder": source.decoder, "device": device if device != "cpu" else None}
        arguments = [repr(source.checkpoint), *(f"{name}={value!r}" for name, value in options.items() if value)]
        arguments += [f"dtype={dtype}"] * is_cast
        imports = "import torch\n\n" * is_cast + "from ldm import Editor\n"
        imports += "from ldm.editing.watermark import add_watermark\n" * bool(source.watermark)
        image = f"add_watermark(image, {source.watermark!r})" if source.watermark else "image"
        keywords = settings.changed() | {"seed": settings.seeds}  # a list of seeds makes a list of results
        lines = (f"    {name}={value!r},\n" for name, value in keywords.items() if name != "n_samples")
        return f"""{imports}
editor = Editor.from_pretrained({", ".join(arguments)})
images = editor.edit(
    {", ".join(map(repr, names.values()))},
{"".join(lines)})
for seed, image in zip({settings.seeds}, images):
    {image}.save(f"result_{{seed}}.png")
"""

    def _shell_call(self, names: dict[str, str], settings: EditSettings) -> str:
        """Return the edit as a shell command, for a folder with the files under these names."""
        precision = next(name for name, dtype in DTYPES.items() if dtype == self.editor.model.weight_dtype)
        options = names | vars(self.source) | {"device": self.editor.device.type, "precision": precision}
        words = [str(word) for name, value in options.items() if value for word in (f"--{name}", value)]
        return shlex.join(["python", "inference.py", *words, *settings.cli_words()])

    def sweep(self, spared: Collection[Path] = ()) -> None:
        """Remove files that were not used for `keep_seconds`, and folders that have been empty for as long."""
        oldest = time.time() - self.limits.keep_seconds
        for parent, folders, files in os.walk(self.folder, topdown=False):
            for path in (Path(parent, name) for name in (*files, *folders)):
                with suppress(OSError):  # a folder that is not empty, or gone meanwhile
                    if path not in spared and path.stat().st_mtime < oldest:
                        path.rmdir() if path.is_dir() else path.unlink()


def call_names(scene: Path, hole_mask: Path, exemplar: Path | None) -> dict[str, str]:
    """Return the file names in the calls as text: the uploads' own, or scene, mask and exemplar if they clash.

    Browsers call every pasted image image.png, and a name that begins with a hyphen would be an option.
    """
    files = {"image": scene, "mask": hole_mask} | ({"reference": exemplar} if exemplar else {})
    names = {file.name.casefold() for file in files.values()}
    if len(names) == len(set(files.values())) and not any(name.startswith("-") for name in names):
        return {part: file.name for part, file in files.items()}
    return {part: f"{name}{files[part].suffix}" for part, name in zip(files, EXAMPLE_PARTS, strict=False)}
