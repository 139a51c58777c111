"""Many edits in one go: rows of a table, batched on the device, read and written in the background.

A row that fails is reported and the others go on. Finished results are skipped when the work is started again.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.editing.editor import Editor, FittedScene, as_rgb, fit_scene, given_hole, prepare_exemplar, save_png
from ldm.editing.safety import ContentFilter, unsafe_reasons
from ldm.editing.watermark import add_watermark
from ldm.files import UserError, write_text
from ldm.images import find_images

FILES = ("scene", "mask", "reference", "reference_mask")  # of a row, relative to the table's folder
SAMPLING = ("sampler", "num_steps", "guidance_scale", "eta", "negative_prompt")  # rows that differ share no batch


@dataclass(frozen=True)
class Job:
    """One edit: what a row says, with the defaults of the whole work where it says nothing.

    Attributes:
        name: of the result, NAME.png; unique.
        scene, reference: files.
        mask, box, polygon: the hole, one of them; none is the scene's transparent part.
        prompt, negative_prompt: as for `Editor.edit`.
        seed: of the noise.
        grow, shape, reference_mask, reference_background, reference_fit: as for `given_hole` and `prepare_exemplar`.
        crop_margin, feather, match_colors, sampler, num_steps, guidance_scale, eta: as for `Editor.edit`.
    """

    name: str
    scene: str
    reference: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    mask: str | None = None
    box: str | None = None
    polygon: str | None = None
    seed: int = 0
    grow: int = 0
    shape: str = "given"
    reference_mask: str | None = None
    reference_background: str = "keep"
    reference_fit: str = "squash"
    crop_margin: float | None = None
    feather: int | None = None
    match_colors: bool = True
    sampler: str = "dpm_solver_pp"
    num_steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 0.0

    @property
    def given(self) -> tuple[bool, bool]:
        """Whether there is an exemplar, and a prompt."""
        return self.reference is not None, self.prompt is not None

    @property
    def sampling(self) -> dict[str, Any]:
        """What the rows of a batch have in common."""
        return {name: getattr(self, name) for name in SAMPLING}


def read_jobs(path: Path, defaults: Mapping[str, Any]) -> list[Job]:
    """The rows of a table.

    Args:
        path: .csv with a header, or .jsonl with an object per line; keys are those of `Job`. Without `name` a result is
            called after its scene and its row. Files are relative to the table's folder.
        defaults: of keys that a row leaves out.

    Raises:
        UserError: the table is missing, damaged or empty, or a row has an unknown key, a wrong value or a name twice.
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
    jobs = [_job(row, f"{path}, row {number}", number, path.parent, defaults) for number, row in enumerate(rows, 1)]
    return _unique(jobs, str(path))


def match_folders(scenes: Path, masks: Path, references: Path, defaults: Mapping[str, Any]) -> list[Job]:
    """A job for every picture of `scenes`, with the mask and the exemplar of the same stem.

    Args:
        masks, references: folders; `references` may be a single file for all.

    Raises:
        UserError: a picture lacks its mask or exemplar.
    """
    jobs = []
    for scene in find_images(scenes):
        found = {"mask": _of_stem(masks, scene), "reference": _of_stem(references, scene)}
        row = {"name": scene.stem, "scene": str(scene), **found}
        jobs.append(_job(row, str(scene), 0, Path(), defaults))
    return _unique(jobs, str(scenes))


def _of_stem(folder: Path, scene: Path) -> str:
    if folder.is_file():
        return str(folder)
    found = [path for path in find_images(folder) if path.stem == scene.stem]
    if len(found) != 1:
        raise UserError(f"{folder}: holds {len(found)} pictures called {scene.stem}, expected one for {scene}")
    return str(found[0])


