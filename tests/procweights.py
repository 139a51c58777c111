"""Weights and inputs as a function of their names, the same on every platform and in every library.

A full-size model has 5 GB of weights; its reference outputs fit in a megabyte if both sides can make the weights.
Element i of the tensor called `name` is made from splitmix64's output number i + 1 for the seed crc32(name) * 2^32
(added, not multiplied by the increment, to the counter), of which the upper 24 bits become u in [-1, 1).

Source: Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 16 (the mixing).
"""

from __future__ import annotations

import csv
import json
import lzma
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
_BLOCK = 1 << 15  # elements at a time: arrays of 256 KiB, which stay in the cache


def uniform(name: str, numel: int) -> Tensor:
    """(numel,) float32 in [-1, 1)."""
    values = np.empty(numel, np.float32)
    base = np.uint64(zlib.crc32(name.encode()) << 32)
    for start in range(0, numel, _BLOCK):
        stop = min(start + _BLOCK, numel)
        z = np.arange(start + 1, stop + 1, dtype=np.uint64)
        z += base
        z *= np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around silently
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        z ^= z >> np.uint64(31)
        values[start:stop] = (z >> np.uint64(40)).astype(np.float32)
    values *= np.float32(2.0**-23)
    values -= np.float32(1)
    return torch.from_numpy(values)


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """The tensor that the published checkpoint's layout calls `name`: scaled so that signals keep their size."""
    u = uniform(name, math.prod(shape)).reshape(tuple(shape))
    if name.endswith("class_embedding") or name == "learnable_vector":
        return u
    if len(shape) >= 2:
        return u * float(np.float32(0.8 * math.sqrt(3.0 / math.prod(shape[1:]))))
    if name.endswith(".weight"):  # of a norm
        return u * float(np.float32(0.2)) + 1.0
    return u * float(np.float32(0.1))


def normal(name: str, shape: Sequence[int]) -> Tensor:
    """Inputs of the reference: float32 from a standard normal distribution (Box and Muller's)."""
    a, b = ((uniform(f"{name}/{part}", math.prod(shape)).double().numpy() + 1) / 2 for part in "ab")
    values = np.sqrt(-2 * np.log(np.maximum(a, 1e-30))) * np.cos(2 * np.pi * b)
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def read_golden(name: str) -> dict[str, Tensor]:
    """The tensors of `golden/NAME.safetensors.xz`."""
    return load(lzma.decompress((GOLDEN / f"{name}.safetensors.xz").read_bytes()))


def layout(name: str) -> dict[str, Tensor]:
    """A state dict that the reference wrote, as tensors without memory.

    `official` is the published checkpoint, `sd_v1_4` Stable Diffusion's, `tiny` that of configs/tiny.yaml.
    """
    with lzma.open(GOLDEN / f"{name}_state_dict.tsv.xz", "rt", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {
            row["name"]: torch.empty(json.loads(row["shape"]), dtype=getattr(torch, row["dtype"]), device="meta")
            for row in rows
        }


def write_tiny_model(path: Path) -> Path:
    """Write the tiny model's checkpoint as the reference wrote it, and return the path."""
    golden = read_golden("tiny_golden")
    state = {}
    for name, tensor in layout("tiny").items():
        if not tensor.is_floating_point():
            state[name] = torch.arange(tensor.shape[1])[None]  # position_ids
        elif f"schedule/{name}" in golden:
            state[name] = golden[f"schedule/{name}"]
        else:
            state[name] = weight(name, tensor.shape)
    save_file(state, path)
    return path
