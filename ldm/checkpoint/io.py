"""Reading checkpoints without running them, and writing them whole or not at all.

A `.ckpt` is a pickle, and a pickle is a program. Here it is read by an unpickler for which every
global falls in one of three classes, decided by its name alone; nothing is ever imported for it:

1. Tensors, parameters, storages, dtypes and mappings are rebuilt, by the functions of this file.
2. A name from Python's standard library beyond plain data types (`os.system`, `builtins.eval`,
   `subprocess.Popen`, …) has no business among weights: the file is refused.
3. Any other class (Lightning's callbacks, numpy scalars, `pathlib` paths) becomes an inert placeholder,
   which swallows what is done to it and is dropped; one log line names what was dropped.

Safety rests on 1 being a closed list; the refusal in 2 is there to tell you that somebody meant harm.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import logging
import os
import pickle
import pickletools
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ldm.files import UserError, atomic_write

log = logging.getLogger(__name__)

_DOWNLOAD_AGAIN = "truncated or damaged; download or copy it again"
_MAPPING_KEYS = ("state_dict", "module")  # Lightning, DeepSpeed: the weights are one level down


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used; the message names the file and the remedy."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, on the CPU.

    The content decides the format, not the extension: safetensors, or what `torch.save` writes (zip or,
    before torch 1.6, a bare pickle). Tensors of safetensors and zip files are memory-mapped, private
    copy-on-write: they cost memory as they are touched, about one copy in all.

    Args:
        path: the file. Weights nested under `state_dict` or `module` are found there.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not a checkpoint, without tensors, or tries
            to run code.
    """
    path = Path(path)
    head = _read_head(path)
    if _is_safetensors(head):
        return _read_safetensors(path)
    return _named_tensors(path, *_unpickled(path, head))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors file, or what `write_torch` put beside the weights; empty for other files."""
    path = Path(path)
    head = _read_head(path)
    if _is_safetensors(head):
        with _opened_safetensors(path) as file:
            return dict(file.metadata() or {})
    content = _unpickled(path, head)[0] if head.startswith(_ZIP) else None  # older ones would be read as a whole
    found = content.get("provenance") if isinstance(content, Mapping) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}


def sha256_file(path: str | Path, *, show_progress: bool = True) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    path = Path(path)
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        open(path, "rb") as file,
        tqdm(
            desc=f"sha256 {path.name}", total=size, unit="B", unit_scale=True, delay=3, disable=not show_progress
        ) as bar,
    ):
        while block := file.read(2**22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


class Deferred(NamedTuple):
    """A tensor to be made when it is written: what it will look like now, its numbers then."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]


Tensors = Mapping[str, Tensor | Deferred]


def write_safetensors(path: str | Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically and one at a time; those that share memory are written in full each.

    The header is written from dtypes and shapes alone; of mapped and deferred tensors one at a time is in memory.

    Raises:
        CheckpointError: the disk is full or the folder is not writable; an existing file stays as it was. A tensor is
            of a type that the format lacks, or cannot be made.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # numbers lie on their own size
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: {name}: safetensors knows no {tensor.dtype}; write a .ckpt instead")
        start, end = end, end + tensor.dtype.itemsize * tensor.shape.numel()
        dtype = _SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (
        _atomic_target(path) as partial,
        open(partial, "wb") as file,
        tqdm(desc=f"writing {Path(path).name}", total=end, unit="B", unit_scale=True, delay=3) as bar,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for name, given in ordered:
            try:
                tensor = given.make() if isinstance(given, Deferred) else given
            except RuntimeError as error:  # no memory, or a type that torch cannot compute with
                raise CheckpointError(f"{path}: {name} could not be made, nothing was changed: {error}") from error
            assert (tensor.dtype, tensor.shape) == (given.dtype, given.shape), name
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.update(tensor.nbytes)
            del tensor  # before the next is made


def write_torch(path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, str] | None = None) -> None:
    """Write `{"state_dict": tensors, "provenance": …}` as `torch.save` does, atomically.

    Raises:
        CheckpointError: the disk is full or the folder is not writable; an existing file stays as it was.
    """
    content = {"state_dict": _independent(tensors), "provenance": dict(provenance or {})}
    with _atomic_target(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)


_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# --- formats ---------------------------------------------------------------------------------------


def _read_head(path: Path) -> bytes:
    """The first bytes of a file, once it is clear that they may start a checkpoint."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path, or download the checkpoint first") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if not any(head):
        raise CheckpointError(f"{path}: begins with nothing but zeros, an aborted download; download it again")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype", b"<!--", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(f"{path}: a web page, not weights; open the download link in a browser and save the file")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not weights; run `git lfs pull`")
    return head


def _as_text(head: bytes) -> str:
    """The first bytes of a text; nothing if they are none. Of checkpoints only the oldest pickles look like one."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return ""
    return text if all(character.isprintable() or character in "\t\n\r" for character in text) else ""


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"  # after the 8-byte length of the JSON header


@contextmanager
def _opened_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_DOWNLOAD_AGAIN} ({error})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; pass a checkpoint with weights")
    return tensors


