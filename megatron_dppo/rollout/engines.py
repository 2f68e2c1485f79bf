"""The engines of a run as their clients see them: of the kind that the config names, and fit for what it asks."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config, longest_sequence, num_recorded_topk
from megatron_dppo.control import ENGINE_URLS_VARIABLE, Orders
from megatron_dppo.rollout.engine import Capabilities, RolloutEngine
from megatron_dppo.rollout.fleet import Fleet
from megatron_dppo.rollout.http_engine import HttpEngine


def client_of(config: Config, url: str, arch: Architecture, *, concurrency: int) -> HttpEngine:
    """A client of the server at `url`, which was started with the config's model."""
    from megatron_dppo.rollout.sglang.client import SglangEngine
    from megatron_dppo.rollout.vllm.client import VllmEngine

    rollout = config.rollout
    timeout_s, attempts = rollout.request_timeout_s, rollout.max_retries + 1
    if rollout.engine == "sglang":
        return SglangEngine(url, arch, concurrency=concurrency, timeout_s=timeout_s, attempts=attempts)
    return VllmEngine(url, concurrency=concurrency, timeout_s=timeout_s, attempts=attempts)


def check_engine(url: str, found: Capabilities, config: Config, arch: Architecture) -> None:
    """Raises ValueError naming everything in which a running engine is not what the config asks for."""
    rollout, faults = config.rollout, []
    if found.vocab_size != arch.vocab_size:
        faults.append(f"a vocabulary of {found.vocab_size}, expected the model's {arch.vocab_size}")
    if found.dtype != rollout.dtype:
        faults.append(f"dtype {found.dtype}, expected rollout.dtype {rollout.dtype}")
    longest = longest_sequence(config)
    if found.max_model_len < longest:
        faults.append(f"a context of {found.max_model_len}, expected at least prompt + response = {longest}")
    if config.routing.mode == "rollout" and not found.routed_experts:
        faults.append("no recorded routes, expected them for routing.mode rollout (--enable-return-routed-experts)")
    elif config.routing.mode == "rollout" and found.moe_layers != arch.moe_layer_numbers:
        faults.append(f"routes of layers {found.moe_layers}, expected the model's {arch.moe_layer_numbers}")
    if found.max_logprobs < (needed := num_recorded_topk(config) + 1):
        faults.append(f"at most {found.max_logprobs} log-probs, expected {needed} (--max-logprobs)")
    if faults:
        raise ValueError(f"engine {url}: got {'; '.join(faults)}")


async def connect_engines(config: Config, arch: Architecture) -> tuple[list[HttpEngine], list[Capabilities]]:
    """Clients of the engines that the environment names, and what those say; raises ValueError for one unfit."""
    rollout, urls = config.rollout, os.environ[ENGINE_URLS_VARIABLE].split(",")
    concurrency = max(1, rollout.max_concurrency // len(urls))
    engines = [client_of(config, url, arch, concurrency=concurrency) for url in urls]
    try:
        found = [await engine.capabilities() for engine in engines]
        for url, capabilities in zip(urls, found, strict=True):
            print(f"{url}: {capabilities}", flush=True)
            check_engine(url, capabilities, config, arch)
    except BaseException:
        for engine in engines:
            await engine.close()
        raise
    return engines, found


def fleet_of(
    config: Config,
    arch: Architecture,
    engines: Sequence[RolloutEngine],
    orders: Orders,
    *,
    fingerprints: bool = False,
) -> Fleet:
    """The engines as the config wants them kept up to date."""
    assert config.sync.transport != "auto", "the launcher decides"
    return Fleet(
        engines,
        orders,
        transport=config.sync.transport,
        attempts=config.sync.attempts,
        patience_s=config.rollout.start_timeout_s,
        check=functools.partial(check_engine, config=config, arch=arch),
        fingerprints=fingerprints,
    )
