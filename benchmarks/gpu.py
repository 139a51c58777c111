"""Measure the speed of the full-size model on a GPU, beside diffusers' modules with the same weights.

    python benchmarks/gpu.py --out results/gpu --seconds 300
    python benchmarks/gpu.py --out /tmp/gpu --seconds 60 --tiny --device cpu      the same code in seconds

Weights are random, which has no effect on time. Entries are measured in the order of their importance; one that would
not fit into the seconds is skipped and named, one that fails is a row with its reason. `speed.json` and `speed.md` are
written after every row. Times are medians of synchronised runs after a warm-up. Memory is the peak beside the weights:
in training it includes gradients, Adam's moments and the weights' copies in bf16. Operations are the model's, without
what activation checkpointing repeats; the peak is that of a matrix product of 8192 x 8192 in the same precision.
Without diffusers its columns are left out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.loader import make_images, our_dataset
from benchmarks.peers import (
    Inputs,
    Ours,
    Side,
    Theirs,
    TrainingStep,
    largest_difference,
    make_inputs,
    random_model,
    randomise,
)
from benchmarks.timing import Spread, timed
from ldm.config import Config, load_config
from ldm.data.datamodule import set_up_worker
from ldm.files import write_text
from ldm.models.layers import Uninitialised
from ldm.training.diffusion_module import DiffusionTraining

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20  # of an edit
MIB = 2**20


@dataclass(frozen=True)
class Entry:
    """What is measured and how. Training is mixed: weights in float32, autocast to the precision."""

    what: str
    batch: int = 1
    precision: str = "bf16"  # bf16 | tf32 | fp32
    layout: str = ""  # channels_last | contiguous: instead of the project's choice
    checkpointing: bool = False
    compiled: bool = False
    seconds: float = 8  # expected on a data-centre GPU: an entry with fewer left is skipped

    def __str__(self) -> str:
        options = ["" if self.what == MATMUL else f"batch {self.batch}", self.precision, self.layout]
        options += ["activation checkpointing"] * self.checkpointing + ["compiled"] * self.compiled
        return f"{self.what}: {', '.join(option for option in options if option)}"


STEP, EDIT, ENCODE, DECODE = "UNet step", f"edit of {STEPS} steps", "first stage, encode", "first stage, decode"
TRAIN, CACHED, ONLINE = "training step of the UNet", "training step, cached latents", "training step, encoding online"
LOADER, MATMUL = "loader", "matrix product"
ENTRIES = (
    Entry(MATMUL, seconds=3),
    Entry(STEP, 2, seconds=15),
    Entry(EDIT, seconds=12),
    Entry(ENCODE),
    Entry(DECODE),
    Entry(TRAIN, 8, seconds=15),
    Entry(TRAIN, 8, checkpointing=True, seconds=12),
    Entry(CACHED, 16, checkpointing=True, seconds=12),
    Entry(ONLINE, 16, checkpointing=True, seconds=12),
    Entry(STEP, 16),
    Entry(STEP, 2, layout="channels_last"),
    Entry(ENCODE, layout="channels_last"),
    Entry(DECODE, layout="channels_last"),
    Entry(TRAIN, 16, seconds=15),
    Entry(TRAIN, 16, checkpointing=True, seconds=15),
    Entry(LOADER, 16, seconds=20),
    Entry(STEP, 2, compiled=True, seconds=75),
    Entry(EDIT, compiled=True, seconds=75),  # its UNet reads what the steps share: compiled anew
    Entry(MATMUL, precision="tf32", seconds=3),
    Entry(STEP, 2, "tf32", seconds=10),
    Entry(EDIT, 1, "tf32", seconds=20),
    Entry(MATMUL, precision="fp32", seconds=3),
    Entry(STEP, 2, "fp32"),
    Entry(TRAIN, 4, seconds=12),
    Entry(TRAIN, 4, checkpointing=True, seconds=12),
    Entry(STEP, 16, layout="channels_last", seconds=12),
    Entry(TRAIN, 8, layout="contiguous", seconds=12),
    Entry(TRAIN, 8, "tf32", seconds=15),
    Entry(TRAIN, 8, compiled=True, seconds=120),
)


@dataclass
class Row:
    """A result. Each side's milliseconds are the median; `ratio` is that of theirs to ours, more than 1: faster."""

    entry: str
    ms: float | None = None
    ms_range: tuple[float, float] | None = None
    diffusers_ms: float | None = None
    ratio: float | None = None
    difference: float | None = None  # largest, of the outputs, relative to the largest value
    memory_mib: float | None = None  # peak beside the weights
    diffusers_memory_mib: float | None = None
    samples_per_second: float | None = None
    tflops: float | None = None
    share_of_peak: float | None = None  # of the matrix product's in the same precision
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    spread: Spread  # seconds
    memory_mib: float | None
    result: Any


