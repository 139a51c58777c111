"""Edits on behalf of remote users: bounded settings, checked uploads, limits, and the same call as text.

Independent of Gradio. Dimension key: Z, h, w latents.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shlex
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import __version__
from ldm.checkpoint.io import sha256_file
from ldm.editing.editor import EXAMPLE_PARTS, Editor, checkpoint_file, is_out_of_memory
from ldm.editing.hole_masks import as_hole
from ldm.editing.request import EditRequest, make_request
from ldm.editing.safety import OPEN_NSFW, ContentFilter, unsafe_reasons
from ldm.editing.settings import DEFAULTS, OPTIONS, EditSettings, Option, check_setting, json_schema
from ldm.editing.watermark import add_watermark, check_watermark
from ldm.files import UserError
from ldm.images import open_image, open_upright, save_png, tensor_to_pil

FORMATS = ("PNG", "JPEG", "WEBP")  # formats of uploads, recognised by their content
HOLE_PREFIX = "data:image/png;base64,"
LONGEST_PROMPT = 1000  # characters; models read about the first 75 tokens
PREVIEW_SHARE = 0.1  # largest share of the time that goes into decoding previews
PROMPTS = ("prompt", "negative_prompt")
EXEMPLAR_OPTIONS = ("reference_background", "reference_fit")


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        pixels: most pixels of an uploaded image.
        megabytes: largest uploaded file.
        seconds: most time from the model's beginning to its last step; checked after each step.
        samples: most candidates of one edit.
        waiting: most requests in the queue; further ones are turned away.
        keep_seconds: how long files stay on the server after their last use; longer than the longest wait.
    """

    pixels: int = 30_000_000
    megabytes: int = 40
    seconds: float = 300
    samples: int = 8
    waiting: int = 16
    keep_seconds: int = 5400

    @property
    def longest_side(self) -> int:
        """Longest side of an image, pixels: the square around a hole may be as long on both sides."""
        return int(2 * self.pixels**0.5)


@dataclass(frozen=True)
class OfferedSetting:
    """A setting of `EditSettings` as page and API offer it: with a definite default and narrower bounds.

    Attributes:
        name: name of the setting.
        option: how `EditSettings` describes it.
        default: value before the user changes it; its type is the control's.
        low, high: inclusive bounds of a number. A `low` below the setting's own bound stands for None, the automatic
            value, because sliders cannot be empty.
        step: distance between two values of a slider; 0 asks for a number field.
    """

    name: str
    option: Option
    default: str | int | float | bool
    low: float
    high: float
    step: float

    @property
    def is_text(self) -> bool:
        return isinstance(self.default, str) and not self.option.choices

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema: type, choices, bounds and description."""
        automatic = f"; {self.low:g}: {self.option.default_text}" if self.low < self.option.low else ""
        bounds = {"minimum": self.low, "maximum": self.high} if self.high else {}
        return json_schema(self.name) | bounds | {"description": self.option.help + automatic}

    def check(self, value: Any) -> Any:
        """Return the value in the type that `EditSettings` takes.

        Raises:
            UserError: it has another type or is out of bounds.
        """
        if value == self.low < self.option.low:
            return None
        checked = check_setting(self.name, value)
        if self.is_text and len(checked or "") > LONGEST_PROMPT:
            raise UserError(f"{self.name}: got {len(checked)} characters, expected at most {LONGEST_PROMPT}")
        if isinstance(checked, tuple) or (self.high and checked is not None and not self.low <= checked <= self.high):
            raise UserError(f"{self.name}: got {value!r:.80}, expected a number from {self.low:g} to {self.high:g}")
        return checked


def offered_settings(editor: Editor, samples: int) -> dict[str, OfferedSetting]:
    """Return the settings that a model can use by name, in the page's order; at most `samples` candidates."""
    model = editor.model
    defaults = DEFAULTS | {
        "prompt": "",
        "negative_prompt": "",
        "n_samples": min(2, samples),
        "num_steps": EditSettings().steps,
        "crop_margin": float(model.config.crop_margin),
    }
    unused = (() if model.reads_text else PROMPTS) + (() if model.reads_exemplars else EXEMPLAR_OPTIONS)
    offered = {}
    for name, option in OPTIONS.items():
        if option.label and name not in unused:
            low, high, step = option.slider
            default = low if defaults[name] is None else defaults[name]
            high = samples if name == "n_samples" else high
            offered[name] = OfferedSetting(name, option, default, low, high, step)
    return offered


