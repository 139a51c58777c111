"""Features on disk, so that a picture goes through a network once.

One SQLite file holds the features of any number of networks and pictures. A feature is found by what it was
computed from (the bytes of the file, the network, the part of the picture), never by a path or a date: a
renamed file is found again, a changed one is not. Processes may share the file, and one that is killed leaves
it as it was after its last finished batch.

Dimension key: D feature channels.
"""

from __future__ import annotations

import logging
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from ldm.checkpoint.io import sha256_file
from ldm.files import UserError

log = logging.getLogger(__name__)

DEFAULT_PATH = Path.home() / ".cache" / "paint-by-example" / "features.sqlite"

_BUSY_SECONDS = 60.0  # how long to wait for another process that is writing
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SCHEMA = "CREATE TABLE IF NOT EXISTS features (key TEXT PRIMARY KEY, feature BLOB NOT NULL, crc32 INTEGER NOT NULL)"


class FeatureCache:
    """Features by key; a context manager that closes the file.

    Args:
        path: the file; made, with its folder, where it is missing.

    Raises:
        UserError: the file is damaged, is no cache, or cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._hashes: dict[tuple[Path, int, int], str] = {}
        self._writing = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS)
            self._connection.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made ({error.strerror}); choose another place") from error

    def get(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """The features (D,) float32 of those keys that are known.

        Raises:
            UserError: the file is damaged.
        """
        found = {}
        try:
            for key in keys:
                row = self._connection.execute("SELECT feature, crc32 FROM features WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    feature, crc32 = row
                    if zlib.crc32(feature) != crc32:
                        raise self._damaged("a feature is not as it was written")
                    found[key] = np.frombuffer(feature, "<f4").astype(np.float32)
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error
        return found

    def put(self, features: Mapping[str, np.ndarray]) -> None:
        """Keep features, all of them or none. Where that fails (the disk is full), say so once and go on without.

        Raises:
            UserError: the file is damaged.
        """
        if not self._writing or not features:
            return
        blobs = ((key, np.ascontiguousarray(feature, "<f4").tobytes()) for key, feature in features.items())
        rows = [(key, blob, zlib.crc32(blob)) for key, blob in blobs]
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            if _code(error) in _DAMAGED:
                raise self._error(error) from error
            self._writing = False
            log.warning("%s: cannot be written (%s); going on without keeping features", self.path, error)

    def content_hash(self, path: Path) -> str:
        """SHA-256 of a file, read once while its size and date stay the same.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            stat = path.stat()
            identity = (path, stat.st_size, stat.st_mtime_ns)
            if identity not in self._hashes:
                self._hashes[identity] = sha256_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        return self._hashes[identity]

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _error(self, error: sqlite3.DatabaseError) -> UserError:
        if isinstance(error, sqlite3.OperationalError) and _code(error) not in _DAMAGED:
            return UserError(f"{self.path}: cannot be used ({error}); check the folder, or choose another place")
        return self._damaged(str(error))

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: not a cache of features, or damaged ({what}); delete it, it is made anew")


def open_cache(path: str | None) -> FeatureCache | None:
    """The cache that a command line asks for: a file, `none`, or where nothing is said the user's own.

    Raises:
        UserError: as for `FeatureCache`.
    """
    return None if path == "none" else FeatureCache(path or DEFAULT_PATH)


def _code(error: sqlite3.DatabaseError) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte: without what SQLite adds as detail
