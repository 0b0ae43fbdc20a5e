"""Two processes share parameters, over loopback: checkpoints, and what reads values."""

import os
import pathlib
import socket
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).with_name("one_of_two.py")


def test_two_processes_save_restore_and_prune_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    env = os.environ | {"XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(tmp_path / "run"), str(port), str(rank)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
        assert "as saved" in text
