"""Measure memory and time of the checkpoint tools on full-size files, whose weights are a function of their names.

    python benchmarks/checkpoints.py FOLDER              # float32: FOLDER needs 22 GB
    python benchmarks/checkpoints.py FOLDER --dtype float16

Writes Stable Diffusion v1-4 and three models derived from it (custom, inpainting, IC-Light offset) to FOLDER, and runs
each command line in its own process. The reported peak is that of RssAnon, the memory that a process cannot give back,
sampled 100 times a second from /proc (Linux only). Pages of mapped files do not count: the system drops them when it
needs room. Outputs are removed at once, inputs at the end.
"""

from __future__ import annotations

import argparse
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
from ldm.checkpoint.io import read_checkpoint, write_safetensors
from ldm.checkpoint.keys import EMA, SCHEDULE_BUFFERS, UNET
from ldm.checkpoint.merge import inflate_input_conv
from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule

ROOT = Path(__file__).parent.parent


def write_procedural(path: Path, dtype: torch.dtype) -> None:
    """Write Stable Diffusion v1-4 with weights by name, averaged copies left out."""
    from tests.procweights import layout, weight

    shapes = {name: tensor.shape for name, tensor in layout("sd_v1_4").items() if not name.startswith(EMA)}
    fixed: dict[str, Tensor] = dict(make_schedule(ScheduleConfig()).buffers())
    fixed |= {name: torch.arange(shape[-1])[None] for name, shape in shapes.items() if name.endswith("position_ids")}
    names = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()} | fixed
    pieces = ((name, fixed[name] if name in fixed else weight(name, shapes[name]).to(dtype)) for name in names)
    write_safetensors(path, names, pieces=pieces)


def write_scaled(path: Path, state: dict[str, Tensor], factor: float, dtype: torch.dtype) -> None:
    """Write a model whose weights are this one's times a factor."""
    scaled = {name for name, tensor in state.items() if tensor.is_floating_point() and name not in SCHEDULE_BUFFERS}
    layout = {name: tensor.to("meta", dtype) if name in scaled else tensor for name, tensor in state.items()}
    pieces = ((n, (factor * t.float()).to(dtype) if n in scaled else t) for n, t in state.items())
    write_safetensors(path, layout, pieces=pieces)


def make_inputs(folder: Path, dtype: torch.dtype) -> None:
    """Write the files that the commands read: four models of Stable Diffusion's layout."""
    write_procedural(folder / "sd.safetensors", dtype)
    state = read_checkpoint(folder / "sd.safetensors")
    write_scaled(folder / "custom.safetensors", state, 1.1, dtype)
    write_scaled(folder / "inpainting.safetensors", inflate_input_conv(state, 9), 0.9, dtype)
    unet = {name: tensor for name, tensor in inflate_input_conv(state, 8).items() if name.startswith(UNET)}
    write_scaled(folder / "iclight_fc.safetensors", to_diffusers(unet)["unet"], 0.01, torch.float16)


def measured(command: list[str]) -> tuple[float, float]:
    """Run a command line; return its seconds and the peak of its RssAnon in MiB.

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
    """Return the size of a file, or of all files in a folder, in GB."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    sys.path.append(str(ROOT))  # for tests.procweights; Python adds only the script's own folder
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