@dataclass(frozen=True)
class Progress:
    """State of a running edit: steps taken, and the crops around the hole, side by side, when last decoded."""

    step: int
    num_steps: int
    preview: Image.Image | None


@dataclass(frozen=True)
class Edited:
    """A finished edit.

    Attributes:
        files: PNG files with their settings inside, one for each candidate that the content filter did not flag.
        hole_mask: file of the hole mask in the scene's size.
        python, shell: the calls that repeat the edit.
        num_unsafe: number of candidates that the content filter flagged.
    """

    files: list[Path]
    hole_mask: Path
    python: str
    shell: str
    num_unsafe: int = 0


class Cancelled(Exception):
    """The edit was abandoned by its user."""


class EditService:
    """One model for all users; one edit at a time.

    Args:
        editor: editor with the model.
        folder: folder for uploads and results; whoever made it removes it.
        limits: limits of each request.
        checkpoint, config, decoder: where the model came from, for the calls as text; None is the bundled model, the
            config beside it, its own decoder.
        safety: name of the content filter, for the calls as text.
        content_filter: nobody sees the candidates that it flags, nor any preview.
        watermark: text to mark results with; None leaves them unmarked.

    Raises:
        UserError: the model does not inpaint.
    """

    def __init__(
        self,
        editor: Editor,
        folder: Path,
        limits: Limits | None = None,
        *,
        checkpoint: Path | None = None,
        config: Path | None = None,
        decoder: Path | None = None,
        safety: str | None = None,
        content_filter: ContentFilter | None = None,
        watermark: str | None = None,
    ) -> None:
        if not editor.model.inpaints:
            raise UserError("the page edits, and this model relights; use scripts/relight.py")
        self.editor = editor
        self.folder = folder.resolve()
        self.limits = limits or Limits()
        self.checkpoint, self.config, self.decoder = checkpoint, config, decoder
        self.safety, self.content_filter, self.watermark = safety, content_filter, watermark
        self.settings = offered_settings(editor, self.limits.samples)
        # One worker: a cancelled edit ends its step before the next one begins.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edit")
        # Beside the first edit, because it takes seconds for a large file.
        beside = ThreadPoolExecutor(1)
        self._digest = beside.submit(sha256_file, checkpoint_file(checkpoint))
        beside.shutdown(wait=False)

    def close(self) -> None:
        """Cancel what waits, and wait for the running step."""
        self._worker.shutdown(cancel_futures=True)

    def save_hole(self, drawn: Any) -> Path:
        """Write the hole that a browser drew, a PNG as data URL, to a file.

        Raises:
            UserError: it is not a PNG as data URL, or nothing is painted.
        """
        if not isinstance(drawn, str) or not drawn.startswith(HOLE_PREFIX):
            raise UserError("no hole yet; paint over what is to be replaced, or drag a box around it")
        if len(drawn) > self.limits.megabytes * 2**20:
            raise UserError(f"the hole: got {len(drawn)} bytes, expected at most {self.limits.megabytes} MB")
        try:
            content = base64.b64decode(drawn.removeprefix(HOLE_PREFIX), validate=True)
        except binascii.Error as error:
            raise UserError(f"the hole: not base64 ({error}); paint it again") from None
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "mask.png"
        path.write_bytes(content)
        return path

    def edit(
        self, scene: Path, hole_mask: Path, exemplar: Path | None, values: Mapping[str, Any]
    ) -> Generator[Progress | Edited, None, None]:
        """Edit, step by step; closing the generator ends the edit.

        Args:
            scene, hole_mask, exemplar: uploads. The mask may be smaller than the scene, with the same aspect ratio.
                The exemplar may be None with a model that reads text.
            values: settings by name; the page's defaults stand for those left out.

        Yields:
            The progress after each step; at last the result.

        Raises:
            UserError: an input cannot be used, the limit of time is reached, memory runs out, or the content filter
                flags all candidates.
        """
        request = self._request(scene, hole_mask, exemplar, self._check(values))
        if self.watermark:
            check_watermark(request.scene.size, self.watermark)
        steps, cancelled = SimpleQueue[Progress | None](), threading.Event()
        work = self._worker.submit(self._paint, request, steps, cancelled)
        work.add_done_callback(lambda _: steps.put(None))
        try:
            while progress := steps.get():
                yield progress
            results = work.result()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory; use fewer candidates or a smaller scene") from None
        finally:
            cancelled.set()
            work.cancel()
        yield self._save(results, request, (scene, hole_mask, exemplar))

    def _check(self, values: Mapping[str, Any]) -> EditSettings:
        if unknown := values.keys() - self.settings.keys():
            raise UserError(f"got the setting {min(unknown)}, expected one of {', '.join(self.settings)}")
        given = {name: values.get(name, setting.default) for name, setting in self.settings.items()}
        return EditSettings(**{name: self.settings[name].check(value) for name, value in given.items()})

    def _request(self, scene: Path, hole_mask: Path, exemplar: Path | None, settings: EditSettings) -> EditRequest:
        if exemplar is None and not self.editor.model.reads_text:
            raise UserError("no exemplar yet; this model needs one")
        if exemplar is not None and not self.editor.model.reads_exemplars:
            raise UserError("got an exemplar, and this model reads text only; leave it out")
        self.touch((scene, hole_mask, exemplar))
        image = self.open_upload(scene, open_upright)
        reference = exemplar and self.open_upload(exemplar, open_upright)
        hole = self.open_upload(hole_mask, as_hole)
        if abs(hole.width * image.height - hole.height * image.width) > sum(image.size):  # beyond rounding
            sizes = f"{hole.width} x {hole.height}, the scene {image.width} x {image.height}"
            raise UserError(f"the mask is {sizes}; give a mask of the scene's size")
        if hole.size != image.size:  # drawn on a smaller copy of a large scene
            hole = hole.resize(image.size, Image.Resampling.NEAREST)
        return make_request(image, reference, settings, mask=hole)

    def touch(self, files: Iterable[str | Path | None]) -> None:
        """Restart the age of uploads that a request waits for."""
        for file in files:
            if file and Path(file).is_relative_to(self.folder):
                with suppress(OSError):  # gone; opening it says so
                    os.utime(file)

    def open_upload(self, path: str | Path, reader: Callable[[Path], Image.Image] = open_image) -> Image.Image:
        """Read an uploaded image, whose format is recognised by its content.

        Raises:
            UserError: the file is not a PNG, JPEG or WebP image, has too many pixels, is damaged, or is gone. The
                message names the file without its folder.
        """
        path = Path(path)
        if not path.is_file():
            kept = f"{self.limits.keep_seconds // 60} minutes"
            raise UserError(f"{path.name}: no longer here, files are kept for {kept}; upload or make it again")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
                with Image.open(path, formats=FORMATS) as header:  # reads no pixels
                    width, height = header.size
        except Image.DecompressionBombError:
            raise UserError(f"{path.name}: far too many pixels; reduce its size first") from None
        except (OSError, ValueError, SyntaxError, EOFError):  # what Pillow's readers raise for damaged headers
            raise UserError(f"{path.name}: not an image that can be read here; save it as PNG or JPEG") from None
        longest = self.limits.longest_side
        if width * height > self.limits.pixels or max(width, height) > longest:
            most = f"{self.limits.pixels / 1e6:g} million pixels, and the long side at most {longest}"
            raise UserError(f"{path.name}: {width} x {height}, expected at most {most}; reduce its size first")
        try:
            return reader(path)
        except ValueError as error:
            raise UserError(str(error).replace(str(path), path.name)) from None

    def _paint(
        self, request: EditRequest, steps: SimpleQueue[Progress | None], cancelled: threading.Event
    ) -> list[Image.Image]:
        began = time.monotonic()
        next_preview, preview = began, None

        def on_step(step: int, num_steps: int, _x_t: Tensor, x_0: Tensor) -> None:
            nonlocal next_preview, preview
            now = time.monotonic()
            if cancelled.is_set():
                raise Cancelled
            if now - began > self.limits.seconds:
                raise UserError(
                    f"stopped at step {step} of {num_steps}: longer than the limit of {self.limits.seconds:g} s; "
                    "use fewer steps or candidates"
                )
            if now >= next_preview and self.content_filter is None:
                preview = tensor_to_pil(torch.cat(tuple(self.editor.model.decode_latents(x_0)), dim=-1))  # a row
                done = time.monotonic()
                next_preview = done + (done - now) * (1 / PREVIEW_SHARE - 1)
            steps.put(Progress(step, num_steps, preview))

        return self.editor.edit_request(request, on_step=on_step)

    def _save(self, results: list[Image.Image], request: EditRequest, files: tuple[Path, Path, Path | None]) -> Edited:
        made = list(zip(request.settings.seeds, results, strict=True))
        if self.content_filter is not None:
            reasons = unsafe_reasons(self.content_filter, results, request.hole)
            made = [item for item, reason in zip(made, reasons, strict=True) if reason is None]
            if not made:
                raise UserError(f"withheld: {reasons[0]}; another seed or exemplar may pass")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        names = image, mask, reference = call_names(*files)
        record = request.settings.record() | {
            "version": __version__,
            "image": image,
            "mask": mask,
            "reference": reference,
            "checkpoint": str(self.checkpoint or "bundled"),
            "checkpoint_sha256": self._digest.result(),
            "config": str(self.config or "beside the checkpoint"),
            "decoder": self.decoder and str(self.decoder),
            "safety": self.safety,
            "watermark": self.watermark,
            "device": self.editor.device.type,
            "precision": str(self.editor.model.weight_dtype).removeprefix("torch."),
        }
        written = []
        for seed, result in made:
            marked = add_watermark(result, self.watermark) if self.watermark else result
            written.append(folder / f"{Path(image).stem}_{seed}.png")
            save_png(marked, written[-1], {"parameters": json.dumps(record | {"seed": seed})})
        save_png(request.hole, folder / "mask.png")
        python, shell = self._python_call(names, request.settings), self._shell_call(names, request.settings)
        return Edited(written, folder / "mask.png", python, shell, len(results) - len(made))

    def _python_call(self, files: tuple[str, str, str | None], settings: EditSettings) -> str:
        """Return the edit as a Python program, for a folder with the files under these names (`call_names`)."""
        device, dtype = self.editor.device.type, self.editor.model.weight_dtype
        source = {"config": self.config, "decoder": self.decoder, "device": device if device != "cpu" else None}
        arguments = [repr(str(self.checkpoint)) if self.checkpoint else "None"]
        arguments += [f"{name}={str(value)!r}" for name, value in source.items() if value]
        imports = ["from ldm import Editor"]
        if dtype != torch.float32:
            arguments.append(f"dtype={dtype}")
            imports = ["import torch", "", *imports]
        image = "image"
        if self.watermark:
            imports.append("from ldm.editing.watermark import add_watermark")
            image = f"add_watermark(image, {self.watermark!r})"
        keywords = settings.changed() | {"seed": settings.seeds}  # a list of seeds makes a list of results
        lines = [
            *imports,
            "",
            f"editor = Editor.from_pretrained({', '.join(arguments)})",
            "images = editor.edit(",
            f"    {', '.join(repr(file) for file in files if file)},",
            *(f"    {name}={value!r}," for name, value in keywords.items() if name != "n_samples"),
            ")",
            f"for seed, image in zip({settings.seeds}, images):",
            f'    {image}.save(f"result_{{seed}}.png")',
        ]
        return "\n".join(lines) + "\n"

    def _shell_call(self, files: tuple[str, str, str | None], settings: EditSettings) -> str:
        """Return the edit as a shell command, for a folder with the files under these names (`call_names`)."""
        dtype = self.editor.model.weight_dtype
        precision = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        image, mask, reference = files
        options = {
            "--image": image,
            "--mask": mask,
            "--reference": reference,
            "--checkpoint": self.checkpoint,
            "--config": self.config,
            "--decoder": self.decoder,
            "--device": self.editor.device.type,
            "--precision": precision,
            "--watermark": self.watermark,
        }
        words = ["python", "inference.py"]
        words += [str(word) for option, value in options.items() if value for word in (option, value)]
        if self.safety:
            words += ["--safety"] if self.safety == OPEN_NSFW else ["--safety", self.safety]
        return shlex.join(words + settings.cli_words())

    def sweep(self, spared: Collection[Path] = ()) -> None:
        """Remove files that were not used for `keep_seconds`, and folders that have been empty for as long."""
        oldest = time.time() - self.limits.keep_seconds
        for parent, folders, files in os.walk(self.folder, topdown=False):
            for path in (Path(parent, name) for name in (*files, *folders)):
                with suppress(OSError):  # a folder that is not empty, or gone meanwhile
                    if path not in spared and path.stat().st_mtime < oldest:
                        path.rmdir() if path.is_dir() else path.unlink()


def call_names(scene: Path, hole_mask: Path, exemplar: Path | None) -> tuple[str, str, str | None]:
    """Return the file names in the calls as text: the uploads' own, or scene, mask and exemplar if they clash.

    Browsers call every pasted image image.png. A name that begins with a hyphen would be taken for an option.
    """
    files = (scene, hole_mask, exemplar)
    given = {file for file in files if file}
    own = {file.name.casefold() for file in given}
    is_unclear = len(own) < len(given) or any(name.startswith("-") for name in own)
    image, mask, reference = (
        file and (f"{part}{file.suffix}" if is_unclear else file.name)
        for part, file in zip(EXAMPLE_PARTS, files, strict=True)
    )
    assert image and mask
    return image, mask, reference
