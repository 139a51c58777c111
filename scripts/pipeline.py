"""Run the scripts of this project one after another; a stopped pipeline continues where it stopped.

One file per step, in the pipeline's state folder, records the command and whether it has finished.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.files import UserError, write_text

ROOT = Path(__file__).resolve().parent.parent
NEWEST = "*"  # in a command: the newest run of a folder of runs


@dataclass(frozen=True)
class Step:
    """Describe one command.

    Attributes:
        name: unique name, also of the state file.
        words: script and arguments; `FOLDER/*/FILE` stands for FILE of the newest run in FOLDER.
        runs: for a training step, the folder of its runs; the newest unfinished run is resumed.
    """

    name: str
    words: tuple[str, ...]
    runs: Path | None = None

    def __str__(self) -> str:
        words = (word if NEWEST in word else shlex.quote(word) for word in self.words)
        return f"{shlex.quote(sys.executable)} {' '.join(words)}"


def script_path(name: str) -> str:
    """Return the path of a script, for `Step.words`."""
    return str(ROOT / "scripts" / f"{name}.py")


def in_newest_run(runs: Path, file: str) -> str:
    """Return the argument that names a file of the newest run in `runs`; see `Step.words`."""
    return f"{runs}/{NEWEST}/{file}"


def cli_args(**options: object) -> tuple[str, ...]:
    """Return the options as command-line arguments; None leaves an option out."""
    words = {f"--{key.replace('_', '-')}": str(value) for key, value in options.items() if value is not None}
    return tuple(word for pair in words.items() for word in pair)


def run_pipeline(steps: Sequence[Step], memory: Path, *, dry_run: bool = False) -> None:
    """Run the steps in order, or print their commands if `dry_run`."""
    if dry_run:
        print("\n".join(f"# {step.name}\n{step}" for step in steps))
        return
    for step in steps:
        run_step(step, memory)


def run_step(step: Step, memory: Path) -> None:
    """Run a step unless it has finished; resume an unfinished training run.

    Args:
        memory: folder of the state files.

    Raises:
        UserError: the step failed, or was started with a different command.
    """
    path = memory / f"{step.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if before and before["command"] != list(step.words):
        raise UserError(
            f"{path}: {step.name} was started as `{shlex.join(before['command'])}`, not as `{shlex.join(step.words)}`; "
            "choose another --out, or remove this file and the results of the step"
        )
    if before.get("finished"):
        print(f"{step.name}: already finished", flush=True)
        return
    save_state(path, step, finished=False)
    run = newest_run(step.runs) if step.runs else None
    command = [step.words[0], "--resume", str(run)] if run else [resolve(word) for word in step.words]
    print(f"{step.name}: {shlex.join(command)}", flush=True)
    status = execute(command)
    if status != 0:
        raise UserError(f"{step.name}: ended with status {status}; run the same command again to continue from there")
    save_state(path, step, finished=True)


def save_state(path: Path, step: Step, *, finished: bool) -> None:
    write_text(path, json.dumps({"command": step.words, "finished": finished}, indent=2) + "\n")


def newest_run(runs: Path) -> Path | None:
    """Return the newest run directory that holds a checkpoint."""
    checkpoints = sorted(runs.glob("*/checkpoints/last.ckpt"))  # names of runs start with their date
    return checkpoints[-1].parents[1] if checkpoints else None


def resolve(word: str) -> str:
    """Replace the placeholder of the newest run by its directory."""
    runs, star, file = word.partition(f"/{NEWEST}/")
    if not star:
        return word
    run = newest_run(Path(runs))
    if run is None:
        raise UserError(
            f"{runs}: holds no run with a checkpoint; remove the state file of the training step to train again"
        )
    return str(run / file)


def execute(command: list[str]) -> int:
    """Run a script of this project and return its exit status; SIGINT and SIGTERM are left to the script."""
    process = subprocess.Popen([sys.executable, *command])
    # Ctrl-C reaches both processes, SIGTERM only this one. Training saves a checkpoint before it ends.
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
