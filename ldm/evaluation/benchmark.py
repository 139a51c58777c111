"""Editing every item of a benchmark, on any number of devices, each item exactly once.

An item's noise derives from its own number alone, so that its picture does not depend on the batch, the number of
processes, or on whether the run was stopped and continued. Processes share nothing but the output folder:

OUTDIR/results/ID.png · source/ID_{GT,inpaint,mask,ref}.png · grid/grid-ID.png · settings.json · timing.json
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoint.io import sha256_file
from ldm.config import ModelConfig
from ldm.editing.editor import Editor, FittedScene, checkpoint_file, fit_scene, pick_device, pick_dtype, save_png
from ldm.evaluation.cocoee import Bench, BenchItem, copy_paste, opencv_inpaint, seamless_clone
from ldm.files import UserError, write_text
from ldm.images import exemplar_to_tensor
from ldm.latent_diffusion import decoder_file

BASELINES: dict[str, Callable[[BenchItem], Image.Image]] = {
    "copy-paste": lambda item: copy_paste(item.scene, item.hole_mask, item.exemplar),
    "seamless-clone": lambda item: seamless_clone(item.scene, item.hole_mask, item.exemplar),
    "opencv-inpaint": lambda item: opencv_inpaint(item.scene, item.hole_mask),
}
METHODS = ("model", "null-token", "other-exemplar", *BASELINES)


@dataclass(frozen=True)
class Protocol:
    """How an item is edited.

    Attributes:
        sampler, num_steps, guidance_scale, eta, guidance_interval: as for `LatentDiffusion.sample`.
        crop: show the model a square around the hole; else the whole scene.
        crop_margin: what that square shows besides, as for `fit_window`; None is what the model's config says.
        paste_back: keep the scene's own pixels outside the hole; else the result is the decoder's picture of it all.
        match_colors: of what is pasted, as for `Editor.edit`.
    """

    sampler: str
    num_steps: int
    guidance_scale: float
    crop: bool
    paste_back: bool
    eta: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    crop_margin: float | None = None
    match_colors: bool = False


PROTOCOLS = {
    "paper": Protocol("plms", 50, 5.0, crop=False, paste_back=False),  # Yang et al. 2023, section 4.1
    "ours": Protocol("dpm_solver_pp", 20, 5.0, crop=True, paste_back=True),
}


@dataclass(frozen=True)
class Settings:
    """What decides the pictures of a run.

    Attributes:
        method: one of METHODS.
        protocol: how a model edits; baselines do not look at it.
        seed: item k of the bench uses seed + k.
        checkpoint, config: files; None is the bundled model, and the config beside the checkpoint.
        decoder: as for `Editor.from_pretrained`.
        precision: of the weights, as for `pick_dtype`.
    """

    method: str = "model"
    protocol: Protocol = PROTOCOLS["paper"]
    seed: int = 0
    checkpoint: Path | None = None
    config: Path | None = None
    decoder: Path | None = None
    precision: str = "fp32"

    @property
    def uses_model(self) -> bool:
        return self.method not in BASELINES

    def record(self) -> dict[str, Any]:
        """For settings.json: the weights by their hash, wherever they lie."""
        record: dict[str, Any] = {"method": self.method}
        if self.uses_model:
            digest = sha256_file(checkpoint_file(self.checkpoint))
            record |= {**asdict(self.protocol), "guidance_interval": list(self.protocol.guidance_interval)}
            record |= {"seed": self.seed, "precision": self.precision, "checkpoint_sha256": digest}
            if self.decoder is not None:
                record["decoder_sha256"] = sha256_file(decoder_file(self.decoder))
        return record


class Task(NamedTuple):
    """An item and, for a model, the square of it that the model sees."""

    position: int
    item: BenchItem
    fitted: FittedScene | None
    pixel_values: Tensor | None


class Tasks(Dataset[Task]):
    """The items that one process does, read and fitted to the model in the loader's workers."""

    def __init__(self, bench: Bench, indices: Sequence[int], settings: Settings, model: ModelConfig | None) -> None:
        self.bench, self.indices, self.settings, self.model = bench, indices, settings, model

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Task:
        index = self.indices[position]
        item = self.bench[index]
        if self.model is None:
            return Task(index, item, None, None)
        if self.settings.method == "other-exemplar":
            item = item._replace(exemplar=self.bench[(index + 1) % len(self.bench)].exemplar)
        protocol = self.settings.protocol
        margin = protocol.crop_margin
        fitted = fit_scene(
            item.scene,
            item.hole_mask,
            self.model.image_size,
            crop_margin=self.model.crop_margin if margin is None else margin,
            whole_image=not protocol.crop,
        )
        return Task(
            index, item, fitted, exemplar_to_tensor(item.exemplar, self.model.exemplar_encoder.image_size)[None]
        )


