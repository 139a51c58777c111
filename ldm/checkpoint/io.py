"""Reading checkpoints without executing anything in them (`unpickle.py`), and writing them whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.unpickle import safe_unpickler
from ldm.files import UserError, atomic_write

log = logging.getLogger(__name__)

# Where trainers keep the weights; the averaged ones last.
_MAPPING_KEYS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "params"),
    *("ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema", "params_ema"),
)
# Parts of names that come from wrappers: distribution, compilation, sharding, recomputation.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?=.)|_orig_mod\.?(?=.)"
)
# What stands before the names of a whole model, and what may stand before all those of a part alone.
_OUTER = re.compile(r"((?:\w+\.)*?)(?:model\.diffusion_model|first_stage_model|cond_stage_model)\.")
_OWNERS = ("model.", "ema_model.", "ema.", "net.", "network.", "state_dict.")
_OWNERS += ("unet.", "vae.", "autoencoder.", "generator.")
_ZIP = b"PK"
_ENCODING = "latin1"  # Python 2 wrote bytes, of any value, as text
_JSON = b"{"  # of a safetensors header, after its length in 8 bytes
_MAPS, _SMALLEST_MAP = 100, 2**23  # about as many for a large file; bytes
_LARGEST_EXPANSION = 20  # of a zip file; compressed weights shrink by a tenth, hardly ever by half


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used; the message names the file and the remedy."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a checkpoint to the CPU, also those nested under `state_dict` or `module`.

    The content decides the format, not the extension: safetensors, or what `torch.save` writes (zip or, before torch
    1.6, a bare pickle). Tensors of safetensors and uncompressed zip files are memory-mapped, private copy-on-write.
    A file that is missing, damaged, no checkpoint, without tensors, or wants to run code is a CheckpointError.
    """
    path, head = Path(path), _read_head(path)
    if head[8:9] == _JSON:
        if not (tensors := _open_safetensors(path)[0]):
            raise CheckpointError(f"{path}: holds no tensors; pass a checkpoint with weights")
        return _unwrapped(tensors, path)
    content, dropped = _unpickle(path, head)
    tensors = _named_tensors(content, path, dropped)
    if dropped:
        log.warning("%s: dropped what is not a tensor: objects of %s", path, ", ".join(dropped))
    return _unwrapped(tensors, path)


def _named_tensors(content: object, path: Path, dropped: list[str]) -> dict[str, Tensor]:
    """Return the weights among what was read; refuse several sets of them, but for averaged ones beside the last."""
    found: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    places = _places(found)
    usual = [place for place in places if "ema" not in place] or list(places)
    if not usual:
        if "param_groups" in found:
            raise CheckpointError(f"{path}: the state of an optimizer; pass the weights that were saved beside it")
        what = f"keys {', '.join(map(repr, list(found)[:5]))}" if found else f"a {type(content).__name__}"
        what += f" and objects of {', '.join(dropped[:5])}" if dropped else ""
        raise CheckpointError(f"{path}: holds no named tensors, but {what}; save the model's `state_dict()` instead")
    if len(usual) > 1:
        raise CheckpointError(f"{path}: holds weights at each of {', '.join(usual)}; save one of them alone")
    if usual[0] not in ("", "state_dict", "module") or len(places) > 1:
        others = ", ".join(place for place in places if place not in usual)
        log.warning("%s: took the weights at %s%s", path, usual[0], others and f", and left out {others}")
    return places[usual[0]]


def _places(found: Mapping[Any, Any], place: str = "") -> dict[str, dict[str, Tensor]]:
    """Return the sets of tensors at the usual keys, or else of all mappings here, by the keys that lead there."""
    inside: dict[str, dict[str, Tensor]] = {}
    for key in _MAPPING_KEYS if place.count(".") < 3 else ():  # a dictionary may hold itself
        if isinstance(nested := found.get(key), Mapping):
            inside |= _places(nested, f"{place}.{key}".removeprefix("."))
    parts = {f"{key}.": part for key, part in found.items() if isinstance(part, Mapping)}
    own = _tensors(found) or {start + name: x for start, part in parts.items() for name, x in _tensors(part).items()}
    return inside or ({place: own} if own else {})


def _tensors(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}


