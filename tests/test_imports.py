"""Who imports whom: the rules of docs/design.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_dppo"
PICTURE = (PACKAGE.parent / "docs" / "design.md").read_text().partition("## Who imports whom")[2].split("```")[1]
LEVELS = [line.split(" · ") for line in reversed(PICTURE.strip().splitlines())]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
IN_VLLM = ("rollout.vllm.worker", "rollout.vllm.reload", "rollout.vllm.cpu")
OWNERS = {"megatron": ("backend",), "triton": ("head.kernels",), "vllm": IN_VLLM, "sglang": ()}
ON_MEGATRON = ("backend", "rank", "step_metrics", "trainer", "sync_check_rank")


def trees() -> dict[str, ast.Module]:
    """By the name of a module, without that of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


TREES = trees()


def imported(node: ast.AST, *, late: bool) -> Iterator[str]:
    """Modules, those of the package as in `TREES`; `late`: also inside functions."""
    for child in ast.iter_child_nodes(node):
        yield from names(child)
        waits = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not for_types and (late or not waits):
            yield from imported(child, late=late)


def names(node: ast.AST) -> list[str]:
    """What one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.removeprefix("megatron_dppo.") for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.module and not node.level, "expected absolute imports"
    if node.module.split(".")[0] != "megatron_dppo":
        return [node.module]
    module = node.module.removeprefix("megatron_dppo").removeprefix(".")
    deeper = [f"{module}.{alias.name}".removeprefix(".") for alias in node.names]
    return [name if name in TREES else module for name in deeper]


def room_of(name: str) -> str:
    return name.split(".")[0].removesuffix("_rules")


def inside(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def test_a_room_imports_only_rooms_below_it() -> None:
    """However late, but for types alone. Files of `architecture` are one room."""
    wrong = []
    for name, tree in TREES.items():
        for other in imported(tree, late=True):
            ours, theirs = room_of(name), room_of(other)
            if other in TREES and ours and theirs and ours != theirs and LEVEL_OF[theirs] >= LEVEL_OF[ours]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_every_room_is_in_the_picture() -> None:
    assert {room_of(name) for name in TREES} - {""} == LEVEL_OF.keys()


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_only_where_it_may_be(library: str) -> None:
    users = {name for name, tree in TREES.items() if any(inside(i, (library,)) for i in imported(tree, late=True))}
    assert not {name for name in users if not inside(name, OWNERS[library])}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {name: {other for other in imported(tree, late=False) if other in TREES} for name, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("missing", "modules"),
    [
        (
            {"megatron", "vllm", "sglang", "triton", "transformer_engine", "apex"},
            [name for name in TREES if not inside(name, (*ON_MEGATRON, *IN_VLLM, "head.kernels"))],
        ),
        ({"torch"}, ["check", "cli", "job.submit", "config.loading", "algorithm.advantages", "weights.plan"]),
    ],
    ids=["megatron and engines", "torch"],
)
def test_the_library_imports_without(missing: set[str], modules: list[str]) -> None:
    script = f"""
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""
    full = [f"megatron_dppo.{name}".rstrip(".") for name in modules]
    found = subprocess.run([sys.executable, "-c", script, *full], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
