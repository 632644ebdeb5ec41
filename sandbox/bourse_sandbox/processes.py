"""Child processes that never outlive their parent, not even when it is killed with SIGKILL.

Between parent and child is a guardian: this file, run as a small program. It holds the read end of a pipe whose write
end only the parent has. However the parent dies, the kernel closes the pipe, and the guardian ends the child's process
group. (Linux' PR_SET_PDEATHSIG follows the parent's *thread*, and macOS has no equivalent.) Guardian and child have
their own sessions, so a terminal's Ctrl-C reaches only the parent, which stops its children in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

_GRACE_SECONDS = 3.0  # for a child whose parent has died: SIGTERM, this long, SIGKILL


def spawn(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: Path | None = None,
    stderr: Path | None = None,
    inherit_terminal: bool = False,
    scratch: Path | None = None,
) -> Child:
    """Start a program that ends with this process; its output is appended to the files given, or discarded.

    `env` replaces the environment. With `inherit_terminal` an output without a file goes to this process's. The folder
    `scratch` is removed if this process dies. Raises OSError if the program cannot be started.
    """
    elsewhere = None if inherit_terminal else subprocess.DEVNULL
    report, status = os.pipe()
    with contextlib.ExitStack() as files:
        files.callback(os.close, report)
        with contextlib.ExitStack() as ours:
            ours.callback(os.close, status)
            guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(status), str(scratch or "")],
                stdin=subprocess.PIPE,
                stdout=ours.enter_context(stdout.open("ab")) if stdout else elsewhere,
                stderr=ours.enter_context(stderr.open("ab")) if stderr else elsewhere,
                env=env,
                cwd=cwd,
                pass_fds=(status,),
                start_new_session=True,
                bufsize=0,
            )
        child = Child(guardian, stderr or stdout, argv)
        answer = os.read(report, 4096).decode(errors="replace")
    if not answer.isdecimal():
        child.kill()
        raise OSError(answer or f"cannot start {argv[0]}")
    child.pid = int(answer)
    return child


class Child:
    """A running program and its guardian; a context manager that terminates it."""

    pid: int  # of the program itself

    def __init__(self, guardian: subprocess.Popen[bytes], log: Path | None, argv: Sequence[str | Path]) -> None:
        self._guardian = guardian
        self._log = log
        self._write(json.dumps([os.fspath(word) for word in argv]).encode() + b"\n")

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number if one ended it, None while it runs."""
        code = self._guardian.poll()
        if code is not None:
            self._close()
        return code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, at most `timeout` seconds (TimeoutError)."""
        try:
            code = self._guardian.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s") from None
        self._close()
        return code

    def send(self, number: int) -> None:
        """Send a signal to its process group; nothing happens if it has ended."""
        self._write(bytes([number]))

    def terminate(self, timeout: float = 10.0) -> int:
        """Ask it to end, kill it after `timeout` seconds, return its exit code."""
        self.send(signal.SIGTERM)
        try:
            return self.wait(timeout)
        except TimeoutError:
            return self.kill()

    def kill(self) -> int:
        """End it now, and everything in its process group."""
        self.send(signal.SIGKILL)
        return self.wait()

    def log_tail(self, lines: int = 10) -> str:
        """Return the last lines of its log file."""
        return tail(self._log, lines) if self._log else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def _write(self, data: bytes) -> None:
        if (pipe := self._guardian.stdin) and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):
                pipe.write(data)

    def _close(self) -> None:
        if pipe := self._guardian.stdin:
            pipe.close()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block as soon as SIGINT or SIGTERM comes, once; after the block ignore both."""

    def handle(handler: Callable[..., None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def interrupt(*_: object) -> None:
        handle(lambda *_: None)
        raise KeyboardInterrupt

    handle(interrupt)
    try:
        yield
    finally:
        handle(lambda *_: None)


def tail(log: Path, lines: int = 10) -> str:
    """Return the last lines of a file, nothing if it does not exist."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def _guard(status: int, scratch: str) -> None:
    """Be the guardian: read the command, a line of JSON, then a byte per signal to pass on, until the parent ends."""
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the child would inherit
    command = b""
    while not command.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return
        command += byte
    try:
        child = subprocess.Popen(json.loads(command), stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        os.write(status, str(error).encode())
        return

    def signal_group(number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: "not permitted" for a group of zombies
            os.killpg(child.pid, number)

    def listen() -> None:
        while byte := os.read(0, 1):
            signal_group(byte[0])
        signal_group(signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        signal_group(signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # the parent was interrupted meanwhile
        os.write(status, str(child.pid).encode())
    os.close(status)
    code = child.wait()
    signal_group(signal.SIGKILL)  # what the child left behind in its group
    if scratch and os.getppid() != parent:
        subprocess.run(["rm", "-rf", scratch], check=False)
    if code < 0:  # end as the child did, so that the parent's waitpid reports it
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        time.sleep(1)
    os._exit(code)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
