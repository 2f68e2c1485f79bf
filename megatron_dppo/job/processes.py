"""The one way to start and stop processes: nothing a child started may outlive it, and no child its parent.

A child is started under a *guard*, a small process (this file run as a script, standard library only) that is
the leader of the child's process group and the reaper of its orphans. The guard ends the child and all its
descendants when asked (SIGTERM), when the child itself ends in whatever way, and when our process dies, even
by SIGKILL. So an engine server killed with -9 leaves no engine core behind, nor does torchrun its ranks,
which live in sessions of their own. Processes are only ever addressed by their id, never by a name. Needs
Linux (/proc, prctl).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

GRACE_S = 10.0  # between SIGTERM and SIGKILL
ORPHAN_GRACE_S = 2.0  # at most, for what a child that ended by itself left behind
TRACKER_GRACE_S = 1.0  # after SIGKILL to the others, for what ignores SIGTERM: see `_ignores_sigterm`
GUARD_MARGIN_S = 5.0  # what the guard itself may take beyond the grace
POLL_S = 0.1
TAIL_LINES = 20
ERROR_SEARCH_LINES, ERROR_LINES = 1000, 3
ERROR_LINE = re.compile(r"\b\w*(Error|Exception|Died)\b: ")  # the last line of a Python traceback

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STOP_THERE = signal.SIGUSR2  # as SIGTERM, to a guard on another node: srun hands this one on, and kills for SIGTERM
PARENT_GONE = signal.SIGUSR1  # what the kernel sends the guard when the thread that started it ends


class ChildDied(RuntimeError):
    """A child ended that should not have. The message: its name, how it ended, the last lines of its log."""

    def __init__(self, name: str, returncode: int, log_path: Path, log_tail: str) -> None:
        super().__init__(f"{name} ended with {describe(returncode)}; the last lines of {log_path}:\n{log_tail}")
        self.name, self.returncode, self.log_tail = name, returncode, log_tail


@dataclass(eq=False)
class Child:
    """A started process. Made by `start`."""

    name: str
    log_path: Path
    grace_s: float
    _guard: subprocess.Popen[bytes]
    _culprit: Callable[[Path], Path | None]

    @property
    def pid(self) -> int:
        """Of the guard; also the id of the process group."""
        return self._guard.pid

    def poll(self) -> int | None:
        """None while the child runs, then its exit code; 128 + n after signal n, as shells count."""
        code = self._guard.poll()
        return 128 - code if code is not None and code < 0 else code

    def stop(self, grace_s: float | None = None) -> int:
        """End the child and all that it started: SIGTERM, after the grace SIGKILL. Returns the exit code.

        The grace (seconds) is the one given to `start` unless a shorter one is given here. Harmless on an
        ended child.
        """
        request_stop(self)
        return finish_stop(self, time.monotonic() + (self.grace_s if grace_s is None else grace_s))

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of the child's output; empty if there is none."""
        return "\n".join(_last_lines(self.log_path, lines))

    def died(self) -> ChildDied:
        """The error that says how this ended child ended."""
        returncode = self.poll()
        assert returncode is not None, f"{self.name} is still running"
        lines = self.log_tail(ERROR_SEARCH_LINES).splitlines()
        tail = lines[-TAIL_LINES:]
        # Some programs (vLLM) say a lot after the error that ended them.
        errors = [line for line in lines[:-TAIL_LINES] if ERROR_LINE.search(line)][-ERROR_LINES:]
        shown = ["errors before that:", *errors, "the end:", *tail] if errors else tail
        if not os.statvfs(self.log_path.parent).f_bavail:
            shown.append(f"the file system of {self.log_path} is full, and the log may lack the end")
        if (other := self._culprit(self.log_path)) is not None:
            shown += [f"the last lines of {other}:", *_last_lines(other, TAIL_LINES)]
        return ChildDied(self.name, returncode, self.log_path, "\n".join(shown))


