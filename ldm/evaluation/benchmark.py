"""Edit every item of a benchmark: a table of jobs under a protocol, for `ldm.editing.batch`; edits without a model.

OUTDIR/results/ID.png · source/ID_{GT,inpaint,mask,ref}.png · grid/grid-ID.png · settings.json · timing.json
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from ldm.editing.batch import Baseline, Job, Report, edit_many, process_rank
from ldm.editing.editor import DTYPES, Editor, pick_device, weight_hashes
from ldm.editing.hole_masks import hole_box
from ldm.editing.request import EditRequest
from ldm.editing.settings import EditSettings
from ldm.evaluation.cocoee import Bench
from ldm.files import UserError, read_json, write_json
from ldm.images import open_image, save_png

PROTOCOLS = {
    # Yang et al. 2023, section 4.1: the whole scene, and the decoder's whole image.
    "paper": EditSettings(sampler="plms", num_steps=50, guidance_scale=5.0, whole_image=True, paste_back=False),
    "ours": EditSettings(),
}
INPAINT_RADIUS = 3  # pixels, as in OpenCV's examples


@dataclass(frozen=True)
class BenchmarkRun:
    """Edits of the items that have no result yet; a run that was stopped goes on."""

    bench: Bench
    outdir: Path  # gets the images; a folder begun with another method, settings or weights is refused
    method: str = "model"  # one of METHODS
    settings: EditSettings = PROTOCOLS["paper"]  # its seed plus k is the seed of item k; baselines ignore it
    checkpoint: Path | None = None  # of the model, see `Editor.from_pretrained`
    config: Path | None = None
    decoder: Path | None = None
    precision: str = "fp32"  # one of DTYPES
    compile: bool = False  # not recorded: it changes the images up to rounding only
    limit: int | None = None  # only the first so many items
    batch_size: int = 16  # items per forward pass and process
    workers: int = 2  # threads that read, and threads that write, of each process
    device: str = "auto"  # auto | cpu | cuda | mps
    strict: bool = False  # the first item that fails ends the run with a UserError
    has_source: bool = True  # write source/ and grid/ too, as the original does
    prepare: Callable[[], object] | None = None  # called first in every process that is started

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of settings.json, with the weights by their hash."""
        if self.method in BASELINES:
            return {"method": self.method}
        weights = weight_hashes(self.checkpoint, self.decoder)
        return {"method": self.method, **self.settings.record(), "precision": self.precision, **weights}

    def load(self, device: torch.device) -> Editor | Baseline:
        """Load the model, or return the baseline."""
        if self.method in BASELINES:
            return BASELINES[self.method]
        options = {"config": self.config, "decoder": self.decoder, "compile": self.compile}
        return Editor.from_pretrained(self.checkpoint, device=device, dtype=DTYPES[self.precision], **options)

    def edit(self, devices: int = 1) -> dict[str, str]:
        """Edit all items, in one process per device unless torchrun has started them; return failures by id."""
        if min(devices, 1 if self.limit is None else self.limit) < 1:
            raise UserError(f"got devices={devices}, limit={self.limit}, expected 1 or more")
        path, record = self.outdir / "settings.json", self.record
        if not (before := read_json(path, {})):
            write_json(path, record)
        elif changed := sorted(key for key in before.keys() | record.keys() if before.get(key) != record.get(key)):
            got = ", ".join(f"{key}: {before.get(key)} => {record.get(key)}" for key in changed)
            raise UserError(f"{self.outdir}: holds results of other settings ({got}); choose another --outdir")
        if devices == 1 or "RANK" in os.environ:
            return self.edit_share()
        with tempfile.TemporaryDirectory() as folder:
            try:
                spawn(_start, (self, devices, folder), nprocs=devices)
            except ProcessRaisedException as error:
                reason = str(error).strip().splitlines()[-1]
                raise (UserError(reason) if UserError.__name__ in reason else error) from None
            return {id_: reason for path in Path(folder).iterdir() for id_, reason in read_json(path).items()}

    def jobs(self) -> list[Job]:
        """Return the edit of each item; its seed derives from the item's number, whatever the batches and processes."""
        jobs, ids = [], self.bench.ids
        for k, id_ in enumerate(ids[: self.limit]):
            scene, mask, exemplar = self.bench.paths(id_)
            if self.method == "other-exemplar":
                exemplar = self.bench.paths(ids[(k + 1) % len(ids)])[-1]
            settings = replace(self.settings, seed=self.settings.seeds[0] + k)
            reference = None if self.method == "null-token" else str(exemplar)
            jobs.append(Job(id_, str(scene), reference, settings, str(mask)))
        return jobs

    def edit_share(self) -> dict[str, str]:
        """Edit this process's share of the items, and return why items failed."""
        (rank, processes), device = process_rank(), pick_device(self.device)
        report = edit_many(
            self.load(device),
            self.jobs()[rank::processes],
            self.outdir / "results",
            batch_size=self.batch_size,
            workers=self.workers,
            metadata=self.record,
            report=Report(strict=self.strict),
            on_result=self._write_source if self.has_source else None,
        )
        if rank == 0 and report.done:
            timing = {"seconds_per_picture": report.seconds / len(report.done), "pictures": len(report.done)}
            write_json(self.outdir / "timing.json", timing | {"batch_size": self.batch_size, "device": str(device)})
        return report.failed

    def _write_source(self, job: Job, result: Image.Image) -> None:
        """Write the inputs of an item, and a row of scene, masked scene, exemplar and result."""
        item = self.bench.item(job.name)
        exemplar, masked = open_image(job.reference) if job.reference else item.exemplar, item.masked_scene()
        for name, image in {"GT": item.scene, "inpaint": masked, "mask": item.hole_mask, "ref": exemplar}.items():
            save_png(image, self.outdir / "source" / f"{item.id}_{name}.png")
        row = item.scene, masked, exemplar.resize(item.scene.size, Image.Resampling.BICUBIC), result
        save_png(Image.fromarray(np.hstack([*map(np.asarray, row)])), self.outdir / "grid" / f"grid-{item.id}.png")


