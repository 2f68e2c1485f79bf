"""A process that checks mathematical answers: JSON lines in and out (see `check` and `main`).

Answers of a model can make sympy compute for ever, inside C code that no Python timeout interrupts. Here
the kernel's alarm for CPU time (so that a busy machine makes no answer wrong), left at its default action,
ends the whole process at the deadline; whoever asked sees the pipe close and starts another. The process ends
by itself when its standard input does, so it outlives nobody.

Run as `python -m megatron_dppo.data.math_worker`; `rewards.py` does.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

MEMORY_LIMIT = 4 << 30  # bytes of address space: 10^(10^10) is a short answer and a long number


def check(response: str, answer: str) -> dict[str, bool]:
    """`correct`: the response has the expected answer; `parsed`: it has one; `checked`: so has `answer`."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # math-verify's own timeouts are off: they are signals of this same process and would replace the alarm.
    gold = parse(rf"\boxed{{{answer}}}", [LatexExtractionConfig()], parsing_timeout=None)
    found = parse(response, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)
    correct = bool(gold) and bool(found) and verify(gold, found, timeout_seconds=None)
    return {"correct": correct, "parsed": bool(found), "checked": bool(gold)}


def main() -> None:
    """Reads `[response, answer, seconds]` and writes what `check` returns, until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    check("1", "1")  # imports sympy outside of any deadline
    for line in sys.stdin:
        response, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            result = check(response, answer)
        except Exception:  # sympy raises anything at all on strange input: it is then not an answer
            result = {"correct": False, "parsed": False, "checked": False}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