def start(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    log_path: Path,
    grace_s: float = GRACE_S,
    stop_signal: signal.Signals = signal.SIGTERM,
    culprit: Callable[[Path], Path | None] = lambda log_path: None,
) -> Child:
    """Start `argv` in a process group of its own, stdout and stderr appended to `log_path`, stdin empty.

    env: the complete environment of the child. stop_signal: what asks it and its descendants to end. culprit: which
    other log, if any, `log_path` names as the one of the process that failed; its end is shown as well. Raises
    FileNotFoundError if the program does not exist.
    """
    program = argv[0] if os.path.sep in argv[0] else _which(argv[0], env)
    if not os.access(program, os.X_OK):
        raise FileNotFoundError(f"{name}: got program {argv[0]!r}, expected an executable file")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    guard = _guard_command(os.getpid(), grace_s, stop_signal, [program, *argv[1:]])
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            guard,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Child(name, log_path, grace_s, process, culprit)


def become_guarded(argv: Sequence[str], env: Mapping[str, str], grace_s: float) -> NoReturn:
    """This process becomes the guard of `argv`, for whoever started it: on another node, where `start` does not reach.

    It ends gently by STOP_THERE too, which `argv` and its children are made to ignore: Slurm sends it to all of them.
    """
    signal.signal(STOP_THERE, signal.SIG_IGN)  # inherited; the guard blocks and so still receives it
    guard = _guard_command(os.getppid(), grace_s, signal.SIGTERM, [_which(argv[0], env), *argv[1:]])
    os.execve(guard[0], guard, dict(env))


def supervise(children: Sequence[Child], *, until: Sequence[Child], watch: Callable[[], None] = lambda: None) -> None:
    """Block until all of `until` have ended with code 0. Raises ChildDied as soon as any other end is seen.

    A child that is not in `until` is a service: it must not end at all, not even with code 0. `watch` is
    called at every look.
    """
    waiting = list(until)
    while waiting:
        for child in [*waiting, *(c for c in children if c not in until)]:
            returncode = child.poll()
            if returncode is None:
                continue
            if child not in waiting or returncode != 0:
                raise child.died()
            waiting.remove(child)
        watch()
        if waiting:
            time.sleep(POLL_S)


@contextlib.contextmanager
def stop_on_exit() -> Iterator[list[Child]]:
    """A list of children, all of which are stopped when the block is left, however it is left.

    In the main thread SIGTERM becomes KeyboardInterrupt within the block, so that a job that a scheduler ends
    cleans up as on Ctrl-C. While the children are being stopped, further interrupts wait (a few seconds: the
    longest grace).
    """
    children: list[Child] = []
    in_main = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    with _sigterm_interrupts() if in_main else contextlib.nullcontext():
        try:
            yield children
        finally:
            with _interrupts_held() if in_main else contextlib.nullcontext():
                stop_all(children)


