"""Compare this project's speed with that of diffusers' modules with the same weights, on the CPU.

    python benchmarks/speed.py                                     narrower, 256 px: two minutes on two cores
    python benchmarks/speed.py --full --only step --rounds 1       full size, 512 px: two minutes, 8 GB

The ratios are of CPU seconds, theirs to ours, more than 1: ours is faster. Both run alternately, after one run each to
warm up: other load on the machine meets both. Threads that wait for each other count too: set OMP_NUM_THREADS=1 where
the cores are shared. The differences are of the results, relative to the largest value. With --full an edit takes a
quarter of an hour in each round, and the training step needs 28 GB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from benchmarks.peers import (
    Ours,
    Side,
    Theirs,
    TrainingStep,
    largest_difference,
    make_inputs,
    random_model,
    randomise,
)
from benchmarks.timing import Spread, Timed, timed
from ldm.config import Config
from ldm.files import write_text
from ldm.models.layers import Uninitialised
from ldm.training.diffusion_module import DiffusionTraining

STEPS = 20  # of an edit
CPU = torch.device("cpu")
WORKS = ("step", "encode", "decode", "edit", "train")


class Work(NamedTuple):
    """What both do; `name` is one of `WORKS`."""

    name: str
    what: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]


class Comparison(NamedTuple):
    """CPU seconds of each side, their ratio in each round, and the largest difference in any of them."""

    what: str
    ours: Spread
    theirs: Spread
    ratio: Spread
    difference: float


def small() -> Config:
    """Return the paper's architecture at 256 px, with 0.3 of the UNet's and half of the first stage's width."""
    config = Config()
    model = config.model
    model.image_size = 256
    model.unet = replace(model.unet, model_channels=96, num_heads=4)
    model.first_stage = replace(model.first_stage, ch=64)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_layers": 12, "num_heads": 8, "mapper_layers": 2}
    model.exemplar_encoder = replace(model.exemplar_encoder, **sizes)
    return config


def works(config: Config, names: list[str]) -> Iterator[Work]:
    """Build both sides and yield their works; the training step has networks of its own."""
    pair, one = (make_inputs(config.model, batch_size, CPU, torch.float32) for batch_size in (2, 1))
    size = f"{config.model.image_size} px"
    in_inference: dict[str, tuple[str, Callable[[Side], Tensor]]] = {
        "step": ("UNet step, batch 2", lambda side: side.step(pair)),
        "encode": (f"first stage, encode {size}", lambda side: side.encode(one)),
        "decode": (f"first stage, decode {size}", lambda side: side.decode(one)),
        "edit": (f"edit, {STEPS} steps of DPM-Solver++, guidance 5", lambda side: side.edit(one, STEPS)),
    }
    if wanted := [name for name in names if name in in_inference]:
        model = random_model(config.model, CPU, torch.float32)
        ours, theirs = Ours(model), Theirs(model)
        for name in wanted:
            what, run = in_inference[name]
            sides = (torch.no_grad()(partial(run, side)) for side in (ours, theirs))
            yield Work(name, what, *sides)
    if "train" in names:
        with Uninitialised():
            module = DiffusionTraining(config)
        randomise(module)
        theirs = Theirs(module, trains=True)  # before a step changes the weights
        yield Work("train", "training step, batch 2", TrainingStep(Ours(module), pair), TrainingStep(theirs, pair))


def compare(work: Work, rounds: int, done: Callable[[], object]) -> Comparison:
    """Run both alternately, in turn the one and the other first; `done` is called after each run."""
    rows = list[dict[str, Timed[Tensor]]]()
    for k in range(rounds + 1):
        row = dict[str, Timed[Tensor]]()
        for name in ("ours", "theirs") if k % 2 else ("theirs", "ours"):
            row[name] = timed(work._asdict()[name])
            done()
        rows.append(row)
    difference = max(largest_difference(row["ours"].result, row["theirs"].result) for row in rows)
    pairs = [(row["ours"].cpu, row["theirs"].cpu) for row in rows[1:]]  # the first round warms up
    ours, theirs = (Spread.of(seconds) for seconds in zip(*pairs, strict=True))
    return Comparison(work.what, ours, theirs, Spread.of([theirs / ours for ours, theirs in pairs]), difference)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--full", action="store_true", help="measure the published size at 512 px")
    add("--only", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=f"of {', '.join(WORKS)}")
    add("--rounds", type=int, default=3, help="of the edit; the others take three times as many; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args(argv)
    config, found = Config() if args.full else small(), list[Comparison]()
    rounds = {name: args.rounds * (1 if name == "edit" else 3) for name in dict.fromkeys(args.only)}
    with tqdm(total=2 * sum(1 + count for count in rounds.values()), delay=3, leave=False, disable=None) as bar:
        for work in works(config, list(rounds)):
            bar.set_description(work.what)
            found.append(compare(work, rounds[work.name], bar.update))
    parts = ["ours, CPU s", "diffusers, CPU s", "diffusers / ours", "difference"]
    table = Table("smallest / median / largest", *parts, box=box.MARKDOWN)
    for one in found:
        table.add_row(one.what, str(one.ours), str(one.theirs), str(one.ratio), f"{one.difference:.0e}")
    Console(width=140).print(table)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if args.json is not None:
        write_text(args.json, json.dumps([one._asdict() for one in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
