"""An edit that somebody else asks for: settings within bounds, uploads that are checked, limits, the call as text.

Knows nothing of Gradio. Dimension key: B candidates · Z, h, w latents.
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
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import __version__
from ldm.checkpoint.io import sha256_file
from ldm.editing.editor import (
    EXAMPLE_PARTS,
    Editor,
    checkpoint_file,
    is_out_of_memory,
)
from ldm.editing.hole_masks import as_hole
from ldm.editing.request import prepare_exemplar
from ldm.editing.safety import OPEN_NSFW, ContentFilter, unsafe_reasons
from ldm.editing.watermark import add_watermark, check_watermark
from ldm.files import UserError
from ldm.images import open_image, save_png, tensor_to_pil
from ldm.samplers import SAMPLERS

FORMATS = ("PNG", "JPEG", "WEBP")  # of uploads, told by their content
HOLE_PREFIX = "data:image/png;base64,"
LONGEST_PROMPT = 1000  # characters; models read the first 75 or so of its word pieces
PREVIEW_SHARE = 0.1  # of the time, at most, that goes into decoding unfinished pictures
AUTOMATIC = -1  # of the feather, for controls that cannot be empty; None everywhere else
EXEMPLAR_LOOK = {"reference_background": "background", "reference_fit": "fit"}  # keywords of `prepare_exemplar`

Value = str | int | float | bool


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        pixels: of an uploaded picture.
        megabytes: of an uploaded file.
        seconds: from the model's beginning to its last step; looked at after each step.
        samples: candidates of one edit.
        waiting: requests in the queue; further ones are turned away.
        keep_seconds: how long files that nobody uses stay on the server; more than the longest wait.
    """

    pixels: int = 30_000_000
    megabytes: int = 40
    seconds: float = 300
    samples: int = 8
    waiting: int = 16
    keep_seconds: int = 5400


