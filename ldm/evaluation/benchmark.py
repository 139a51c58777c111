"""Edit every item of a benchmark: a table of jobs under a protocol, for `ldm.editing.batch`.

The noise of an item derives from its number alone, so that its image depends neither on the batch nor on the number of
processes. OUTDIR/results/ID.png · source/ID_{GT,inpaint,mask,ref}.png · grid/grid-ID.png · settings.json · timing.json
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from ldm.checkpoint.io import sha256_file
from ldm.editing.batch import Baseline, Job, edit_many, process_rank
from ldm.editing.editor import Editor, checkpoint_file, pick_device, pick_dtype
from ldm.editing.request import EditRequest
from ldm.editing.settings import EditSettings
from ldm.evaluation.cocoee import Bench, copy_paste, opencv_inpaint, seamless_clone
from ldm.files import UserError, write_text
from ldm.images import open_image, save_png
from ldm.latent_diffusion import decoder_file

PROTOCOLS = {
    # Yang et al. 2023, section 4.1: the whole scene, and the decoder's whole image.
    "paper": EditSettings(sampler="plms", num_steps=50, guidance_scale=5.0, whole_image=True, paste_back=False),
    "ours": EditSettings(),
}


def only_exemplar(request: EditRequest) -> Image.Image:
    """Return the exemplar of a request that has one."""
    (exemplar,) = request.exemplars
    assert exemplar is not None
    return exemplar


BASELINES: dict[str, Baseline] = {
    "copy-paste": lambda request: copy_paste(request.scene, request.hole, only_exemplar(request)),
    "seamless-clone": lambda request: seamless_clone(request.scene, request.hole, only_exemplar(request)),
    "opencv-inpaint": lambda request: opencv_inpaint(request.scene, request.hole),
}
METHODS = ("model", "null-token", "other-exemplar", *BASELINES)


@dataclass(frozen=True)
class BenchmarkConfig:
    """What decides the images of a run.

    Attributes:
        method: one of METHODS.
        settings: how a model edits; its seed plus k is the seed of item k. Baselines ignore it.
        checkpoint, config, decoder, precision: of the model, see `Editor.from_pretrained` and `pick_dtype`.
    """

    method: str = "model"
    settings: EditSettings = PROTOCOLS["paper"]
    checkpoint: Path | None = None
    config: Path | None = None
    decoder: Path | None = None
    precision: str = "fp32"

    def record(self) -> dict[str, Any]:
        """Return the content of settings.json, with the weights by their hash."""
        if self.method in BASELINES:
            return {"method": self.method}
        weights = {"checkpoint_sha256": sha256_file(checkpoint_file(self.checkpoint))}
        if self.decoder is not None:
            weights["decoder_sha256"] = sha256_file(decoder_file(self.decoder))
        return {"method": self.method, **self.settings.record(), "precision": self.precision, **weights}

    def load(self, device: torch.device) -> Editor | Baseline:
        """Load the model, or return the baseline."""
        if self.method in BASELINES:
            return BASELINES[self.method]
        dtype = pick_dtype(self.precision, device)
        return Editor.from_pretrained(
            self.checkpoint, config=self.config, decoder=self.decoder, device=device, dtype=dtype
        )


def make_jobs(bench: Bench, config: BenchmarkConfig, limit: int | None = None) -> list[Job]:
    """Make a job of each of the first `limit` items."""
    jobs = []
    for k, id_ in enumerate(bench.ids[:limit]):
        scene, mask, exemplar = bench.paths(id_)
        if config.method == "other-exemplar":
            exemplar = bench.paths(bench.ids[(k + 1) % len(bench)])[-1]
        settings = replace(config.settings, seed=config.settings.seeds[0] + k)
        reference = None if config.method == "null-token" else str(exemplar)
        jobs.append(Job(id_, str(scene), reference, settings, mask=str(mask)))
    return jobs


@dataclass(frozen=True)
class _Run:
    """A run that several processes share."""

    bench: Bench
    outdir: Path
    config: BenchmarkConfig
    record: dict[str, Any]
    limit: int | None
    batch_size: int
    workers: int
    device: str
    has_source: bool

    def edit_share(self) -> None:
        """Edit this process's share of the items."""
        (rank, processes), device = process_rank(), pick_device(self.device)
        report = edit_many(
            self.config.load(device),
            make_jobs(self.bench, self.config, self.limit)[rank::processes],
            self.outdir / "results",
            batch_size=self.batch_size,
            workers=self.workers,
            metadata=self.record,
            on_result=self.write_source if self.has_source else None,
        )
        if report.failed:
            name, reason = next(iter(report.failed.items()))
            raise UserError(f"{len(report.failed)} items failed, the first {name}: {reason}")
        if rank == 0 and report.done:
            timing = {"seconds_per_picture": report.seconds / len(report.done), "pictures": len(report.done)}
            write_json(self.outdir / "timing.json", timing | {"batch_size": self.batch_size, "device": str(device)})

    def write_source(self, job: Job, result: Image.Image) -> None:
        """Write the inputs of an item, and a row of scene, masked scene, exemplar and result."""
        item = self.bench[self.bench.ids.index(job.name)]
        exemplar, masked = open_image(job.reference) if job.reference else item.exemplar, item.masked_scene()
        source = {"GT": item.scene, "inpaint": masked, "mask": item.hole_mask, "ref": exemplar}
        for name, image in source.items():
            save_png(image, self.outdir / "source" / f"{item.id}_{name}.png")
        width, height = item.scene.size
        row = (item.scene, masked, exemplar.resize(item.scene.size, Image.Resampling.BICUBIC), result)
        grid = Image.new("RGB", (len(row) * width, height))
        for column, image in enumerate(row):
            grid.paste(image, (column * width, 0))
        save_png(grid, self.outdir / "grid" / f"grid-{item.id}.png")


