"""Reading never runs anything; writing is all or nothing."""

from __future__ import annotations

import http
import importlib
import io
import json
import logging
import operator
import os
import pickle
import platform
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import uuid
import weakref
import zipfile
from argparse import Namespace
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum, pickle_by_enum_name
from fractions import Fraction
from functools import cmp_to_key, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import load_file
from torch import nn

from ldm.checkpoint.io import (
    CheckpointError,
    read_checkpoint,
    read_metadata,
    sha256_file,
    write_safetensors,
    write_torch,
)

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(path: Path, content: object, zipped: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def as_torch_file(path: Path, program: bytes, zipped: bool) -> Path:
    """A file of torch around a hand-written pickle."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", program)
            archive.writestr("a/version", "3")
    else:
        start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(
            b"".join(pickle.dumps(part, protocol=2) for part in start) + program + pickle.dumps([], protocol=2)
        )
    return path


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor.detach()), name


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    block = torch.randn(10)
    return {
        "weight": torch.randn(3, 4),
        "parameter": nn.Parameter(torch.randn(5)),
        "half": torch.randn(4).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "integers": torch.arange(4),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 2),
        "transposed": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "first half of a storage": block[:5],
        "second half of a storage": block[5:],
    }


@both_formats
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"module": s}])
def test_reads_what_torch_saves(tmp_path: Path, state: dict[str, torch.Tensor], wrap: Any, zipped: bool) -> None:
    assert_equal(read_checkpoint(save(tmp_path / "a.ckpt", wrap(state), zipped)), state)


def test_reads_dtypes_without_a_storage_class(tmp_path: Path) -> None:
    state = {"unsigned": torch.arange(3).to(torch.uint16)}
    assert_equal(read_checkpoint(save(tmp_path / "a.ckpt", state, zipped=True)), state)


@both_formats
def test_reads_modules_state(tmp_path: Path, zipped: bool) -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()  # an OrderedDict with _metadata
    assert_equal(read_checkpoint(save(tmp_path / "a.pth", state, zipped)), dict(state))


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.ckpt", {"w": torch.ones(2)})
    write_torch(tmp_path / "b.safetensors", {"w": torch.ones(2)})
    for name in ("a.ckpt", "b.safetensors"):
        assert_equal(read_checkpoint(tmp_path / name), {"w": torch.ones(2)})


def test_zip_is_mapped_and_private(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", {"w": torch.zeros(1000)}, zipped=True)
    read_checkpoint(path)["w"].fill_(1.0)
    assert_equal(read_checkpoint(path), {"w": torch.zeros(1000)})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts pages as Linux does")
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_mapped_tensor_takes_its_pages_along(tmp_path: Path, name: str) -> None:
    def file_pages() -> int:  # KiB of files in memory
        return int(re.findall(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    path = tmp_path / name
    write = write_safetensors if path.suffix == ".safetensors" else write_torch
    write(path, {str(i): torch.full((2**20,), float(i)) for i in range(16)})
    tensors, before, pages = read_checkpoint(path), file_pages(), []
    for i in range(16):
        x = tensors.pop(str(i)).half()  # reads 4 MiB
        pages.append(file_pages() - before)
        assert x[0] == x[-1] == i
    assert max(pages) < 16 * 1024  # of 64 MiB; the rest may be pages of libraries


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_many_tensors_take_few_open_files(tmp_path: Path, name: str) -> None:
    state = {f"{i}": torch.full((i % 7, 3), i, dtype=(torch.float32, torch.int16)[i % 2]) for i in range(300)}
    path = tmp_path / name
    (write_safetensors if path.suffix == ".safetensors" else write_torch)(path, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(path) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 20, hard))
    try:
        tensors = read_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], x) and tensors[key].dtype == x.dtype for key, x in state.items())
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors.values())


def test_tensors_that_share_a_storage_still_share_it(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    path = save(tmp_path / "a.ckpt", {"whole": whole, "column": whole[:, 1], "empty": torch.empty(0)}, zipped=True)
    tensors = read_checkpoint(path)
    assert_equal(tensors, {"whole": whole, "column": whole[:, 1], "empty": torch.empty(0)})
    tensors["whole"].zero_()
    assert not tensors["column"].any()


def test_reads_a_zip_that_somebody_compressed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    source = save(tmp_path / "a.ckpt", state, zipped=True)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert_equal(read_checkpoint(tmp_path / "b.ckpt"), state)


# --- pickles that hold more than tensors


class Call:
    """Pickles as a call of a function; loading such a pickle calls it."""

    def __init__(self, function: Any, *args: object) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


@both_formats
@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.check_output, importlib.import_module])
def test_code_is_refused(tmp_path: Path, function: Any, zipped: bool) -> None:
    trace = tmp_path / "trace"
    code = f"touch {trace}" if function in (os.system, subprocess.check_output) else f"open({str(trace)!r}, 'w')"
    content = {"state_dict": {"w": torch.ones(2)}, "callbacks": [Call(function, code)]}
    path = save(tmp_path / "evil.ckpt", content, zipped)
    with pytest.raises(CheckpointError, match=rf"evil\.ckpt: refused: .*\.{function.__name__}"):
        read_checkpoint(path)
    assert not trace.exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'trace'}")))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "trace").exists()


def test_a_torchscript_program_is_not_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "a.pt")


@both_formats
def test_a_pickle_changes_nothing_of_torch(tmp_path: Path, zipped: bool) -> None:
    """BUILD sets attributes of what is on the stack, which may be a function or class of torch."""
    program = b"\x80\x02}ctorch.storage\nUntypedStorage\nN}U\x0bfrom_bufferNs\x86bs."
    from_buffer = torch.UntypedStorage.from_buffer
    with pytest.raises(CheckpointError):
        read_checkpoint(as_torch_file(tmp_path / "a.ckpt", program, zipped))
    assert torch.UntypedStorage.from_buffer is from_buffer


def text(value: str) -> bytes:
    """The opcodes that push a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


SYSTEM = b"cposix\nsystem\n"
GETATTR = b"cbuiltins\ngetattr\n("
EMPTY = b"cargparse\nNamespace\n)\x81"  # an object that is made without a call

# Pickles, without header and end, that run a command (as text) or create a file (at a path).
ATTACKS: dict[str, Callable[[bytes, str], bytes]] = {
    "REDUCE": lambda run, _: SYSTEM + b"(" + run + b"tR",
    "STACK_GLOBAL": lambda run, _: text("posix") + text("system") + b"\x93(" + run + b"tR",
    "a name that leads through a module": lambda run, _: (
        text("torch.serialization") + text("os.system") + b"\x93(" + run + b"tR"
    ),
    "a name that leads through a module of data": lambda run, _: (
        text("random") + text("_os.system") + b"\x93(" + run + b"tR"
    ),
    "INST": lambda run, _: b"(" + run + b"iposix\nsystem\n",
    "OBJ": lambda run, _: b"(" + SYSTEM + run + b"o",
    "partial": lambda run, _: b"cfunctools\npartial\n(" + SYSTEM + b"tR(" + run + b"tR",
    "attribute of a partial": lambda run, _: (
        GETATTR + b"cfunctools\npartial\n(" + SYSTEM + b"tR" + text("func") + b"tR(" + run + b"tR"
    ),
    "attribute of a module": lambda run, _: (
        GETATTR + b"ctorch.serialization\nos\n" + text("system") + b"tR(" + run + b"tR"
    ),
    "attributes of attributes": lambda run, _: (
        GETATTR + GETATTR + b"ctorch.serialization\nload\n" + text("__globals__") + b"tR" + text("get") + b"tR("
        + text("os") + b"tRp0\n0" + GETATTR + b"g0\n" + text("system") + b"tR(" + run + b"tR"
    ),
    "method by its name": lambda run, _: (
        b"coperator\nmethodcaller\n(" + text("system") + run + b"tR(ctorch.serialization\nos\ntR"
    ),
    "attribute by its name": lambda run, _: (
        b"coperator\nattrgetter\n(" + text("system") + b"tR(ctorch.serialization\nos\ntR(" + run + b"tR"
    ),
    "map": lambda run, _: b"cbuiltins\nlist\n(cbuiltins\nmap\n(" + SYSTEM + b"(" + run + b"ltRtR",
    "evaluated": lambda _, path: b"cbuiltins\neval\n(" + text(f"open({path!r}, 'w')") + b"tR",
    "opened": lambda _, path: b"cio\nopen\n(" + text(path) + text("w") + b"tR",
    "profiled": lambda _, path: b"ccProfile\nrun\n(" + text(f"open({path!r}, 'w')") + b"tR",
    "code": lambda _, path: b"cbuiltins\nexec\n(" + text(f"open({path!r}, 'w')") + b"}tR",
    "persistent id": lambda run, _: (
        b"(" + text("storage") + SYSTEM + b"(" + run + b"tR" + text("0") + text("cpu") + b"K\x01tQ"
    ),
}  # fmt: skip


# What sets attributes, or calls methods of what stands for data, needs no refusal: it does nothing here.
INERT: dict[str, Callable[[bytes, str], bytes]] = {
    "BUILD": lambda run, _: EMPTY + b"}" + text("__setstate__") + SYSTEM + b"sb" + run + b"b",
    "BUILD with slots": lambda run, _: EMPTY + b"N}" + text("__setstate__") + SYSTEM + b"s\x86b" + run + b"b",
    "APPEND": lambda run, _: EMPTY + b"}" + text("append") + SYSTEM + b"sb" + run + b"a",
    "ADDITEMS": lambda run, _: EMPTY + b"}" + text("add") + SYSTEM + b"sb(" + run + b"\x90",
    "method of a path": lambda _, path: (
        text("pathlib") + text("Path.touch") + b"\x93(cpathlib\nPosixPath\n(" + text(path) + b"tRtR"
    ),
    "method of an object": lambda _, path: (
        GETATTR + b"cpathlib\nPosixPath\n(" + text(path) + b"tR" + text("touch") + b"tR(tR"
    ),
}  # fmt: skip


@both_formats
@pytest.mark.parametrize("attack", (ATTACKS | INERT).values(), ids=ATTACKS | INERT)
def test_calls_with_effects_have_none(
    tmp_path: Path, attack: Callable[[bytes, str], bytes], zipped: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    program = b"\x80\x04" + attack(text(f"touch {trace}"), str(trace)) + b"."

    class Unpickler(pickle._Unpickler):
        def persistent_load(self, pid: Any) -> None: ...

    with suppress(Exception):  # what comes behind the effect
        Unpickler(io.BytesIO(program)).load()
    assert trace.exists()  # so it is an attack
    trace.unlink()
    refused = "holds no named tensors" if attack in INERT.values() else "refused: the pickle calls "
    with pytest.raises(CheckpointError, match=rf"evil\.ckpt: {refused}"):
        read_checkpoint(as_torch_file(tmp_path / "evil.ckpt", program, zipped))
    assert not trace.exists()


class Colour(Enum):
    RED = 1


class NamedColour(Enum):
    RED = 1
    __reduce_ex__ = pickle_by_enum_name  # by getattr


class Pair(NamedTuple):
    a: int
    b: str


@dataclass(frozen=True)
class Settings:
    path: Path = Path("x")


class Settled(dict[str, Any]): ...


HONEST: dict[str, Any] = {
    "types": (int, str, range, slice, type(None), Path, defaultdict, Namespace, np.float32, torch.Tensor),
    "functions": (len, print, open, os.path.join, os.system, torch.relu, torch.load),  # named, not called
    "methods": (Path("x").exists, "{}".format, [].append, Settings.__init__, random.Random(0).random),
    "builtins": (
        range(3), slice(1, 2), 1j, 2**70, b"\xff\x00", bytearray(b"x"), {1}, frozenset([1]), Ellipsis, iter([1]),
    ),
    "errors": (ValueError("x"), FileNotFoundError(2, "x"), subprocess.CalledProcessError(1, "x")),
    "containers": (
        defaultdict(int), defaultdict(list, a=[1]), Counter("ab"), deque([1], 2), OrderedDict(a=1), array("f"),
    ),
    "own classes": (Pair(1, "x"), Settings(), Settled(a=1), Namespace(a=1), types.SimpleNamespace(a=1)),
    "enumerations": (Colour.RED, NamedColour.RED, re.IGNORECASE, http.HTTPStatus.OK, socket.AF_INET, signal.SIGINT),
    "paths": (Path("x"), PurePosixPath("x"), PureWindowsPath("C:/x")),
    "times": (datetime.now(), timedelta(1), UTC, ZoneInfo("UTC"), time.gmtime()),
    "numbers": (Fraction(1, 2), Decimal(1), uuid.uuid4(), random.getstate(), random.Random(0)),
    "getters": (operator.itemgetter(1), operator.attrgetter("a.b"), operator.methodcaller("f"), cmp_to_key(max)),
    "partial": (partial(max, 1), partial(open, mode="rb"), partial(Colour)),
    "standard library": (
        logging.getLogger("x"), json.JSONEncoder(), platform.uname(), re.compile("x"), io.BytesIO(b"x"),
    ),
    "numpy": (np.float64(2), np.int64(3), np.bool_(True), np.arange(3), np.dtype("f4"), np.array([None]), np.sum),
    "numpy's random states": (np.random.RandomState(0), np.random.default_rng(0), np.random.get_state()),
    "OmegaConf": (OmegaConf.create({"a": [1, {"b": "x"}], "c": None, "d": "${a}"}), OmegaConf.structured(Settings)),
    "torch": (
        torch.Size([1]), torch.device("cuda:0"), torch.float16, torch.get_rng_state(), torch.Generator(), torch.strided,
    ),
    "torch's modules": (
        nn.Linear(1, 1), torch.optim.AdamW([nn.Parameter(torch.ones(1))]), torch.distributions.Normal(0, 1),
    ),
    "tensors": (torch.eye(2).to_sparse(), nn.Parameter(torch.ones(1)), torch.empty(1, device="meta")),
    "Lightning": (ModelCheckpoint(), EarlyStopping("x"), AttributeDict(a=1), TrainerFn.FITTING),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("extra", HONEST.values(), ids=HONEST)
def test_honest_objects_beside_the_weights(tmp_path: Path, extra: tuple[Any, ...], protocol: int) -> None:
    path = tmp_path / "a.ckpt"
    extra = tuple(x for x in extra if can_be_pickled(x, protocol))
    if protocol:
        for zipped in (True, False):
            content = {"state_dict": {"w": torch.ones(2)}, "extra": [*extra, {"nested": extra}]}
            torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
            assert_equal(read_checkpoint(path), {"w": torch.ones(2)})
    else:  # torch has no names for storages in it
        torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "plain.ckpt")
        with zipfile.ZipFile(tmp_path / "plain.ckpt") as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                record, added = old.read(name), text("extra") + pickle.dumps(extra, 0)[:-1] + b"s."
                new.writestr(name, record.removesuffix(b".") + added if name.endswith("data.pkl") else record)
        assert_equal(read_checkpoint(path), {"w": torch.ones(2)})


def can_be_pickled(value: object, protocol: int) -> bool:
    try:
        pickle.dumps(value, protocol)
    except (TypeError, ValueError, AttributeError, pickle.PicklingError, NotImplementedError):
        return False
    return True


def test_bytes_of_python_2(tmp_path: Path) -> None:
    """Its pickles hold the numbers of numpy's scalars as text that is no UTF-8."""
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02f8K\x00K\x01tRU\x08\x00\xff\xfe\x80\x00\x00\xf0?tR"
    long = b"c__builtin__\nlong\nc__builtin__\nunicode\nc__builtin__\nxrange\nc__builtin__\nbasestring\n"
    program = b"\x80\x02}(U\x01aK\x01U\x01b" + scalar + b"U\x01c(" + long + b"l" + b"u."
    for zipped in (True, False):
        with pytest.raises(CheckpointError, match="holds no named tensors, but keys 'a', 'b', 'c'"):
            read_checkpoint(as_torch_file(tmp_path / "a.ckpt", program, zipped))


def test_weights_in_a_class_that_behaves_like_a_dict(tmp_path: Path) -> None:
    state = Settled(w=torch.ones(2))
    for content in (state, {"state_dict": state}, Settled(state_dict=state), AttributeDict(state_dict=state)):
        torch.save(content, tmp_path / "a.ckpt")
        assert_equal(read_checkpoint(tmp_path / "a.ckpt"), {"w": torch.ones(2)})


class Net(pl.LightningModule):
    def __init__(self, config: Any, kind: Any = Colour.RED, folder: Path = Path("x")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, partial(min, 1))]


def test_a_file_of_lightning(tmp_path: Path) -> None:
    net = Net(OmegaConf.create({"lr": 1e-4, "channels": [1, 2], "path": Path("x"), "nested": {"a": None}}))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(tmp_path, save_last=True), EarlyStopping("x", strict=False)],
    )  # fmt: skip
    trainer.fit(net, torch.utils.data.DataLoader(torch.ones(2, 1)))
    assert_equal(read_checkpoint(tmp_path / "last.ckpt"), net.state_dict())