@dataclass(frozen=True)
class Setting:
    """A setting of an edit: page, API, checks, metadata and the call as text all come from this line.

    Attributes:
        name: the keyword of `Editor.edit`; for EXEMPLAR_LOOK, of the API alone.
        option: the option of inference.py; of one that is true or false, --no-… says the contrary of what is usual.
        label: on the page.
        default: its type is the setting's.
        choices: the words allowed; none: any text of up to `high` characters.
        low, high: bounds of a number, both included.
        step: between two values of a slider; 0 shows a field instead.
        info: a few words of help.
    """

    name: str
    option: str
    label: str
    default: Value
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    step: float = 0
    info: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is to be written, not chosen."""
        return isinstance(self.default, str) and not self.choices

    def check(self, value: Any) -> Value:
        """The value in the setting's type.

        Raises:
            UserError: it is of another type or out of bounds.
        """
        if isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
            raise UserError(f"{self.name}: got {value!r:.80}, expected true or false")
        if self.is_text:
            if isinstance(value, str) and len(value) <= self.high:
                return value
            got = f"{len(value)} characters" if isinstance(value, str) else f"{value!r:.80}"
            raise UserError(f"{self.name}: got {got}, expected a text of at most {self.high:g}")
        if isinstance(self.default, str):
            if isinstance(value, str) and value in self.choices:
                return value
            raise UserError(f"{self.name}: got {value!r:.80}, expected one of {', '.join(self.choices)}")
        kind = type(self.default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and self.low <= value <= self.high and kind(value) == value:
            return kind(value)
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{self.name}: got {value!r:.80}, expected {what} from {self.low:g} to {self.high:g}")


def offered_settings(
    crop_margin: float, samples: int, *, with_text: bool = False, with_exemplars: bool = True
) -> dict[str, Setting]:
    """The settings of an edit by name, in the page's order.

    Args:
        crop_margin: the model's own, the default.
        samples: most candidates of one edit.
        with_text: whether the model reads prompts; with_exemplars: whether it reads exemplars.
    """
    steps, largest = "more is slower and finer", 2**31 - 1
    texts = (
        Setting("prompt", "--prompt", "Prompt", "", high=LONGEST_PROMPT, info="what to paint"),
        Setting("negative_prompt", "--negative-prompt", "Negative prompt", "", high=LONGEST_PROMPT, info="what not"),
    )
    looks = (
        Setting("reference_background", "--reference-background", "Exemplar's background", "keep",
                choices=("keep", "grey"), info="of a cut-out"),
        Setting("reference_fit", "--reference-fit", "Exemplar's fit", "squash", choices=("squash", "pad"),
                info="to the square that the model reads"),
    )  # fmt: skip
    settings = (
        *(texts if with_text else ()),
        Setting("n_samples", "--n-samples", "Candidates", min(2, samples), low=1, high=samples, step=1),
        Setting("seed", "--seed", "Seed", 0, low=0, high=largest, info="of the first candidate; the next adds 1"),
        Setting("num_steps", "--steps", "Steps", 20, low=1, high=250, step=1, info=steps),
        Setting("guidance_scale", "--guidance-scale", "Guidance scale", 5.0, low=1, high=15, step=0.5),
        Setting("sampler", "--sampler", "Sampler", "dpm_solver_pp", choices=tuple(SAMPLERS)),
        Setting("feather", "--feather", "Feather", AUTOMATIC, low=AUTOMATIC, high=64, step=1,
                info=f"pixels the edge fades over; {AUTOMATIC}: automatic"),
        Setting("match_colors", "--match-colors", "Colour agreement", True, info="at the hole's edge"),
        Setting("crop_margin", "--crop-margin", "Context margin", float(crop_margin), low=0, high=4, step=0.05,
                info="surroundings shown, times the hole's size"),
        Setting("whole_image", "--whole-image", "Whole image", False, info="show the model all of the scene"),
        Setting("separate", "--separate", "Separate parts", False, info="each part of the hole by itself"),
        *(looks if with_exemplars else ()),
    )  # fmt: skip
    return {setting.name: setting for setting in settings}


def edit_keywords(options: Mapping[str, Value | None]) -> dict[str, Any]:
    """Of every setting, those that are keywords of `Editor.edit`; what is automatic is left out."""
    return {name: value for name, value in options.items() if name not in EXEMPLAR_LOOK and value is not None}


def look(options: Mapping[str, Value | None]) -> dict[str, Any]:
    """Of every setting, those that are keywords of `prepare_exemplar`."""
    return {keyword: options[name] for name, keyword in EXEMPLAR_LOOK.items()}


def call_names(scene: Path, hole_mask: Path, exemplar: Path | None) -> tuple[str, str, str | None]:
    """The names under which the calls know the files: their own, or the parts' where two have the same.

    Browsers call every picture that is pasted image.png. A name that begins with a hyphen would be taken for an option.
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


@dataclass(frozen=True)
class Progress:
    """An unfinished edit: so many of its steps, and the crops around the hole, in a row, when last decoded."""

    step: int
    num_steps: int
    preview: Image.Image | None


@dataclass(frozen=True)
class Edited:
    """A finished edit: PNG files with their settings inside, the hole in the scene's size, the calls that repeat it.

    Candidates that the content filter flags have no file; there are `num_withheld` of them.
    """

    files: list[Path]
    hole_mask: Path
    python: str
    shell: str
    num_withheld: int = 0


class Cancelled(Exception):
    """Nobody waits for the edit any more."""


