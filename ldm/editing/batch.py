"""Many edits in one go: batched on the device, read and written in the background, resumed where they stopped.

Tables, folders and the benchmark all become lists of `Job`. A job that fails is reported and the others go on. Results
that are present, whole and made with the same settings are skipped.
"""

import csv
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.editing.editor import Editor, NotFiniteError
from ldm.editing.geometry import FittedScene
from ldm.editing.progress import moving_bar
from ldm.editing.request import EditRequest, make_request
from ldm.editing.safety import ContentFilter, unsafe_reasons
from ldm.editing.settings import COLUMNS, EditSettings, numbers, settings_from
from ldm.editing.watermark import add_watermark
from ldm.files import UserError, write_text
from ldm.images import find_images, save_png

FILES = ("scene", "mask", "reference", "reference_mask")  # columns with files, relative to the table's folder
OUTLINES = ("box", "polygon")
DEFAULT_SETTINGS = EditSettings()

# An edit without a model, such as pasting the exemplar.
Baseline = Callable[[EditRequest], Image.Image]


@dataclass(frozen=True)
class Job:
    """One edit of many; `make_request` explains its files."""

    name: str  # unique; the result is NAME.png
    scene: str
    reference: str | None = None
    settings: EditSettings = DEFAULT_SETTINGS  # of one sample; components of the hole are edited together
    mask: str | None = None
    box: tuple[float, ...] = ()  # the hole, instead of a mask
    polygon: tuple[float, ...] = ()  # likewise
    reference_mask: str | None = None

    def request(self) -> EditRequest:
        """Read the files."""
        hole: dict[str, Any] = {"mask": self.mask, "boxes": [self.box] * bool(self.box)}
        hole["polygons"] = [self.polygon] * bool(self.polygon)
        return make_request(self.scene, self.reference, self.settings, **hole, reference_mask=self.reference_mask)

    @property
    def group(self) -> tuple[Any, ...]:
        """What the jobs of one batch have in common."""
        return self.reference is not None, self.settings.prompt is not None, *self.settings.sampling.values()

    def parameters(self, metadata: Mapping[str, Any]) -> str:
        """Return the text in the result's metadata: job, settings and `metadata` as JSON."""
        columns = {name: value for name, value in vars(self).items() if name != "settings"}
        return json.dumps({**columns, **self.settings.record(), **metadata}, sort_keys=True)