class Device:
    """Synchronised timing, and memory where the device counts it."""

    def __init__(self, name: str, *, quick: bool) -> None:
        self.device, self.is_cuda, self._quick = torch.device(name), name.startswith("cuda"), quick

    def synchronise(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def measure(self, run: Callable[[], Any]) -> Measurement:
        """Run for about three seconds after two runs to warm up, or once after one; keep the first result."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated() if self.is_cuda else 0
        result = run()  # also picks kernels and allocates the optimizer's state
        if not self._quick:
            self._synchronised(run)
        seconds, started = [], time.perf_counter()
        most, limit = (1, 0.0) if self._quick else (50, 3.0)
        while len(seconds) < min(3, most) or (len(seconds) < most and time.perf_counter() - started < limit):
            seconds.append(timed(partial(self._synchronised, run)).wall)
        memory = (torch.cuda.max_memory_allocated() - resident) / MIB if self.is_cuda else None
        return Measurement(Spread.of(seconds), memory, result)

    def _synchronised(self, run: Callable[[], Any]) -> None:
        self.synchronise()
        run()
        self.synchronise()

    def free(self) -> None:
        """Give memory back that nothing refers to, so that the next peak is its own."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()


class Bench:
    """Measures entries; keeps the networks of the last one, because the next often reads the same."""

    def __init__(self, config: Config, device: Device, *, quick: bool) -> None:
        self.config, self.device, self.quick = config, device, quick
        self.operations = operations(config)
        self.peaks: dict[str, float] = {}  # precision => TFLOP a second
        self._key: tuple[Any, ...] = ()
        self._sides: list[Side] = []

    def run(self, entry: Entry) -> Row:
        """Measure one entry; a failure becomes the row's note."""
        torch.set_float32_matmul_precision("highest" if entry.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = entry.precision != "fp32"
        runs = {
            MATMUL: self._matmul,
            LOADER: self._loader,
            TRAIN: self._train,
            CACHED: self._losses,
            ONLINE: self._losses,
        }
        row = Row(str(entry))
        try:
            runs.get(entry.what, self._infer)(entry, row)
        except Exception as error:  # out of memory, a kernel that the card lacks: the other entries go on
            row.note = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if row.note and row.ms is None:
            self._forget()  # here the traceback no longer holds tensors
        return row

    def _forget(self) -> None:
        self._key, self._sides = (), []
        self.device.free()

    def _matmul(self, entry: Entry, row: Row) -> None:
        side = 256 if self.quick else 8192
        a, b = torch.randn(2, side, side, device=self.device.device, dtype=_weights(entry)).unbind()
        self._fill(row, entry, self.device.measure(lambda: a @ b), 2 * side**3)
        assert row.tflops is not None
        self.peaks[entry.precision] = row.tflops
        row.share_of_peak, row.samples_per_second = 1.0, None

    def _loader(self, entry: Entry, row: Row) -> None:
        """Count the samples of 512 px that all cores make."""
        model, workers = self.config.model, os.cpu_count() or 1
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder), 4 if self.quick else 48, (1024, 768))
            dataset = our_dataset(Path(folder), model.image_size, model.exemplar_encoder.image_size)
            samples: Any = ((0, i % len(dataset)) for i in count())
            options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": set_up_worker}
            batches = iter(DataLoader(dataset, entry.batch, sampler=samples, pin_memory=self.device.is_cuda, **options))
            for _ in range(2 * workers):  # the workers' start
                next(batches)
            done, start = 0, time.perf_counter()
            while time.perf_counter() - start < (0.5 if self.quick else 8):
                done += len(next(batches)["key"])
            row.samples_per_second = done / (time.perf_counter() - start)
            del batches
        row.note = f"{workers} processes, JPEGs of 1024 x 768, samples of {model.image_size} px"

    @torch.no_grad()
    def _infer(self, entry: Entry, row: Row) -> None:
        inputs = make_inputs(self.config.model, entry.batch, self.device.device, _weights(entry))
        works: dict[str, Callable[[Side], Tensor]] = {
            STEP: lambda side: side.step(inputs),
            EDIT: lambda side: side.edit(inputs, STEPS),
            ENCODE: lambda side: side.encode(inputs),
            DECODE: lambda side: side.decode(inputs),
        }
        self._compare(entry, row, [partial(works[entry.what], side) for side in self._networks(entry, inputs)])

    def _train(self, entry: Entry, row: Row) -> None:
        inputs = make_inputs(self.config.model, entry.batch, self.device.device, torch.float32)
        steps = (TrainingStep(side, inputs, _autocast(entry)) for side in self._networks(entry, inputs))
        self._compare(entry, row, steps)
        self._forget()  # the weights have changed

    def _losses(self, entry: Entry, row: Row) -> None:
        """Take whole training steps as the trainer does, without Lightning: encoders, losses, backward pass, AdamW."""
        module, dtype = self._training_module(entry), _autocast(entry)
        optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-5, fused=True)
        batch = self._batch(entry, module)

        def step() -> Tensor:
            with torch.autocast(self.device.device.type, dtype, enabled=dtype != torch.float32):
                loss = module.losses(batch)[0].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        self._fill(row, entry, self.device.measure(step), entry.batch * self.operations[entry.what])
        row.note = "AdamW and the condition's mapper included"

    def _compare(self, entry: Entry, row: Row, runs: Any) -> None:
        """Measure ours, then theirs where diffusers is there."""
        found = list[Measurement]()
        for run in runs:
            found.append(self.device.measure(run))
            del run  # with the optimizer's state
            self.device.free()
        ours, *theirs = found
        self._fill(row, entry, ours, entry.batch * self.operations[entry.what])
        for other in theirs:
            row.diffusers_ms, row.diffusers_memory_mib = 1e3 * other.spread.middle, other.memory_mib
            row.ratio = other.spread.middle / ours.spread.middle
            row.difference = largest_difference(ours.result.float(), other.result.float())

    def _fill(self, row: Row, entry: Entry, found: Measurement, operations: float) -> None:
        seconds = found.spread.middle
        row.ms, row.ms_range = 1e3 * seconds, (1e3 * found.spread.low, 1e3 * found.spread.high)
        row.memory_mib, row.samples_per_second = found.memory_mib, entry.batch / seconds
        row.tflops = operations / seconds / 1e12
        if peak := self.peaks.get(entry.precision):
            row.share_of_peak = row.tflops / peak

    def _networks(self, entry: Entry, inputs: Inputs) -> Iterator[Side]:
        """Build ours and, where it can be imported, diffusers' with the same weights; yield one after the other."""
        trains = entry.what == TRAIN
        key = trains, entry.precision, entry.layout, entry.compiled, entry.checkpointing
        if key != self._key:
            self._forget()
            model = (
                self._training_module(entry)
                if trains
                else random_model(self.config.model, self.device.device, _weights(entry))
            )
            self._sides = [Ours(model)]
            if not entry.compiled and has_diffusers():
                theirs = Theirs(model, trains=trains)
                if entry.checkpointing:
                    theirs.unet.enable_gradient_checkpointing()
                self._sides.append(theirs)
            if entry.layout:
                layout = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[entry.layout]
                for network in (network for side in self._sides for network in side.networks):
                    network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
            if entry.compiled and not trains:
                model.unet.compile(dynamic=False, mode="reduce-overhead")  # with CUDA graphs
            self._key = key
        yield from self._sides

    def _training_module(self, entry: Entry) -> DiffusionTraining:
        self._forget()
        config = copy.deepcopy(self.config)
        config.model.unet.activation_checkpointing = entry.checkpointing
        config.training.compile = entry.compiled
        with self.device.device, Uninitialised():
            module = DiffusionTraining(config)
        randomise(module)
        return module.to(self.device.device)

    def _batch(self, entry: Entry, module: DiffusionTraining) -> dict[str, Tensor]:
        """Make the batch that the loader of images, or of cached latents, would give."""
        device, inputs = (
            self.device.device,
            make_inputs(self.config.model, entry.batch, self.device.device, torch.float32),
        )
        batch = {"key": torch.arange(entry.batch), "keep_mask": inputs.keep_mask}
        if entry.what == ONLINE:
            masked = inputs.image * inputs.keep_mask
            return batch | {"image": inputs.image, "masked_image": masked, "exemplar": inputs.exemplar}
        moments = torch.cat([inputs.z, inputs.z.square().neg()], dim=1)
        features = torch.randn(entry.batch, 1, self.config.model.exemplar_encoder.hidden_size, device=device)
        return batch | {"image_moments": moments, "masked_moments": moments, "exemplar_features": features}