class BenchEditing(pl.LightningModule):
    """One process's share of a run, for Lightning's `Trainer.predict`.

    Args:
        bench: the items.
        indices: which of them are wanted, of the whole run.
        settings: how they are edited.
        outdir: where the pictures go.
        batch_size, num_workers: of the loader.
        whole_output: write source/ and grid/ too.
    """

    def __init__(
        self,
        bench: Bench,
        indices: Sequence[int],
        settings: Settings,
        outdir: Path,
        *,
        batch_size: int,
        num_workers: int,
        whole_output: bool,
    ) -> None:
        super().__init__()
        self.bench, self.indices, self.run_settings, self.outdir = bench, indices, settings, outdir
        self.batch_size, self.num_workers, self.whole_output = batch_size, num_workers, whole_output
        self.editor: Editor | None = None
        self.done, self.seconds = 0, 0.0

    def setup(self, stage: str) -> None:
        settings = self.run_settings
        if settings.uses_model:
            device = self.trainer.strategy.root_device
            self.editor = Editor.from_pretrained(
                settings.checkpoint,
                config=settings.config,
                decoder=settings.decoder,
                device=device,
                dtype=pick_dtype(settings.precision, device),
            )

    def predict_dataloader(self) -> DataLoader[Task]:
        # Shared out before looking at what is there: another process may have begun to write.
        mine = self.indices[self.trainer.global_rank :: self.trainer.world_size]
        todo = [k for k in mine if not is_result(self.outdir, self.bench, k)]
        return DataLoader(
            Tasks(self.bench, todo, self.run_settings, self.editor.model.config if self.editor else None),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=list,
        )

    def transfer_batch_to_device(self, batch: list[Task], device: torch.device, dataloader_idx: int) -> list[Task]:
        return batch  # `Editor.paint` moves what it needs

    def predict_step(self, batch: list[Task]) -> None:
        start = time.perf_counter()
        results = self._edit(batch)
        self.seconds += time.perf_counter() - start
        self.done += len(batch)
        for task, result in zip(batch, results, strict=True):
            id_ = task.item.id
            if self.whole_output:
                self._write_source(task.item, result)
            save_png(result, result_path(self.outdir, id_))  # last: its presence says that the item is done

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier()

    def _edit(self, batch: list[Task]) -> list[Image.Image]:
        if self.editor is None:
            return [BASELINES[self.run_settings.method](task.item) for task in batch]
        fitted = [task.fitted for task in batch if task.fitted is not None]
        exemplars = [task.pixel_values for task in batch if task.pixel_values is not None]
        protocol = self.run_settings.protocol
        painted = self.editor.paint(
            torch.cat([scene.image for scene in fitted]),
            torch.cat([scene.keep_mask for scene in fitted]),
            None if self.run_settings.method == "null-token" else torch.cat(exemplars),
            [self.run_settings.seed + task.position for task in batch],
            sampler=protocol.sampler,
            num_steps=protocol.num_steps,
            guidance_scale=protocol.guidance_scale,
            guidance_interval=protocol.guidance_interval,
            eta=protocol.eta,
        )
        return [
            scene.put_back(pixels, match_colors=protocol.match_colors, whole=not protocol.paste_back)
            for scene, pixels in zip(fitted, painted, strict=True)
        ]

    def _write_source(self, item: BenchItem, result: Image.Image) -> None:
        masked = item.masked_scene()
        pictures = {"GT": item.scene, "inpaint": masked, "mask": item.hole_mask, "ref": item.exemplar}
        for name, picture in pictures.items():
            save_png(picture, self.outdir / "source" / f"{item.id}_{name}.png")
        width, height = item.scene.size
        row = (item.scene, masked, item.exemplar.resize(item.scene.size, Image.Resampling.BICUBIC), result)
        grid = Image.new("RGB", (len(row) * width, height))
        for column, picture in enumerate(row):
            grid.paste(picture, (column * width, 0))
        save_png(grid, self.outdir / "grid" / f"grid-{item.id}.png")


