"""The unpickler of checkpoints, which builds tensors and mappings and runs nothing else.

A pickle is a program: it looks names up and calls what it finds. `find_class`, its only way to anything, imports
nothing: it knows `_BUILDERS`, and answers any other name with an inert placeholder, which keeps the items of what
behaves like a dict and ignores the rest. BUILD, which would set attributes, does nothing. Safety rests on that alone; a
call of what would have effects is also refused, to tell the user. `torch.load(weights_only=True)` reads protocol 2
alone and fails on objects like lists or dicts.
"""

from __future__ import annotations

import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import _utils

from ldm.files import UserError

# Parts of dotted names that have effects if they are called, or lead to what has; but for errors and named tuples.
_WITH_EFFECTS = re.compile(
    r"_?(?:os|nt|posix|sys|subprocess|shutil|importlib|runpy|pty|ctypes|cProfile)|eval|exec|open|__(?!new|main)\w+__"
)


class _Placeholder(dict[Any, Any]):
    """Stands for what a name means, or as an instance for an object made by it; a call makes another one."""

    path: ClassVar[str] = ""

    def __new__(cls, *args: object, **kwargs: object) -> _Placeholder:
        _refuse(*args, *kwargs.values())  # `map` calls what it is given
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:  # not if the pickle makes the object without its constructor
        _refuse(type(self))

    def __call__(self, *args: object) -> _Placeholder:
        _refuse(type(self), *args)
        return self

    def _ignore(self, *_: object) -> None: ...

    append = extend = add = _ignore

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)


def _refuse(*called: object) -> None:
    """Refuse calls of placeholders whose names have effects."""
    for path in (kind.path for kind in called if isinstance(kind, type) and issubclass(kind, _Placeholder)):
        if any(map(_WITH_EFFECTS.fullmatch, path.split("."))) and not path.endswith(("Error", "_result")):
            raise UserError(f"refused: the pickle calls {path}, which no weights need; get them elsewhere")


def _placeholder(path: str) -> type[_Placeholder]:
    return type(path.rpartition(".")[2], (_Placeholder,), {"path": path})


def _attribute(target: Any, name: object, *_: object) -> type[_Placeholder]:
    """Stand for `getattr`, by which bound methods and some enumerations are pickled."""
    owner = target if isinstance(target, type) else type(target)
    path = owner.path if issubclass(owner, _Placeholder) else f"{owner.__module__}.{owner.__qualname__}"
    return _placeholder(f"{path}.{name}")


def _rebuild(build: Any) -> Any:
    return lambda storage, *args: storage if isinstance(storage, _Placeholder) else build(storage, *args)


_BUILDERS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _rebuild(_utils._rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _rebuild(_utils._rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _rebuild(_utils._rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda build, _, args, __: build(*args),  # a subclass, as a plain tensor
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **{f"torch.{kind}": SimpleNamespace(dtype=x) for kind, x in torch.storage._storage_type_to_dtype_map().items()},
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch.Size": torch.Size,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: OrderedDict(),  # its factory is not wanted
    "copyreg._reconstructor": lambda kind, base, state: state,  # an object of protocols 0 and 1, as its base class
    "functools.partial": lambda function, *_: function,
    "builtins.getattr": _attribute,
}


def safe_unpickler() -> Any:
    """Make the unpickler of one file; its `dropped` collects what became placeholders."""

    # The implementation in Python, whose memo is a dict. C's is an array as long as the largest number in the file,
    # and four damaged bytes ask for 64 GiB.
    class Unpickler(pickle._Unpickler):
        dropped: ClassVar[set[str]] = set()
        stack: list[Any]

        def load_build(self) -> None:
            self.stack.pop()

        dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

        def find_class(self, module: str, name: str) -> Any:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's
            path = f"{module}.{name}".encode("unicode_escape").decode()  # a terminal obeys some characters
            if path in _BUILDERS:
                return _BUILDERS[path]
            if module != "builtins":
                self.dropped.add(path)
            return _placeholder(path)

    return Unpickler
