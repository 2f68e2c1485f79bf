from __future__ import annotations

from importlib import metadata
from pathlib import Path

from rich.console import Console

from megatron_dppo.check import (
    apex_component,
    inspect_machine,
    print_report,
    what_is_missing,
    what_is_possible,
)

EVERYTHING: dict[str, str | None] = {
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "transformers": "5.19.0",
    "vLLM": "0.30.0",
    "Transformer Engine": "2.9",
    "apex": "0.1",
}


def test_versions_are_those_of_the_installed_packages() -> None:
    components = {component.name: component for component in inspect_machine().components}
    assert components["transformers"].version == metadata.version("transformers")
    assert components["torch"].version == metadata.version("torch")


def test_the_report_names_every_package_and_is_readable() -> None:
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    report = inspect_machine()
    print_report(report, console)
    text = console.export_text()
    assert all(component.name in text for component in report.components)
    assert all(line in text.replace("\n", " ") or line[:60] in text for line in report.possible)


def test_nothing_is_missing_on_a_full_gpu_machine() -> None:
    assert what_is_missing(EVERYTHING, num_gpus=8) == []
    assert what_is_possible(EVERYTHING, num_gpus=8) == [
        "training on 8 GPU(s) over NCCL, with Transformer Engine layers",
        "the optimizer step with apex's fused Adam",
        "rollouts by a vLLM 0.30.0 server that a run starts itself",
        "the quickstart: make quickstart",
    ]


def test_without_engine_and_megatron_it_says_what_to_install() -> None:
    versions = EVERYTHING | {"vLLM": None, "megatron-core": None}
    assert what_is_missing(versions, num_gpus=0) == [
        "megatron-core is not installed, and training needs it: pip install megatron-core",
        "vLLM is not installed, so no run can start an engine of its own: make .venv (requirements/cpu.txt)",
    ]
    assert what_is_possible(versions, num_gpus=0) == [
        "rollouts by a vLLM server of your own on this machine (rollout.urls)"
    ]


def test_packages_that_break_a_cpu_build_are_pointed_out() -> None:
    (line,) = what_is_missing(EVERYTHING | {"torchvision": "0.28.0", "torchcodec": "0.17"}, num_gpus=0)
    assert line.endswith("pip uninstall torchvision torchcodec")
    assert what_is_missing(EVERYTHING | {"torchvision": "0.28.0"}, num_gpus=1) == []


def test_an_untested_vllm_is_pointed_out() -> None:
    assert what_is_missing(EVERYTHING | {"vLLM": "0.30.0"}, num_gpus=1) == []
    (line,) = what_is_missing(EVERYTHING | {"vLLM": "0.34.1"}, num_gpus=1)
    assert line == "vLLM 0.34.1 is outside the supported range, >= 0.30 and < 0.34"


def test_sglang_is_named_where_it_is_and_its_version_checked() -> None:
    assert "rollouts by an SGLang 0.5.20.post1 server that a run starts itself" in what_is_possible(
        EVERYTHING | {"SGLang": "0.5.20.post1"}, num_gpus=1
    )
    assert what_is_missing(EVERYTHING | {"SGLang": "0.5.20.post1"}, num_gpus=1) == []
    for version in ("0.5.17", "0.5.24rc1", "0.6.0"):
        assert what_is_missing(EVERYTHING | {"SGLang": version}, num_gpus=1) == [
            f"got SGLang {version}, expected 0.5.18 to 0.5.23"
        ]


def test_the_unrelated_apex_is_not_taken_for_nvidias(tmp_path: Path) -> None:
    unrelated, nvidia = tmp_path / "unrelated", tmp_path / "nvidia"
    unrelated.mkdir()
    (nvidia / "optimizers").mkdir(parents=True)
    assert apex_component([]).version is None
    other = apex_component([unrelated])
    assert other.version is None
    assert "another package" in other.note
    assert apex_component([nvidia]).version is not None
