from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dppo.data.addition import build_tokenizer
from megatron_dppo.data.prompts import batch_indices, load_prompts, prompt_order


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a byte, as in a byte-level BPE without merges: covers every text."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def jsonl(path: Path, *records: Any) -> Path:
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in records) + b"\n")
    return path


def test_lines_are_taken_or_refused_one_by_one(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(
        tmp_path / "prompts.jsonl",
        {"prompt": "1+1=", "answer": "2", "source": "own"},
        b"{not json",
        {"prompt": "1+1="},
        {"prompt": "", "answer": "2"},
        {"prompt": "  \n", "answer": "2"},
        b"",
        [1, 2],
        {"prompt": "x" * 17, "answer": "2"},
        '"é'.encode("latin-1"),
        {"prompt": "größe 你?", "answer": 3.5},
        {"prompt": "1+1=", "answer": None},
        {"prompt": ["a"], "answer": "1"},
    )
    taken = load_prompts(path, bytes_tokenizer, max_prompt_tokens=16)
    assert [(p.text, p.answer) for p in taken.prompts] == [("1+1=", "2"), ("größe 你?", "3.5")]
    assert taken.prompts[1].token_ids.dtype == np.int32
    assert len(taken.prompts[1].token_ids) == len("größe 你?".encode()) == 12
    assert bytes_tokenizer.decode(taken.prompts[1].token_ids) == "größe 你?"
    assert taken.refused == {
        "not a JSON object": 3,
        "without a usable answer": 2,
        "empty prompt": 2,
        "longer than max_prompt_tokens": 1,
        "without a usable prompt": 1,
    }
    assert taken.refused_lines["not a JSON object"] == (2, 7, 9)
    assert taken.describe().startswith("2 prompts taken, 9 refused: 3 not a JSON object (lines 2, 7, 9)")


def test_characters_outside_the_vocabulary_refuse_the_line(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    records = [{"prompt": "754832=", "answer": "0632"}, *({"prompt": "7é=", "answer": "0"} for _ in range(7))]
    taken = load_prompts(jsonl(tmp_path / "p.jsonl", *records), tokenizer, max_prompt_tokens=7)
    assert [list(p.token_ids) for p in taken.prompts] == [[7, 5, 4, 8, 3, 2, 12]]
    assert taken.refused == {"cannot be tokenised": 7}
    assert taken.refused_lines == {"cannot be tokenised": (2, 3, 4, 5, 6)}
    assert taken.describe().endswith("7 cannot be tokenised (lines 2, 3, 4, 5, 6, ...)")


def test_a_chat_template_wraps_the_prompt(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = jsonl(tmp_path / "p.jsonl", {"q": "hi", "a": "1"}, {"q": messages, "a": "2"})
    taken = load_prompts(
        path, bytes_tokenizer, max_prompt_tokens=64, prompt_key="q", answer_key="a", chat_template=True
    )
    texts = [bytes_tokenizer.decode(p.token_ids) for p in taken.prompts]
    assert texts == ["<user>hi<assistant>", "<system>s<user>u<assistant>"]


DAPO = {"prompt": [{"role": "user", "content": "Solve: 1+1"}], "reward_model": {"ground_truth": "2", "style": "rule"}}
MATH = {"problem": "Find $x$.", "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{2}$", "answer": "2"}
AIME = {"id": 60, "problem": "Find $x$.", "answer": 204}


@pytest.mark.parametrize(
    ("record", "keys", "settings", "rendered", "answer"),
    [
        (DAPO, ("prompt", "reward_model.ground_truth"), {"chat_template": True}, "<user>Solve: 1+1<assistant>", "2"),
        (DAPO, ("prompt", "reward_model.ground_truth"), {}, "Solve: 1+1", "2"),  # a base model: the text alone
        (MATH, ("problem", "answer"), {"prompt_template": "Q: {prompt}\nA:"}, "Q: Find $x$.\nA:", "2"),
        (MATH, ("problem", "solution"), {}, "Find $x$.", r"$\boxed{2}$"),
        (
            AIME,
            ("problem", "answer"),
            {"prompt_template": r"{prompt} Use \boxed{}.", "chat_template": True},
            r"<user>Find $x$. Use \boxed{}.<assistant>",
            "204",
        ),
    ],
)
def test_files_as_users_have_them(
    tmp_path: Path,
    bytes_tokenizer: PreTrainedTokenizerFast,
    record: dict[str, Any],
    keys: tuple[str, str],
    settings: dict[str, Any],
    rendered: str,
    answer: str,
) -> None:
    path = jsonl(tmp_path / "p.jsonl", record)
    (prompt,) = load_prompts(
        path, bytes_tokenizer, max_prompt_tokens=64, prompt_key=keys[0], answer_key=keys[1], **settings
    ).prompts
    assert bytes_tokenizer.decode(prompt.token_ids) == rendered
    assert prompt.answer == answer


def test_the_template_is_around_the_last_message(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "{prompt}"}, {"role": "user", "content": "u {prompt}"}]
    path = jsonl(tmp_path / "p.jsonl", {"prompt": messages, "answer": "1"})
    (prompt,) = load_prompts(
        path, bytes_tokenizer, max_prompt_tokens=64, prompt_template="<{prompt}>", chat_template=True
    ).prompts
    assert bytes_tokenizer.decode(prompt.token_ids) == "<system>{prompt}<user><u {prompt}><assistant>"


def test_a_refusal_names_the_key(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    broken = [DAPO | {"reward_model": "2"}, DAPO | {"prompt": [{"role": "user"}]}, DAPO | {"reward_model": {}}]
    path = jsonl(tmp_path / "p.jsonl", DAPO, *broken, {**AIME, "prompt": "q", "reward_model.ground_truth": 3})
    taken = load_prompts(path, bytes_tokenizer, max_prompt_tokens=64, answer_key="reward_model.ground_truth")
    assert [p.answer for p in taken.prompts] == ["2", "3"]  # a key may have a dot in it
    assert taken.refused_lines == {
        "without a usable reward_model.ground_truth": (2, 4),
        "without a usable prompt": (3,),
    }


def test_a_file_that_windows_wrote(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1", "answer": "1"}\r\n{"prompt": "2", "answer": "2"}\r\n')
    taken = load_prompts(path, bytes_tokenizer, max_prompt_tokens=4)
    assert [prompt.text for prompt in taken.prompts] == ["1", "2"]


def test_limit_and_nothing_left(tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = jsonl(tmp_path / "p.jsonl", *({"prompt": str(i), "answer": "1"} for i in range(10)))
    taken = load_prompts(path, bytes_tokenizer, max_prompt_tokens=4, limit=3)
    assert [p.text for p in taken.prompts] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no usable line in .*1 not a JSON object"):
        load_prompts(jsonl(tmp_path / "bad.jsonl", b"?"), bytes_tokenizer, max_prompt_tokens=4)


def test_steps_walk_through_whole_reshuffled_epochs() -> None:
    steps = np.concatenate([batch_indices(step, 4, 10, seed=3) for step in range(5)])
    assert sorted(steps[:10]) == sorted(steps[10:]) == list(range(10))
    assert list(steps[:10]) == list(prompt_order(10, seed=3, epoch=0))
    assert list(steps[10:]) == list(prompt_order(10, seed=3, epoch=1))
    assert list(steps[:10]) != list(steps[10:])
    assert list(prompt_order(10, seed=4, epoch=0)) != list(prompt_order(10, seed=3, epoch=0))


def test_a_step_may_be_larger_than_an_epoch() -> None:
    counts = np.bincount(batch_indices(0, 12, 3, seed=0), minlength=3)
    assert list(counts) == [4, 4, 4]
    with pytest.raises(ValueError, match="num_prompts: got 0"):
        batch_indices(0, 4, 0, seed=0)


def test_the_order_of_a_seed_is_fixed() -> None:
    # Written down so that a resumed run walks on through the same prompts under a newer version.
    assert list(prompt_order(8, seed=0, epoch=0)) == [2, 4, 3, 6, 5, 0, 1, 7]