def _job(row: Any, where: str, number: int, folder: Path, defaults: Mapping[str, Any]) -> Job:
    known = {f.name for f in fields(Job)}
    if not isinstance(row, dict) or set(row) - known:
        extra = ", ".join(sorted(map(str, set(row) - known))) if isinstance(row, dict) else repr(row)
        raise UserError(f"{where}: got {extra}, expected some of {', '.join(sorted(known))}")
    values = {**defaults, **row}
    if not row.get("scene") or not (values.get("reference") or values.get("prompt") is not None):
        raise UserError(f"{where}: lacks {'reference or prompt' if row.get('scene') else 'scene'}")
    values.setdefault("name", f"{number:06d}_{Path(str(row['scene'])).stem}")
    hints = get_type_hints(Job)
    for key, value in values.items():
        values[key] = _typed(value, hints[key], f"{where}: {key}")
    for key in FILES:
        if values.get(key):
            values[key] = str(folder / values[key])
    return Job(**values)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Text of a CSV as the type of its key."""
    if value is None:
        return None
    kind = next(kind for kind in (bool, int, float, str) if kind in (hint, *getattr(hint, "__args__", ())))
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        return kind(value)
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{where}: got {value!r}, expected {kind.__name__}") from None


def _unique(jobs: list[Job], where: str) -> list[Job]:
    seen: set[str] = set()
    for job in jobs:
        if job.name in seen or Path(job.name).name != job.name:
            raise UserError(f"{where}: the name {job.name!r} is there twice or is no file name; give each row its own")
        seen.add(job.name)
    return jobs


@dataclass
class Report:
    """What became of the jobs, by name: done | skipped | failed, and of those that failed the reason."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """A JSON object per job, in no particular order."""
        lines = [{"name": name, "status": "done"} for name in self.done]
        lines += [{"name": name, "status": "skipped"} for name in self.skipped]
        lines += [{"name": name, "status": "failed", "reason": reason} for name, reason in self.failed.items()]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


@dataclass(frozen=True)
class _Prepared:
    job: Job
    fitted: FittedScene
    pixel_values: Tensor | None


def run_jobs(
    editor: Editor,
    jobs: Sequence[Job],
    outdir: Path,
    *,
    batch_size: int = 4,
    workers: int = 2,
    about: Mapping[str, Any],
    content_filter: ContentFilter | None = None,
    watermark: str | None = None,
) -> Report:
    """Edit every job that has no result yet.

    At most a few batches are in memory, whatever the number of jobs.

    Args:
        outdir: gets NAME.png, with the job and `about` in its metadata.
        batch_size: jobs that are painted together, scenes of any sizes.
        workers: threads that read pictures, and as many that write them.
        about: what else decides the pictures (model, precision): a result made with another one is made again.
        content_filter: results that it flags are not written; their jobs count as failed.
        watermark: text that results are marked with, `provenance.add_watermark`.

    Raises:
        OSError: a result can't be written.
    """
    report = Report()
    about = {**about, "watermark": watermark} if watermark else about
    jobs = sorted(jobs, key=lambda job: (job.given, [repr(value) for value in job.sampling.values()]))

    def read(job: Job) -> _Prepared | None:
        return None if _is_result(outdir, job, about) else _prepare(editor, job)

    with (
        ThreadPoolExecutor(workers) as readers,
        ThreadPoolExecutor(workers) as writers,
        tqdm(total=len(jobs), desc="editing", unit="picture", disable=None) as bar,
    ):
        writing: list[tuple[Job, Future[None]]] = []

        def finish_first() -> None:
            job, future = writing.pop(0)
            try:
                future.result()
                report.done.append(job.name)
            except ValueError as error:  # withheld, or too small for its mark
                report.failed[job.name] = str(error)

        prepared = _ahead(readers, read, jobs, 2 * batch_size, report, bar)
        for batch in _batches(prepared, batch_size):
            bar.update(len(batch))
            try:
                painted = _paint(editor, batch)
            except ValueError as error:  # of the sampling settings, which are those of all of them
                report.failed |= {item.job.name: str(error) for item in batch}
                continue
            for item, pixels in zip(batch, painted, strict=True):
                finishing = writers.submit(_finish, item, pixels, outdir, about, content_filter, watermark)
                writing.append((item.job, finishing))
            while len(writing) > 2 * batch_size:
                finish_first()
        while writing:
            finish_first()
    return report


def _ahead(
    readers: ThreadPoolExecutor,
    read: Callable[[Job], _Prepared | None],
    jobs: Sequence[Job],
    ahead: int,
    report: Report,
    bar: tqdm[Any],
) -> Iterator[_Prepared]:
    """Jobs as the model takes them, so many read in advance; the report gets what is there or can't be read."""
    pending = [(job, readers.submit(read, job)) for job in jobs[:ahead]]
    for following in (*jobs[ahead:], *[None] * len(pending)):
        job, future = pending.pop(0)
        if following is not None:
            pending.append((following, readers.submit(read, following)))
        try:
            prepared = future.result()
        except (ValueError, OSError) as error:
            report.failed[job.name] = str(error)
            prepared = None
        else:
            if prepared is None:
                report.skipped.append(job.name)
        if prepared is None:
            bar.update()
        else:
            yield prepared


