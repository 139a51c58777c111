"""Many edits in one go: batched on the device, read and written in the background, resumed where they stopped.

Tables, folders and the benchmark all become lists of `Job`. A job that fails is reported and the others go on. Results
that are present, whole and made with the same settings are skipped.
"""

import json
import os
import re
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import compress, groupby, islice
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
from ldm.files import Skipped, UserError, check_writable, claimed, composed, read_table, write_text
from ldm.images import find_images, save_png

FILES = ("scene", "mask", "reference", "reference_mask")  # columns with files, relative to the table's folder
KNOWN = {"name", *FILES, "box", "polygon", *COLUMNS}
LONGEST_NAME = 255 - len(".png")  # bytes, of a result; more than that no usual file system takes
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

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or "\0" in self.name or len(os.fsencode(self.name)) > LONGEST_NAME:
            raise UserError(f"name: got {self.name!r:.80}, expected a file name of at most {LONGEST_NAME} bytes")

    def request(self) -> EditRequest:
        """Read the files."""
        hole: dict[str, Any] = {"mask": self.mask, "boxes": [self.box] * bool(self.box)}
        hole["polygons"] = [self.polygon] * bool(self.polygon)
        return make_request(self.scene, self.reference, self.settings, **hole, reference_mask=self.reference_mask)

    @property
    def files(self) -> list[str]:
        """The names of the files that are read."""
        return [file for name in FILES if (file := getattr(self, name))]

    @property
    def group(self) -> tuple[Any, ...]:
        """What the jobs of one batch have in common."""
        return self.reference is not None, self.settings.prompt is not None, *self.settings.sampling.values()

    def parameters(self, metadata: Mapping[str, Any]) -> str:
        """Return the text in the result's metadata: job, settings and `metadata` as JSON."""
        columns = {name: value for name, value in vars(self).items() if name != "settings"}
        return json.dumps({**columns, **self.settings.record(), **metadata}, sort_keys=True)