def edit_bench(
    bench: Bench,
    outdir: Path,
    config: BenchmarkConfig,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
    devices: int = 1,
    has_source: bool = True,
) -> int:
    """Edit the items that have no result yet.

    Args:
        bench: the items.
        outdir: gets the images; a run that was stopped goes on.
        config: how items are edited; a folder begun with another config is refused.
        limit: only the first so many items.
        batch_size: items per forward pass and process.
        workers: threads that read, and threads that write, of each process.
        device: auto | cpu | cuda | mps.
        devices: processes to start, one per device. Under torchrun, which starts them itself, it is ignored.
        has_source: write source/ and grid/ too, as the original does.

    Returns:
        The number of items.

    Raises:
        UserError: the config or the folder does not fit, or items failed.
    """
    if min(devices, 1 if limit is None else limit) < 1:
        raise UserError(f"got devices={devices}, limit={limit}, expected 1 or more")
    record = config.record()
    check_settings(outdir / "settings.json", record)
    run = _Run(bench, outdir, config, record, limit, batch_size, workers, device, has_source)
    if devices == 1 or "RANK" in os.environ:
        run.edit_share()
    else:
        try:
            spawn(_start, (run, devices), nprocs=devices)
        except ProcessRaisedException as error:
            reason = str(error).strip().splitlines()[-1]
            raise (UserError(reason) if UserError.__name__ in reason else error) from None
    return len(bench.ids[:limit])


def _start(rank: int, run: _Run, processes: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    run.edit_share()


def check_settings(path: Path, record: dict[str, Any]) -> None:
    """Write the settings of a run, or compare them with those the folder was begun with.

    Raises:
        UserError: they differ.
    """
    if not path.exists():
        write_json(path, record)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: damaged; delete the folder or choose another --outdir") from None
    if changed := sorted(key for key in before.keys() | record.keys() if before.get(key) != record.get(key)):
        got = ", ".join(f"{key}: {before.get(key)} => {record.get(key)}" for key in changed)
        raise UserError(f"{path.parent}: holds results of other settings ({got}); choose another --outdir")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")
