"""Writing files and folders whole or not at all, and checking them; the error class for bad input."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Input that cannot be used; the message names it and says what to do. Command lines print it in one line."""


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; see `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, indented, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of `write_json`; {} if there is no such file, UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path}: damaged; delete it, or make its folder again") from None


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`, in a new folder if need be; rename it to `path` if the block succeeds.

    With `sync` the finished file is on the disk before it gets its name. If the disk is full or the folder not
    writable, an OSError is raised and an existing file at `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the umask gives; some libraries replace the file by a private one
        yield partial
        os.chmod(partial, mode)
        if sync:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and put it in the place of `path` (or its link's target) if all succeeds.

    Raises OSError, like `atomic_write`; an existing folder at `path` then stays as it was.
    """
    path = Path(path).resolve()
    partial, before = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("partial", "before"))
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


def verify_zip(path: str | Path) -> str:
    """Compare the checksums of a zip file, such as `torch.save` writes; return what is wrong, "" if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return f"bad checksum of {damaged}" if damaged else ""