def _weights(entry: Entry) -> torch.dtype:
    """Return the type of weights and inputs in inference."""
    return torch.bfloat16 if entry.precision == "bf16" else torch.float32


_autocast = _weights  # the type of autocast in training


def operations(config: Config) -> dict[str, float]:
    """Return the FLOP of each kind of entry for one sample, by PyTorch's formulas, counted on the meta device."""
    config, meta = copy.deepcopy(config), torch.device("meta")
    config.model.unet.activation_checkpointing = False
    with meta:
        module = DiffusionTraining(config)
    side, inputs = Ours(module), make_inputs(config.model, 1, meta, torch.float32)
    train, step = _flops(lambda: side.step(inputs).sum().backward()), _flops(lambda: side.step(inputs))
    with torch.no_grad():
        encode, decode = _flops(lambda: side.encode(inputs)), _flops(lambda: side.decode(inputs))
        tower = _flops(lambda: module.encode_exemplar(inputs.exemplar))
    edit = encode + tower + 2 * STEPS * step + decode  # with guidance
    online = train + 2 * encode + tower
    return {STEP: step, EDIT: edit, ENCODE: encode, DECODE: decode, TRAIN: train, CACHED: train, ONLINE: online}


def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def environment(device: Device) -> dict[str, Any]:
    """Describe what the figures depend on."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    found["diffusers"] = importlib.metadata.version("diffusers") if has_diffusers() else None
    if device.is_cuda:
        card = torch.cuda.get_device_properties(device.device)
        found |= {"card": card.name, "memory, GiB": round(card.total_memory / 2**30, 1), "CUDA": torch.version.cuda}
        found["compute capability"] = f"{card.major}.{card.minor}"
        found["cuDNN"] = torch.backends.cudnn.version()
    return found


def has_diffusers() -> bool:
    """Return whether diffusers' modules can be measured beside ours."""
    return importlib.util.find_spec("diffusers") is not None