@both_formats
def test_other_functions_are_not_called(tmp_path: Path, zipped: bool) -> None:
    # Third-party functions aren't known to be harmful by their names; they are inert all the same.
    calls = [Call(np.save, str(tmp_path / "trace.npy"), [1]), Call(torch.load, str(tmp_path / "other.ckpt"))]
    path = save(tmp_path / "a.ckpt", {"state_dict": {"w": torch.ones(2)}, "calls": calls}, zipped)
    assert_equal(read_checkpoint(path), {"w": torch.ones(2)})
    assert not (tmp_path / "trace.npy").exists()


@both_formats
def test_callback_objects_are_dropped_with_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    module: Any = types.ModuleType("lightning_like")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best, self.path, self.scores = np.float64(0.5), Path("a/b"), np.arange(3)

    class History(dict[str, int]): ...

    class Steps(list[int]): ...

    for kind in (ModelCheckpoint, History, Steps):
        kind.__module__, kind.__qualname__ = "lightning_like", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "lightning_like", module)
    content = {
        "state_dict": OrderedDict(w=torch.ones(2)),
        "callbacks": {ModelCheckpoint: ModelCheckpoint()},
        "history": [History(a=1), Steps([1, 2]), defaultdict(list, a=[1])],
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "version": "1.4.2",
    }
    path = save(tmp_path / "a.ckpt", content, zipped)
    monkeypatch.delitem(sys.modules, "lightning_like")
    with caplog.at_level(logging.WARNING):
        assert_equal(read_checkpoint(path), {"w": torch.ones(2)})
    assert len(caplog.records) == 1
    for name in ("lightning_like.ModelCheckpoint", "lightning_like.History", "multiarray.scalar", "pathlib"):
        assert name in caplog.text


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_tensors_of_unknown_kinds_are_named(tmp_path: Path) -> None:
    state = {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
    with pytest.raises(CheckpointError, match="_rebuild_qtensor"):
        read_checkpoint(save(tmp_path / "a.ckpt", state, zipped=True))


@both_formats
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_is_not_a_checkpoint(tmp_path: Path, zipped: bool) -> None:
    path = save(tmp_path / "a.pt", nn.Linear(2, 2), zipped)
    with pytest.raises(CheckpointError, match=r"a\.pt: .*torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(path)


# --- weights in wrappers

PUBLISHED = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.full((1,), 1.0),
    "model.diffusion_model.out.2.weight": torch.full((1,), 2.0),
    "first_stage_model.encoder.conv_in.weight": torch.full((1,), 3.0),
    "cond_stage_model.final_ln.weight": torch.full((1,), 4.0),
    "proj_out.weight": torch.full((1,), 5.0),
    "learnable_vector": torch.full((1,), 6.0),
}
FIRST_STAGE_ALONE = {"encoder.conv_in.weight": torch.full((1,), 1.0), "quant_conv.bias": torch.full((1,), 2.0)}
UNET_OF_DIFFUSERS = {"conv_in.weight": torch.ones(1), "down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}
State = dict[str, torch.Tensor]


def prefixed(prefix: str, state: State, only: str = "") -> State:
    """Put a prefix before the names, or behind their part `only`."""
    return {(only + prefix + n[len(only) :] if n.startswith(only) else n): x for n, x in state.items()}


parts = st.sampled_from(["module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module."])
places = st.sampled_from(["state_dict", "model_state_dict", "model", "module", "net", "params", "ema", "params_ema"])
owners = st.sampled_from(["", "model.", "net.", "ema_model.", "state_dict.", "generator.", "any.thing."])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    state=st.sampled_from([PUBLISHED, FIRST_STAGE_ALONE, UNET_OF_DIFFUSERS]),
    wrappers=st.lists(parts, max_size=3),
    owner=owners,
    inside=st.sampled_from(["", "model.diffusion_model.", "first_stage_model.encoder."]),
    nested=st.lists(places, max_size=2, unique=True),
    as_safetensors=st.booleans(),
)
def test_wrappers_are_taken_off(
    tmp_path: Path, state: State, wrappers: list[str], owner: str, inside: str, nested: list[str], as_safetensors: bool
) -> None:
    wrapped = prefixed("".join(wrappers), state, inside)
    wrapped = prefixed(owner if state is PUBLISHED or owner.count(".") == 1 else "", wrapped)
    content: dict[str, Any] = wrapped
    for place in nested:
        content = {place: content, "epoch": 3, "optimizer": {"lr": 1e-4}}
    if as_safetensors:
        write_safetensors(tmp_path / "a", wrapped)
    else:
        torch.save(content, tmp_path / "a")
    got = read_checkpoint(tmp_path / "a")
    assert got.keys() == state.keys()
    assert_equal({name: got[name] for name in state}, state)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": prefixed("module.", PUBLISHED)}, ["model", "module."]),
        (prefixed("_orig_mod.", PUBLISHED, "model.diffusion_model."), ["_orig_mod."]),
        ({"model": PUBLISHED, "ema": prefixed("module.", PUBLISHED), "step": 1}, ["model", "ema"]),
        ({"anything": PUBLISHED, "step": 1}, ["anything."]),
        (prefixed("ema_model.", PUBLISHED) | {"initted": torch.ones(1)}, ["ema_model.", "1 other"]),
    ],
)  # fmt: skip
def test_what_was_taken_off_is_said_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: object, named: list[str]
) -> None:
    assert_equal(read_checkpoint(save(tmp_path / "a.ckpt", content, zipped=True)), PUBLISHED)
    assert all(what in caplog.text for what in ("a.ckpt", *named))


