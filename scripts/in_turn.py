"""Processes that are measured in turn: each is stopped while another has the machine."""

import os
import signal
import subprocess
import sys


def start(script: str, child: str, given: list) -> subprocess.Popen:
    """`script --child=...` with the values of absl flags `given`; it answers lines with lines."""
    values = [f"--{flag.name}={flag.value}" for flag in given if flag.value is not None]
    return subprocess.Popen(
        [sys.executable, script, f"--child={child}", *values], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip


def ask(child: subprocess.Popen, line: str = "go") -> str:
    """The answer to a line; the child is stopped before and after."""
    child.send_signal(signal.SIGCONT)
    child.stdin.write(f"{line}\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    child.send_signal(signal.SIGSTOP)  # or it would read ahead while the others are measured
    if not answer:
        sys.exit(f"error: run it alone to see why it failed: {child.args}, and {line!r} on stdin")
    return answer