def _unwrapped(tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Take wrappers' parts off the names of a model or of one of its parts and say so; refuse several copies."""
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    outer = dict.fromkeys(match[1] for name in names.values() if (match := _OUTER.match(name)))
    outer = outer or dict.fromkeys(owner for owner in _OWNERS if all(name.startswith(owner) for name in names.values()))
    removed = [*dict.fromkeys(part for name in tensors for part in _WRAPPERS.findall(name)), *filter(None, outer)]
    which = ", ".join(map(repr, removed))
    if len(outer) > 1 or len(set(names.values())) < len(names):
        raise CheckpointError(f"{source}: holds its weights more than once, told apart by {which}; save one copy")
    prefix = next(iter(outer), "")
    names = {name: new.removeprefix(prefix) for name, new in names.items() if new.startswith(prefix)}
    if removed:
        rest = f", and left out {len(tensors) - len(names)} other tensors" if len(names) < len(tensors) else ""
        log.warning("%s: took %s off its names%s", source, which, rest)
    return {new: tensors[name] for name, new in names.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the text metadata of a safetensors file, or the provenance that `write_torch` put beside the weights."""
    path, head = Path(path), _read_head(path)
    if head[8:9] == _JSON:
        return _open_safetensors(path)[1]
    content = _unpickle(path, head)[0] if head.startswith(_ZIP) else None  # older files would be read as a whole
    found = content.get("provenance") if isinstance(content, Mapping) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_head(path: str | Path) -> bytes:
    """Read the first bytes of a file and refuse those that cannot start a checkpoint."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: {str(error.strerror).lower()}; check the path") from error
    is_text = all(c >= 32 or c in b"\t\n\r" for c in head)  # checkpoints begin with a number or a pickle's opcodes
    text = head.decode("utf-8-sig", errors="replace").strip() if is_text else ""
    page = text.lower().startswith(("<!doctype", "<!--", "<html", "<?xml", "<head"))
    problems = {
        "the file is empty, or nothing but zeros, an aborted download; download it again": not any(head),
        "a Git LFS pointer, not weights; run `git lfs pull`": text.startswith("version https://git-lfs"),
        "a web page, not weights; open the link in a browser and save the file": page,
        f"text, not weights, beginning {text[:60]!r}; was the download refused?": bool(text),
    }
    if problem := next((problem for problem, there in problems.items() if there), ""):
        raise CheckpointError(f"{path}: {problem}")
    return head


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a file, and return them with its metadata."""
    try:
        with safe_open(path, framework="pt"):  # checks the header
            pass
        with open(path, "rb") as file:
            begin = 8 + struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(begin - 8))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged; download or copy it again ({error})") from error
    metadata = header.pop("__metadata__", {})
    contents = _map(path, {name: tuple(begin + end for end in x["data_offsets"]) for name, x in header.items()})
    tensors = {n: contents[n].view(_DTYPES[x["dtype"]]).view(x["shape"]) for n, x in header.items()}
    return tensors, metadata


def _map(path: Path, spans: Mapping[Any, tuple[int, int]]) -> dict[Any, Tensor]:
    """Map spans of a file, (start, end) in bytes, as (end - start,) uint8.

    Neighbours share a map, whose pages go with its last tensor: each map is an open file, and some systems allow 256.
    """
    size, tensors = max(_SMALLEST_MAP, path.stat().st_size // _MAPS), dict[Any, Tensor]()
    for _, group in groupby(sorted(spans.items(), key=itemgetter(1)), lambda item: item[1][0] // size):
        members = dict(group)
        first, last = min(members.values())[0], max(end for _, end in members.values())
        content = np.asarray(np.memmap(path, np.uint8, "c", first, (last - first,)))
        tensors |= {name: torch.from_numpy(content[a - first : b - first]) for name, (a, b) in members.items()}
    return tensors


def _unpickle(path: Path, head: bytes) -> tuple[object, list[str]]:
    """Return what torch saved, and the names that became placeholders."""
    unpickler = safe_unpickler()
    try:
        if head.startswith(_ZIP):
            content = _load_zip(path, unpickler)
        elif tarfile.is_tarfile(path):  # torch.load would unpack it
            raise CheckpointError("a tar archive; pass the checkpoint inside it")
        else:
            load = lambda file, **options: unpickler(file, **options).load()  # noqa: E731
            module: Any = SimpleNamespace(__name__=__name__, Unpickler=unpickler, load=load)
            with open(path, "rb") as file:
                content = torch.load(file, "cpu", module, weights_only=False, encoding=_ENCODING)
        return content, sorted(unpickler.dropped)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).partition("\n")[0]
        what = "truncated or damaged, or not written by torch.save; download or copy it again"
        raise CheckpointError(f"{path}: {what} ({type(error).__name__}: {reason})") from error


def _load_zip(path: Path, unpickler: Any) -> object:
    """Load what is in a zip file of torch; the storages are mapped, unless somebody compressed them."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        size, unpacked = path.stat().st_size, sum(member.file_size for member in members.values())
        if "data.pkl" not in members:
            raise CheckpointError("a zip archive, but not one that torch.save wrote; pass the checkpoint inside it")
        if unpacked > _LARGEST_EXPANSION * size:
            raise CheckpointError(f"refused: {size:,} bytes that unpack to {unpacked:,}; get the weights elsewhere")
        if "constants.pkl" in members:
            raise CheckpointError("a TorchScript program, not weights; save its `state_dict()` instead")
        mapped = {name: member.file_size for name, member in members.items() if name.startswith("data/")}
        mapped = {name: size for name, size in mapped.items() if size and not members[name].compress_type}
        read = {name: archive.read(member) for name, member in members.items() if name not in mapped}
    if read.get("byteorder", sys.byteorder.encode()) != sys.byteorder.encode():
        raise CheckpointError("written on a computer of another byte order; save it there as safetensors")
    reader: Any = torch._C.PyTorchFileReader(str(path))
    starts = {name: reader.get_record_offset(name) for name in mapped}
    records = {name: torch.from_numpy(np.array(bytearray(content), np.uint8)) for name, content in read.items()}
    records |= _map(path, {name: (start, start + mapped[name]) for name, start in starts.items()})

    def storage(pid: tuple[Any, ...]) -> Any:  # ("storage", its type, number of its record, device, size)
        untyped, dtype = records[f"data/{pid[2]}"].untyped_storage(), getattr(pid[1], "dtype", torch.uint8)
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)

    loader = unpickler(io.BytesIO(read["data.pkl"]), encoding=_ENCODING)
    loader.persistent_load = storage
    return loader.load()


