#!/usr/bin/env python
"""Use a GPU for a few minutes: test, measure the speed, train and evaluate a small model; see docs/gpu.md.

    python scripts/gpu_day.py --fetch-wheels dataset/wheels                     # beforehand, with a network
    python scripts/gpu_day.py --check                                           # what is missing, what it weighs
    python scripts/gpu_day.py --minutes 12 --out results/day                    # on the machine with the GPU
    python scripts/gpu_day.py --minutes 5 --out results/day --tiny --device cpu # a rehearsal

A step that fails or exceeds its time is logged, and the next one follows. OUT gets `day.log`, a line per step, and
archives in parts of at most 16 MiB, eight files at most: `day` with the steps' output, tables, figures and grids,
`model` with the weights, `edits` with the edited benchmark. Everything else stays in --work.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing it

from ldm.files import UserError, write_text
from scripts import wheels
from scripts.pipeline import ROOT, Step, cli_args, newest_run, resolve, script_path

MATERIAL, WHEELS = ROOT / "dataset" / "material.tar.gz", ROOT / "dataset" / "wheels"
STAGES = ("tests", "speed", "train")
TRAVELS = 60 * 2**20  # bytes that may go to the machine: tracked files, wheels and material
FILES, FILE_BYTES = 8, 16 * 2**20  # that may come back

# Shares of the day. What a step leaves over goes to the training of the diffusion model.
MOST = {"environment": 0.05, "tests": 0.16, "speed": 0.16, "first-stage": 0.14, "cache": 0.08}
COMPOSED_BY = 0.45  # tests and speed table are through by a third
PACKED_FROM = 0.97
EVALUATION = 100  # seconds before that: export, edits, metrics
SAVING = 20  # seconds between SIGTERM and SIGKILL: training saves a checkpoint

SCENES_PER_CORE = 12  # of 256 px in a second
COMPOSING = 0.08  # share of the day, beside those of tests and speed table
MOST_SCENES = 40_000

BASELINES = ("sample-copy-paste", "sample-seamless-clone", "sample-opencv-inpaint")  # need no GPU
EDITS = ("sample-mini-ours", "sample-mini", "sample-bundled", "sample-null-token")
TINY = (
    "model.image_size=32 model.first_stage.ch=8 model.first_stage.ch_mult=[1,1] model.first_stage.norm_groups=0 "
    "model.unet.model_channels=16 model.unet.num_heads=1 model.unet.context_dim=32 "
    "model.exemplar_encoder.image_size=32 model.exemplar_encoder.hidden_size=32 data.batch_size=4 "
    "data.val_batch_size=4 data.num_workers=0 data.max_val_samples=4 logging.num_images=2 logging.image_every=10 "
    "logging.sampler_steps=2 trainer.log_every_n_steps=2"
)

TINY_STEPS = 12


class Day:
    """The clock, the log and the processes of a day.

    Args:
        minutes: from now to the end.
        logs: folder for the steps' output, NAME.log.
        log: file with a line per step: its start and duration in seconds, its name, and how it ended.
    """

    def __init__(self, minutes: float, logs: Path, log: Path) -> None:
        self._start, self.total, self._logs = time.monotonic(), 60 * minutes, logs
        for folder in (logs, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def note(self, name: str, status: str, since: float | None = None) -> None:
        """Write a line of the log."""
        now = self.now
        since = now if since is None else since
        line = f"{since:7.1f} s {now - since:7.1f} s  {name:<22} {status}"
        with self._lock:
            print(line, flush=True)
            self._log.write(line + "\n")

    def run(self, step: Step, until: float, enough: Callable[[], bool] | None = None) -> bool:
        """Run a step until it ends, until it is `enough`, or until that time; return whether it did not fail.

        Args:
            until: seconds since the start. SIGTERM comes up to `SAVING` seconds earlier, SIGKILL then.
        """
        since = self.now
        if self._stopped or until - since < 1:
            self.note(step.name, "left out: no time")
            return False
        try:
            command = [sys.executable, *(resolve(word) for word in step.words)]
        except UserError as error:
            self.note(step.name, f"left out: {error}")
            return False
        output, ended = self._logs / f"{step.name}.log", ""
        with output.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        self._running.add(process)
        terminate_at = until - min(SAVING, 0.2 * (until - since))
        while process.poll() is None and self.now < until:
            if not ended and ((enough and enough()) or self.now > terminate_at):
                ended = "ended: out of time" if self.now > terminate_at else "ended: enough"
                process.terminate()
            time.sleep(0.1)
        _kill_group(process)  # its workers too
        self._running.discard(process)
        status = process.wait()
        failure = f"failed with status {status}: {_last_line(output)}"
        self.note(step.name, ended or ("ok" if status == 0 else failure), since)
        return status == 0 or bool(ended)

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        self._stopped = True
        for process in list(self._running):
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "no output")


# ---- the stages ----


def spend(day: Day, args: argparse.Namespace, work: Path) -> None:
    """Test and measure on the GPU while the cores compose scenes, then do the other steps of scripts/make_mini.py."""
    environment(work / "environment.txt")
    day.run(Step("environment", ("-m", "torch.utils.collect_env")), day.now + MOST["environment"] * day.total)
    steps = {} if "train" in args.skip else plan(args, work)
    with ThreadPoolExecutor(1) as cores:
        composed = cores.submit(day.run, steps["compose"], COMPOSED_BY * day.total) if steps else None
        for name in BASELINES if steps else ():
            cores.submit(day.run, steps[name], PACKED_FROM * day.total)
        if "tests" not in args.skip:
            words = ("-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-p", "no:cacheprovider")
            day.run(Step("tests", words), day.now + MOST["tests"] * day.total)
        if "speed" not in args.skip:
            seconds = round(0.9 * MOST["speed"] * day.total)
            words = (str(ROOT / "benchmarks" / "gpu.py"), *cli_args(out=work / "speed", seconds=seconds))
            words += ("--tiny", *cli_args(device=args.device)) if args.tiny else ()
            day.run(Step("speed", words), day.now + MOST["speed"] * day.total)
        if composed and composed.result():
            make_model(day, steps, TINY_STEPS if args.tiny else None)
    if steps:
        evaluate(day, steps, work)


def environment(path: Path) -> None:
    """Write down machine and packages."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [f"{platform.platform()}, Python {platform.python_version()}, {_cores()} cores, {memory:.1f} GiB"]
    lines += sorted(f"{package.name} {package.version}" for package in distributions())
    write_text(path, "\n".join(lines) + "\n")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def plan(args: argparse.Namespace, work: Path) -> dict[str, Step]:
    """Return the steps of scripts/make_mini.py for this machine, and one more with the bundled model's edits."""
    from omegaconf import OmegaConf  # which the wheels may bring

    from scripts import make_mini

    spare = max(1, _cores() - 3)  # what tests and speed table leave
    settings = ["trainer.max_epochs=null", "trainer.enable_progress_bar=false", "logging.checkpoint_every=2000"]
    settings += TINY.split() if args.tiny else [f"data.num_workers={min(12, spare)}"]
    if args.device == "cpu":
        settings += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true"]
    seconds = 60 * args.minutes * (COMPOSING + sum(MOST[name] for name in ("tests", "speed") if name not in args.skip))
    numbers = {"count": min(MOST_SCENES, round(SCENES_PER_CORE * seconds * spare)), "draws": 3}
    if args.tiny:
        numbers = {"count": 40, "draws": 1, "bench": 4}
    out, overlay = work / "mini", work / "day.yaml"
    write_text(overlay, OmegaConf.to_yaml(OmegaConf.from_dotlist(settings)))
    base, larger, first_stage = (str(ROOT / f"configs/mini{kind}.yaml") for kind in ("", "-gpu", "-autoencoder"))
    words = [
        *cli_args(out=out, material=args.material, workers=spare, device=args.device, **numbers),
        *("--base", base, larger, str(overlay), "--first-stage", first_stage, str(overlay)),
    ]
    steps = {step.name: step for step in make_mini.plan(make_mini.build_parser().parse_args(words))}
    bundled = cli_args(outdir=out / "results" / "bundled", protocol="ours", device=args.device)
    words = (script_path("inference_test_bench"), str(out / "scenes" / "bench"), *bundled)
    return steps | {"sample-bundled": Step("sample-bundled", words)}


