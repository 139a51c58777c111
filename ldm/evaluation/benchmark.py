"""Edit every item of a benchmark: a table of jobs under a protocol, for `ldm.editing.batch`.

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
from ldm.editing.settings import EditSettings
from ldm.evaluation.cocoee import Bench, copy_paste, opencv_inpaint, seamless_clone
from ldm.files import UserError, read_json, write_json
from ldm.images import open_image, save_png

PROTOCOLS = {
    # Yang et al. 2023, section 4.1: the whole scene, and the decoder's whole image.
    "paper": EditSettings(sampler="plms", num_steps=50, guidance_scale=5.0, whole_image=True, paste_back=False),
    "ours": EditSettings(),
}
BASELINES = {edit.__name__.replace("_", "-"): edit for edit in (copy_paste, seamless_clone, opencv_inpaint)}
METHODS = ("model", "null-token", "other-exemplar", *BASELINES)


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
            baseline: Callable[..., Image.Image] = BASELINES[self.method]
            return lambda request: baseline(request.scene, request.hole, *request.exemplars)
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
