"""How an SGLang server is started for rollouts: command line and environment."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import megatron_dppo
from megatron_dppo.rollout.sglang.message import LOADER

SUPPORTED = (0, 5, 18), (0, 5, 23)  # first and last version
PYTHON_VARIABLE = "MEGATRON_DPPO_SGLANG_PYTHON"  # in the environment: the interpreter that has SGLang
RESERVED_POSITIONS = 6  # of the context that SGLang gives to no request
DEFAULT_SEQS = 64


def server_command(
    model_dir: Path,
    *,
    port: int,
    cpu: bool,
    dtype: Literal["float32", "bfloat16", "float16"],
    host: str = "127.0.0.1",
    routed_experts: bool = False,
    tensor_parallel_size: int = 1,
    expert_parallel: bool = False,
    max_model_len: int,
    max_num_seqs: int = DEFAULT_SEQS,
    gpu_memory_utilization: float | None = None,
    python: str = sys.executable,
    extra: Sequence[str] = (),
) -> list[str]:
    """The argv of a server on `model_dir`, a local Hugging Face directory with weights and a tokenizer.

    python: of the environment that has SGLang, which cannot share one with vLLM. extra: further arguments of SGLang,
    passed on last. Raises ValueError if the directory has no config.json.
    """
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"engine model: got {model_dir}, expected a local Hugging Face directory with a config.json")
    context = max_model_len + RESERVED_POSITIONS
    options: dict[str, str | int | float | None] = {
        "model-path": str(model_dir),
        "host": host,
        "port": port,
        "dtype": dtype,
        "tp-size": tensor_parallel_size,
        "ep-size": tensor_parallel_size if expert_parallel else None,
        "custom-weight-loader": LOADER,
        "context-length": context,
        "max-total-tokens": max_num_seqs * context if cpu else None,  # of the KV cache
        "max-running-requests": max_num_seqs,
        "mem-fraction-static": None if cpu else gpu_memory_utilization,
        "sampling-defaults": "openai",  # not the model's own generation_config.json
        "device": "cpu" if cpu else None,
        "attention-backend": "torch_native" if cpu else None,
        "log-level": "warning",
    }
    flags = ["enable-metrics", "skip-server-warmup"]
    flags += ["enable-return-routed-experts"] if routed_experts else []
    flags += ["sleep-on-idle"] if cpu else []  # its schedulers would take the cores that ranks train on
    argv = [python, "-m", "sglang.launch_server"]
    for name, value in options.items():
        argv += [] if value is None else [f"--{name}", str(value)]
    return [*argv, *(f"--{flag}" for flag in flags), *extra]


def server_env(
    *, cpu: bool, cache_root: Path, tensor_parallel_size: int = 1, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The complete environment of a server: `base` (this process's by default) with what rollouts need.

    This package comes onto its path, wherever its environment is: workers load `sglang_worker`.
    """
    env = dict(os.environ if base is None else base)
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_path_of_package(cache_root)), env.get("PYTHONPATH")])),
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # for the positions that it keeps back
        "HF_HUB_OFFLINE": "1",
    }
    if cpu:
        env |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
        }
        if tensor_parallel_size > 1:  # one core each, or SGLang wants to know of NUMA nodes
            cores = sorted(os.sched_getaffinity(0))
            bind = [str(cores[worker % len(cores)]) for worker in range(tensor_parallel_size)]
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bind)
    return env


def _path_of_package(cache_root: Path) -> Path:
    """A directory with a link to this package and nothing else: what is installed beside it is not SGLang's."""
    package = Path(megatron_dppo.__file__).resolve().parent
    place = cache_root / hashlib.sha256(str(package).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (place / package.name).symlink_to(package, target_is_directory=True)
    return place.absolute()


def interpreter() -> str:
    """The Python that has SGLang: `PYTHON_VARIABLE` names it, or it is this one. Raises ValueError where neither is."""
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        if not (Path(named).is_file() and os.access(named, os.X_OK)):
            raise ValueError(f"{PYTHON_VARIABLE}: got {named}, expected an interpreter that has SGLang installed")
        return str(Path(named).absolute())
    if importlib.util.find_spec("sglang") is None:
        raise ValueError(
            f"rollout.engine: SGLang is not installed beside {sys.executable}; install it in an environment of its own "
            f"(vLLM's pins are others) and set {PYTHON_VARIABLE} to its python"
        )
    return sys.executable


def installed_version() -> str | None:
    """Of the SGLang that `interpreter` has; None where there is none."""
    try:
        python = interpreter()
    except ValueError:
        return None
    script = "from importlib.metadata import version; print(version('sglang'))"
    found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def check_supported(version: str) -> None:
    """Raises ValueError for a version that this project was not tested with."""
    low, high = SUPPORTED
    if not low <= _numbers(version) <= high:
        raise ValueError(f"got SGLang {version}, expected {'.'.join(map(str, low))} to {'.'.join(map(str, high))}")


def _numbers(version: str) -> tuple[int, ...]:
    """The three numbers that a version begins with; what is no number is 0."""
    digits = [re.match(r"\d*", part) for part in version.split(".")[:3]]
    return tuple(int(found[0] or 0) if found else 0 for found in digits)
