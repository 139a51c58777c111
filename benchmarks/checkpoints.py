"""Memory and time of the checkpoint tools on full-size files, whose weights are a function of their names.

    python benchmarks/checkpoints.py FOLDER              # float32: FOLDER needs 22 GB
    python benchmarks/checkpoints.py FOLDER --dtype float16

Makes Stable Diffusion v1-4, and of it a custom model, an inpainting model and an IC-Light offset, in FOLDER, and runs
each command line in a process of its own. What is reported is the peak of RssAnon, the memory that a process cannot
give back: sampled 100 times a second from /proc, so of Linux alone. Pages of mapped files are left out: the system
drops them when it needs room.
Outputs are removed at once, inputs at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.convert import to_diffusers
from ldm.checkpoint.io import Deferred, read_checkpoint, write_safetensors
from ldm.checkpoint.keys import EMA, SCHEDULE_BUFFERS, UNET
from ldm.checkpoint.surgery import inflate_input_conv
from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule

ROOT = Path(__file__).parent.parent


def layout() -> dict[str, torch.Size]:
    """Shapes by name of Stable Diffusion v1-4, averaged copies left out."""
    with open(ROOT / "tests" / "golden" / "sd_v1_4_state_dict.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {row["name"]: torch.Size(json.loads(row["shape"])) for row in rows if not row["name"].startswith(EMA)}


def procedural(dtype: torch.dtype) -> dict[str, Tensor | Deferred]:
    """Stable Diffusion with weights by name."""
    from tests.procweights import weight

    schedule = make_schedule(ScheduleConfig()).buffers()

    def made(name: str, shape: torch.Size) -> Tensor | Deferred:
        if name in SCHEDULE_BUFFERS:
            return schedule[name]
        if name.endswith("position_ids"):
            return torch.arange(shape.numel())[None]
        return Deferred(dtype, shape, lambda: weight(name, shape).to(dtype))

    return {name: made(name, shape) for name, shape in layout().items()}


def scaled(state: dict[str, Tensor], factor: float, dtype: torch.dtype) -> dict[str, Tensor | Deferred]:
    """Another model: every weight times a factor."""
    return {
        name: Deferred(dtype, tensor.shape, lambda tensor=tensor: (factor * tensor.float()).to(dtype))
        if tensor.is_floating_point() and name not in SCHEDULE_BUFFERS
        else tensor
        for name, tensor in state.items()
    }


def make_inputs(folder: Path, dtype: torch.dtype) -> None:
    """The files that the commands read: four models of Stable Diffusion's layout."""
    write_safetensors(folder / "sd.safetensors", procedural(dtype))
    state = read_checkpoint(folder / "sd.safetensors")
    write_safetensors(folder / "custom.safetensors", scaled(state, 1.1, dtype))
    write_safetensors(folder / "inpainting.safetensors", scaled(inflate_input_conv(state, 9), 0.9, dtype))
    unet = {name: tensor for name, tensor in inflate_input_conv(state, 8).items() if name.startswith(UNET)}
    write_safetensors(folder / "iclight_fc.safetensors", scaled(to_diffusers(unet)["unet"], 0.01, torch.float16))


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak of RssAnon in MiB of a command line.

    Raises:
        SystemExit: it failed.
    """
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if found := re.search(r"RssAnon:\s+(\d+)", status.read_text()):
                peak = max(peak, int(found[1]))
            time.sleep(0.01)
        if process.returncode:
            assert process.stderr
            raise SystemExit(f"{' '.join(command)}\n{process.stderr.read()}")
    return time.perf_counter() - start, peak / 1024


def size(path: Path) -> float:
    """Of a file, or all files of a folder, in GB."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    sys.path.append(str(ROOT))  # for tests.procweights: of a script only its own folder is on the path
    folder: Path = args.folder.resolve()
    folder.mkdir(parents=True)
    make_inputs(folder, getattr(torch, args.dtype))
    sd, custom, inpainting, light = (
        folder / f"{name}.safetensors" for name in ("sd", "custom", "inpainting", "iclight_fc")
    )
    eight, out, diffusers = folder / "eight.safetensors", folder / "out.safetensors", folder / "diffusers"

    def row(what: str, output: Path | None, script: str, *arguments: object, remove: bool = True) -> None:
        seconds, peak = measured([sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)])
        written = f"{size(output):.2f} GB" if output else ""
        print(f"| {what} | {written} | {peak:.0f} MiB | {seconds:.0f} s |", flush=True)
        if output and remove:
            (shutil.rmtree if output.is_dir() else Path.unlink)(output)

    modify, merge, convert = "modify_checkpoints.py", "merge_checkpoints.py", "convert_checkpoint.py"
    print(f"| {args.dtype} | written | peak | time |\n| --- | --- | --- | --- |")
    try:
        row("nothing: start and `--help`", None, merge, "--help")
        row("inflate 4 → 9", out, modify, sd, out)
        row("inflate 4 → 12", out, modify, sd, out, "--in-channels", 12)
        row("inflate 4 → 9, to `.ckpt`", folder / "out.ckpt", modify, sd, folder / "out.ckpt")
        row("inflate 4 → 8", eight, modify, sd, eight, "--in-channels", 8, remove=False)
        row("offset by IC-Light (float16, diffusers' names)", out, merge, "offset", eight, light, out)
        eight.unlink()
        row("add difference", out, merge, "add-difference", inpainting, custom, sd, out)
        row("add difference, `--dry-run`", None, merge, "add-difference", inpainting, custom, sd, out, "--dry-run")
        row("weighted sum", out, merge, "weighted-sum", sd, custom, out)
        custom.unlink()
        row("to diffusers", diffusers, convert, sd, diffusers, "--to", "diffusers", remove=False)
        row("inflate that folder 4 → 9", folder / "nine", modify, diffusers, folder / "nine")
        row("to original", out, convert, diffusers, out, "--to", "original")
        row("inspect", None, "inspect_checkpoint.py", sd)
        row("inspect, `--header-only`", None, "inspect_checkpoint.py", sd, "--header-only")
        row("inspect, `--scan`", None, "inspect_checkpoint.py", sd, "--scan")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