class EditService:
    """One model for all who ask; one edit at a time.

    Args:
        editor: with the model.
        folder: for files of its own and uploads; who made it removes it.
        limits: of each request.
        checkpoint, config, decoder: where the model came from, for the calls as text; None is the bundled one, the
            config beside it, its own decoder.
        safety: name of the filter, for the calls as text; content_filter: what it flags is shown to nobody, and neither
            is any unfinished picture.
        watermark: text that results are marked with; None leaves them as they are.

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
        self.settings = offered_settings(
            editor.model.config.crop_margin,
            self.limits.samples,
            with_text=editor.model.reads_text,
            with_exemplars=editor.model.reads_exemplars,
        )
        # One worker: an edit that was cancelled ends its step before the next one begins.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edit")
        # Beside the first edit: it takes seconds for a large file.
        self._digest = ThreadPoolExecutor(1).submit(lambda: sha256_file(checkpoint_file(checkpoint)))

    def open_upload(self, path: str | Path, reader: Callable[[Path], Image.Image] = open_image) -> Image.Image:
        """Read an uploaded picture; what it is, its content says and not its name.

        Raises:
            UserError: not a PNG, JPEG or WebP picture, too many pixels, damaged, or gone. Names the file
                without its folder.
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
        except (OSError, ValueError, SyntaxError, EOFError):
            raise UserError(f"{path.name}: not a picture that can be read here; save it as PNG or JPEG") from None
        # The square around a hole can be as long as the scene on both sides: a long strip would cost its square.
        if max(width * height, max(width, height) ** 2 // 4) > self.limits.pixels:
            most = f"{self.limits.pixels / 1e6:g} million pixels, and the long side at most {self.longest_side}"
            raise UserError(f"{path.name}: {width} x {height}, expected at most {most}; reduce its size first")
        try:
            return reader(path)
        except ValueError as error:
            raise UserError(str(error).replace(str(path), path.name)) from None

    @property
    def longest_side(self) -> int:
        """Longest side of a picture in pixels."""
        return int(2 * self.limits.pixels**0.5)

    def touch(self, files: Iterable[str | Path | None]) -> None:
        """Let the age of uploads begin anew: somebody waits for what is made of them."""
        for file in files:
            if file and Path(file).is_relative_to(self.folder):
                with suppress(OSError):  # gone; opening it says so
                    os.utime(file)

    def sweep(self, spared: Collection[Path] = ()) -> None:
        """Remove the files that nobody used for long, and folders that have been empty for as long."""
        oldest = time.time() - self.limits.keep_seconds
        for parent, folders, files in os.walk(self.folder, topdown=False):
            for path in (Path(parent, name) for name in (*files, *folders)):
                with suppress(OSError):  # a folder that is not empty, or gone meanwhile
                    if path not in spared and path.stat().st_mtime < oldest:
                        path.rmdir() if path.is_dir() else path.unlink()

    def save_hole(self, drawn: Any) -> Path:
        """Write the hole that a browser drew, a PNG as data URL, to a file.

        Raises:
            UserError: it is not one, or nothing is painted.
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
            scene, hole_mask, exemplar: uploaded files; only models that read text do without an exemplar.
            values: settings by name; those left out have their defaults.

        Yields:
            The progress after each step, and at last the results.

        Raises:
            UserError: a setting is out of bounds, the hole is empty, the exemplar is missing or not for the model,
                it took too long, or all of it is withheld.
            UserError: the scene is too small to be marked.
            UserError: see `open_upload`.
        """
        unknown = values.keys() - self.settings.keys()
        if unknown:
            raise UserError(f"got the setting {min(unknown)}, expected {', '.join(self.settings)}")
        options: dict[str, Value | None] = {
            name: setting.check(values.get(name, setting.default)) for name, setting in self.settings.items()
        }
        if options["feather"] == AUTOMATIC:
            options["feather"] = None
        if exemplar is None and not self.editor.model.reads_text:
            raise UserError("no exemplar yet; this model needs one")
        if exemplar is not None and not self.editor.model.reads_exemplars:
            raise UserError("got an exemplar, and this model reads text only; leave it out")
        self.touch((scene, hole_mask, exemplar))
        picture = self.open_upload(scene)
        shown = None if exemplar is None else self.open_upload(exemplar, partial(prepare_exemplar, **look(options)))
        hole = self.open_upload(hole_mask, reader=as_hole)
        if abs(hole.width * picture.height - hole.height * picture.width) > sum(picture.size):  # beyond rounding
            sizes = f"{hole.width} x {hole.height}, the scene {picture.width} x {picture.height}"
            raise UserError(f"the mask is {sizes}; give a mask of the scene's size")
        if hole.size != picture.size:  # drawn on a smaller copy of a large scene
            hole = hole.resize(picture.size, Image.Resampling.NEAREST)

        if self.watermark:
            check_watermark(picture.size, self.watermark)
        steps, cancelled = SimpleQueue[Progress | None](), threading.Event()
        work = self._worker.submit(self._paint, picture, hole, shown, options, steps, cancelled)
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
        yield self._save(results, hole, (scene, hole_mask, exemplar), options)

    def _paint(
        self,
        scene: Image.Image,
        hole: Image.Image,
        exemplar: Image.Image | None,
        options: Mapping[str, Any],
        steps: SimpleQueue[Progress | None],
        cancelled: threading.Event,
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

        edited = self.editor.edit(scene, hole, exemplar, on_step=on_step, **edit_keywords(options))
        return edited if isinstance(edited, list) else [edited]

    def _save(
        self,
        results: list[Image.Image],
        hole: Image.Image,
        files: tuple[Path, Path, Path | None],
        options: dict[str, Any],
    ) -> Edited:
        made = list(enumerate(results, start=options["seed"]))
        if self.content_filter is not None:
            reasons = unsafe_reasons(self.content_filter, results, hole)
            made = [item for item, reason in zip(made, reasons, strict=True) if reason is None]
            if not made:
                raise UserError(f"withheld: {reasons[0]}; another seed or exemplar may pass")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        names = image, mask, reference = call_names(*files)
        record = options | {
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
            result = add_watermark(result, self.watermark) if self.watermark else result
            written.append(folder / f"{Path(image).stem}_{seed}.png")
            save_png(result, written[-1], {"parameters": json.dumps(record | {"seed": seed})})
        save_png(hole, folder / "mask.png")
        python, shell = self.calls(names, options)
        return Edited(written, folder / "mask.png", python, shell, len(results) - len(made))

    def calls(self, files: tuple[str, str, str | None], options: Mapping[str, Value | None]) -> tuple[str, str]:
        """The edit as a Python program and as a shell command, for a folder with the files under these names.

        Args:
            files: names of scene, mask and exemplar, where there is one; `call_names`.
            options: every setting, checked.
        """
        arguments = [repr(str(self.checkpoint)) if self.checkpoint else "None"]
        arguments += [f"config={str(self.config)!r}"] if self.config else []
        arguments += [f"decoder={str(self.decoder)!r}"] if self.decoder else []
        device, dtype = self.editor.device.type, self.editor.model.weight_dtype
        arguments += [] if device == "cpu" else [f"device={device!r}"]
        arguments += [] if dtype == torch.float32 else [f"dtype={dtype}"]
        keywords = "".join(f"    {name}={value!r},\n" for name, value in edit_keywords(options).items())
        given = [repr(file) for file in files if file]
        is_prepared = bool(files[2]) and any(options[name] != self.settings[name].default for name in EXEMPLAR_LOOK)
        if is_prepared:
            given[2] = f"prepare_exemplar({given[2]}, {', '.join(f'{k}={v!r}' for k, v in look(options).items())})"
        python = ("" if dtype == torch.float32 else "import torch\n\n") + "from ldm import Editor\n"
        python += "from ldm.editing.request import prepare_exemplar\n" if is_prepared else ""
        python += "from ldm.editing.watermark import add_watermark\n\n" if self.watermark else "\n"
        mark = f"add_watermark({{}}, {self.watermark!r})" if self.watermark else "{}"
        python += f"editor = Editor.from_pretrained({', '.join(arguments)})\n"
        python += f"edited = editor.edit(\n    {', '.join(given)},\n{keywords})\n"
        if options["n_samples"] == 1:
            python += f'{mark.format("edited")}.save("result_{options["seed"]}.png")\n'
        else:
            python += f"for seed, picture in enumerate(edited, start={options['seed']}):\n"
            python += f'    {mark.format("picture")}.save(f"result_{{seed}}.png")\n'
        words = ["python", "inference.py"]
        named = zip(("--image", "--mask", "--reference"), files, strict=True)
        words += [word for option, file in named if file for word in (option, file)]
        words += ["--checkpoint", str(self.checkpoint)] if self.checkpoint else []
        words += ["--config", str(self.config)] if self.config else []
        words += ["--decoder", str(self.decoder)] if self.decoder else []
        words += ["--device", device]
        words += ["--precision", "bf16" if dtype == torch.bfloat16 else "fp16"] if dtype != torch.float32 else []
        words += ["--safety"] + ([self.safety] if self.safety != OPEN_NSFW else []) if self.safety else []
        words += ["--watermark", self.watermark] if self.watermark else []
        for name, value in options.items():
            option = self.settings[name].option
            if self.settings[name].is_text:
                words.append(f"{option}={value}")  # in one word: it may begin with a hyphen
            elif not isinstance(value, bool):
                words += [] if value is None else [option, str(value)]
            elif value is not self.settings[name].default:
                words += [option] if value else [option.replace("--", "--no-", 1)]
        return python, shlex.join(words)
