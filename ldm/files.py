"""Text, tables and JSON from any program; files written whole or not at all; the errors of bad input."""

import codecs
import csv
import io
import json
import os
import tempfile
import unicodedata
import uuid
import zipfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Input that cannot be used; the message names it and says what to do. Command lines print it in one line."""


class Skipped:
    """Records left out: counts and first places by reason; as text "2 without a box (row 3, row 8), 1 damaged (a.png)".

    With `strict` the first one raises a UserError, but for the reasons in `allowed`.
    """

    def __init__(self, *, strict: bool = False, allowed: Collection[str] = ()) -> None:
        self.counts, self.places = Counter[str](), defaultdict[str, list[str]](list)
        self._strict, self._allowed = strict, allowed

    def add(self, reason: str, place: object) -> None:
        """Count a record by its reason, a few words; `place` names its file, row or number."""
        if self._strict and reason not in self._allowed:
            raise UserError(f"{place}: {reason}")
        self.counts[reason] += 1
        if self.counts[reason] <= 4:
            self.places[reason].append(str(place) if self.counts[reason] < 4 else "...")

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{n:,} {reason} ({', '.join(self.places[reason])})" for reason, n in self.counts.items())


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 where it begins with that mark; UserError if it is missing or no text."""
    try:
        content = Path(path).read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not text in UTF-8; save it in that encoding") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_json(path: str | Path, default: Any = None) -> Any:
    """Read a JSON file, of the type of `default`, which stands for a missing one; UserError if missing or damaged."""
    if default is not None and not Path(path).exists():
        return default
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: damaged, no JSON ({error}); mend it, or make it again") from None
    if default is not None and not isinstance(content, type(default)):
        raise UserError(f"{path}: got a {type(content).__name__}, expected a {type(default).__name__}; make it again")
    return content


def read_table(path: str | Path, failed: dict[str, str] | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Return number, counted from 1 without the header, and content of each row of a table, by any program.

    The file is .jsonl with an object per line, .json with a list of objects, or text with a header, separated by
    commas, semicolons or tabs. Names and cells are stripped. Empty cells, columns without a name and empty rows are
    left out, and so is Excel's first line "sep=;". `failed` gets the reason why "row N" cannot be read; without it the
    first of them is a UserError, as is a file that is missing, no text, or whose header names a column twice.
    """
    rows: list[dict[str, Any] | str | None] = []  # what a row holds, or what is wrong with it; None: nothing
    suffix, lines = Path(path).suffix.lower(), list(io.StringIO(read_text(path), newline=""))
    if suffix in (".json", ".jsonl", ".ndjson"):
        for entry in read_json(path) if suffix == ".json" else filter(str.strip, lines):
            try:
                content: Any = entry if suffix == ".json" else json.loads(entry)
                rows.append({**content})
            except (TypeError, ValueError, RecursionError):
                rows.append("no JSON object")
    else:
        lines = lines[1:] if lines and lines[0].strip('"').lower().startswith("sep=") else lines
        separator = max(",;\t", key=lines[0].count) if lines else ","
        try:
            header, *table = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)] or [[]]
        except csv.Error as error:
            raise UserError(f"{path}: no readable table ({error}); save it as CSV with a header") from None
        if twice := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
            raise UserError(f"{path}: two columns are called {twice[0]}; rename one")
        for cells in table:
            is_wide, pairs = any(cells[len(header) :]), zip(header, cells, strict=False)
            content = {name: cell for name, cell in pairs if name and cell} if any(cells) else None
            rows.append("more cells than the header; quote cells that hold a separator" if is_wide else content)
    for number, row in enumerate(rows, 1):
        if isinstance(row, str) and failed is None:
            raise UserError(f"{path}, row {number}: {row}")
        if isinstance(row, str) and failed is not None:
            failed[f"row {number}"] = row
    return [(number, row) for number, row in enumerate(rows, 1) if isinstance(row, dict)]


def composed(name: object) -> str:
    """Return a file's name with each accent in its letter; in macOS's form of names it stands behind the letter."""
    return unicodedata.normalize("NFC", str(name))


def whole(value: Any) -> int:
    """Convert a number or its text to an integer, also "7.0", as spreadsheets write it; ValueError if it has a part."""
    try:
        return int(str(value))
    except ValueError:
        number = float(value)
        if not number.is_integer() or abs(number) > 2**53:
            raise ValueError(f"got {value}, expected a whole number") from None
        return int(number)


def claim(paths: Iterable[Path], *, folder: bool = False) -> Path:
    """Make an empty file, or a folder, at the first path where nothing is; of several processes each has its own."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir() if folder else path.touch(exist_ok=False)
            return path
    raise UserError("all names are taken; choose another one")


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Take a free name by an empty file, until the block writes it or fails; FileExistsError if it is not free."""
    path.touch(exist_ok=False)
    try:
        yield
    finally:
        if path.exists() and not path.stat().st_size:
            path.unlink()


def check_writable(folder: str | Path, longest: str = "") -> None:
    """Make a folder and try to write there, `longest` being the longest name to come; UserError if that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / longest).exists()  # an OSError if the name is too long
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"test")
    except OSError as error:
        reason = f"cannot write there ({error.strerror}); choose another folder or shorter names"
        raise UserError(f"{folder}: {reason}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; see `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, indented; as `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`, in a new folder if need be; rename it to `path` if the block succeeds.

    With `sync` the finished file is on the disk before it gets its name. After an OSError, as of a full disk, an
    existing file at `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.partial")  # short: names may be as long as a folder allows
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the umask gives; some libraries replace the file by a private one
        yield partial
        os.chmod(partial, mode)
        if sync:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the disk is full
    finally:
        partial.unlink(missing_ok=True)


def verify_zip(path: str | Path) -> str:
    """Compare the checksums of a zip file, such as `torch.save` writes; return what is wrong, "" if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return f"bad checksum of {damaged}" if damaged else ""