@pytest.mark.parametrize("state", [PUBLISHED, FIRST_STAGE_ALONE, UNET_OF_DIFFUSERS])
def test_plain_files_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture, state: State) -> None:
    for content in (state, {"state_dict": state}):
        assert_equal(read_checkpoint(save(tmp_path / "a.ckpt", content, zipped=True)), state)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (prefixed("online_model.", PUBLISHED) | prefixed("ema_model.", PUBLISHED), ["online_model.", "ema_model."]),
        (PUBLISHED | prefixed("ema_model.", PUBLISHED), ["ema_model."]),
        (PUBLISHED | prefixed("module.", PUBLISHED), ["module."]),
        (PUBLISHED | prefixed("_orig_mod.", PUBLISHED, "model.diffusion_model."), ["_orig_mod."]),
        ({"state_dict": PUBLISHED, "model": PUBLISHED}, ["state_dict", "model"]),
    ],
)
def test_several_copies_are_refused_by_their_prefixes(tmp_path: Path, content: object, named: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(save(tmp_path / "a.ckpt", content, zipped=True))
    assert all(what in str(caught.value) for what in ("a.ckpt", *named))


# --- files that are no checkpoints


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\xef\xbb\xbf<html>Sign in</html>", "web page"),
        (bytes(2000), "nothing but zeros, an aborted download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"Access to this model is restricted.\n", "text, not weights, beginning 'Access to this"),
        (f"{'Zugriff verweigert: ü':511}ü".encode(), "text, not weights, beginning 'Zugriff verweigert: ü"),  # cut in ü
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (pickle.dumps({"w": 1}), "torch.save"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{message}"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="is a directory"):
        read_checkpoint(tmp_path)


def test_no_tensors(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {"epoch": 1}
    cyclic["model"] = cyclic
    for content in ({"epoch": 1, "state_dict": {}}, [torch.ones(2)], {"model": {"w": "x"}}, cyclic):
        path = save(tmp_path / "a.ckpt", content, zipped=True)
        with pytest.raises(CheckpointError, match="holds no named tensors"):
            read_checkpoint(path)
    write_safetensors(tmp_path / "a.safetensors", {})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_foreign_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not one that torch"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.9999])
def test_truncated(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / "a.ckpt"
    state = {f"w{i}": torch.randn(5000) for i in range(3)}
    if kind == "safetensors":
        write_safetensors(path, state)
    else:
        save(path, state, zipped=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        read_checkpoint(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), zipped=st.booleans())
def test_damage_ends_in_one_error_or_tensors(tmp_path: Path, data: st.DataObject, zipped: bool) -> None:
    path = save(tmp_path / "a.ckpt", {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, 9999)) % len(content)  # legacy files hold addresses, of varying length
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tensors = read_checkpoint(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))
    else:
        assert all(tensor.sum() is not None for tensor in tensors.values())  # memory is really there


BOMBS = {
    # one damaged byte turns "remember this as number n" into a number of four bytes
    "number": (b"\x80\x02}r\xff\xff\xff\x7f.", ""),
    # list(bytearray(1_200_000_000))
    "call": (b"\x80\x02c__builtin__\nlist\ncbuiltins\nbytearray\nJ\0\x8c\x86G\x85R\x85R.", "holds no named tensors"),
}


@both_formats
@pytest.mark.parametrize(("program", "message"), BOMBS.values(), ids=BOMBS)
def test_a_small_pickle_takes_little(tmp_path: Path, program: bytes, message: str, zipped: bool) -> None:
    path = as_torch_file(tmp_path / "a.ckpt", program, zipped)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))  # 1 GiB more than now: 32 would be asked for
    try:
        with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*{message}"):
            read_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# --- writing


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
no_dot = st.characters(exclude_characters=".", codec="utf-8")  # parts of names may be wrappers'
shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.dictionaries(st.text(no_dot, min_size=1, max_size=8), st.tuples(dtypes, shapes), min_size=1, max_size=4)
)
def test_round_trips(tmp_path: Path, layout: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    layout.pop("__metadata__", None)  # reserved by the format
    state = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in layout.items()}
    write_safetensors(tmp_path / "a.safetensors", state)
    write_torch(tmp_path / "a.ckpt", state)
    for file in ("a.safetensors", "a.ckpt"):
        got = read_checkpoint(tmp_path / file)
        assert_equal({name: got[name] for name in state}, state)


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_views_and_shared_tensors_are_written_in_full(
    tmp_path: Path, state: dict[str, torch.Tensor], write: Any
) -> None:
    state["again"] = state["weight"]
    write(tmp_path / "a", state)
    got = read_checkpoint(tmp_path / "a")
    assert_equal({name: got[name] for name in state}, state)
    slim = torch.zeros(1_000_000)[:2]
    write(tmp_path / "b", {"w": slim})
    assert (tmp_path / "b").stat().st_size < 5000  # the rest of its storage is not written


def test_pieces_are_made_one_at_a_time_and_in_any_order(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def pieces() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("w1", "w0", "w1", "h", "w0"):  # two rows of each at a time
            assert not any(reference() is not None for reference in alive)
            tensor = torch.full((2, 2), len(alive), dtype=torch.half if name == "h" else torch.int64)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    layout = {name: torch.empty(4, 2, dtype=torch.int64, device="meta") for name in ("w0", "w1")}
    layout["h"] = torch.empty(2, 2, dtype=torch.half, device="meta")
    write_safetensors(tmp_path / "a.safetensors", layout, {"command": "x"}, pieces=pieces())
    assert len(alive) == 5
    rows = {"w0": [[1, 1]] * 2 + [[4, 4]] * 2, "w1": [[0, 0]] * 2 + [[2, 2]] * 2}
    expected = {name: torch.tensor(values) for name, values in rows.items()}
    assert_equal(load_file(tmp_path / "a.safetensors"), {**expected, "h": torch.full((2, 2), 3).half()})


def test_pieces_that_fail_leave_nothing(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        raise CheckpointError("does not fit")
        yield

    with pytest.raises(CheckpointError, match=r"^does not fit"):
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)}, pieces=failing())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert_equal(read_checkpoint(tmp_path / "a.safetensors"), {"w": torch.ones(2)})