def make_model(day: Day, steps: Mapping[str, Step], max_steps: int | None) -> None:
    """Train both stages, each for `max_steps` at most, export the weights and edit the benchmark."""
    trained_by = PACKED_FROM * day.total - min(EVALUATION, 0.45 * day.total)
    first_stage_by = min(day.now + MOST["first-stage"] * day.total, trained_by)
    ready = train(day, steps["first-stage"], first_stage_by, max_steps)
    ready = ready and day.run(steps["cache"], min(day.now + MOST["cache"] * day.total, trained_by))
    if ready and train(day, steps["train"], trained_by, max_steps):
        day.run(steps["export"], PACKED_FROM * day.total)
        with ThreadPoolExecutor(len(EDITS)) as beside:  # small models do not fill a GPU
            beside.map(lambda name: day.run(steps[name], PACKED_FROM * day.total), EDITS)


def train(day: Day, step: Step, until: float, max_steps: int | None) -> bool:
    """Train for the time that there is; return whether there is a checkpoint.

    A cosine schedule needs its length beforehand. So the run begins with a schedule without an end, is stopped when
    its speed is known, and goes on with the number of steps that fit. The first steps are the warm-up in either case.
    """
    assert step.runs is not None
    runs, since = step.runs, day.now
    endless = Step(f"{step.name}-begin", (*step.words, "trainer.max_steps=100000000"))
    day.run(endless, until, enough=lambda: len(step_seconds(runs)) >= 2)
    run, measured = newest_run(runs), step_seconds(runs)
    if run is None or not measured:
        return run is not None
    done, seconds = measured[-1]
    again = day.now - since - done * seconds  # imports, the first batch and saving, which come again
    steps = int(0.9 * (until - day.now - again) / seconds)  # a tenth for validation and grids
    day.note(step.name, f"{seconds:.4f} s a step: {max(steps, 0)} more fit")
    steps = min(steps, max_steps or steps)
    if steps > 0:
        limits = (f"trainer.max_steps={done + steps}", f"trainer.val_check_interval={max(1, steps // 8)}")
        day.run(Step(step.name, (step.words[0], "--resume", str(run), *limits)), until)
    return True