def read_jobs(path: Path, base: EditSettings = DEFAULT_SETTINGS) -> list[Job]:
    """Read a table of jobs.

    Args:
        path: .csv with a header, or .jsonl with an object per line. Columns are the fields of `Job`, and settings in
            any spelling of the command line. Without `name` a result is called after its row and scene. Files are
            relative to the table's folder.
        base: settings that a row leaves out.

    Raises:
        UserError: the table is missing, damaged or empty, or a row has an unknown column, a wrong value or a used name.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            if path.suffix.lower() == ".csv":
                rows = [{key: text for key, text in row.items() if text} for row in csv.DictReader(file)]
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable table ({error}); expected CSV with a header, or JSON lines") from error
    if not rows:
        raise UserError(f"{path}: holds no rows")
    jobs = []
    for number, row in enumerate(rows, 1):
        try:
            jobs.append(_job(row, number, path.parent, base))
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
    return _check_names(jobs, path)


def match_folders(scenes: Path, masks: Path, references: Path, base: EditSettings = DEFAULT_SETTINGS) -> list[Job]:
    """Make a job with the settings `base` of every image in `scenes`, with the mask and exemplar of the same stem.

    `references` may be a single file for all. Raises UserError if an image lacks its mask or exemplar.
    """

    def of_stem(folder: Path, scene: Path) -> str:
        if folder.is_file():
            return str(folder)
        found = [path for path in find_images(folder) if path.stem == scene.stem]
        if len(found) != 1:
            raise UserError(f"{folder}: holds {len(found)} images called {scene.stem}, expected one for {scene}")
        return str(found[0])

    found = find_images(scenes)
    jobs = [Job(scene.stem, str(scene), of_stem(references, scene), base, of_stem(masks, scene)) for scene in found]
    return _check_names(jobs, scenes)


def _job(row: Any, number: int, folder: Path, base: EditSettings) -> Job:
    known = {"name", *FILES, *OUTLINES, *COLUMNS}
    unknown = row.keys() - known if isinstance(row, dict) else {row}
    if unknown:
        raise UserError(f"got {', '.join(sorted(map(str, unknown)))}, expected some of {', '.join(sorted(known))}")
    row = {key: value for key, value in row.items() if value is not None}
    files = {key: str(folder / str(row.pop(key))) for key in FILES if key in row}
    box, polygon = (numbers(str(row.pop(key, ""))) for key in OUTLINES)
    name = str(row.pop("name", "")) or f"{number:06d}_{Path(files.get('scene', '')).stem}"
    settings = settings_from(row, base)
    if not settings.is_single or settings.per_component:
        raise UserError("several samples, seeds or components are not for tables; give each its row")
    if "scene" not in files or ("reference" not in files and settings.prompt is None):
        raise UserError(f"lacks {'reference or prompt' if 'scene' in files else 'scene'}")
    return Job(name=name, settings=settings, box=box, polygon=polygon, **files)


def _check_names(jobs: list[Job], where: Path) -> list[Job]:
    seen: set[str] = set()
    for job in jobs:
        if job.name in seen or Path(job.name).name != job.name:
            raise UserError(f"{where}: the name {job.name!r} is there twice or is no file name; give each row its own")
        seen.add(job.name)
    return jobs


@dataclass
class Report:
    """The outcome by name: done, skipped, or failed with the reason; and the seconds of painting."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """Write a JSON object per job, in no particular order."""
        lines = [{"name": name, "status": status} for status in ("done", "skipped") for name in getattr(self, status)]
        lines += [{"name": name, "status": "failed", "reason": reason} for name, reason in self.failed.items()]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def process_rank() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def edit_many(editor: Editor | Baseline, jobs: Iterable[Job], outdir: Path, **options: Any) -> Report:
    """Edit every job that has no result yet as OUTDIR/NAME.png; `options` are the other fields of `EditRun`."""
    return EditRun(editor, outdir, **options).edit(jobs)


@dataclass(frozen=True)
class _Item:
    """A job whose files are read; fitted to the model, unless a baseline edits it."""

    job: Job
    request: EditRequest
    fitted: FittedScene | None = None
    pixel_values: Tensor | None = None


@dataclass
class EditRun:
    """Many edits in one go, and their outcome so far.

    Raises:
        UserError: batch_size or workers is less than 1.
        OSError: a result cannot be written.
    """

    editor: Editor | Baseline  # a model's editor, or a function that edits without a model
    outdir: Path  # gets NAME.png, with the job and `metadata` in its metadata
    metadata: Mapping[str, Any]  # what else decides images, e.g. the model: results with other metadata are made again
    batch_size: int = 4  # jobs that are painted together; their scenes may have any sizes
    workers: int = 2  # threads that read images, and as many that write them
    content_filter: ContentFilter | None = None  # results that it flags are not written; their jobs count as failed
    watermark: str | None = None  # text that results are marked with
    on_result: Callable[[Job, Image.Image], None] | None = None  # called by a writer thread before it writes
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        if min(self.batch_size, self.workers) < 1:
            raise UserError(f"got batch_size={self.batch_size}, workers={self.workers}, expected 1 or more")
        if self.watermark:
            self.metadata = {**self.metadata, "watermark": self.watermark}

    def edit(self, jobs: Iterable[Job]) -> Report:
        """Edit every job that has no result yet, with at most a few batches in memory."""
        jobs = sorted(jobs, key=lambda job: [repr(value) for value in job.group])
        writing: deque[Future[None]] = deque()
        with (
            ThreadPoolExecutor(self.workers) as readers,
            ThreadPoolExecutor(self.workers) as writers,
            moving_bar(total=len(jobs), desc="editing", unit="image", disable=None) as bar,
        ):
            for batch in self.batches(readers, jobs, bar):
                pairs = zip(batch, self.paint(batch, bar), strict=False)
                writing.extend(writers.submit(self.finish, *pair) for pair in pairs)
                bar.update(len(batch))
                while len(writing) > 2 * self.batch_size:
                    writing.popleft().result()
            for future in writing:
                future.result()
        failed = self.report.failed
        self.report.failed = {job.name: failed[job.name] for job in jobs if job.name in failed}
        return self.report

    def batches(self, readers: ThreadPoolExecutor, jobs: list[Job], bar: tqdm) -> Iterator[list[_Item]]:
        """Read jobs in the background, two batches ahead, and yield those that are to be painted, by group."""
        size = self.batch_size

        def items() -> Iterator[_Item]:
            waiting, reading = iter(jobs), deque[Future[_Item | None]]()
            while True:
                reading.extend(readers.submit(self.read, job) for job in islice(waiting, 2 * size - len(reading)))
                if not reading:
                    return
                item = reading.popleft().result()
                if item is not None:
                    yield item
                else:
                    bar.update()

        for _, group in groupby(items(), key=lambda item: item.job.group):
            while batch := list(islice(group, size)):
                yield batch

    def read(self, job: Job) -> _Item | None:
        """Read a job's files; None if there is a result, or if they cannot be used."""
        try:
            if self.is_done(job):
                self.report.skipped.append(job.name)
                return None
            request = job.request()
            if not isinstance(self.editor, Editor):
                return _Item(job, request)
            (exemplar,) = request.exemplars
            pixel_values = None if exemplar is None else self.editor.exemplar_tensor(exemplar)
            return _Item(job, request, self.editor.fit(request.scene, request.hole, job.settings), pixel_values)
        except (ValueError, OSError) as error:
            self.report.failed[job.name] = str(error)
            return None

    def is_done(self, job: Job) -> bool:
        """Tell whether a job's result is present, whole, and made with the same settings."""
        try:
            with Image.open(self.outdir / f"{job.name}.png") as image:
                image.load()
                return image.info.get("parameters") == job.parameters(self.metadata)
        except (OSError, ValueError, SyntaxError):
            return False

    def paint(self, batch: Sequence[_Item], bar: tqdm) -> Iterable[Tensor | Image.Image]:
        """Paint a batch: (3, S, S) pixels in [-1, 1] each, whole images from a baseline, nothing if it fails."""
        start, settings = time.perf_counter(), [item.job.settings for item in batch]
        exemplars = [item.pixel_values for item in batch if item.pixel_values is not None]
        prompts = [one.prompt for one in settings if one.prompt is not None]
        try:
            if not isinstance(self.editor, Editor):
                return [self.editor(item.request) for item in batch]
            fits = [item.fitted for item in batch if item.fitted is not None]
            return self.editor.paint(
                torch.cat([fitted.image for fitted in fits]),
                torch.cat([fitted.keep_mask for fitted in fits]),
                torch.cat(exemplars) if exemplars else None,
                [one.seeds[0] for one in settings],
                prompts=prompts or None,
                on_phase=bar.set_description,
                on_step=lambda step, num_steps, *_: bar.set_description(f"step {step} of {num_steps}", refresh=False),
                **settings[0].sampling,
            )
        except NotFiniteError as error:
            pairs = zip(batch, error.is_finite, strict=True)
            self.report.failed |= {item.job.name: str(error) for item, is_finite in pairs if not is_finite}
            return error.painted.clamp(-1, 1)
        except ValueError as error:  # e.g. more steps than the model has timesteps: true of the whole batch
            self.report.failed |= {item.job.name: str(error) for item in batch}
            return []
        finally:
            self.report.seconds += time.perf_counter() - start

    def finish(self, item: _Item, painted: Tensor | Image.Image) -> None:
        """Put a painted square back, judge it, mark it and write it."""
        name, result = item.job.name, painted
        if name in self.report.failed:  # in painting
            return
        if not isinstance(result, Image.Image):
            assert item.fitted is not None
            result = item.fitted.put_back(result, **item.job.settings.pasting)
        try:
            (reason,) = unsafe_reasons(self.content_filter, [result], item.request.hole)
            if reason:
                raise UserError(f"withheld: {reason}")
            result = add_watermark(result, self.watermark)
        except UserError as error:  # withheld, or too small for its watermark
            self.report.failed[name] = str(error)
            return
        if self.on_result is not None:
            self.on_result(item.job, result)
        # Last: its presence says that the job is done.
        save_png(result, self.outdir / f"{name}.png", {"parameters": item.job.parameters(self.metadata)})
        self.report.done.append(name)
