"""Weights from real ranks to real engines, as users have them sent: `sync-check`, and runs whose engines fail."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen3MoeForCausalLM

from megatron_dppo.data.addition import build_tokenizer, sample_problems, write_problems
from megatron_dppo.job.engine_server import wait_ready
from megatron_dppo.job.processes import Child, free_port, start, stop_all
from tests.engines.conftest import READY_DEADLINE_S, Served, serving
from tests.engines.kinds import KIND
from tests.tiny_models import deepseek_config, tiny_model
from tools.make_quickstart_input import write_initial_model

UPDATES = 10
DEADLINE_S = 400.0
GROUP_TIMEOUT_S = 5.0
ENGINES: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp2_ep": {"tensor_parallel_size": 2, "expert_parallel": True},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2_ep2": {"tensor": 2, "expert": 2, "ranks": 2},
    "pp2": {"pipeline": 2, "ranks": 2},
    "tp2_ep2_pp2_virtual2": {"tensor": 2, "expert": 2, "pipeline": 2, "virtual": 2, "ranks": 4},
    "etp2": {"tensor": 2, "expert_tensor": 2, "ranks": 2},
    "cp2_ep2": {"context": 2, "expert": 2, "ranks": 2},
}
PAIRS: dict[str, dict[str, tuple[str, ...]]] = {  # MDPPO_ALL_PAIRS=1 for all (`make test-long`)
    "vllm": {"tp1": ("tp2_ep2_pp2_virtual2",), "tp2": (), "tp2_ep": ("cp2_ep2",)},
    "sglang": {"tp1": ("etp2",), "tp2": ("pp2",)},
}
ALL = "MDPPO_ALL_PAIRS" in os.environ
TRANSPORTS = {"vllm": ("shm", "disk"), "sglang": ("ipc",)}  # likewise
# SGLang splits experts on GPUs only.
ENGINES_HERE = [name for name, trainers in PAIRS[KIND.name].items() if trainers or ALL]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that a trainer can have virtual stages."""
    path = tmp_path_factory.mktemp("trained") / "model"
    write_initial_model(path, seed=3, num_layers=4)
    return path


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_problems(tmp_path / "train.jsonl", sample_problems(random.Random(0), 50, held_out=False))
    return {
        "run": {"name": f"sync{os.getpid()}", "dir": str(tmp_path / "run")},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 16},
        "reward": {"name": "final_answer"},
        "rollout": {
            "engine": KIND.name, "dtype": "float32", "max_response_tokens": 6, "prompts_per_step": 4,
            "samples_per_prompt": 4, "max_retries": 1,
        },
        "sync": {"transport": "group", "bucket_mib": 0.0625, "timeout_s": GROUP_TIMEOUT_S},
        "training": {"steps": 2, "minibatches": 2, "micro_batch_tokens": 64, "lr": 1e-3},
        "loss": {"entropy_coefficient": 0.5},  # without it an untrained model would not move
    }  # fmt: skip