def result_path(outdir: Path, id_: str) -> Path:
    """Where the edited picture of an item lies."""
    return outdir / "results" / f"{id_}.png"


def is_result(outdir: Path, bench: Bench, index: int) -> bool:
    """Whether an item's picture is there, whole, and of its scene's size."""
    id_ = bench.ids[index]
    try:
        with Image.open(result_path(outdir, id_)) as picture, Image.open(bench.paths(id_)[0]) as scene:
            picture.load()
            return picture.size == scene.size
    except (OSError, SyntaxError, ValueError):
        return False


def edit_bench(
    bench: Bench,
    outdir: Path,
    settings: Settings,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    whole_output: bool = True,
) -> int:
    """Edit what is not there yet. Every process of a distributed run calls this.

    Args:
        bench: the items.
        outdir: gets the pictures; a run that was stopped goes on.
        settings: how items are edited; a folder begun with other settings is refused.
        limit: only the first so many items.
        batch_size: items per forward pass and process.
        num_workers: loader processes for each process.
        device: auto | cpu | cuda | mps.
        devices: processes on this node, one per device.
        num_nodes: nodes, started by torchrun, SLURM or whatever Lightning knows.
        whole_output: write source/ and grid/ too, as the original does.

    Returns:
        How many items there are.

    Raises:
        UserError: the settings or the folder do not fit, or pictures are missing at the end.
    """
    if min(batch_size, devices, num_nodes, 1 if limit is None else limit) < 1 or num_workers < 0:
        raise UserError("batch size, devices, nodes and limit: expected 1 or more; workers: 0 or more")
    indices = range(min(limit or len(bench), len(bench)))
    editing = BenchEditing(
        bench, indices, settings, outdir,
        batch_size=batch_size, num_workers=num_workers, whole_output=whole_output,
    )  # fmt: skip
    accelerator = {"cuda": "gpu"}.get(kind := pick_device(device).type, kind)
    _quiet()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # shared out by hand: nothing padded, nothing dropped
        default_root_dir=outdir,
    )
    for name in ("results", *(("source", "grid") if whole_output else ())):
        (outdir / name).mkdir(parents=True, exist_ok=True)
    if trainer.is_global_zero:
        _check_settings(outdir / "settings.json", settings.record())
    trainer.predict(editing, return_predictions=False)
    if trainer.is_global_zero:
        if missing := [bench.ids[k] for k in indices if not is_result(outdir, bench, k)]:
            raise UserError(
                f"{outdir}: {len(missing)} pictures are missing or damaged, the first {missing[0]}.png; "
                "run the same command again"
            )
        if editing.done:
            _write_json(
                outdir / "timing.json",
                {
                    "seconds_per_picture": editing.seconds / editing.done,
                    "pictures": editing.done,
                    "batch_size": batch_size,
                    "device": str(trainer.strategy.root_device),
                },
            )
    return len(indices)


def _check_settings(path: Path, mine: dict[str, Any]) -> None:
    """Keep the settings with the pictures; refuse to continue a folder that was begun with other ones."""
    if not path.exists():
        _write_json(path, mine)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: damaged; delete the folder or choose another --outdir") from None
    if changed := sorted(key for key in before.keys() | mine.keys() if before.get(key) != mine.get(key)):
        got = ", ".join(f"{key}: {before.get(key)} => {mine.get(key)}" for key in changed)
        raise UserError(f"{path.parent}: holds results of other settings ({got}); choose another --outdir")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _quiet() -> None:
    """Leave out what Lightning says about things that are meant to be so."""
    for message in (
        ".*does not have many workers.*",
        ".*predict returned None.*",
        ".*across ranks is zero.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for package in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{package}.utilities.rank_zero").setLevel(logging.WARNING)
