"""A host's gate: refusals are waited for by all threads together, counted on a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import pytest
from answers import Answers, Asked, Said, answering, ranged
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE_S, until

from rasteret_dask.errors import ReadError
from rasteret_dask.net import gate, remote
from rasteret_dask.net.gate import Gate, ThrottledError, seconds

DATA = bytes(range(256)) * 400
THREADS = 32


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)


class Moody:
    """Refuses for as long as it is told, and counts what it refused; what comes after so many rounds has to wait."""

    def __init__(self, said: Said, rounds: int = 10**6) -> None:
        self.said, self.refused, self.until = said, 0, threading.Event()
        self._rounds = rounds
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Said:
        if gate.at(f"http://{asked.headers['host']}").rounds >= self._rounds:
            assert self.until.wait(PATIENCE_S)
        if self.until.is_set():
            return ranged(DATA, asked)
        with self._lock:
            self.refused += 1
        return self.said


@pytest.fixture
def calm() -> Iterator[Answers]:
    with answering(lambda asked: ranged(DATA, asked)) as server:
        yield server


def read_all(server: Answers, count: int) -> list[bytes]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda n: remote.get(server.url("/a"), n, 7), range(count)))


@pytest.mark.parametrize(
    "said", [Said(429), Said(503, {"Retry-After": "1"}), Said(503, {}, b"<Code>SlowDown</Code>")]
)
def test_a_host_that_refuses_for_a_while_is_asked_by_few(said: Said, calm: Answers) -> None:
    """32 threads with 6 tries each sent up to 192 requests to be refused; now one goes ahead for all."""
    moody = Moody(said, rounds=3)
    with answering(moody) as server:
        with ThreadPoolExecutor(1) as other:
            reading = other.submit(read_all, server, 200)
            until(lambda: gate.at(f"http://127.0.0.1:{server.port}").rounds >= 3 or reading.done())
            before = len(calm.log)
            assert remote.get(calm.url("/b"), 5, 3) == DATA[5:8]  # another host is not slowed
            assert len(calm.log) == before + 1
            moody.until.set()
            assert reading.result() == [DATA[n : n + 7] for n in range(200)]
        assert moody.refused <= THREADS + gate.ROUNDS
        assert len(server.log) == 200 + moody.refused


def test_a_host_that_refuses_for_ever_is_one_error_after_few_requests() -> None:
    moody = Moody(Said(429))
    with answering(moody) as server, ThreadPoolExecutor(THREADS) as pool:
        asked = [pool.submit(remote.get, server.url("/a"), n, 7) for n in range(THREADS)]
        for one in asked:
            with pytest.raises(ReadError, match=r"status 429 \(Too Many Requests\)"):
                one.result()
        assert moody.refused <= THREADS + gate.ROUNDS
        before = moody.refused
        with pytest.raises(ReadError):
            remote.get(server.url("/a"), 0, 7)
        assert moody.refused == before + 1  # it is known to refuse: not waited for again
        moody.until.set()
        assert remote.get(server.url("/a"), 0, 7) == DATA[:7]


def test_retry_after_closes_the_gate_for_all_threads() -> None:
    """After the refusal nothing is sent until the second is over, whoever asks."""
    times: list[float] = []

    def once(asked: Asked) -> Said:
        times.append(time.monotonic())
        return Said(429, {"Retry-After": "1"}) if len(times) == 1 else ranged(DATA, asked)

    with answering(once) as server:
        first = threading.Thread(target=remote.get, args=(server.url("/a"), 0, 7))
        first.start()
        until(lambda: gate.at(f"http://127.0.0.1:{server.port}").rounds or not first.is_alive())
        assert read_all(server, 40) == [DATA[n : n + 7] for n in range(40)]
        first.join()
    assert min(t - times[0] for t in times[1:]) >= 1.0


def test_one_503_of_many_answers_slows_nobody() -> None:
    """Two of 40 at a time: three in a row, in whatever order threads hear of them, would mean the host."""
    count = iter(range(10_000))
    with answering(lambda asked: Said(503) if next(count) % 42 in (3, 20) else ranged(DATA, asked)) as server:
        for _ in range(6):
            assert read_all(server, 40) == [DATA[n : n + 7] for n in range(40)]
        assert len(server.log) == 6 * 42
        assert gate.at(f"http://127.0.0.1:{server.port}").width >= THREADS // 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["ok", "429", "503", "later"]), max_size=60), st.integers(1, 48))
def test_the_width_stays_between_one_and_most(steps: list[str], most: int) -> None:
    now = [0.0]
    one = Gate(most, lambda: now[0])
    for step in steps:
        now[0] += 1000.0  # whatever it waits for is over
        try:
            with one.turn(0.25):
                if step == "429":
                    raise ThrottledError("x")
                if step == "503":
                    raise ThrottledError("x", sure=False)
                if step == "later":
                    raise ThrottledError("x", wait_s=5.0)
        except ThrottledError:
            pass
        assert 1 <= one.width <= most
        assert one.rounds == 0 or step != "ok"


def test_what_retry_after_asks_for() -> None:
    assert seconds("7") == 7
    assert seconds(" 0 ") == 0
    assert seconds("99999999999999999999") == gate.RETRY_AFTER_MOST_S
    assert seconds(None) is None
    assert seconds("soon") is None
    assert seconds("-5") is None
    assert seconds(formatdate(time.time() - 100, usegmt=True)) == 0
    later = seconds(formatdate(time.time() + 3600, usegmt=True))
    assert later is not None
    assert 3000 < later <= 3600