_DTYPES = safetensors.torch._TYPES  # F32 => torch.float32, …
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    pieces: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write tensors as safetensors, atomically and one at a time; `save_file` needs all in memory, and none shared.

    With `pieces`, (name, tensor) pairs in any order of which several of one name are its consecutive rows, only dtypes
    and shapes of `tensors` count (device `meta` will do). `metadata` is text for the header. A failure changes nothing.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts: dict[str, int] = {}
    end = 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # aligns numbers with their size
    for name, tensor in ordered:
        if (dtype := _DTYPE_NAMES.get(tensor.dtype)) is None:
            raise CheckpointError(f"{path}: {name}: safetensors knows no {tensor.dtype}; write a .ckpt instead")
        starts[name], end = end, end + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (
        atomic_target(path) as partial,
        open(partial, "wb") as file,
        tqdm(desc=f"writing {Path(path).name}", total=end, unit="B", unit_scale=True, delay=3) as bar,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for name, piece in ordered if pieces is None else pieces:
            assert piece.dtype == tensors[name].dtype, name
            file.seek(8 + len(text) + starts[name])
            if piece.numel():
                file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            starts[name] += piece.nbytes
            bar.update(piece.nbytes)
            del piece  # before the next is made
        assert all(starts[name] == header[name]["data_offsets"][1] for name in starts), "pieces are missing"


def write_torch(path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, str] | None = None) -> None:
    """Write `{"state_dict": tensors, "provenance": …}` as `torch.save` does, atomically, without what views hide."""
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = {name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for name, x in written.items()}
    with atomic_target(path) as partial, open(partial, "wb") as file:
        torch.save({"state_dict": written, "provenance": dict(provenance or {})}, file)


@contextmanager
def atomic_target(path: str | Path, then: str = "run again") -> Iterator[Path]:
    """Yield a name that becomes `path` on success; errors of the system say to mend their cause `and {then}`."""
    try:
        with atomic_write(path) as partial:
            yield partial
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # PyTorch's writer hides the OSError
        if not isinstance(reason, OSError):
            raise
        full = reason.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "the disk is full; free some space" if full else f"check the folder ({reason.strerror})"
        raise CheckpointError(f"{path}: could not be written, nothing was changed: {remedy} and {then}") from error
