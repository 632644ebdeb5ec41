"""End the process when a call does not return: librdkafka does not honour the time-outs of some of its calls.

    with deadline("commit_transaction", 30):
        producer.commit_transaction(12)

One thread watches all calls of the process. A process that hangs and looks alive is worse than one that ended: whatever
supervises it starts it again, and what was not committed is delivered again.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

TICK_SECONDS = 0.25
# What a service may take to stop, in which its own orderly stop has to fit.
STOP_SECONDS = 4.5
STOPPING = (signal.SIGTERM, signal.SIGINT)


@dataclass(eq=False, slots=True)
class _Call:
    name: str
    seconds: float
    left: float


_calls: dict[_Call, None] = {}
_starting = threading.Lock()
unwatched = threading.Lock()
"""To hold while something long only computes, and so cannot hang: no call's time passes meanwhile."""


def _arm(name: str, seconds: float) -> _Call:
    call = _Call(name, seconds, seconds)
    _calls[call] = None
    # Two watchers would each count a call's time.
    with _starting:
        _start()
    return call


@cache
def _start() -> None:
    threading.Thread(target=_watch, name="watchdog", daemon=True).start()


def _watch() -> None:
    while True:
        with unwatched:
            began = time.monotonic()
        time.sleep(TICK_SECONDS)
        # No call can return while the process is stopped or the machine sleeps: that time does not count.
        passed = min(time.monotonic() - began, 2 * TICK_SECONDS)
        for call in list(_calls):
            call.left -= passed
            if call.left <= 0:
                _end(call)


@contextmanager
def deadline(call: str, seconds: float) -> Iterator[None]:
    """End the process with exit code 1, and print the call's name, if the block takes longer than `seconds`."""
    armed = _arm(call, seconds)
    try:
        yield
    finally:
        _calls.pop(armed, None)


def stop_on_signals(seconds: float = STOP_SECONDS) -> threading.Event:
    """Return an event that SIGTERM and SIGINT set; a process that has not ended `seconds` later is ended with exit 1.

    A thread reads the signals: the main thread cannot, as long as it is inside a call into librdkafka.
    """
    stop = threading.Event()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen() -> None:
        while True:  # a second signal has to find a reader too
            if ours.recv(1)[0] in STOPPING and not stop.is_set():
                stop.set()
                _arm("the orderly stop", seconds)

    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in STOPPING:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    return stop


def _end(call: _Call) -> None:
    message = f"{call.name} did not return within {call.seconds:g} s: the process ends, start it again"
    line = message if os.isatty(2) else json.dumps({"level": "critical", "event": message})
    # Not through a logger, whose lock may be held; and not into a pipe that is full. Its reader may be gone.
    try:
        if select.select([], [2], [], 1)[1]:
            os.write(2, line.encode() + b"\n")
    finally:
        os._exit(1)
