"""Measure how a dataset of Open Images' size opens: 1.7 million images, 14.6 million boxes.

    python benchmarks/index.py

Writes a synthetic index, opens it in new processes and reads random entries. Reports seconds and peak memory, and the
memory of a process that imports the same modules without opening an index.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data.box_index import AnnotatedImage, IndexWriter, Object

OPEN = """
import json, resource, sys, time
import numpy as np
from ldm.data.box_dataset import BoxDataset, SampleRecipe
from ldm.data.box_index import BoxIndex

start = time.perf_counter()
found = 0
if sys.argv[1:]:
    dataset = BoxDataset(BoxIndex(sys.argv[1]), SampleRecipe(512, 224))
    opened = time.perf_counter() - start
    for i in np.random.default_rng(0).integers(0, len(dataset), 10_000).tolist():
        found += len(dataset.index[i].boxes)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
seconds = opened if found else 0.0
rate = 10_000 / (time.perf_counter() - start - seconds) if found else 0.0
memory = [line.split() for line in open("/proc/self/smaps_rollup")]
private = sum(int(words[1]) for words in memory if words[0] == "Private_Dirty:") / 1024  # mapped pages are shared
print(json.dumps({"seconds": seconds, "peak": peak, "private": private, "entries_per_s": rate}))
"""


def write(path: Path, images: int, boxes: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(boxes - images, np.full(images, 1 / images)) + 1
    writer = IndexWriter(path, {"images": "."})
    for i, count in enumerate(tqdm(counts.tolist(), desc="writing", unit=" images")):
        corner = (i * 7919) % 400
        name = f"train_{i % 16:x}/{i * 2654435761 % 2**64:016x}.jpg"
        found = ((corner, corner // 2, corner + 300 + k, corner // 2 + 250) for k in range(count))
        writer.add(AnnotatedImage(name, (1024, 768), [Object(box) for box in found]))
    writer.write()


def measure(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", OPEN, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_700_000)
    parser.add_argument("--boxes", type=int, default=14_600_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.safetensors"
        start = time.perf_counter()
        write(path, args.images, args.boxes)
        print(f"written in {time.perf_counter() - start:.0f} s, {path.stat().st_size / 2**20:.0f} MiB")
        bare = measure()
        for _ in range(3):
            got = measure(str(path))
            print(
                f"opened in {got['seconds'] * 1000:.1f} ms; after 10,000 entries ({got['entries_per_s']:,.0f}/s) "
                f"peak {got['peak']:.0f} MiB, private {got['private']:.0f} MiB; without an index {bare['peak']:.0f} "
                f"and {bare['private']:.0f} MiB"
            )


if __name__ == "__main__":
    main()
