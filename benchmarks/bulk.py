"""Measure edits per second of a job table against one process per row, and memory over a thousand rows.

    python benchmarks/bulk.py
    python benchmarks/bulk.py --config configs/v1.yaml --checkpoint model.ckpt --bench test_bench --device cuda

The rows repeat the items of a benchmark with further seeds. Each figure is measured in its own process and includes
start-up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ldm.editing.editor import BUNDLED_MODEL
from ldm.evaluation.cocoee import Bench

ROOT = Path(__file__).parent.parent


def timed(*words: str) -> tuple[float, float]:
    """Run `inference.py`; return its seconds and its peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "inference.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"error: inference.py {' '.join(words)}: ended with status {os.waitstatus_to_exitcode(status)}"
        )
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the bundled model")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument(
        "--bench", type=Path, default=BUNDLED_MODEL / "bench", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--rows", type=int, default=96, help="default: %(default)s")
    parser.add_argument(
        "--long", type=int, default=1000, metavar="ROWS", help="rows of the memory measurement; 0 skips it"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model = [*(["--checkpoint", args.checkpoint] if args.checkpoint else []), "--device", args.device]
    model += ["--config", args.config] if args.config else []
    bench = Bench(args.bench)
    table = Table("rows", "batch", "steps", "seconds", "edits per second", "peak memory, MiB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def rows(count: int) -> str:
            lines = ["name,scene,mask,reference,seed"]
            for k in range(count):
                scene, mask, exemplar = (path.absolute() for path in bench.paths(bench.ids[k % len(bench)]))
                lines.append(f"{k},{scene},{mask},{exemplar},{k}")
            (folder / "jobs.csv").write_text("\n".join(lines))
            return str(folder / "jobs.csv")

        def add(count: int, batch: int, steps: int) -> None:
            words = ["--jobs", rows(count), "--batch-size", str(batch), "--steps", str(steps), *model]
            seconds, memory = timed(*words, "--outdir", str(folder / f"{count}-{batch}-{steps}"))
            table.add_row(*map(str, (count, batch, steps)), f"{seconds:.1f}", f"{count / seconds:.2f}", f"{memory:.0f}")

        scene, mask, exemplar = map(str, (path.absolute() for path in bench.paths(bench.ids[0])))
        files = ["--image", scene, "--mask", mask, "--reference", exemplar, "--outdir", str(folder / "one")]
        seconds, memory = min(timed(*files, "--steps", "20", *model) for _ in range(2))
        table.add_row("1", "one process each", "20", f"{seconds:.1f}", f"{1 / seconds:.2f}", f"{memory:.0f}")
        for batch in (1, 4, 16):
            add(args.rows, batch, 20)
        if args.long:
            add(args.long // 10, 16, 2)
            add(args.long, 16, 2)
    Console().print(table)


if __name__ == "__main__":
    main()
