"""The batch script, with stand-ins for SLURM's commands: what it starts, and when it queues itself again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ldm.training.cli import parse_args

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (138, True), (2, False), (143, False)])
def test_requeue(status: int, requeued: bool, tmp_path: Path) -> None:
    for name, code in (("srun", status), ("scontrol", 0)):
        command = tmp_path / name
        command.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\nexit {code}\n')
        command.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "a b.yaml", "WEIGHTS": "w.ckpt"}
    env |= {"SLURM_JOB_NAME": "pbe", "SLURM_JOB_ID": "42", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(["bash", str(SCRIPT), "data.batch_size=4"], env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr

    _, python, program, *words = (tmp_path / "srun.txt").read_text().splitlines()
    assert (python, program) == ("python", "main.py")
    args = parse_args(words)
    assert (args.base, args.pretrained_model, args.resume, args.name) == (["a b.yaml"], "w.ckpt", "auto", "pbe-42")
    assert {"trainer.devices=8", "trainer.num_nodes=2", "data.batch_size=4"} <= set(args.overrides)

    asked = tmp_path / "scontrol.txt"
    assert asked.is_file() is requeued
    if requeued:
        assert asked.read_text().split() == ["requeue", "42"]