@contextlib.contextmanager
def noted(signum: int) -> Iterator[list[int]]:
    """A list that has `signum` once it was received within the block, where else it would end the process.

    Nothing is noted outside of the main thread.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signum, lambda n, _: received.append(n))
    try:
        yield received
    finally:
        signal.signal(signum, before)


def stop_all(children: Sequence[Child]) -> None:
    """Stop all children at the same time."""
    for child in children:
        request_stop(child)
    now = time.monotonic()
    for child in children:
        finish_stop(child, now + child.grace_s)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago. Somebody may take it before you do."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def describe(returncode: int) -> str:
    """An exit code in words."""
    if returncode > 128:
        with contextlib.suppress(ValueError):
            return f"code {returncode} ({signal.Signals(returncode - 128).name})"
    return f"code {returncode}"


def request_stop(child: Child) -> None:
    """Ask the guard to end the child; returns at once."""
    if child._guard.poll() is None:
        child._guard.send_signal(signal.SIGTERM)


def finish_stop(child: Child, kill_at: float) -> int:
    """Wait for a requested stop; at `kill_at` (of time.monotonic) ask the guard to kill at once."""
    try:
        child._guard.wait(max(0.0, kill_at - time.monotonic()))
    except subprocess.TimeoutExpired:
        child._guard.send_signal(signal.SIGINT)
        try:
            child._guard.wait(GUARD_MARGIN_S)
        except subprocess.TimeoutExpired:  # the guard itself is stuck (stopped, say): the group is all we can reach
            os.killpg(child.pid, signal.SIGKILL)
            child._guard.wait()
    returncode = child.poll()
    assert returncode is not None
    return returncode


def _guard_command(parent: int, grace_s: float, stop_signal: signal.Signals, argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-I", "-S", __file__, str(parent), str(grace_s), str(int(stop_signal)), "--", *argv]


def _last_lines(path: Path, lines: int) -> list[str]:
    """Of a text file; none where it is not there."""
    if not path.is_file():
        return []
    with path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - 400 * lines))
        return log.read().decode(errors="replace").splitlines()[-lines:]


def _which(program: str, env: Mapping[str, str]) -> str:
    import shutil  # not needed by the guard, which should start fast

    return shutil.which(program, path=env.get("PATH")) or program


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt("received SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the block. Handlers, not a mask: a mask holds for one thread only."""
    received: list[int] = []
    hold = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.signal(signum, lambda n, _: received.append(n)) for signum in hold}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received:
        raise KeyboardInterrupt(f"received {signal.Signals(received[0]).name}")


# ---- the guard: runs as a script, in a process of its own --------------------------------------------------


def guard_main(parent: int, grace_s: float, stop_signal: int, argv: list[str]) -> int:
    """Run `argv` and end all that it started (module docstring). SIGTERM ends it gently, by `stop_signal`; SIGINT at
    once."""
    gently = {signal.SIGTERM, signal.SIGHUP, STOP_THERE}
    awaited = {*gently, signal.SIGINT, signal.SIGCHLD, PARENT_GONE}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    _prctl(PR_SET_PDEATHSIG, PARENT_GONE)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # should somebody kill the guard itself
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        try:
            os.execv(argv[0], argv)
        except OSError as error:
            os.write(2, f"{argv[0]}: {error}\n".encode())
            os._exit(127)
    code: int | None = None
    kill_at: float | None = None  # set once everything has to end
    while True:
        code = _reap(child, code)
        descendants = _descendants()
        if code is not None and not descendants:
            return code
        if kill_at is None and (code is not None or os.getppid() != parent):
            _signal_all(descendants, stop_signal)
            kill_at = time.monotonic() + (grace_s if code is None else min(grace_s, ORPHAN_GRACE_S))
        if kill_at is not None and time.monotonic() >= kill_at:
            spared = time.monotonic() < kill_at + TRACKER_GRACE_S
            _signal_all([pid for pid in descendants if not (spared and _ignores_sigterm(pid))], signal.SIGKILL)
        received = signal.sigtimedwait(awaited, 1.0 if kill_at is None else 0.05)
        if received is None:
            continue
        if received.si_signo in gently and kill_at is None:
            _signal_all(_descendants(), stop_signal)
            kill_at = time.monotonic() + grace_s
        if received.si_signo == signal.SIGINT:
            kill_at = time.monotonic()


def _reap(child: int, code: int | None) -> int | None:
    """Collect everything that ended; the exit code of `child` once it is among it."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                ended = os.waitstatus_to_exitcode(status)
                code = 128 - ended if ended < 0 else ended
    return code


def _descendants() -> list[int]:
    """All descendants of this process, whatever their group or session. Without /proc none can be seen."""
    found: list[int] = []
    queue = [os.getpid()]
    while queue:
        pid = queue.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
                found += map(int, children)
                queue += map(int, children)
    return found


def _ignores_sigterm(pid: int) -> bool:
    """Whether a process ignores SIGTERM, as Python's resource tracker does.

    It removes the shared memory of its users once they are gone, so it must outlive them for a moment: a vLLM
    server leaves 160 MiB a worker in /dev/shm otherwise.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _signal_all(pids: list[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    sys.exit(guard_main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[5:]))