def command(tmp_path: Path, recipe: dict[str, Any], name: str, *arguments: str) -> subprocess.Popen[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    argv = [sys.executable, "-m", "megatron_dppo.cli", name, str(path), *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module", params=ENGINES_HERE)
def engine(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Started from other weights of the same shapes."""
    directory = tmp_path_factory.mktemp(request.param)
    write_initial_model(directory / "initial", seed=4, num_layers=4)
    hub = Qwen3MoeForCausalLM.from_pretrained(directory / "initial")
    with serving(request.config, directory, hub, **ENGINES[request.param]) as served:
        yield served


@pytest.mark.parametrize("trainer", TRAINERS)
def test_engines_get_what_ranks_have(
    engine: Served, trainer: str, recipe: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Ten updates: every tensor bit by bit, and every sampled token's log-prob under the ranks' own model."""
    if trainer not in PAIRS[KIND.name][request.node.callspec.params["engine"]] and not ALL:
        pytest.skip("for MDPPO_ALL_PAIRS=1")
    recipe["parallel"] = TRAINERS[trainer]
    recipe["rollout"]["urls"] = [engine.url]
    check = command(tmp_path, recipe, "sync-check", "--updates", str(UPDATES), "--json")
    output, _ = check.communicate(timeout=DEADLINE_S)
    assert check.returncode == 0, output
    rows = json.loads(output.splitlines()[-1])["updates"]
    assert len(rows) == UPDATES
    assert all(not row["different"] and row["tensors"] == 135 and row["tokens"] >= 8 for row in rows)
    assert max(row["worst"] for row in rows) <= 2e-5


@pytest.mark.skipif(not KIND.latent_attention, reason="SGLang computes latent attention on GPUs only")
def test_latent_attention_on_an_engine_of_the_runs_own(recipe: dict[str, Any], tmp_path: Path) -> None:
    """DeepSeek-V3: cached latents, experts in groups with biased scores, shared experts, a dense layer, YaRN."""
    path = tmp_path / "deepseek"
    tokenizer = build_tokenizer(path)
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    tiny_model(deepseek_config(**sizes, **ids), seed=1).save_pretrained(path)
    file = path / "config.json"  # transformers leaves out what vLLM wants to know, and the hub's files say
    file.write_text(json.dumps(json.loads(file.read_text()) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}))
    recipe |= {"model": {"path": str(path), "dtype": "float32"}, "parallel": TRAINERS["tp2_ep2"]}
    check = command(tmp_path, recipe, "sync-check", "--updates", "3", "--json")
    output, _ = check.communicate(timeout=DEADLINE_S)
    assert check.returncode == 0, output
    assert all(row["tensors"] == 53 and not row["different"] for row in json.loads(output.splitlines()[-1])["updates"])


@pytest.mark.parametrize("engine", ["tp1"], indirect=True)
@pytest.mark.parametrize("transport", ["shm", "ipc", "disk"] if ALL else TRANSPORTS[KIND.name])
def test_the_check_fails_where_weights_differ(
    engine: Served, transport: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Behind the checksum: only the log-probs can tell."""
    KIND.tell(engine.url, "test_damage_next_load", 3)
    recipe["rollout"]["urls"] = [engine.url]
    check = command(tmp_path, recipe, "sync-check", f"sync.transport={transport}", "--updates", "2", "--json")
    output, _ = check.communicate(timeout=DEADLINE_S)
    assert check.returncode == 1, output
    result = json.loads(output.splitlines()[-1])
    assert not result["passed"]
    damaged, sound = result["updates"]
    assert damaged["worst"] > 1e-3 and sound["worst"] <= 2e-5
    assert "update 1" in output and "FAILED" in output and output.count(": ok") == 1
    assert not list((tmp_path / "run" / "sync-check").glob("weights/weights-1*"))  # the last one is enough


@dataclass
class Server:
    """An engine of one's own that can be started again at the same address."""

    config: pytest.Config
    model: Path
    directory: Path
    port: int
    child: Child | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        argv, env = KIND.server(self.config, self.model, self.port)
        self.child = start(f"engine {self.port}", argv, env=env, log_path=self.directory / f"{self.port}.log")

    def wait(self) -> None:
        assert self.child is not None
        wait_ready(self.url, self.child, READY_DEADLINE_S)


@pytest.fixture
def servers(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[list[Server]]:
    both = [Server(request.config, model, tmp_path, free_port()) for _ in range(2)]
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait()
        yield both
    finally:
        stop_all([server.child for server in both if server.child is not None])


def test_a_run_outlives_its_engines(servers: list[Server], recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two engines get weights in a relay; one stalls, one dies in the middle of an update and is started again, and
    then the last one is killed. Whatever answers has the trainer's weights: samples are as probable to both."""
    stalling, dying = servers
    recipe["parallel"] = TRAINERS["tp2_ep2"]
    recipe["rollout"]["urls"] = [server.url for server in servers]
    recipe["training"]["steps"] = 1000
    records = tmp_path / "run" / "metrics.jsonl"

    def engines() -> list[int]:
        lines = records.read_text().splitlines() if records.is_file() else []
        found = [json.loads(line) for line in lines]
        assert all(record["mismatch"] < 1e-5 for record in found)
        return [int(record["engines"]) for record in found]

    job = command(tmp_path, recipe, "train")
    client_log = tmp_path / "run" / "logs" / "client.log"

    def wait_until(what: Any) -> None:
        give_up = time.monotonic() + DEADLINE_S
        while not what():
            assert job.poll() is None, f"the job ended: {job.stdout.read() if job.stdout else ''}"
            assert time.monotonic() < give_up, client_log.read_text()[-3000:]
            time.sleep(0.1)

    try:
        wait_until(lambda: engines()[-2:] == [2, 2])
        before = len(engines())
        KIND.tell(stalling.url, "test_stall_next_load", 20, 3 * GROUP_TIMEOUT_S)
        wait_until(lambda: "attempt 1" in client_log.read_text())
        wait_until(lambda: len(engines()) > before + 2)
        assert engines()[-1] == 2, client_log.read_text()
        KIND.tell(dying.url, "test_exit_next_load", 30)
        wait_until(lambda: engines()[-1] == 1)
        assert f"engine {dying.url}" in client_log.read_text()
        dying.start()
        wait_until(lambda: engines()[-1] == 2)
        assert f"engine {dying.url} is back" in client_log.read_text()
        for server in servers:
            assert server.child is not None
            server.child.stop()
        stalling.start()
        stopped = len(engines())
        wait_until(lambda: len(engines()) > stopped + 3)
        assert engines()[-1] == 1
    finally:
        job.terminate()
        job.communicate(timeout=60)
