"""Two processes share parameters, over loopback: checkpoints, and what reads values."""

import os
import pathlib
import socket

import preloaded

PROGRAM = pathlib.Path(__file__).with_name("one_of_two.py")


def test_two_processes_save_restore_and_prune_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    said = [tmp_path / f"said_{rank}.txt" for rank in range(2)]
    processes = [
        preloaded.start(
            PROGRAM,
            *(str(tmp_path / "run"), str(port), str(rank)),
            environment={"XLA_FLAGS": flags},
            output=output,
        )
        for rank, output in enumerate(said)
    ]
    for process, output in zip(processes, said, strict=True):
        assert preloaded.finish(process) == 0, output.read_text()
        assert "as saved" in output.read_text()