def test_types_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w: .*torch\.complex128"):
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(2, dtype=torch.complex128)})


def test_metadata(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {"command": "x"})
    write_torch(tmp_path / "a.ckpt", {"w": torch.ones(2)}, {"command": "x"})
    assert read_metadata(tmp_path / "a.safetensors")["command"] == "x"
    assert read_metadata(tmp_path / "a.ckpt") == {"command": "x"}
    torch.save({"w": torch.ones(2)}, tmp_path / "foreign.ckpt")
    assert read_metadata(tmp_path / "foreign.ckpt") == {}
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["provenance"] == {"command": "x"}


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_a_folder_that_is_a_file(tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="check the folder"):
        write(tmp_path / "file" / "a", {"w": torch.ones(2)})


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits are POSIX")
@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, write: Any) -> None:
    (tmp_path / "plain").touch()
    write(tmp_path / "a", {"w": torch.ones(2)})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # The test vector of FIPS 180-2.
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, write: Any) -> None:
    import resource

    write(tmp_path / "a", {"w": torch.ones(2)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing beyond this fails half-way
    try:
        with pytest.raises(CheckpointError, match="nothing was changed"):
            write(tmp_path / "a", {"w": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_equal(read_checkpoint(tmp_path / "a"), {"w": torch.ones(2)})


@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "a", {"w": torch.ones(2)})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(tmp_path / "a", {"w": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_equal(read_checkpoint(tmp_path / "a"), {"w": torch.ones(2)})
