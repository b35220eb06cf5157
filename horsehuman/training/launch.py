"""Several processes on one machine: started, watched and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

#: Exit code of a process that could not go on because another one had ended.
PEER_GONE = 75  # EX_TEMPFAIL of sysexits.h

#: Seconds that processes have to end by themselves.
GRACE = 10.0


def launch(command: Sequence[str], count: int, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command ``count`` times at once, as ``torchrun`` does, and wait for all of them.

    When one fails, or is killed, the others are killed; where it has only missed another, or was
    interrupted, they have :data:`GRACE` seconds to say so. When this process is killed, they end,
    too. SIGTERM is passed on as SIGINT: Lightning's own handler of SIGTERM waits for all processes.

    Args:
        command: What to run.
        count: How often.
        environment: What to add to this process's.

    Returns:
        The exit code, and what to say where no process has said it: how one was killed.
    """
    here = {
        **os.environ,
        **environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
    }
    here.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    processes = [
        subprocess.Popen(
            command,
            env={**here, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,  # its end is that of this process: see end_with_parent
        )
        for rank in range(count)
    ]
    with _passed_on(processes) as signals:
        failed = _wait(processes, signals)
    for process in processes:
        assert process.stdin
        process.stdin.close()
    if signals:
        return 128 + signals[0], ""
    causes = [rank for rank, code in failed.items() if code != PEER_GONE]
    if not causes:
        return (1 if failed else 0), ""
    code = failed[causes[0]]
    said = "" if code > 0 else f"process {causes[0] + 1} of {count} was killed by signal {-code}"
    return max(code, 1), said


def _wait(processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> dict[int, int]:
    """Exit codes of those that failed, by rank and in time's order; ends the others."""
    failed: dict[int, int] = {}
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code and rank not in failed:
                failed[rank] = code
                patience = GRACE if code == PEER_GONE or code > 128 else 0
                deadline = min(deadline, time.monotonic() + patience)
        if signals:
            deadline = min(deadline, time.monotonic() + GRACE)
        if None not in codes or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return failed


@contextlib.contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass signals on meanwhile; yields the list of those that came."""
    came: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """End this process when the one that launched it is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(PEER_GONE)

    threading.Thread(target=watch, daemon=True).start()


def free_port() -> int:
    """A port of this machine's own address that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