COLUMNS: tuple[tuple[str, Callable[[Row], object], str], ...] = (
    ("ms", lambda row: row.ms, ".4g"),
    ("diffusers, ms", lambda row: row.diffusers_ms, ".4g"),
    ("diffusers / ours", lambda row: row.ratio, ".2f"),
    ("difference", lambda row: row.difference, ".0e"),
    ("memory, MiB", lambda row: row.memory_mib, ",.0f"),
    ("diffusers, MiB", lambda row: row.diffusers_memory_mib, ",.0f"),
    ("samples a second", lambda row: row.samples_per_second, ".4g"),
    ("TFLOP/s", lambda row: row.tflops, ".4g"),
    ("share of peak", lambda row: row.share_of_peak, ".0%"),
)


def markdown(found: dict[str, Any], rows: list[Row], skipped: list[str]) -> str:
    """Return the table; columns that no row fills are left out."""
    columns = [column for column in COLUMNS if any(column[1](row) is not None for row in rows)]
    lines = [", ".join(f"{name} {value}" for name, value in found.items() if value is not None) + ".", ""]
    if found["diffusers"] is None:
        lines = [*lines, "diffusers cannot be imported here: its columns are left out.", ""]
    lines.append("| " + " | ".join(["what", *(name for name, _, _ in columns), "note"]) + " |")
    lines.append("| --- |" + " ---: |" * len(columns) + " --- |")
    for row in rows:
        values = [(value(row), form) for _, value, form in columns]
        cells = [row.entry, *("" if value is None else format(value, form) for value, form in values), row.note]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    if skipped:
        lines += ["", "Skipped for lack of time: " + "; ".join(skipped) + "."]
    return "\n".join(lines) + "\n"


def entries_for(device: Device, *, tiny: bool) -> list[Entry]:
    """Return the entries of a device, without those that a CPU, which computes in float32, or brevity makes equal."""
    entries = list(ENTRIES)
    if not device.is_cuda:
        entries = [replace(entry, precision="fp32") for entry in entries if not entry.compiled]
    if tiny:
        entries = [replace(entry, batch=min(entry.batch, 2), seconds=entry.seconds / 30) for entry in entries]
    unique = dict[str, Entry]()
    for entry in entries:
        unique.setdefault(str(entry), entry)
    return list(unique.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for speed.json and speed.md")
    add("--seconds", type=float, default=300, help="for all entries together; default: %(default)s")
    add("--tiny", action="store_true", help="measure the tiny model, briefly: a test of this script")
    add("--device", default="cuda", help="cuda or cpu; default: %(default)s")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: got cuda without a GPU; pass --device cpu, with --tiny")
    device, config = (
        Device(args.device, quick=args.tiny),
        load_config(ROOT / "configs" / f"{'tiny' if args.tiny else 'v1'}.yaml"),
    )
    bench, found = Bench(config, device, quick=args.tiny), environment(device)
    rows, skipped = list[Row](), list[str]()

    def write() -> None:
        content = {"environment": found, "rows": [asdict(row) for row in rows], "skipped": skipped}
        write_text(args.out / "speed.json", json.dumps(content, indent=1) + "\n")
        write_text(args.out / "speed.md", markdown(found, rows, skipped))

    args.out.mkdir(parents=True, exist_ok=True)
    for entry in (bar := tqdm(entries_for(device, tiny=args.tiny), leave=False, disable=None)):
        bar.set_description(str(entry))
        if time.perf_counter() - start + entry.seconds > args.seconds:
            skipped.append(str(entry))
        else:
            rows.append(bench.run(entry))
            tqdm.write(markdown(found, rows[-1:], []).splitlines()[-1])
        write()
    print(markdown(found, rows, skipped))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