def step_seconds(runs: Path) -> list[tuple[int, float]]:
    """Return (steps done, seconds per step) as often as the newest run has logged them."""
    files = sorted(runs.glob("*/metrics.csv"))
    if not files:
        return []
    with files[-1].open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/step_s")]
    return [(int(row["step"]) + 1, float(row["train/step_s"])) for row in rows]


def evaluate(day: Day, steps: Mapping[str, Step], work: Path) -> None:
    """Measure the runs that are there, and make the page."""
    results = work / "mini" / "results"
    there = [name for name in (*EDITS, *BASELINES) if (results / name.removeprefix("sample-") / "results").is_dir()]
    folders = [str(results / name.removeprefix("sample-")) for name in there]
    words = [word for word in steps["evaluate"].words if not word.startswith(f"{results}/")]
    words[2:2] = folders  # after script and bench
    words.insert(words.index("--metrics") + 1, "copying")
    day.run(Step("evaluate", tuple(words)), PACKED_FROM * day.total)
    day.run(steps["report"], PACKED_FROM * day.total)


# ---- what comes back ----


def pack(work: Path, out: Path) -> list[str]:
    """Write the archives to `out`, the more important ones first; return the names of those that did not fit."""
    mini = work / "mini"
    runs = [
        path for stage in ("first-stage", "train") for path in (mini / stage).glob("*/*") if path.name != "checkpoints"
    ]
    small = [work / "logs", work / "environment.txt", work / "speed", mini / "metrics.json", mini / "report", *runs]
    edits = [*(mini / "results").glob("*/results"), mini / "scenes" / "bench"]
    archives = {"day": small, "model": [mini / "model"], "edits": edits}
    left_out, free = [], FILES - 1  # day.log is there already
    for name, paths in archives.items():
        whole = work / f"{name}.tar.gz"
        with tarfile.open(whole, "w:gz", compresslevel=3) as archive:
            for path in filter(Path.exists, paths):
                archive.add(path, path.relative_to(work))
        count = -(-whole.stat().st_size // FILE_BYTES)
        if count > free:
            left_out.append(name)
            continue
        free -= count
        with whole.open("rb") as file:
            for index in range(count):
                (out / f"{whole.name}.{index}").write_bytes(file.read(FILE_BYTES))
    return left_out


# ---- beforehand ----


def check(args: argparse.Namespace) -> int:
    """Print what travels, and what is missing; return 1 if something is, or if it is too much."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / os.fsdecode(name) for name in tracked.split(b"\0") if name]
    parts = {"tracked files": files, "wheels": list(args.wheels.glob("*.whl")), "material": [args.material]}
    sizes = {name: sum(path.stat().st_size for path in paths if path.is_file()) for name, paths in parts.items()}
    for name, size in (sizes | {"together": sum(sizes.values()), "limit": TRAVELS}).items():
        print(f"{name:<14} {size / 2**20:6.1f} MiB")
    faults = [f"{args.wheels}: no wheel of {name}; do --fetch-wheels" for name in wheels.missing(args.wheels)]
    faults += [] if args.material.is_file() else [f"{args.material}: missing; make it with scripts/scenes/pack.py"]
    faults += [] if sum(sizes.values()) <= TRAVELS else ["too much: pack the material smaller"]
    print("\n".join(faults) or "nothing is missing")
    return 1 if faults else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--minutes", type=float, default=12, help="for everything (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="folder for what comes back")
    add("--work", type=Path, metavar="DIR", help="folder for everything else (default: a temporary one, removed)")
    add("--skip", nargs="+", default=[], choices=STAGES, help="stages to leave out")
    add("--material", type=Path, default=MATERIAL, metavar="FILE", help="default: dataset/material.tar.gz")
    add("--wheels", type=Path, default=WHEELS, metavar="DIR", help="default: dataset/wheels")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    add("--tiny", action="store_true", help="a rehearsal with tiny models and few scenes")
    add("--check", action="store_true", help="say what is missing and what travels, and stop")
    add("--fetch-wheels", type=Path, metavar="DIR", help="download the wheels that such a machine lacks, and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.fetch_wheels:
            wheels.fetch(args.fetch_wheels)
            return 0
        if args.check:
            return check(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out is None:
        parser.error("give --out: where the results go")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device: got cuda, but PyTorch finds no GPU; rehearse with --tiny --device cpu")
    work = (args.work or Path(tempfile.mkdtemp(prefix="gpu-day-"))).resolve()
    args.material, args.out = args.material.resolve(), args.out.resolve()  # steps run in the checkout
    day = Day(args.minutes, work / "logs", args.out / "day.log")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        site = work / "site"
        since, names = day.now, wheels.unpack(args.wheels, site)
        day.note("wheels", ", ".join(names) or "nothing is missing", since)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(site), os.environ.get("PYTHONPATH", "")])
        spend(day, args, work)
    except KeyboardInterrupt:
        day.note("interrupted", "packing what there is")
    finally:
        day.stop()
        since, left_out = day.now, pack(work, args.out)
        day.note("pack", f"did not fit: {', '.join(left_out)}" if left_out else "ok", since)
    if args.work is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
