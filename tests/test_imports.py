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
IN_VLLM = ("rollout.vllm_cpu", "rollout.vllm_reload", "rollout.vllm_worker")

# What each room may import of the package, however late. A room is a module or a package; of two the narrower counts.
# What is not here (commands, ranks, the launcher and its machines) may import everything, and is imported by no room.
ROOMS = {
    "algorithm": "",
    "routing": "",
    "control": "",
    "processes": "",
    "files": "",
    "checkpoints": "",
    "metrics": "files",
    "architecture": "architecture_rules",
    "architecture_rules": "",
    "head": "algorithm",
    "rollout.trajectory": "files",
    "rollout.engine": "rollout.trajectory weights.layout",
    "weights": "rollout.engine architecture control files",
    "data": "rollout.trajectory weights.layout config",
    "backend": "head weights data.packing algorithm architecture checkpoints",
    "rollout": "data weights routing algorithm.advantages architecture checkpoints config config_loading control files",
    "rollout.node_engine": "rollout.engines machines processes control config config_cluster_rules config_loading",
    "rollout.engines": "rollout architecture config processes",
    "config": "algorithm rollout.engine weights.layout",
    "config_cluster_rules": "config",
    "config_file_rules": "config data.prompts",
    "config_rollout_rules": "rollout.engine rollout.engines weights.engine_layout architecture config "
    "config_file_rules",
    "config_rules": "weights.layout weights.mapping data.prompts algorithm architecture config config_cluster_rules "
    "config_file_rules config_rollout_rules",
    "config_loading": "config config_rules files",
    "planner": "weights.layout weights.engine_layout weights.mapping weights.plan head.policy_head rollout.engine "
    "architecture config config_cluster_rules config_loading config_rules",
}
OWNERS = {"megatron": ("backend",), "triton": ("head.kernels",), "vllm": IN_VLLM, "sglang": ()}
ON_MEGATRON = ("backend", "rank", "trainer", "sync_check_rank")


def trees() -> dict[str, ast.Module]:
    """By the name of a module, without that of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


TREES = trees()


def imported(node: ast.AST, *, late: bool) -> Iterator[str]:
    """Modules, those of the package as in `TREES`; `late`: also inside functions, and for types alone."""
    for child in ast.iter_child_nodes(node):
        yield from names(child)
        waits = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        )
        if late or not waits:
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


def inside(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def test_a_room_imports_what_it_may() -> None:
    found = {}
    for name, tree in TREES.items():
        room = max((room for room in ROOMS if inside(name, (room,))), key=len, default=None)
        if room:
            own = (room,)
            others = [other for other in imported(tree, late=True) if other in TREES and other]
            found[name] = {other for other in others if not inside(other, (*own, *ROOMS[room].split()))}
    assert not {name: others for name, others in found.items() if others}


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
        ({"torch"}, ["check", "cli", "submit", "config_loading", "algorithm.advantages", "weights.plan"]),
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
