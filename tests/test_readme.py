"""The README's commands, run as a reader would type them.

A fenced block runs when the line before it says so (invisible on the rendered page):

    <!-- run -->               in one temporary folder shared by all blocks, in order
    <!-- run in repository --> in the repository's root

`bash` blocks stop at the first failing command; `python` blocks are one script. `pliant` and `python` are
those of the environment that runs the tests.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^<!-- run(?P<where> in repository)? -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
MARK = re.compile(r"^<!-- run", re.M)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    in_repository: bool
    line: int


def marked_blocks(text: str) -> list[Block]:
    """All blocks to run, in order. A mark that is not followed by a bash or python block is an error."""
    blocks = [
        Block(m["language"], m["code"], m["where"] is not None, text.count("\n", 0, m.start()) + 1)
        for m in BLOCK.finditer(text)
    ]
    lines = {block.line for block in blocks if block.language in ("bash", "python")}
    astray = [line for m in MARK.finditer(text) if (line := text.count("\n", 0, m.start()) + 1) not in lines]
    if astray:
        raise ValueError(f"README.md:{astray[0]}: a run mark belongs directly above a bash or python block")
    return blocks


def run(block: Block, folder: Path) -> None:
    """Run one block; raises with its output when it fails."""
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = time.monotonic()
    done = subprocess.run(
        [*command, block.code],
        cwd=ROOT if block.in_repository else folder,
        env={**os.environ, "PATH": programs},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        where = f"README.md:{block.line} exits with {done.returncode}"
        raise RuntimeError(f"{where}:\n{block.code}\n--- output\n{done.stdout[-3000:]}")
    print(f"README.md:{block.line} {time.monotonic() - start:.1f} s")


@pytest.mark.slow
def test_readme_commands(tmp_path: Path) -> None:
    blocks = marked_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks, "README.md has no block marked <!-- run -->"
    for block in blocks:
        run(block, tmp_path)


def test_readme_marks_are_well_formed() -> None:
    marked_blocks((ROOT / "README.md").read_text(encoding="utf-8"))


EXAMPLE = """
<!-- run -->
```bash
echo 1 > file
cat missing | cat
```

```bash
not run
```
<!-- run -->
```python
print(open("file").read())
```
<!-- run in repository -->
```bash
test -f pyproject.toml
```
"""


def test_blocks_are_found_in_order_with_their_place() -> None:
    blocks = marked_blocks(EXAMPLE)
    assert [(b.language, b.line, b.in_repository) for b in blocks] == [
        ("bash", 2, False),
        ("python", 11, False),
        ("bash", 15, True),
    ]


def test_blocks_share_a_folder_and_failures_are_seen(tmp_path: Path) -> None:
    first, second, third = marked_blocks(EXAMPLE)
    with pytest.raises(RuntimeError, match="missing"):
        run(first, tmp_path)
    run(second, tmp_path)
    run(third, tmp_path)


def test_a_mark_without_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README\.md:1:"):
        marked_blocks("<!-- run -->\n\n```bash\ntrue\n```\n")
