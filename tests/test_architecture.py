"""The import rule: rooms import downward only, and editing starts without the training stack.

Read from the source, so nothing is imported here; `if TYPE_CHECKING:` does not count, a function's own import does,
but for the rules about start-up, which are about what an import statement outside of functions brings in.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ARCHITECTURE = ROOT / "docs" / "architecture.md"


def read_layers() -> tuple[tuple[str, ...], ...]:
    """The layers of the table in `docs/architecture.md`, lowest first, each as a tuple of dotted module names."""
    rows = re.findall(r"^\| \d+ \|(.*?)\|", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return tuple(tuple(re.findall(r"`([\w.]+)`", row)) for row in rows)


LAYERS = read_layers()
# The first room does not reach the second one, directly or through any chain of imports.
APART = (
    ("ldm.data", "ldm.models"),
    ("ldm.data", "ldm.evaluation"),
    ("ldm.models", "ldm.evaluation"),
    ("ldm.samplers", "ldm.models"),
    ("ldm.models", "ldm.samplers"),
    ("ldm.models", "ldm.data"),
    ("ldm.checkpoint", "ldm.models"),
    ("ldm.samplers", "ldm.data"),
    ("ldm.editing", "ldm.training"),
    ("ldm.evaluation.evaluate", "ldm.latent_diffusion"),
)
# The path of an edit, and what it must start without.
EDITING = ("inference", "ldm.editing.editor", "ldm")
HEAVY = {"pytorch_lightning", "lightning_fabric", "cv2", "gradio", "transformers", "tensorboard", "sklearn", "scipy"}


def modules() -> dict[str, Path]:
    paths = [*ROOT.glob("*.py"), *(p for room in ("ldm", "scripts", "benchmarks") for p in (ROOT / room).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    names.pop("setup")
    return names


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Full names of what a piece of source imports, `from a import b` as `a.b`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide where they point"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif is_type_checking(child):
            assert isinstance(child, ast.If)
            yield from imports(ast.Module(child.orelse, []), inside_functions=inside_functions)
        elif inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(child, inside_functions=inside_functions)


@cache
def imported(module: str, *, inside_functions: bool) -> set[str]:
    return set(imports(ast.parse(MODULES[module].read_text()), inside_functions=inside_functions))


def own(name: str) -> str | None:
    """The module of this project that an imported name is or is part of."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else None


def within(module: str, room: str) -> bool:
    return module == room or (room != "ldm" and module.startswith(f"{room}."))


def layer(module: str) -> int:
    rooms = [(len(room), i) for i, rooms in enumerate(LAYERS) for room in rooms if within(module, room)]
    assert rooms, f"{module}: add it to the table in {ARCHITECTURE}"
    return max(rooms)[1]  # the longest name is the most specific


def chains(start: str) -> dict[str, list[str]]:
    """Every module of this project that `start` reaches, with one chain of imports that leads there.

    The package itself imports its public names on first use only, so chains end there.
    """
    found, waiting = {start: [start]}, [start]
    while waiting:
        module = waiting.pop()
        if module == "ldm":
            continue
        for target in {own(name) for name in imported(module, inside_functions=True)}:
            if target and target not in found:
                found[target] = [*found[module], target]
                waiting.append(target)
    return found


def test_imports_point_downward() -> None:
    for module in MODULES:
        for target, chain in chains(module).items():
            assert layer(target) <= layer(module), f"{' -> '.join(chain)} leads upward"
            for importer, forbidden in APART:
                assert not (within(module, importer) and within(target, forbidden)), " -> ".join(chain)


def test_the_table_lists_what_exists() -> None:
    for name in (name for names in LAYERS for name in names):
        assert any(within(module, name) for module in MODULES), name


def test_flat_modules_are_few() -> None:
    """Everything else has a package of its own."""
    assert len([path for path in (ROOT / "ldm").glob("*.py") if path.stem != "__init__"]) <= 8


def test_nothing_imports_an_entry_point() -> None:
    for module in MODULES:
        targets = {own(name) for name in imported(module, inside_functions=True)} - {module, None}
        if within(module, "scripts") or within(module, "benchmarks"):
            continue
        assert not any(layer(target) == layer("main") for target in targets if target), module


@pytest.mark.parametrize("start", EDITING)
def test_editing_starts_without_the_training_stack(start: str) -> None:
    """What functions import of this project is followed too; heavy packages may come in only inside functions."""
    seen, waiting = set[str](), [start]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        brought = {name.partition(".")[0] for name in imported(module, inside_functions=False)}
        assert not brought & HEAVY, f"{start} reaches {module}, which imports {brought & HEAVY}"
        targets = {own(name) for name in imported(module, inside_functions=True)}
        waiting += [target for target in targets if target and target not in seen]
    assert not any(
        within(module, room)
        for module in seen
        for room in ("ldm.training.diffusion_module", "ldm.training.run", "ldm.training.callbacks")
    )


def test_heavy_packages_that_are_always_imported_late() -> None:
    for module in MODULES:
        names = imported(module, inside_functions=False)
        assert "ldm.web.page" not in {own(name) for name in names}, module
        brought = {name.partition(".")[0] for name in names}
        if module == "ldm.web.page":  # it consists of Gradio, and is itself always imported late
            brought.remove("gradio")
        if within(module, "ldm.data"):  # making training samples needs OpenCV, which albumentations imports too
            brought.discard("cv2")
        assert not brought & {"transformers", "cv2", "gradio", "pandas", "diffusers"}, module


def test_the_checkpoint_room_knows_no_modules() -> None:
    for module in MODULES:
        if within(module, "ldm.checkpoint"):
            names = imported(module, inside_functions=True)
            assert not any(name.startswith("torch.nn") for name in names), module


def test_no_room_for_odds_and_ends() -> None:
    assert not [name for name in MODULES if name.rpartition(".")[2] in ("utils", "util", "helpers", "misc", "common")]