def _start(rank: int, run: BenchmarkRun, processes: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    if run.prepare is not None:
        run.prepare()
    write_json(Path(folder) / f"{rank}.json", run.edit_share())


def copy_paste(request: EditRequest) -> Image.Image:
    """Squash the exemplar into the hole's bounding box: it is shown plainly, and fits the scene badly."""
    box, pasted, (exemplar,) = hole_box(request.hole), request.scene.copy(), request.exemplars
    assert exemplar is not None
    pasted.paste(exemplar.resize(box.size, Image.Resampling.BICUBIC), box[:2])
    return pasted


def seamless_clone(request: EditRequest) -> Image.Image:
    """Copy-paste with its seam removed: the exemplar's gradients with the surroundings' values at the hole's edge.

    OpenCV reads the target inside the hole, up to three pixels deep, and would find the true image there; so the
    hole is filled from its surroundings first. A hole as large as the scene has none: there it is copy-paste.
    Source: Perez et al. 2003 (Poisson image editing), as in OpenCV.
    """
    import cv2

    pasted, hole, (left, top, right, bottom) = copy_paste(request), np.asarray(request.hole), hole_box(request.hole)
    if hole.all():
        return pasted
    margin = 2  # pixels: holes at the scene's border get an edge too
    images = map(np.asarray, (opencv_inpaint(request), pasted))
    wide_scene, wide_pasted = (np.pad(x, [(margin,) * 2, (margin,) * 2, (0, 0)], mode="edge") for x in images)
    centre = (left + margin + (right - left) // 2, top + margin + (bottom - top) // 2)
    cloned = cv2.seamlessClone(wide_pasted, wide_scene, np.pad(hole, margin), centre, cv2.NORMAL_CLONE)
    inside = Image.fromarray(cloned[margin:-margin, margin:-margin])
    return Image.composite(inside, request.scene, request.hole)


def opencv_inpaint(request: EditRequest) -> Image.Image:
    """Fill the hole from its surroundings, without the exemplar. Source: Telea 2004 (fast marching), as in OpenCV."""
    import cv2

    scene, hole = np.asarray(request.scene), np.asarray(request.hole)
    return Image.fromarray(cv2.inpaint(scene, hole, INPAINT_RADIUS, cv2.INPAINT_TELEA))


BASELINES = {edit.__name__.replace("_", "-"): edit for edit in (copy_paste, seamless_clone, opencv_inpaint)}
METHODS = ("model", "null-token", "other-exemplar", *BASELINES)
