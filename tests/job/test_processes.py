"""`processes`: real processes, each test looks at the process table for what is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dppo.job import processes
from megatron_dppo.job.processes import ChildDied, start, stop_on_exit, supervise

REPOSITORY = Path(processes.__file__).parents[2]

# Writes its own pid and a grandchild's to the file given; the grandchild has a session of its own, as
# torchrun's ranks have.
FAMILY = """
import os, signal, subprocess, sys, time
{setup}
grandchild = subprocess.Popen([sys.executable, "-c", "{grandchild}"], start_new_session=True)
open(sys.argv[1] + ".tmp", "w").write(f"{{os.getpid()}} {{grandchild.pid}}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
{then}
"""
SLEEP = "import time; time.sleep(600)"
IGNORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def family(*, setup: str = "", grandchild: str = SLEEP, then: str = "time.sleep(600)") -> str:
    return FAMILY.format(setup=setup, grandchild=grandchild, then=then)


def python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which only waits to be collected, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.02)
    return False


def pids_in(path: Path) -> list[int]:
    assert eventually(path.exists), "the child did not come up"
    return [int(word) for word in path.read_text().split()]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., processes.Child]]:
    started: list[processes.Child] = []

    def _launch(name: str, argv: list[str], **kwargs: object) -> processes.Child:
        started.append(start(name, argv, env=os.environ, log_path=tmp_path / f"{name}.log", **kwargs))
        return started[-1]

    yield _launch
    processes.stop_all(started)


def test_a_child_runs_with_the_given_environment_and_log(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WORD'], flush=True); sys.exit('oops')"
    child = start("worker", python(code), env={"WORD": "héllo"}, log_path=tmp_path / "logs/w.log")
    assert eventually(lambda: child.poll() is not None)
    assert child.poll() == 1
    assert child.log_tail().splitlines() == ["héllo", "oops"]
    assert child.log_tail(lines=1) == "oops"


def test_a_program_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        start("worker", ["no-such-program"], env=os.environ, log_path=tmp_path / "log")


def test_stop_ends_a_child_and_its_grandchild_in_another_session(launch, tmp_path: Path) -> None:
    child = launch("family", python(family(), tmp_path / "pids"))
    pids = pids_in(tmp_path / "pids")
    assert all(map(alive, pids)) and child.poll() is None
    assert child.stop() == 128 + signal.SIGTERM
    assert not any(map(alive, pids))
    assert child.stop() == 128 + signal.SIGTERM  # harmless a second time


def test_stop_kills_what_ignores_sigterm_after_the_grace(launch, tmp_path: Path) -> None:
    stubborn = family(setup="signal.signal(signal.SIGTERM, signal.SIG_IGN)", grandchild=IGNORE)
    child = launch("stubborn", python(stubborn, tmp_path / "pids"))
    pids = pids_in(tmp_path / "pids")
    before = time.monotonic()
    assert child.stop(grace_s=0.5) == 128 + signal.SIGKILL
    assert 0.5 <= time.monotonic() - before < 3.0
    assert not any(map(alive, pids))


def test_the_shared_memory_of_a_killed_child_is_removed(launch, tmp_path: Path) -> None:
    holder = f"""
    import os, signal, time
    from multiprocessing import resource_tracker
    from multiprocessing.shared_memory import SharedMemory
    signal.signal(signal.SIGTERM, lambda *_: None)  # handled, and yet it stays
    memory = SharedMemory(create=True, size=4096)
    open({str(tmp_path / "tmp")!r}, "w").write(f"{{resource_tracker._resource_tracker._pid}} {{memory.name}}")
    os.rename({str(tmp_path / "tmp")!r}, {str(tmp_path / "up")!r})
    while True: time.sleep(1)
    """
    child = launch("holder", python(holder), grace_s=0.2)
    assert eventually((tmp_path / "up").exists)
    tracker, name = (tmp_path / "up").read_text().split()
    assert eventually(lambda: processes._ignores_sigterm(int(tracker)))  # it has come up
    assert (Path("/dev/shm") / name).exists()
    assert child.stop() == 128 + signal.SIGKILL
    assert not (Path("/dev/shm") / name).exists() and not alive(int(tracker))


def test_stop_lets_a_child_clean_up_within_the_grace(launch, tmp_path: Path) -> None:
    tidy = f"""
    import signal, sys, time
    def clean(*_):
        time.sleep(0.3); open({str(tmp_path / "cleaned")!r}, "w").close(); sys.exit(0)
    signal.signal(signal.SIGTERM, clean)
    open({str(tmp_path / "up")!r}, "w").close()
    time.sleep(600)
    """
    child = launch("tidy", python(tidy))
    assert eventually((tmp_path / "up").exists)
    assert child.stop() == 0
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(("then", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_a_child_that_dies_takes_its_grandchild_with_it(launch, tmp_path: Path, then: str, code: int) -> None:
    child = launch("dies", python(family(grandchild=IGNORE, then=then), tmp_path / "pids"), grace_s=0.3)
    pids = pids_in(tmp_path / "pids")
    assert eventually(lambda: child.poll() is not None)
    assert child.poll() == code
    assert not any(map(alive, pids))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    stubborn = family(setup="signal.signal(signal.SIGTERM, signal.SIG_IGN)", grandchild=IGNORE)
    argv, log_path = python(stubborn, tmp_path / "pids"), str(tmp_path / "log")
    parent_code = f"""
    import os, sys, time
    from pathlib import Path
    from megatron_dppo.job.processes import start
    start("c", {argv!r}, env=os.environ, log_path=Path({log_path!r}), grace_s=0.3)
    time.sleep(600)
    """
    parent = subprocess.Popen(python(parent_code), env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    pids = pids_in(tmp_path / "pids")
    assert all(map(alive, pids))
    parent.send_signal(how)
    parent.wait()
    assert eventually(lambda: not any(map(alive, pids)), seconds=5.0)


def test_a_thread_that_ends_does_not_take_the_child_it_started(launch) -> None:
    import threading

    started: list[processes.Child] = []
    thread = threading.Thread(target=lambda: started.append(launch("sleeper", python(SLEEP))))
    thread.start()
    thread.join()
    time.sleep(0.5)
    assert started[0].poll() is None


def test_the_child_dies_with_its_guard_when_the_guard_is_killed(launch, tmp_path: Path) -> None:
    child = launch("family", python(family(), tmp_path / "pids"))
    pids = pids_in(tmp_path / "pids")
    os.kill(child.pid, signal.SIGKILL)
    assert eventually(lambda: not alive(pids[0]))
    os.kill(pids[1], signal.SIGKILL)  # in a session of its own and without a guard: this one nobody can know of


def test_supervise_returns_when_all_awaited_children_end_well(launch) -> None:
    service = launch("service", python(SLEEP))
    jobs = [launch(f"job{i}", python(f"import time; time.sleep({0.1 * i})")) for i in range(3)]
    supervise([service, *jobs], until=jobs)
    assert [job.poll() for job in jobs] == [0, 0, 0] and service.poll() is None


@pytest.mark.parametrize(
    ("service_code", "job_code", "guilty", "returncode"),
    [
        ("import sys, time; print('no memory'); sys.exit(0)", "import time; time.sleep(600)", "service", 0),
        ("import time; time.sleep(600)", "import sys; print('no memory'); sys.exit(5)", "job", 5),
        ("import time; time.sleep(600)", "import os; print('no memory', flush=True); os.abort()", "job", 134),
    ],
)
def test_supervise_raises_as_soon_as_a_child_dies(
    launch, service_code: str, job_code: str, guilty: str, returncode: int
) -> None:
    service, job = launch("service", python(service_code)), launch("job", python(job_code))
    with pytest.raises(ChildDied, match="no memory") as error:
        supervise([service, job], until=[job])
    assert (error.value.name, error.value.returncode) == (guilty, returncode)
    assert error.value.log_tail == "no memory"


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_leaving_the_block_stops_every_child(tmp_path: Path, raised: type[BaseException]) -> None:
    with pytest.raises(raised), stop_on_exit() as children:
        for i in range(2):
            argv = python(family(), tmp_path / f"pids{i}")
            children.append(start(f"c{i}", argv, env=os.environ, log_path=tmp_path / f"{i}.log"))
        pids = pids_in(tmp_path / "pids0") + pids_in(tmp_path / "pids1")
        assert all(map(alive, pids))
        raise raised
    assert not any(map(alive, pids))


def test_sigterm_leaves_the_block_as_an_interrupt_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), stop_on_exit():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_waits_until_the_children_are_stopped(tmp_path: Path) -> None:
    stubborn = family(setup="signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    with pytest.raises(KeyboardInterrupt), stop_on_exit() as children:
        argv = python(stubborn, tmp_path / "pids")
        children.append(start("stubborn", argv, env=os.environ, log_path=tmp_path / "log", grace_s=1.0))
        pids = pids_in(tmp_path / "pids")
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -INT {os.getpid()}"])  # arrives during the stop
        raise KeyboardInterrupt
    assert not any(map(alive, pids))


def test_free_port_can_be_bound() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", processes.free_port()))


def test_a_process_that_becomes_the_guard_of_another_ends_it_gently(tmp_path: Path) -> None:
    """As on another node: the signal that srun hands on reaches what the guard started."""
    server = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(print('gently', flush=True)));"
    server += "print('up', flush=True); time.sleep(600)"
    code = f"""
    import os, sys
    from megatron_dppo.job.processes import become_guarded
    become_guarded([sys.executable, "-c", {server!r}], os.environ, 10.0)
    """
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(python(code), env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(processes.STOP_THERE)
    output, _ = process.communicate(timeout=10)
    assert (output, process.returncode) == ("gently\n", 0)


def test_another_signal_may_ask_a_child_to_stop(tmp_path: Path) -> None:
    code = """
    import signal, sys, time
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
    open(sys.argv[1], "w").close()
    time.sleep(600)
    """
    argv = python(code, tmp_path / "up")
    child = start("c", argv, env=os.environ, log_path=tmp_path / "log", stop_signal=signal.SIGUSR2)
    assert eventually((tmp_path / "up").exists)
    assert child.stop() == 7


def test_a_log_that_a_full_disk_cut_short_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = start("c", python("raise SystemExit(1)"), env=os.environ, log_path=tmp_path / "log")
    assert eventually(lambda: child.poll() is not None)
    assert "is full" not in str(child.died())
    monkeypatch.setattr(processes.os, "statvfs", lambda path: SimpleNamespace(f_bavail=0))
    assert f"the file system of {tmp_path}/log is full" in str(child.died())


def test_the_log_that_a_child_names_is_shown_too(tmp_path: Path) -> None:
    (tmp_path / "rank3.log").write_text("the cause\n")
    argv = python("print('rank 3 failed'); raise SystemExit(1)")
    child = start("c", argv, env=os.environ, log_path=tmp_path / "log", culprit=lambda log: log.with_name("rank3.log"))
    assert eventually(lambda: child.poll() is not None)
    assert "rank 3 failed" in str(child.died()) and str(child.died()).endswith("rank3.log:\nthe cause")


def test_a_signal_is_noted_instead_of_ending_the_process() -> None:
    with processes.noted(signal.SIGUSR1) as received:
        assert not received
        os.kill(os.getpid(), signal.SIGUSR1)
        assert eventually(lambda: received == [signal.SIGUSR1])
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