def _prepare(editor: Editor, job: Job) -> _Prepared:
    config = editor.model.config
    if (job.feather or 0) < 0 or not 0 <= (job.crop_margin or 0) < math.inf or job.grow < 0:
        raise UserError(
            f"got feather={job.feather}, crop_margin={job.crop_margin}, grow={job.grow}, expected 0 or more"
        )
    scene = as_rgb(job.scene)
    hole = given_hole(
        job.scene,
        scene.size,
        mask=job.mask,
        boxes=[_numbers(job.box)] if job.box else [],
        polygons=[_numbers(job.polygon)] if job.polygon else [],
        grow=job.grow,
        shape=job.shape,
        seed=job.seed,
    )
    margin = config.crop_margin if job.crop_margin is None else job.crop_margin
    pixel_values = None
    if job.reference:
        exemplar = prepare_exemplar(
            job.reference, job.reference_mask, background=job.reference_background, fit=job.reference_fit
        )
        pixel_values = editor.exemplar_tensor(exemplar)
    return _Prepared(job, fit_scene(scene, hole, config.image_size, crop_margin=margin), pixel_values)


def _numbers(text: str) -> list[float]:
    """`1,2 3,4`, or the lists of JSON, as numbers."""
    try:
        return [float(word) for word in text.translate(str.maketrans(",[]", "   ")).split()]
    except ValueError:
        raise UserError(f"got {text!r}, expected numbers with commas or spaces between them") from None


def _batches(prepared: Iterable[_Prepared], size: int) -> Iterator[list[_Prepared]]:
    for _, group in groupby(prepared, key=lambda item: (*item.job.given, *item.job.sampling.values())):
        batch: list[_Prepared] = []
        for item in group:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def _paint(editor: Editor, batch: Sequence[_Prepared]) -> Tensor:
    exemplars = [item.pixel_values for item in batch if item.pixel_values is not None]
    prompts = [item.job.prompt for item in batch if item.job.prompt is not None]
    return editor.paint(
        torch.cat([item.fitted.image for item in batch]),
        torch.cat([item.fitted.keep_mask for item in batch]),
        torch.cat(exemplars) if exemplars else None,
        [item.job.seed for item in batch],
        prompts=prompts or None,
        **batch[0].job.sampling,
    )


def _finish(
    item: _Prepared,
    pixels: Tensor,
    outdir: Path,
    about: Mapping[str, Any],
    content_filter: ContentFilter | None,
    watermark: str | None,
) -> None:
    job = item.job
    result = item.fitted.put_back(pixels, feather=job.feather, match_colors=job.match_colors)
    if content_filter is not None:
        (reason,) = unsafe_reasons(content_filter, [result], item.fitted.hole)
        if reason:
            raise UserError(f"withheld: {reason}")
    if watermark:
        result = add_watermark(result, watermark)
    save_png(result, outdir / f"{job.name}.png", {"parameters": _parameters(job, about)})


def _parameters(job: Job, about: Mapping[str, Any]) -> str:
    return json.dumps({**vars(job), **about}, sort_keys=True)


def _is_result(outdir: Path, job: Job, about: Mapping[str, Any]) -> bool:
    """Whether a job's result is there, whole, and made with the same settings."""
    try:
        with Image.open(outdir / f"{job.name}.png") as picture:
            picture.load()
            return picture.info.get("parameters") == _parameters(job, about)
    except (OSError, ValueError, SyntaxError):
        return False
