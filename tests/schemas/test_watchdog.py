"""A call that does not return ends the process; a signal ends it within five seconds, whatever it does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

HANG = """
import time
from bourse_schemas.watchdog import deadline
with deadline("quick", 0.1):
    pass
with deadline("commit_transaction", 0.5):
    time.sleep(60)
"""
BUSY = """
import sys, time
from bourse_schemas.watchdog import deadline, unwatched
with deadline("the stop", 1):
    with unwatched:
        time.sleep(2.5)
    print("computed", flush=True)
    time.sleep(60)
"""
CROWD = """
import sys, threading
from bourse_schemas.watchdog import deadline
sys.setswitchinterval(1e-6)
gate = threading.Barrier(8)
def call():
    gate.wait()
    with deadline("quick", 60):
        gate.wait()
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sum(thread.name == "watchdog" for thread in threading.enumerate()))
"""
STOP = """
import ctypes, signal, sys, time
from bourse_schemas.watchdog import stop_on_signals
stop = stop_on_signals()
print("ready", flush=True)
if sys.argv[1] == "twice":
    stop.wait(60)
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.2)
    signal.raise_signal(signal.SIGTERM)
    sys.exit(0)
if sys.argv[1] == "hangs":
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # unlike a sleep, no signal ends it
else:
    stop.wait(60)
    print("stopped")
"""


def test_a_call_that_hangs_ends_the_process_and_is_named() -> None:
    """Exit code 1 and one line; a call that returned in time does not count."""
    ran = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=20, check=False)
    assert ran.returncode == 1
    assert json.loads(ran.stderr) == {
        "level": "critical",
        "event": "commit_transaction did not return within 0.5 s: the process ends, start it again",
    }


@pytest.mark.parametrize("gone", ["2>&-", "2>&1 >/dev/null | true"])
def test_a_call_that_hangs_ends_the_process_whose_log_has_no_reader(gone: str) -> None:
    """The line cannot be written then; that must not save the process."""
    command = f"{sys.executable} -c '{HANG}' {gone}; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20, check=False)
    assert ran.stdout == "1\n"


def test_what_only_computes_takes_no_time_of_a_call() -> None:
    """Afterwards the call's time goes on."""
    ran = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout) == (1, "computed\n")
    assert "the stop did not return within 1 s" in ran.stderr


def test_one_thread_watches_all_calls() -> None:
    """However many threads make the first call at once: each watcher counts the time of every call."""
    ran = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr


def test_a_second_signal_is_no_error() -> None:
    """People press Ctrl-C twice."""
    command = [sys.executable, "-c", STOP, "twice"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("what", "code"), [("waits", 0), ("hangs", 1)])
def test_a_signal_ends_the_process_within_five_seconds(number: signal.Signals, what: str, code: int) -> None:
    """In good order if it can, and else by force: also inside a call that does not return to Python."""
    with subprocess.Popen([sys.executable, "-c", STOP, what], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(20) == code
        assert time.monotonic() - began < 5