_ZIP = b"PK"


def _unpickled(path: Path, head: bytes) -> tuple[object, list[str]]:
    """What torch saved, and the classes of which objects were dropped; every error is one that names the file."""
    try:
        return _read_zip(path) if head.startswith(_ZIP) else _read_legacy(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        if text := _as_text(head):
            raise CheckpointError(
                f"{path}: text, not weights, beginning {text[:60]!r}; was the download refused?"
            ) from error
        raise CheckpointError(f"{path}: {_DOWNLOAD_AGAIN} ({type(error).__name__}: {error})") from error


def _named_tensors(path: Path, unpickled: object, dropped: list[str]) -> dict[str, Tensor]:
    found: Mapping[Any, Any] = unpickled if isinstance(unpickled, Mapping) else {}
    for key in _MAPPING_KEYS:
        if isinstance(nested := found.get(key), Mapping):
            found = nested
            break
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        what = f"keys {', '.join(map(repr, list(found)[:5]))}" if found else f"a {type(unpickled).__name__}"
        what += f" and objects of {', '.join(dropped[:5])}" if dropped else ""
        raise CheckpointError(
            f"{path}: holds no named tensors, but {what}; save the `state_dict()` of the model instead"
        )
    if dropped:
        log.warning("%s: dropped what is not a tensor: objects of %s", path, ", ".join(dropped))
    return tensors


class _Storage(NamedTuple):
    """Bytes and how to read them."""

    dtype: torch.dtype
    data: torch.UntypedStorage


_LARGEST_EXPANSION = 20  # of a zip file: weights that somebody compressed shrink by a tenth, hardly ever by half


def _read_zip(path: Path) -> tuple[object, list[str]]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{_DOWNLOAD_AGAIN} ({error})") from error
    with archive, open(path, "rb") as file:
        members = {info.filename: info for info in archive.infolist()}
        unpacked, size = sum(info.file_size for info in members.values()), path.stat().st_size
        if unpacked > _LARGEST_EXPANSION * size:
            raise CheckpointError(
                f"refused: {size:,} bytes that unpack to {unpacked:,}, a zip bomb; torch.save does not compress, "
                "get the weights elsewhere"
            )
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("a zip archive, but not one that torch.save wrote; pass the checkpoint inside it")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in members:
            raise CheckpointError("a TorchScript program, not weights; save its `state_dict()` instead")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder").decode() != sys.byteorder:
            raise CheckpointError("written on a machine with the other byte order; save it as safetensors there")
        mapped: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        loaded: dict[str, torch.UntypedStorage] = {}

        def storage(dtype: torch.dtype, key: str, numel: int) -> _Storage:
            if key not in loaded:
                member = members[f"{folder}data/{key}"]
                if member.compress_type == zipfile.ZIP_STORED:
                    # The local header repeats the name; its extra field pads the data to 64 bytes.
                    file.seek(member.header_offset + 26)
                    name_length, extra_length = struct.unpack("<HH", file.read(4))
                    start = member.header_offset + 30 + name_length + extra_length
                    loaded[key] = _sliced(mapped, start, start + member.file_size)
                else:
                    loaded[key] = torch.UntypedStorage(member.file_size)
                    _fill(loaded[key], archive.open(member))
            return _checked_storage(dtype, loaded[key], numel)

        unpickler = _Unpickler(BytesIO(archive.read(pickles[0])), storage)
        return unpickler.load(), sorted(unpickler.dropped)


_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def _read_legacy(path: Path) -> tuple[object, list[str]]:
    """The format before torch 1.6: five pickles in a row, then the bytes of each storage."""
    if tarfile.is_tarfile(path):
        raise CheckpointError("a tar archive (torch before 0.1.10 wrote such); load and save it with a newer torch")
    size = path.stat().st_size
    loaded: dict[str, torch.UntypedStorage] = {}

    def storage(dtype: torch.dtype, key: str, numel: int, view: tuple[str, int, int] | None) -> _Storage:
        num_bytes = numel * dtype.itemsize
        if num_bytes > size:
            raise CheckpointError(_DOWNLOAD_AGAIN)
        if key not in loaded:
            loaded[key] = torch.UntypedStorage(num_bytes)  # filled below: the bytes come after the pickles
        data = loaded[key]
        if view is not None:
            _, offset, numel = view
            data = _sliced(data, offset * dtype.itemsize, (offset + numel) * dtype.itemsize)
        return _checked_storage(dtype, data, numel)

    with open(path, "rb") as file:
        unpickler = _Unpickler(file, storage)
        if unpickler.load() != _LEGACY_MAGIC:
            raise CheckpointError("a pickle, but not one that torch.save wrote; save the weights with torch.save")
        if _Unpickler(file, storage).load() != _LEGACY_PROTOCOL:
            raise CheckpointError("an unknown version of the legacy torch format; load and save it with a newer torch")
        system = _Unpickler(file, storage).load()
        if isinstance(system, Mapping) and system.get("little_endian") is not (sys.byteorder == "little"):
            raise CheckpointError("written on a machine with the other byte order; save it as safetensors there")
        unpickler = _Unpickler(file, storage)
        unpickled = unpickler.load()
        keys = _Unpickler(file, storage).load()
        if set(keys) != set(loaded):
            raise CheckpointError(_DOWNLOAD_AGAIN)
        for key in keys:
            file.seek(8, os.SEEK_CUR)  # the number of elements, known already
            _fill(loaded[key], file)
    return unpickled, sorted(unpickler.dropped)


def _checked_storage(dtype: torch.dtype, data: torch.UntypedStorage, numel: int) -> _Storage:
    if data.nbytes() < numel * dtype.itemsize:
        raise CheckpointError(_DOWNLOAD_AGAIN)
    return _Storage(dtype, data)


def _fill(data: torch.UntypedStorage, file: Any) -> None:
    content = torch.empty(0, dtype=torch.uint8).set_(data)  # type: ignore[call-overload]
    if content.numel() and file.readinto(content.numpy().data) != content.numel():
        raise CheckpointError(_DOWNLOAD_AGAIN)


def _sliced(data: torch.UntypedStorage, start: int, end: int) -> torch.UntypedStorage:
    view = data[start:end]  # shares the memory
    assert isinstance(view, torch.UntypedStorage)
    return view


# --- the restricted unpickler ----------------------------------------------------------------------


class _Placeholder:
    """Stands for an object that is not rebuilt; takes whatever a pickle does to objects, keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, _: object, __: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...

    def add(self, _: object) -> None: ...


def _rebuild_tensor(storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    tensor = torch.empty(0, dtype=storage.dtype)
    return tensor.set_(storage.data, offset, size, stride)  # type: ignore[call-overload]; checks the bounds


def _rebuild_tensor_v3(storage: _Storage, *layout: Any) -> Tensor:
    offset, size, stride, _grad, _hooks, dtype, *_ = layout
    return _rebuild_tensor(_Storage(dtype, storage.data), offset, size, stride)


def _first(data: object, *_: object) -> object:
    return data


def _rebuild_subclass(rebuild: Callable[..., object], _: object, args: tuple[object, ...], __: object) -> object:
    return rebuild(*args)  # as the REDUCE opcode does: `rebuild` can only be something from this file


def _empty_mapping(*_: object) -> OrderedDict[object, object]:
    return OrderedDict()  # for defaultdict, whose factory is not wanted


_REBUILT: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("torch", "Size"): _first,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _empty_mapping,
    **{  # weights need none of them, and called they may ask for any amount of memory: bytearray(10**9)
        (module, kind.__name__): _Placeholder
        for module in ("builtins", "__builtin__")
        for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, slice, str, tuple)
    },
}

_STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}

# Standard modules that honest checkpoints name, for plain data: placeholders, as for third parties.
_DATA_MODULES = {
    *("_codecs", "abc", "argparse", "collections", "copy_reg", "copyreg", "dataclasses", "datetime", "decimal"),
    *("enum", "fractions", "functools", "numbers", "pathlib", "re", "types", "typing", "uuid"),
}
_REFUSED_MODULES = (set(sys.stdlib_module_names) | {"__builtin__", "commands", "distutils", "imp"}) - _DATA_MODULES


_LARGEST_TUPLE = 50_000  # objects in it at any depth; what describes a tensor has a dozen


def _check_program(file: IO[bytes]) -> None:
    """Raise CheckpointError where the pickle at the file's position would take more memory or time than it can mean.

    Unpickling makes room for the largest number of an object first: four damaged bytes are worth 64 GiB. And a tuple
    that holds one twice that holds another twice, and so on, takes for ever as a key: hashing walks every path.
    """
    start, memoised = file.tell(), 0
    stack: list[int | None] = []  # what hashing would visit in each object; None: a mark
    memo: dict[Any, int | None] = {}
    for opcode, number, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memoised += 1
            if number is not None and number > memoised:  # honest ones count up, from 0 or from 1
                raise CheckpointError(_DOWNLOAD_AGAIN)
            memo[len(memo) if number is None else number] = stack[-1]
            continue
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[number])
            continue
        taken: list[int] = []
        if marked := pickletools.markobject in opcode.stack_before:
            while (top := stack.pop()) is not None:
                taken.append(top)
        rest = opcode.stack_before.index(pickletools.markobject) if marked else len(opcode.stack_before)
        taken += [stack.pop() or 0 for _ in range(rest)]
        if opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "LIST", "DICT"):
            size = taken[-1] if rest else 1  # these cannot be hashed, and are what they were
        else:
            size = 1 + sum(taken)
        if opcode.name.startswith(("TUPLE", "FROZENSET")) and size > _LARGEST_TUPLE:
            raise CheckpointError(f"refused: a tuple of more than {_LARGEST_TUPLE:,} objects, which no weights need")
        stack += [None if kind is pickletools.markobject else size for kind in opcode.stack_after]
    file.seek(start)


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and containers; see the rule at the top of this file."""

    def __init__(self, file: IO[bytes], storage: Callable[..., _Storage]) -> None:
        _check_program(file)
        super().__init__(file, encoding="utf-8")
        self.storage = storage
        self.dropped: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILT:
            return _REBUILT[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        called = f"{module}.{name}".encode("unicode_escape").decode()  # a terminal obeys some characters
        if module.partition(".")[0] in _REFUSED_MODULES and (module, name) != ("builtins", "object"):
            raise CheckpointError(
                f"refused: the pickle wants to call {called}, which no weights need; "
                "don't use this file, get the weights elsewhere or as safetensors"
            )
        self.dropped.add(called)
        return type(name, (_Placeholder,), {})

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # legacy files name the classes of modules and their source
            return pid[1]
        _, dtype, key, _location, numel, *view = pid
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"holds numbers of a type not known here, {dtype.__name__}; save it as safetensors")
        return self.storage(dtype, key, numel, *view)


# --- writing ---------------------------------------------------------------------------------------

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that own their memory; copies only where one of these does not hold yet."""
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        written[name] = tensor
    return written


@contextmanager
def _atomic_target(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block succeeds and vanishes when not."""
    try:
        with atomic_write(path) as partial:
            yield partial
    except (OSError, RuntimeError) as error:  # torch wraps the system's errors
        full = any(getattr(cause, "errno", None) in _DISK_FULL for cause in (error, error.__context__))
        full = full or "No space left" in str(error)
        remedy = "the disk is full; free some space and run again" if full else f"check the folder ({error})"
        raise CheckpointError(f"{path}: could not be written, nothing was changed: {remedy}") from error
