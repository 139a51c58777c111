"""Writing files so that a reader never finds half of one, and telling when one is."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


class UserError(ValueError):
    """An input that cannot be used: the message names it and says what to do. Command lines print it in one line."""


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; see `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block succeeds and vanishes when it does not.

    The folder is made where it is missing. With `sync` the finished file is on the disk before it takes its name.

    Raises:
        OSError: the disk is full or the folder is not writable; what was at `path` before is still there.
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
    """As `atomic_write`, for a folder: what was at `path` goes away once the new one is complete.

    Of a link to a folder the folder is replaced, and the link stays.

    Raises:
        OSError: the disk is full or the parent is not writable; what was at `path` before is still there.
    """
    path = Path(path).resolve()
    partial, before = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("partial", "before"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, before)
        os.replace(partial, path)
    except shutil.Error as error:  # of copytree: a list of what was not copied, from where, to where, and why
        raise OSError(f"{path}: could not be written, nothing was changed: {error.args[0][0][-1]}") from error
    finally:
        if before.exists() and not path.exists():
            os.replace(before, path)
        for leftover in (before, partial):
            shutil.rmtree(leftover, ignore_errors=True)


def verify_zip(path: str | Path) -> str:
    """What is wrong with a zip file, such as `torch.save` writes; nothing if every byte is as it was written.

    Reads all of it: PyTorch's own reader checks no checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            total = sum(info.file_size for info in infos)
            with tqdm(total=total, desc=f"checking {Path(path).name}", unit="B", unit_scale=True, delay=3) as bar:
                for info in infos:
                    with archive.open(info) as member:
                        while block := member.read(2**22):
                            bar.update(len(block))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""
