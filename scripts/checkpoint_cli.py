"""Shared by the command lines over checkpoints: checks of the output, folders written whole, errors, provenance."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path

from ldm import __version__
from ldm.checkpoint.convert import STEMS, weight_files
from ldm.checkpoint.io import CheckpointError, sha256_file
from ldm.files import UserError, read_json

# Files of a diffusers folder besides its components' folders and a UNet's weights.
_FILES = ("model_index.json", "config.json", "README.md", "LICENSE", ".gitattributes")


def check_output(output: Path, inputs: Collection[Path], *, overwrite: bool, endings: Sequence[str] = ()) -> None:
    """Refuse an output before anything is read: one that is an input, lies in one, or must not be replaced.

    `endings` are those that a file may have, none if the output is a folder of diffusers.
    """
    if endings and output.suffix not in endings:
        raise CheckpointError(f"{output}: got extension {output.suffix!r}, expected {' or '.join(endings)}")
    if not endings and output.suffix in (".safetensors", ".ckpt", ".bin"):
        raise CheckpointError(f"{output}: the result is a folder, and this is the name of a file; choose another")
    for path in inputs:
        ours, theirs = output.resolve(), path.resolve()
        if ours == theirs or (output.exists() and path.exists() and output.samefile(path)):
            raise CheckpointError(f"{output}: the output would replace the input; choose another name")
        if theirs in ours.parents or ours in theirs.parents:
            raise CheckpointError(f"{output}: one of input and output lies in the other; choose another place")
    if not output.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{output}: exists already; pass --overwrite to replace it")
    if output.is_dir() != (not endings):
        raise CheckpointError(f"{output}: is a {'folder' if endings else 'file'}; choose another name")
    if output.is_dir():
        _check_replaceable(output)


def _check_replaceable(folder: Path) -> None:
    """Refuse any folder but one of diffusers: a mistyped name must not delete the user's own folder."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: is the current folder or lies above it; name one inside or beside it")
    entries = sorted(folder.iterdir())
    descriptions = [read_json(path, {}) for path in entries if path.name in ("config.json", "model_index.json")]
    if entries and not any("_class_name" in description for description in descriptions):
        raise CheckpointError(f"{folder}: is not a diffusers folder, so it is not replaced; choose another name")
    parts = {name for description in descriptions for name in description}  # a pipeline's index names its folders
    for path in entries:
        known = parts if path.is_dir() else _FILES
        if path.name not in known and not (path.is_file() and path.name.startswith(STEMS["unet"])):
            raise CheckpointError(
                f"{folder}: holds {path.name}, which is no part of a diffusers folder, so it is not replaced; move it "
                "away, or choose another name"
            )


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Make a command line print errors as a line and return 2, or 130 if it was interrupted."""

    @wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            return 130

    return guarded


@contextmanager
def prefix_errors(path: Path) -> Iterator[None]:
    """Put the file's name before the errors of pure functions on its tensors."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which takes the place of `path`, or its link's target, if the block succeeds.

    Raises OSError, like `atomic_write`; an existing folder at `path` then stays as it was.
    """
    path = Path(path).resolve()
    partial, before = (path.with_name(f".{uuid.uuid4().hex[:12]}.{what}") for what in ("partial", "before"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, before)
        os.replace(partial, path)
    except shutil.Error as error:  # of copytree: a list of (source, target, reason)
        raise OSError(f"{path}: could not be written, nothing was changed: {error.args[0][0][-1]}") from error
    finally:
        if before.exists() and not path.exists():
            os.replace(before, path)
        for leftover in (before, partial):
            shutil.rmtree(leftover, ignore_errors=True)


def provenance(script: str, argv: Sequence[str] | None, inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return the metadata of an output: the inputs' names and SHA-256 by role, the command, versions.

    Of a folder of diffusers, the known components are recorded.
    """
    record = {"command": shlex.join([f"scripts/{script}.py", *(sys.argv[1:] if argv is None else argv)])}
    for role, path in inputs.items():
        record[role] = path.name
        if path.is_dir():
            folders = [path / name for name in STEMS if (path / name).is_dir()] or [path]
            files = [file for folder in folders for file in weight_files(folder)]
            record |= {f"{role}_sha256 {file.relative_to(path)}": sha256_file(file) for file in files}
        else:
            record[f"{role}_sha256"] = sha256_file(path)
    versions = {"paint-by-example": __version__, "python": platform.python_version(), "torch": version("torch")}
    record["versions"] = json.dumps(versions)
    return record
