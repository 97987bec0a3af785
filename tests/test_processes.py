"""How a process that works in a group ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What gloo's threads do to a process now and then, always: taking Python down aborts it.
FRAGILE = """
import atexit, os, sys, threading, time
import torch.distributed as dist
from pliant.processes import end_process, in_group

class Fragile:
    def __del__(self, abort=os.abort):
        abort()

def last_words():
    print("atexit")

def later():
    time.sleep(0.2)
    print("thread")

assert not in_group()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
assert in_group()
kept = Fragile()
atexit.register(last_words)
threading.Thread(target=later).start()
sys.stdout.write("unflushed\\n")
"""


def ended(tmp_path: Path, last_line: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", f"{FRAGILE}{last_line}\n", str(tmp_path / "store")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_in_a_group_ends_without_taking_python_down(tmp_path: Path, code: int) -> None:
    assert ended(tmp_path, f"end_process({code})") == (code, ["unflushed", "thread", "atexit"])


def test_without_it_the_same_process_aborts(tmp_path: Path) -> None:
    code, _ = ended(tmp_path, "dist.destroy_process_group()")
    assert code == -6


def test_alone_it_is_an_ordinary_exit() -> None:
    from pliant.processes import end_process

    with pytest.raises(SystemExit) as raised:
        end_process(2)
    assert raised.value.code == 2


def test_a_defect_in_a_group_keeps_its_traceback_and_ends_as_a_defect(tmp_path: Path) -> None:
    code = (
        "import sys, torch.distributed as dist, pliant.cli\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1)\n"
        "def main(): raise ZeroDivisionError('a defect')\n"
        "pliant.cli.program.__globals__['main'] = main\n"
        "pliant.cli.program()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: a defect")
