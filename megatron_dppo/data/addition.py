"""The quickstart's task: three-digit addition with its working written out, in a language of 16 characters.

A prompt interleaves the digits of both numbers, ones column first: `754832=` asks 347 + 285. A solution
writes each column's sum with its carry in two digits, then the answer: `121306>0632$` (7+5=12, 4+8+1=13,
3+2+1=06; `$` ends it). Only the text after `>` is checked. A tenth of the 10^6 prompts, by a hash of their
text, is held out.

A model warm-started on `teacher` knows the task but forgets carries, so reinforcement learning has a preferred
mode to turn around, and every prompt stays solvable by sampling.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYMBOLS = "0123456789+*=>$,"
END = "$"
MARKER = ">"
NUM_COLUMNS = 3

Problem = tuple[int, int]


def prompt_text(a: int, b: int) -> str:
    """`754832=` for 347 + 285."""
    return "".join(f"{x}{y}" for x, y in _columns(a, b)) + "="


def teacher(a: int, b: int, forget: float, rng: random.Random) -> str:
    """A response that forgets each carry with probability `forget`, the rest consistent with that; with 0 the right
    one, `121306>0632$` for 347 + 285."""
    kept_carries = [rng.random() >= forget for _ in range(NUM_COLUMNS - 1)]
    working, digits, carry = "", "", 0
    for (x, y), kept in zip(_columns(a, b), (*kept_carries, True), strict=True):
        total = x + y + carry
        working += f"{total:02d}"
        digits = str(total % 10) + digits
        carry = total // 10 if kept else 0
    return f"{working}{MARKER}{carry}{digits}{END}"


def answer(a: int, b: int) -> str:
    """The four digits after the marker, `0632` for 347 + 285."""
    return f"{a + b:0{NUM_COLUMNS + 1}d}"


def is_held_out(a: int, b: int) -> bool:
    """True for a tenth of the problems, the same ones everywhere and always."""
    digest = blake2b(prompt_text(a, b).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def sample_problems(rng: random.Random, n: int, held_out: bool) -> list[Problem]:
    """`n` problems (with replacement) of the held-out or of the training part."""
    problems: list[Problem] = []
    while len(problems) < n:
        a, b = rng.randrange(10**NUM_COLUMNS), rng.randrange(10**NUM_COLUMNS)
        if is_held_out(a, b) == held_out:
            problems.append((a, b))
    return problems


def write_problems(path: Path | str, problems: Iterable[Problem]) -> None:
    """JSONL of {"prompt", "answer"}."""
    with Path(path).open("w", encoding="utf-8") as file:
        for a, b in problems:
            file.write(json.dumps({"prompt": prompt_text(a, b), "answer": answer(a, b)}) + "\n")


def build_tokenizer(path: Path | str) -> PreTrainedTokenizerFast:
    """Saves the tokenizer of the 16 symbols as a Hugging Face directory and returns it: a token is a
    character.

    It has no unknown token: text with any other character is refused, not mangled.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(str(path))
    return tokenizer


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digit pairs, ones first."""
    for number in (a, b):
        if not 0 <= number < 10**NUM_COLUMNS:
            raise ValueError(f"problem: got {number}, expected 0..{10**NUM_COLUMNS - 1}")
    return [(a // 10**k % 10, b // 10**k % 10) for k in range(NUM_COLUMNS)]
