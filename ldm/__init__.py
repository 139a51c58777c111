"""Paint by Example: exemplar-based image editing with latent diffusion.

`load_model` builds the model of a config and loads a checkpoint into it; `Editor` edits images.
Both are imported on first use, so that importing a part of the package does not import all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.editing.editor import Editor
    from ldm.latent_diffusion import load_model

__version__ = "0.1.0"
__all__ = ["Editor", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name in ("Editor", "load_model"):
        return getattr(import_module("ldm.editing.editor" if name == "Editor" else "ldm.latent_diffusion"), name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
