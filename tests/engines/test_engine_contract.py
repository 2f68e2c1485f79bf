"""The contract of `RolloutEngine` on real engines, against transformers in fp32 on the same weights.

The tests share one server a session and leave it with version and weights of their own, so each asks for the
version it finds. The last test kills the server: it must stay the last.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from megatron_dppo.architecture import load_architecture
from megatron_dppo.data.prompts import Prompt
from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.data.turns import join_turns
from megatron_dppo.rollout.engine import EngineError, EngineUnreachable, RolloutEngine, Sampling
from megatron_dppo.rollout.routes import probe_routes
from tests.engines.conftest import Served, alive, descendants, reference_logprobs, share
from tests.tiny_models import EOS_ID

TOLERANCE = 2e-5  # of a log-prob, engine against transformers, both fp32
PROMPTS = [[5 + i, 7, 40 - i, 9, 13, 21 + i] for i in range(12)]
LONG_PROMPT = [3 + (7 * i) % 60 for i in range(100)]  # several blocks of the prefix cache


def training(temperature: float = 1.0, max_tokens: int = 24, K: int = 0, **kwargs: Any) -> Sampling:
    return Sampling(temperature, max_tokens, training=True, num_topk_logprobs=K, **kwargs)


GREEDY = Sampling(0.0, 24, training=False)


def on(
    served: Served, body: Callable[[RolloutEngine], Awaitable[Any]], *, deadline_s: float = 60, **kwargs: Any
) -> Any:
    """Run `body` with a fresh client of the engine."""

    async def main() -> Any:
        async with served.connect(**kwargs) as engine:
            return await body(engine)

    return asyncio.run(asyncio.wait_for(main(), deadline_s))


def sample(served: Served, prompts: list[list[int]], sampling: Sampling) -> list[Trajectory]:
    async def body(engine: RolloutEngine) -> list[Trajectory]:
        return await asyncio.gather(
            *(engine.generate(ids, sampling, f"r{i}", group_id=f"g{i // 2}") for i, ids in enumerate(prompts))
        )

    return on(served, body)


async def update(engine: RolloutEngine, weights: Any) -> None:
    await engine.pause("wait")
    await engine.begin_update(weights.update)
    await engine.commit()


def worst(trajectories: list[Trajectory], model: Any) -> float:
    """Largest difference between recorded and reference log-probs of the sampled tokens."""
    differences = []
    for t in trajectories:
        expected = reference_logprobs(model, t, t.temperature or 1.0)[np.arange(t.response_length), t.response_ids]
        differences.append(np.abs(t.rollout_logprobs - expected).max())
    return float(max(differences))


def test_capabilities_are_those_of_the_model(served: Served) -> None:
    facts = on(served, lambda engine: engine.capabilities())
    assert (facts.engine, facts.vocab_size, facts.max_model_len) == (served.kind.name, 64, 256)
    assert (facts.max_logprobs, facts.routed_experts) == (served.kind.max_logprobs, True)
    assert facts.moe_layers == ((1,) if served.kind.dense_layers else (0, 1))
    assert facts.dtype == "float32" and facts.engine_version[0].isdigit()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_transformers_at_the_sampling_temperature(served: Served, temperature: float) -> None:
    trajectories = sample(served, PROMPTS, training(temperature))
    assert sum(t.response_length for t in trajectories) > 100
    assert worst(trajectories, served.model) <= TOLERANCE
    first = trajectories[3]
    assert (first.sample_id, first.group_id, first.engine) == ("r3", "g1", served.url)
    assert first.temperature == temperature and first.prompt_ids.tolist() == PROMPTS[3]
    assert first.loss_mask.all() and not first.topk_ids.size


def test_topk_entries_are_the_k_most_probable_with_the_sample_inside_and_outside(served: Served) -> None:
    K, inside, outside = 5, 0, 0
    for t in sample(served, PROMPTS, training(1.3, K=K)):
        expected = reference_logprobs(served.model, t, 1.3)
        np.testing.assert_allclose(t.topk_logprobs, -np.sort(-expected, axis=1)[:, :K], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(
            t.topk_logprobs, np.take_along_axis(expected, t.topk_ids, axis=1), atol=TOLERANCE, rtol=0
        )
        member = (t.topk_ids == t.response_ids[:, None]).any(axis=1)
        inside, outside = inside + int(member.sum()), outside + int((~member).sum())
    assert inside >= 20 and outside >= 20


def test_as_many_entries_as_the_engine_gives(served: Served) -> None:
    most = served.kind.max_logprobs - 1
    (t,) = sample(served, PROMPTS[:1], training(K=most, max_tokens=4))
    expected = -np.sort(-reference_logprobs(served.model, t, 1.0), axis=1)[:, :most]
    np.testing.assert_allclose(t.topk_logprobs, expected, atol=TOLERANCE, rtol=0)
    if most < 64:
        with pytest.raises(ValueError, match=f"got K={most + 1}, expected at most {most}"):
            sample(served, PROMPTS[:1], training(K=most + 1))
    else:  # what is not in the vocabulary is absent
        (t,) = sample(served, PROMPTS[:1], training(K=most + 1, max_tokens=4))
        assert (t.topk_ids[:, most] == -1).all() and (t.topk_ids[:, :most] >= 0).all()


def test_greedy_takes_the_argmax_also_beside_random_requests(served: Served) -> None:
    async def body(engine: RolloutEngine) -> list[Trajectory]:
        samplings = [GREEDY if i % 2 else training(0.7) for i in range(len(PROMPTS))]
        return await asyncio.gather(
            *(engine.generate(ids, s, f"{i}") for i, (ids, s) in enumerate(zip(PROMPTS, samplings, strict=True)))
        )

    trajectories = on(served, body)
    assert worst(trajectories, served.model) <= TOLERANCE  # a greedy token's log-prob is the one at temperature 1
    for t in trajectories[1::2]:
        assert t.temperature == 0.0
        assert t.response_ids.tolist() == reference_logprobs(served.model, t, 1.0).argmax(axis=1).tolist()


def test_a_seed_repeats_a_sample(served: Served) -> None:
    if not on(served, lambda engine: engine.capabilities()).seeds:
        pytest.skip("SGLang heeds seeds with --enable-deterministic-inference, which it does not have on the CPU")
    first, second = (sample(served, [PROMPTS[0]] * 4, training(seed=7)) for _ in range(2))
    assert {t.response_ids.tobytes() for t in [*first, *second]} == {first[0].response_ids.tobytes()}
    free = sample(served, [PROMPTS[0]] * 4, training())
    assert len({t.response_ids.tobytes() for t in free}) == 4


def test_finish_reasons(served: Served) -> None:
    trajectories = sample(served, PROMPTS * 4, training(1.3, max_tokens=40))
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    for t in trajectories:
        ends = t.response_ids == EOS_ID
        if t.finish_reason == "stop":
            assert ends[-1] and not ends[:-1].any()
        else:
            assert t.response_length == 40 and not ends.any()
    stop = int(trajectories[0].response_ids[0])
    for t in sample(served, [PROMPTS[0]] * 8, training(1.3, max_tokens=200, stop_token_ids=(stop,))):
        assert t.finish_reason == "length" or t.response_ids[-1] in (stop, EOS_ID)
        assert stop not in t.response_ids[:-1]


def test_a_response_ends_where_the_context_is_full(served: Served) -> None:
    prompt = (LONG_PROMPT * 3)[:250]
    for t in sample(served, [prompt] * 4, training(max_tokens=100)):
        assert (t.finish_reason == "length" and t.num_tokens == 256) or t.response_ids[-1] == EOS_ID
    (one,) = sample(served, [(LONG_PROMPT * 3)[:255]], training(max_tokens=1))
    assert one.response_length == 1


@torch.no_grad()
def wrong_rows(t: Trajectory, model: Any) -> np.ndarray:
    """bool[P+R-1]: where recorded routes are not the experts that transformers takes."""
    ids = torch.from_numpy(np.concatenate([t.prompt_ids, t.response_ids]).astype(np.int64))
    logits = model(ids[None], output_router_logits=True).router_logits
    expected = logits[-1].topk(2).indices[:-1].sort(dim=-1).values.numpy()
    assert t.routed_experts.dtype == np.uint8 and t.moe_layers[-1] == 1 and t.routes_valid.all()
    return (np.sort(t.routed_experts[:, -1], axis=-1) != expected).any(axis=-1)


def test_routes_are_transformers_choices(served: Served) -> None:
    rows = np.concatenate([wrong_rows(t, served.model) for t in sample(served, PROMPTS, training())])
    assert len(rows) > 100 and not rows.any()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, 64], r"token ids \[64\], expected ids in \[0, 64\)"),
        ([5, -1], r"token ids \[-1\], expected ids in \[0, 64\)"),
        ([], "expected at least one integer id"),
        ([5] * 256, "got 256 tokens, expected fewer than the context of 256"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_in_the_client(
    served: Served, prompt: list[int], message: str
) -> None:
    log_before = served.child.log_tail(200)
    with pytest.raises(ValueError, match=message):
        sample(served, [prompt], training())
    assert served.child.log_tail(200) == log_before


def test_new_weights_in_memory(served: Served, other: Any, original: Any, shared_memory: Path) -> None:
    model, tensors = other

    async def body(engine: RolloutEngine) -> None:
        version = await engine.version()
        before = await engine.generate(LONG_PROMPT, GREEDY, "before")
        assert before.policy_versions.tolist() == [version] * before.response_length
        assert worst([before], served.model) <= TOLERANCE

        weights = share(shared_memory, tensors, version + 1)
        await engine.begin_update(weights.update)
        assert await engine.version() == version  # handed over, not yet in use
        with pytest.raises(EngineError, match="generate refused: a weight update is under way"):
            await engine.generate(LONG_PROMPT, GREEDY, "between")
        await engine.commit()
        await engine.health()
        assert await engine.version() == version + 1
        assert await engine.checksum() == weights.checksums

        # The same long prompt again: a prefix cache that survived would answer from the old weights' keys and
        # values.
        after = await engine.generate(LONG_PROMPT, GREEDY, "after")
        assert after.policy_versions.tolist() == [version + 1] * after.response_length
        assert worst([after], model) <= TOLERANCE < 0.1 < worst([after], served.model)
        assert after.response_ids.tolist() == reference_logprobs(model, after, 1.0).argmax(axis=1).tolist()
        many = await asyncio.gather(*(engine.generate(ids, training(), f"{i}") for i, ids in enumerate(PROMPTS)))
        assert worst(many, model) <= TOLERANCE

        await update(engine, share(shared_memory, original, version + 2, with_crc32=False))
        with pytest.raises(EngineError, match="the last update did not ask for fingerprints"):
            await engine.checksum()
        again = await engine.generate(LONG_PROMPT, GREEDY, "again")
        assert again.response_ids.tolist() == before.response_ids.tolist() and worst([again], served.model) <= TOLERANCE

    on(served, body)


def test_ten_updates_in_a_row_stay_exact(served: Served, other: Any, original: Any, shared_memory: Path) -> None:
    async def body(engine: RolloutEngine) -> None:
        version = await engine.version()
        for i in range(1, 11):
            model, tensors = (served.model, original) if i % 2 == 0 else other
            await update(engine, share(shared_memory, tensors, version + i))
            t = await engine.generate(PROMPTS[i], training(), str(i))
            assert t.policy_versions[0] == version + i and worst([t], model) <= TOLERANCE

    on(served, body)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "damaged", "absent"])
def test_a_refused_update_leaves_the_old_weights(served: Served, other: Any, shared_memory: Path, fault: str) -> None:
    expert = "model.layers.1.mlp.experts.3.gate_proj.weight"
    tensors = dict(other[1])
    if fault == "missing":
        del tensors[expert]
    elif fault == "unknown":
        tensors["model.layers.7.norm.weight"] = tensors["model.norm.weight"]
    elif fault == "shape":
        tensors[expert] = tensors[expert][:-1]

    async def body(engine: RolloutEngine) -> None:
        version = await engine.version()
        weights = share(shared_memory, tensors, version + 1)
        path = Path(weights.update.path)
        if fault == "damaged":
            data = bytearray(path.read_bytes())
            data[{name: offset for name, _, _, offset in weights.update.tensors}[expert]] ^= 1
            path.write_bytes(data)
        elif fault == "absent":
            path.unlink()
        message = {
            "missing": f"missing {expert}",
            "unknown": "unknown model.layers.7.norm.weight",
            "shape": rf"wrong shape {expert} \(63, 64\) instead of \(64, 64\)",
            "damaged": f"crc32 differs from the update's for {expert}",
            "absent": "of None bytes, expected",
        }[fault]
        with pytest.raises(EngineError, match=message):
            await engine.begin_update(weights.update)
        with pytest.raises(EngineError, match="generate refused"):
            await engine.generate(PROMPTS[0], training(), "r")
        with pytest.raises(EngineError, match="commit refused: no update was handed over"):
            await engine.commit()
        await engine.abort_update()
        t = await engine.generate(PROMPTS[0], training(), "r")
        assert t.policy_versions[0] == version and worst([t], served.model) <= TOLERANCE

    on(served, body)


def test_after_a_refused_update_a_full_one_succeeds(served: Served, original: Any, shared_memory: Path) -> None:
    async def body(engine: RolloutEngine) -> None:
        version = await engine.version()
        part = dict(list(original.items())[:5])
        with pytest.raises(EngineError, match="got 5 tensors"):
            await engine.begin_update(share(shared_memory, part, version + 1).update)
        await engine.begin_update(share(shared_memory, original, version + 1).update)
        await engine.commit()
        assert worst([await engine.generate(PROMPTS[0], training(), "r")], served.model) <= TOLERANCE

    on(served, body)


@pytest.mark.parametrize("after", [1, 3, 20, 40])
def test_a_commit_that_fails_half_way_is_cured_by_a_full_update(
    served: Served, other: Any, original: Any, shared_memory: Path, after: int
) -> None:
    served.kind.tell(served.url, "mdppo_fail_next_load", after)

    async def body(engine: RolloutEngine) -> None:
        version = await engine.version()
        await engine.begin_update(share(shared_memory, other[1], version + 1).update)
        with pytest.raises(EngineError, match=f"injected fault after {after} tensors"):
            await engine.commit()
        assert await engine.version() == -1
        with pytest.raises(EngineError, match="generate refused: its weights are unusable"):
            await engine.generate(PROMPTS[0], training(), "r")
        with pytest.raises(EngineError, match="resume refused"):
            await engine.resume()
        with pytest.raises(EngineError, match="abort_update: got weights of version -1"):
            await engine.abort_update()
        async with served.connect() as newcomer:
            with pytest.raises(EngineError, match="generate refused: its weights are unusable"):
                await newcomer.generate(PROMPTS[0], training(), "r")
        await engine.begin_update(share(shared_memory, original, version + 2).update)
        await engine.commit()
        many = await asyncio.gather(*(engine.generate(ids, training(), f"{i}") for i, ids in enumerate(PROMPTS)))
        assert worst(many, served.model) <= TOLERANCE and many[0].policy_versions[0] == version + 2

    on(served, body)


def test_updates_and_requests_do_not_mix(served: Served, original: Any, shared_memory: Path) -> None:
    async def body(engine: RolloutEngine) -> None:
        version = await engine.version()
        weights = share(shared_memory, original, version + 1)
        flying = [asyncio.create_task(engine.generate(p, training(max_tokens=200), "f")) for p in PROMPTS]
        await asyncio.sleep(0.1)
        with pytest.raises(EngineError, match=r"\d+ requests in flight, expected pause\(\) first"):
            await engine.begin_update(weights.update)
        await update(engine, weights)  # its pause("wait") lets them finish
        trajectories = await asyncio.gather(*flying)
        assert {v for t in trajectories for v in t.policy_versions.tolist()} == {version}
        assert {t.finish_reason for t in trajectories} <= {"stop", "length"}

    on(served, body)


def test_an_engine_that_records_no_routes_is_found_before_anything_is_trained(served: Served) -> None:
    arch, prompts = load_architecture(served.model_dir), [Prompt("", "", np.array(p)) for p in PROMPTS]

    async def body(engine: RolloutEngine) -> None:
        await probe_routes([engine], prompts, arch)
        served.kind.tell(served.url, "test_forget_routes", True)
        try:
            with pytest.raises(ValueError, match=f"engine {served.url}: sample probe-0 of .*: got expert 0 twice"):
                await probe_routes([engine], prompts, arch)
        finally:
            served.kind.tell(served.url, "test_forget_routes", False)
        await probe_routes([engine], prompts, arch)

    on(served, body)


def test_held_requests_go_on_under_the_new_weights(
    served: Served, other: Any, original: Any, shared_memory: Path
) -> None:
    """Each token has the log-prob of the weights that its trajectory names, and its input the routes of those weights;
    no request is lost or begun anew."""
    models = {0: served.model, 1: other[0]}

    async def four_updates(engine: RolloutEngine, first: int) -> tuple[list[int], list[Trajectory]]:
        flying = [asyncio.create_task(engine.generate(p, training(max_tokens=200), "f")) for p in PROMPTS * 4]
        held = []
        for number, tensors in ((1, other[1]), (2, original), (3, other[1]), (4, original)):
            await asyncio.sleep(0.1)
            await engine.pause("keep")
            held.append(sum(not task.done() for task in flying))
            late = asyncio.create_task(engine.generate(PROMPTS[number], training(), "late"))
            await asyncio.sleep(0.05)
            assert not late.done()
            await engine.begin_update(share(shared_memory, tensors, first + number).update)
            with pytest.raises(EngineError, match="commit|pause refused"):
                await engine.pause("wait")
            await engine.commit()
            assert (await late).policy_versions.min() >= first + number
        return held, await asyncio.gather(*flying)

    async def body(engine: RolloutEngine) -> None:
        for _ in range(5):  # on a busy machine all may have been sampled before the second update
            first = await engine.version()
            held, trajectories = await four_updates(engine, first)
            mixed = [len(set(t.policy_versions.tolist())) for t in trajectories]
            if max(mixed) > 2:
                break
        assert held[0] >= 8 and sum(n > 1 for n in mixed) >= 8 and max(mixed) > 2
        for t in trajectories:
            assert t.finish_reason == ("stop" if t.response_ids[-1] == EOS_ID else "length")
            assert EOS_ID not in t.response_ids[:-1] and (t.finish_reason == "stop" or t.response_length == 200)
        wrong: dict[int, list[np.ndarray]] = {0: [], 1: []}
        others: dict[int, list[np.ndarray]] = {0: [], 1: []}
        for t in trajectories:
            versions = t.policy_versions - first
            assert (np.diff(versions) >= 0).all()
            for parity, model in models.items():
                here = versions % 2 == parity
                expected = reference_logprobs(model, t, 1.0)[np.arange(t.response_length), t.response_ids]
                np.testing.assert_allclose(t.rollout_logprobs[here], expected[here], atol=TOLERANCE, rtol=0)
                # The prompt was read for the first token, each token for the next.
                rows = np.concatenate([np.repeat(here[:1], t.prompt_length - 1), here])
                wrong[parity] += [wrong_rows(t, model)[rows]]
                others[parity] += [wrong_rows(t, model)[~rows]]
        for parity in models:
            assert np.concatenate(wrong[parity]).mean() < 1e-3  # but for what is as good as a tie
            assert np.concatenate(others[parity]).mean() > 0.05  # of the other weights

    on(served, body)


def test_turns_of_a_conversation_join_with_the_routes_of_their_weights(
    served: Served, other: Any, original: Any, shared_memory: Path
) -> None:
    """An update between two turns; the second reads the first, which was sampled and recorded under older weights."""

    async def body(engine: RolloutEngine) -> list[tuple[Trajectory, Trajectory]]:
        version = await engine.version()
        first = [await engine.generate(p, training(), f"a{i}") for i, p in enumerate(PROMPTS[:6])]
        await update(engine, share(shared_memory, other[1], version + 1))
        told = [[*t.prompt_ids.tolist(), *t.response_ids.tolist(), 11, 12, 13] for t in first]
        then = [await engine.generate(p, training(), f"b{i}") for i, p in enumerate(told)]
        await update(engine, share(shared_memory, original, version + 2))
        return [*zip(first, then, strict=True)]

    early, late = [], []
    for first, then in on(served, body):
        joined = join_turns([first, then])
        assert joined.loss_mask.sum() == joined.response_length - 3 and joined.routes_valid.all()
        early += [wrong_rows(joined, served.model)[: first.num_tokens - 1]]
        late += [wrong_rows(joined, other[0])[first.num_tokens - 1 :]]
        assert (np.diff(joined.policy_versions[joined.loss_mask]) >= 0).all()
    assert np.concatenate(early).mean() < 1e-2 and np.concatenate(late).mean() < 1e-2


def test_held_requests_end_with_an_update_that_fails(served: Served, original: Any, shared_memory: Path) -> None:
    """Refused before the model is touched: they go on under the weights they had."""

    async def body(engine: RolloutEngine) -> None:
        version = await engine.version()
        flying = [asyncio.create_task(engine.generate(p, training(max_tokens=100), "f")) for p in PROMPTS[:4]]
        await asyncio.sleep(0.1)
        await engine.pause("keep")
        part = dict(list(original.items())[:5])
        with pytest.raises(EngineError, match="got 5 tensors"):
            await engine.begin_update(share(shared_memory, part, version + 1).update)
        await engine.abort_update()
        trajectories = await asyncio.gather(*flying)
        assert {int(v) for t in trajectories for v in t.policy_versions} == {version}
        assert worst(trajectories, served.model) <= TOLERANCE

    on(served, body)


def test_pause_abort_ends_requests_with_what_they_have(served: Served) -> None:
    async def body(engine: RolloutEngine) -> None:
        await engine.capabilities()
        flying = [asyncio.create_task(engine.generate(p, training(max_tokens=240), "f")) for p in PROMPTS * 4]
        await asyncio.sleep(0.15)
        await engine.pause("abort")
        trajectories = await asyncio.gather(*flying, return_exceptions=True)
        assert all(isinstance(t, Trajectory) for t in trajectories), trajectories
        cut = [t for t in trajectories if t.finish_reason == "abort"]
        assert cut and worst([t for t in trajectories if t.response_length], served.model) <= TOLERANCE
        with pytest.raises(EngineError, match="generate refused: it is paused"):
            await engine.generate(PROMPTS[0], training(), "r")
        await engine.resume()
        assert (await engine.generate(PROMPTS[0], training(), "r")).response_length > 0

    on(served, body)


def test_a_cancelled_request_is_aborted_at_the_engine(served: Served) -> None:
    def generated() -> int:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return int(sum(float(x.split()[-1]) for x in lines if x.startswith(served.kind.generated)))

    async def body(engine: RolloutEngine) -> None:
        endless = Sampling(0.0, 200, training=False)
        probes = await asyncio.gather(*(engine.generate(p, endless, "probe") for p in PROMPTS))
        prompts = [list(t.prompt_ids) for t in probes if t.finish_reason == "length"]
        before = generated()
        tasks = [asyncio.create_task(engine.generate(prompts[i % len(prompts)], endless, "f")) for i in range(24)]
        await asyncio.sleep(0.15)
        for task in tasks:
            task.cancel()
        assert {type(r) for r in await asyncio.gather(*tasks, return_exceptions=True)} == {asyncio.CancelledError}
        await asyncio.sleep(0.2)
        shortly_after = generated()
        await asyncio.sleep(0.5)
        assert before < shortly_after == generated() < before + 24 * 200 / 2

    on(served, body)


def test_a_client_sees_that_the_weights_are_not_those_it_knows(
    served: Served, original: Any, shared_memory: Path
) -> None:
    async def body(engine: RolloutEngine) -> None:
        await engine.health()
        version = await engine.version()
        async with served.connect() as elsewhere:
            await update(elsewhere, share(shared_memory, original, version + 1))
        with pytest.raises(EngineError, match=f"got weights of version {version + 1}, expected {version}"):
            await engine.health()

    on(served, body)


def test_a_server_that_dies_in_mid_run_is_a_clear_error_and_leaves_nothing(served: Served) -> None:
    """Kills the server: the last test of the session on it."""
    family = descendants(served.child.pid)
    server = family[0]

    async def body(engine: RolloutEngine) -> list[Any]:
        await engine.capabilities()
        flying = [asyncio.create_task(engine.generate(p, training(max_tokens=240), "f")) for p in PROMPTS * 4]
        await asyncio.sleep(0.05)
        os.kill(server, signal.SIGKILL)
        return await asyncio.gather(*flying, return_exceptions=True)

    before = time.monotonic()
    results = on(served, body, attempts=3, backoff_s=0.1)
    assert time.monotonic() - before < 10
    errors = [r for r in results if not isinstance(r, Trajectory)]
    assert errors and all(isinstance(error, EngineUnreachable) for error in errors)
    assert served.url in str(errors[0]) and "failed 3 times, last with" in str(errors[0])

    give_up = time.monotonic() + 15  # the guard gives what is left of the server its grace
    while served.child.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    assert served.child.poll() == 128 + signal.SIGKILL and not any(map(alive, family))