@dataclass
class Report:
    """The outcome by name: done, skipped, or failed with the reason; and the seconds of painting."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    strict: bool = False  # the first failure is a UserError

    def fail(self, name: str, reason: object) -> None:
        """Note a failure; an error without a message is called by its type."""
        self.failed[name] = str(reason) or type(reason).__name__
        if self.strict:
            raise UserError(f"{name}: {self.failed[name]}")

    def counts(self) -> Counter[str]:
        """Count the failures by reason, without numbers of rows, paths and values."""
        specific = re.compile(r"^row \d+: |^\S.*[/\\].*?: |got .*?, (?=expected)")
        return Counter(specific.sub("", reason) for reason in self.failed.values())

    def write(self, path: Path, jobs: Iterable[Job] = ()) -> None:
        """Write a JSON object per job, in no particular order; those of `jobs` without an outcome are `waiting`."""
        states = (("waiting", [job.name for job in jobs]), ("skipped", self.skipped), ("done", self.done))
        lines = {name: {"status": status} for status, names in states for name in names}
        lines |= {name: {"status": "failed", "reason": reason} for name, reason in self.failed.items()}
        write_text(path, "".join(json.dumps({"name": name, **line}) + "\n" for name, line in lines.items()))


def read_jobs(
    path: Path, base: EditSettings = DEFAULT_SETTINGS, *, ignore_columns: bool = False, report: Report | None = None
) -> list[Job]:
    """Read a table of jobs, see `read_table`.

    Columns are the fields of `Job`, and settings in any spelling of the command line; those that a row leaves out are
    `base`'s. Without `name` a result is called after its row and scene; it may end in .png. Files are relative to the
    table's folder. Rows that are wrong are failed in `report`; without it the first of them is a UserError, as is a
    table that is damaged or empty, or has an unknown column.
    """
    wrong = report or Report(strict=True)
    rows = read_table(path, report and report.failed)
    if not any(row for _, row in rows):
        raise UserError(", but ".join([f"{path}: holds no rows", *list(wrong.failed.values())[:1]]))
    unknown = sorted({column for _, row in rows for column in row} - KNOWN)
    if unknown and not ignore_columns:
        known = ", ".join(sorted(KNOWN))
        raise UserError(f"{path}: got the column {unknown[0]}, expected some of {known}; or use --ignore-columns")
    jobs: dict[str, Job] = {}
    for number, row in rows:
        row = {key: value for key, value in row.items() if key in KNOWN and value is not None}
        stem = f"{number:06d}_{Path(str(row.get('scene', ''))).stem}".encode(errors="ignore")[:LONGEST_NAME]
        name = re.sub(r"\.png$", "", str(row.pop("name", "")), flags=re.IGNORECASE) or stem.decode(errors="ignore")
        if name in jobs or name in wrong.failed:
            wrong.fail(f"row {number}", f"the name {name!r:.80} is there twice; give each row its own")
            continue
        try:
            files = {key: str(path.parent / str(value)) for key in FILES if (value := row.pop(key, None))}
            box, polygon = (numbers(str(row.pop(key, ""))) for key in ("box", "polygon"))
            settings = settings_from(row, base)
            if not settings.is_single or settings.per_component:
                raise UserError("several samples, seeds or components are not for tables; give each its row")
            if "scene" not in files or ("reference" not in files and settings.prompt is None):
                raise UserError(f"lacks {'reference or prompt' if 'scene' in files else 'scene'}")
            jobs[name] = Job(name=name, settings=settings, box=box, polygon=polygon, **files)
        except ValueError as error:
            wrong.fail(name, f"row {number}: {error}")
    return list(jobs.values())


def match_folders(
    scenes: Path,
    masks: Path,
    references: Path,
    base: EditSettings = DEFAULT_SETTINGS,
    *,
    apart: Sequence[Path] = (),
    report: Report | None = None,
) -> list[Job]:
    """Make a job with the settings `base` of every image in `scenes`, with the mask and exemplar of the same stem.

    Folders are searched by `find_images`, without those inside that are another argument or in `apart`, such as that of
    the results. Masks and references may be a single file for all. Stems may differ in upper and lower case where no
    other file has them, and the mask of a.jpg may be a.jpg.png. Scenes without exactly one mask and exemplar are failed
    in `report`; without it the first is a UserError, as is a folder without images.
    """
    wrong, folders = report or Report(strict=True), (scenes, masks, references)
    by_stem: dict[Path, dict[str, list[Path]]] = {}
    for folder in folders:
        by_stem[folder] = {}
        names = {composed(path.name).casefold(): stem for stem, paths in by_stem[scenes].items() for path in paths}
        inner = [other for other in (*folders, *apart) if other != folder and other.is_relative_to(folder)]
        for path in [] if folder.is_file() else find_images(folder):
            if not any(path.is_relative_to(other) for other in inner):
                stem = composed(path.stem).casefold()
                by_stem[folder].setdefault(names.get(stem, stem), []).append(path)

    def of_stem(folder: Path, stem: str, scene: Path) -> str:
        if folder.is_file():
            return str(folder)
        alike = by_stem[folder].get(stem, [])
        found = [path for path in alike if path.stem == scene.stem] or alike * (len(by_stem[scenes][stem]) == 1)
        if len(found) != 1:
            names = " and ".join(path.relative_to(folder).as_posix() for path in found) or "no images"
            raise UserError(f"{names} in {folder} have its stem, expected one")
        return str(found[0])

    jobs = []
    for scene, stem in sorted((scene, stem) for stem, paths in by_stem[scenes].items() for scene in paths):
        try:
            _, reference, mask = (of_stem(folder, stem, scene) for folder in (scenes, references, masks))
            jobs.append(Job(scene.stem, str(scene), reference, base, mask))
        except ValueError as error:
            wrong.fail(scene.relative_to(scenes).as_posix(), error)
    for folder in {masks, references} - {scenes}:
        alone = Skipped()
        for stem in sorted(by_stem[folder].keys() - by_stem[scenes].keys()):
            alone.add("without a scene", by_stem[folder][stem][0].relative_to(folder))
        if alone:
            warnings.warn(f"{folder}: passed over {alone}", stacklevel=2)
    return jobs


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
    """Many edits in one go, and their outcome so far; UserError, also where `outdir` cannot be written to."""

    editor: Editor | Baseline  # a model's editor, or a function that edits without a model
    outdir: Path  # gets NAME.png, with the job and `metadata` in its metadata
    metadata: Mapping[str, Any]  # what else decides images, e.g. the model: results with other metadata are made again
    batch_size: int = 4  # jobs that are painted together; their scenes may have any sizes
    workers: int = 2  # threads that read images, and as many that write them
    content_filter: ContentFilter | None = None  # results that it flags are not written; their jobs count as failed
    watermark: str | None = None  # text that results are marked with
    on_result: Callable[[Job, Image.Image], None] | None = None  # called by a writer thread before it writes
    report: Report = field(default_factory=Report)
    present: set[str] = field(init=False)  # names in `outdir` at first; what appears later is another run's
    inputs: set[str] = field(init=False, default_factory=set)  # files that no result may replace

    def __post_init__(self) -> None:
        if min(self.batch_size, self.workers) < 1:
            raise UserError(f"got batch_size={self.batch_size}, workers={self.workers}, expected 1 or more")
        check_writable(self.outdir)
        self.present = set(os.listdir(self.outdir))
        if self.watermark:
            self.metadata = {**self.metadata, "watermark": self.watermark}

    def edit(self, jobs: Iterable[Job]) -> Report:
        """Edit every job that has no result yet, with at most a few batches in memory."""
        jobs = sorted(jobs, key=lambda job: [repr(value) for value in job.group])
        self.inputs = {os.path.realpath(file) for job in jobs for file in job.files}
        writing: deque[Future[None]] = deque()
        with (
            ThreadPoolExecutor(self.workers) as readers,
            ThreadPoolExecutor(self.workers) as writers,
            moving_bar(total=len(jobs), desc="editing", unit="image", disable=None) as bar,
        ):
            for batch in self.batches(readers, jobs, bar):
                writing.extend(writers.submit(self.finish, *pair) for pair in self.paint(batch, bar))
                bar.update(len(batch))
                while len(writing) > 2 * self.batch_size:
                    writing.popleft().result()
            for future in writing:
                future.result()
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

    def path(self, job: Job) -> Path:
        return self.outdir / f"{job.name}.png"

    def read(self, job: Job) -> _Item | None:
        """Read a job's files; None if there is a result, or if they cannot be used."""
        try:
            if self.is_done(job):
                self.report.skipped.append(job.name)
                return None
            if os.path.realpath(self.path(job)) in self.inputs:
                raise UserError(f"{self.path(job)}: is an input, too; choose another --outdir")
            request = job.request()
            if not isinstance(self.editor, Editor):
                return _Item(job, request)
            (exemplar,) = request.exemplars
            pixel_values = None if exemplar is None else self.editor.exemplar_tensor(exemplar)
            return _Item(job, request, self.editor.fit(request.scene, request.hole, job.settings), pixel_values)
        except (ValueError, OSError, ArithmeticError, MemoryError) as error:
            self.report.fail(job.name, error)
            return None

    def is_done(self, job: Job) -> bool:
        """Tell whether a job's result is present, whole, and made with the same settings."""
        try:
            with Image.open(self.path(job)) as image:
                image.load()
                return image.info.get("parameters") == job.parameters(self.metadata)
        except (OSError, ValueError, SyntaxError):
            return False

    def paint(self, batch: Sequence[_Item], bar: tqdm) -> list[tuple[_Item, Tensor | Image.Image]]:
        """Return items with (3, S, S) pixels in [-1, 1], or a baseline's whole image.

        A batch that fails is painted again one by one; items that fail alone are left out.
        """
        start = time.perf_counter()
        try:
            return list(zip(batch, self._paint(batch, bar), strict=True))
        except NotFiniteError as error:
            for item in (item for item, is_finite in zip(batch, error.is_finite, strict=True) if not is_finite):
                self.report.fail(item.job.name, error)
            return list(compress(zip(batch, error.painted.clamp(-1, 1), strict=True), error.is_finite))
        except ValueError as error:
            if len(batch) == 1:
                self.report.fail(batch[0].job.name, error)
                return []
        finally:
            self.report.seconds += time.perf_counter() - start
        return [pair for item in batch for pair in self.paint([item], bar)]

    def _paint(self, batch: Sequence[_Item], bar: tqdm) -> Iterable[Tensor | Image.Image]:
        if not isinstance(self.editor, Editor):
            return [self.editor(item.request) for item in batch]
        settings = [item.job.settings for item in batch]
        fits = [item.fitted for item in batch if item.fitted is not None]
        exemplars = [item.pixel_values for item in batch if item.pixel_values is not None]
        return self.editor.paint(
            torch.cat([fitted.image for fitted in fits]),
            torch.cat([fitted.keep_mask for fitted in fits]),
            torch.cat(exemplars) if exemplars else None,
            [one.seeds[0] for one in settings],
            prompts=[one.prompt for one in settings if one.prompt is not None] or None,
            on_phase=bar.set_description,
            on_step=lambda step, num_steps, *_: bar.set_description(f"step {step} of {num_steps}", refresh=False),
            **settings[0].sampling,
        )

    def finish(self, item: _Item, painted: Tensor | Image.Image) -> None:
        """Put a painted square back, judge it, mark it and write it."""
        job, path, result = item.job, self.path(item.job), painted
        try:
            if not isinstance(result, Image.Image):
                assert item.fitted is not None
                result = item.fitted.put_back(result, **job.settings.pasting)
            (reason,) = unsafe_reasons(self.content_filter, [result], item.request.hole)
            if reason:
                raise UserError(f"withheld: {reason}")
            result = add_watermark(result, self.watermark)
            if self.on_result is not None:
                self.on_result(job, result)
            # Last: its presence says that the job is done.
            with nullcontext() if path.name in self.present else claimed(path):
                save_png(result, path, {"parameters": job.parameters(self.metadata)})
            self.report.done.append(job.name)
        except FileExistsError:
            if self.is_done(job):
                self.report.skipped.append(job.name)
            else:
                self.report.fail(job.name, "another run wrote its result meanwhile; give each run its own --outdir")
        except (ValueError, ArithmeticError, MemoryError, OSError) as error:
            self.report.fail(job.name, error)
            if isinstance(error, OSError):  # the disk is full: the run ends
                raise
