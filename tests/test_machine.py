"""What a run notes of its machine at each start: kept over starts, and nothing that names a host or a user."""

import getpass
import json
import socket
from pathlib import Path

from crisp.machine import MACHINE_FILE, note_start, read_starts


def test_starts_are_added(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == []
    note_start(tmp_path, step=0, ranks=1, nodes=1, device="cpu")
    note_start(tmp_path, step=40, ranks=4, nodes=2, device="cuda")
    first, second = read_starts(tmp_path)
    assert (first.step, first.ranks, first.nodes, first.device) == (0, 1, 1, "cpu")
    assert (second.step, second.ranks, second.nodes, second.device) == (40, 4, 2, "cuda")
    assert first.cores >= 1
    assert first.memory_gb > 0.1
    assert {"crisp", "Python", "torch"} <= set(first.versions)


def test_no_host_and_no_user(tmp_path: Path) -> None:
    note_start(tmp_path, step=0, ranks=1, nodes=1, device="cpu")
    text = (tmp_path / MACHINE_FILE).read_text()
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_a_file_that_cannot_be_read_is_no_reason_to_stop(tmp_path: Path) -> None:
    for text in ("", "[{}]", "[1]", '{"step": 0}', json.dumps([{"step": 0, "gpus": []}])):
        (tmp_path / MACHINE_FILE).write_text(text)
        assert read_starts(tmp_path) == []
    note_start(tmp_path, step=5, ranks=1, nodes=1, device="cpu")
    assert [start.step for start in read_starts(tmp_path)] == [5]
