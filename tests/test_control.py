"""Messages over the store: what is posted arrives, what is not there in time is an error that names it."""

from __future__ import annotations

import random
import threading
import time

import pytest

from megatron_dppo import control
from megatron_dppo.control import Control, ControlTimeout, order_key, reply_key


def test_a_message_arrives_whoever_comes_first() -> None:
    server = Control.serve()
    client = Control.connect(server.address)
    assert client.peek(order_key(3)) is None
    client.post(order_key(3), {"files": ["a"], "stop": None, "wort": "größe"})
    assert (
        server.peek(order_key(3)) == server.wait(order_key(3), 1.0) == {"files": ["a"], "stop": None, "wort": "größe"}
    )
    threading.Timer(0.2, lambda: server.post(reply_key(1), {"version": 1})).start()
    assert client.wait(reply_key(1), 10.0) == {"version": 1}


def test_a_store_on_another_machine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CONNECT_TIMEOUT_S", 1.0)
    with pytest.raises(RuntimeError, match="cannot be reached as 192.0.2.1, expected a name or address"):
        Control.serve("192.0.2.1")  # of nobody


def test_messages_of_any_size_arrive_and_can_be_taken() -> None:
    server = Control.serve()
    client = Control.connect(server.address)
    noise = {"text": "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x9FFF), k=6_000_000)))}
    client.post("large", noise)
    assert server.wait("large", 5.0) == noise
    assert server.take("large", 5.0) == noise and client.peek("large") is None


def test_waiting_ends_at_the_deadline() -> None:
    server = Control.serve()
    before = time.monotonic()
    with pytest.raises(ControlTimeout, match="waited 0 s for 'order/7', got nothing"):
        server.wait(order_key(7), 0.3)
    assert time.monotonic() - before < 5
