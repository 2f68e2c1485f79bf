"""What differs between engines under test: how a server is started that can be told to fail, a client, the telling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from megatron_dppo.architecture import load_architecture
from megatron_dppo.rollout.http_engine import HttpEngine
from megatron_dppo.rollout.sglang import server as sglang_server
from megatron_dppo.rollout.sglang.client import SglangEngine
from megatron_dppo.rollout.sglang.message import LOADER, Call
from megatron_dppo.rollout.vllm import server as vllm_server
from megatron_dppo.rollout.vllm.client import VllmEngine

REPOSITORY = Path(__file__).parents[2]
MAX_LOGPROBS = 40
MAX_SEQS = 32
CONTEXT = 256
TELL_S = 60.0


class Kind(Protocol):
    """One of the engines."""

    name: str
    tensor_parallel: tuple[int, ...]  # at which the contract is tested
    max_logprobs: int  # of a vocabulary of 64
    dense_layers: bool  # whether it serves Qwen3-MoE models some of whose layers are dense
    latent_attention: bool  # whether it computes that on the CPU
    process: str  # in its command line
    generated: str  # its metric of sampled tokens

    def server(
        self, config: pytest.Config, model_dir: Path, port: int, **options: Any
    ) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a server whose workers can be told to fail."""
        ...

    def client(self, url: str, model_dir: Path, **kwargs: Any) -> HttpEngine: ...

    def tell(self, url: str, method: str, *args: Any) -> None:
        """Has the workers do what `faulty_*` does."""
        ...


class Vllm:
    tensor_parallel = (1,)
    name, max_logprobs, generated = "vllm", MAX_LOGPROBS, "vllm:generation_tokens_total"
    process, dense_layers, latent_attention = "vllm.entrypoints", True, True

    def server(
        self, config: pytest.Config, model_dir: Path, port: int, **options: Any
    ) -> tuple[list[str], dict[str, str]]:
        argv = vllm_server.server_command(
            model_dir, port=port, cpu=True, dtype="float32", max_logprobs=MAX_LOGPROBS, max_num_seqs=MAX_SEQS,
            extra=["--worker-extension-cls", "tests.engines.faulty_worker.FaultyExtension"], **options,
        )  # fmt: skip
        env = vllm_server.server_env(cpu=True, cache_root=config.cache.mkdir("vllm"))
        env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), env.get("PYTHONPATH", "")])
        return argv, env

    def client(self, url: str, model_dir: Path, **kwargs: Any) -> HttpEngine:
        return VllmEngine(url, **kwargs)

    def tell(self, url: str, method: str, *args: Any) -> None:
        answer = httpx.post(f"{url}/collective_rpc", json={"method": method, "args": list(args)}, timeout=TELL_S)
        assert answer.status_code == 200, answer.text


class Sglang:
    tensor_parallel = (1, 2)
    name, max_logprobs, generated = "sglang", 65, "sglang:generation_tokens_total"
    process, dense_layers, latent_attention = "sglang.launch_server", False, False
    loader = "tests.engines.faulty_sglang.call"

    def server(
        self, config: pytest.Config, model_dir: Path, port: int, **options: Any
    ) -> tuple[list[str], dict[str, str]]:
        options = {"max_model_len": CONTEXT, **options}
        loaders = options.pop("loaders", (LOADER, self.loader))
        argv = sglang_server.server_command(
            model_dir, port=port, cpu=True, dtype="float32", max_num_seqs=MAX_SEQS,
            python=sglang_server.interpreter(), extra=["--custom-weight-loader", *loaders], **options,
        )  # fmt: skip
        env = sglang_server.server_env(
            cpu=True,
            cache_root=config.cache.mkdir("path"),
            tensor_parallel_size=options.get("tensor_parallel_size", 1),
        )
        env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(REPOSITORY)])  # of `loader`
        return argv, env

    def client(self, url: str, model_dir: Path, **kwargs: Any) -> HttpEngine:
        return SglangEngine(url, load_architecture(model_dir), **kwargs)

    def tell(self, url: str, method: str, *args: Any) -> None:
        with httpx.Client(base_url=url, timeout=TELL_S) as http:
            workers = http.get("/server_info").json()["tp_size"]
            sessions = http.post("/begin_weight_update", json={}).status_code == 200
            body = {
                "serialized_named_tensors": [Call(0, method, {"args": args}, "", "").message()] * workers,
                "load_format": self.loader,
                "flush_cache": False,
            }
            answer = http.post("/update_weights_from_tensor", json=body)
            assert answer.status_code == 200, answer.text
            if sessions:
                assert http.post("/end_weight_update", json={}).status_code == 200


KINDS: dict[str, Kind] = {"vllm": Vllm(), "sglang": Sglang()}
KIND = KINDS[os.environ.get("MDPPO_ENGINE", "vllm")]  # one at a time: they do not share an environment
