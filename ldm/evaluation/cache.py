"""Features on disk, so that no image passes through a network twice."""

import logging
from pathlib import Path

import numpy as np

from ldm.files import UserError, atomic_write

log = logging.getLogger(__name__)

DEFAULT_PATH = Path.home() / ".cache" / "paint-by-example" / "features"


class FeatureCache:
    """Features (D,) float32 by key, a file each, in a folder that processes may share; it is created if missing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self._writing = Path(folder), True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be a folder of features ({error.strerror}); choose another") from error

    def get(self, key: str) -> np.ndarray | None:
        """Return the feature of a key; None if it is unknown, damaged or not finite, so that it is computed anew."""
        try:
            feature = np.load(self._path(key), allow_pickle=False)
            return feature if feature.dtype == np.float32 and feature.ndim == 1 and np.isfinite(feature).all() else None
        except (OSError, ValueError, EOFError, AttributeError):  # the last: a .npz
            return None

    def put(self, key: str, feature: np.ndarray) -> None:
        """Store a feature. If that fails (the disk is full), warn once and store nothing more."""
        try:
            if self._writing:
                with atomic_write(self._path(key), sync=False) as partial, open(partial, "wb") as file:
                    np.save(file, feature)
        except OSError as error:
            self._writing = False
            log.warning("%s: cannot be written (%s); going on without storing features", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"  # 256 folders: file systems and people dislike huge ones


def open_cache(folder: str | None) -> FeatureCache | None:
    """Open the cache of a command line: a folder, `none`, or by default the user's own."""
    return None if folder == "none" else FeatureCache(folder or DEFAULT_PATH)
