"""Do the solver tests notice a wrong coefficient? Change one number or sign at a time and run them.

    python scripts/mutate_solvers.py                          every change, in every file that makes coefficients
    python scripts/mutate_solvers.py fits.py unipc.py         some files
    python scripts/mutate_solvers.py --every 5 --seconds 900  a fifth of the changes, at most a quarter of an hour
    python scripts/mutate_solvers.py unipc.py --line 55       one line of one file

Changes: + and - swapped, * and / swapped, a minus removed, a number times 1.001 (or a whole number plus 1), an index
shifted, a product times 1.001. A change that no test notices is a survivor and is printed with its line; the exit code
is 1 if there are any. Lines that steer without being coefficients (tolerances, limits, messages) are not changed: see
`NOT_COEFFICIENTS`. Tests run in forked processes that have torch loaded, the quick ones first.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "src" / "pliant" / "solvers"
FILES = ("fits.py", "coefficients.py", "builder.py", "exponential.py", "singlestep.py", "unipc.py", "pndm.py",
         "runge_kutta.py", "churn.py", "usf.py", "ancestral.py", "sde.py", "adaptive.py")  # fmt: skip
# Quick and sharp first; the others only see what these let through.
STAGES = (
    ["tests/solvers/test_coefficients.py", "-k", "not third_order and not second"],
    [
        "tests/solvers/test_catalogue.py",
        "-k",
        "by_hand or formulas or named_solvers or is_ or agree or lower or allocation",
    ],
    ["tests/solvers/test_catalogue.py", "tests/solvers/test_stochastic.py"],
    ["tests/solvers/test_parity_diffusers.py", "tests/solvers/test_program.py", "-k", "not thousand"],
    ["tests/solvers/test_orders.py"],
    ["tests/solvers/test_identities.py", "tests/solvers/test_coefficients.py", "tests/plans/test_compensation.py"],
)
# Patterns of lines whose numbers are not coefficients, each with its reason.
NOT_COEFFICIENTS = {
    r"raise |Error\(|^\s*f?\"(?![\w-]+\": )|match=": "messages (but not entries of a table)",
    r"1e-18|abs\(z\) [<>] 0\.5|abs\(z\) < 0\.5 \+ k": "where a series takes over: both are right there",
    r"_MAX_NODES|MAX_ORDER|_HISTORY|del self\.history|check_order\(": "limits",
    r"1e-6 \* abs|length = |1e-9|1e-12|10\*\*9|max_steps|1e-3": "tolerances",
    r"convergence|evaluations_per_step|return \d$|min\(self\.order, 2\)": "what a solver says of itself",
    r"next\(\(w for w in u": "a stand-in for steps without an inner node, never used",
}


BROKEN = 98


class Change(ast.NodeTransformer):
    """Walks a tree in a fixed order and applies the change with one number; counts them all if `target` is -1."""

    def __init__(self, target: int, skipped: set[int]) -> None:
        self.target, self.skipped = target, skipped
        self.count = 0
        self.what = ""
        self.line = 0

    def _mine(self, node: ast.AST, what: str) -> bool:
        if node.lineno in self.skipped:  # type: ignore[attr-defined]
            return False
        self.count += 1
        if self.count - 1 != self.target:
            return False
        self.what, self.line = what, node.lineno  # type: ignore[attr-defined]
        return True

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        return node  # conditions steer; what they choose between is changed

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right)):
            return node
        swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
        swap = swaps.get(type(node.op))
        if swap is not None and not self._sequence(node) and self._mine(node, "operator swapped"):
            node.op = swap()
        elif type(node.op) in (ast.Mult, ast.Div) and not self._sequence(node) and self._mine(node, "times 1.001"):
            return ast.BinOp(node, ast.Mult(), ast.Constant(1.001))
        return node

    @staticmethod
    def _sequence(node: ast.BinOp) -> bool:
        return any(isinstance(side, (ast.List, ast.Tuple, ast.ListComp)) for side in (node.left, node.right))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.USub) and self._mine(node, "minus removed"):
            return node.operand
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return node
        if self._mine(node, "number changed"):
            return ast.Constant(value + 1 if isinstance(value, int) else value * 1.001 if value else 1e-3)
        return node


def skipped_lines(source: str) -> set[int]:
    return {n for n, text in enumerate(source.splitlines(), 1) if any(re.search(p, text) for p in NOT_COEFFICIENTS)}


def changes(file: str) -> Iterator[tuple[int, str, int, str]]:
    """(number, what, line, mutated source) of every change to a file."""
    source = (FOLDER / file).read_text()
    tree, skipped = ast.parse(source), skipped_lines(source)
    counter = Change(-1, skipped)
    counter.visit(copy.deepcopy(tree))
    for k in range(counter.count):
        change = Change(k, skipped)
        mutated = ast.fix_missing_locations(change.visit(copy.deepcopy(tree)))
        yield k, change.what, change.line, ast.unparse(mutated)


class Replaced(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module of the solvers from a given source."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def get_filename(self, fullname: str) -> str:
        return f"<changed {fullname}>"

    def get_data(self, path: str | bytes) -> bytes:
        return self.source.encode()


def run_tests(file: str, source: str | None) -> int:
    """In a fork: the stage whose tests failed (1..), or 0 if all passed. Never returns."""
    import pytest

    if source is not None:
        sys.meta_path.insert(0, Replaced(f"pliant.solvers.{file.removesuffix('.py')}", source))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for number, arguments in enumerate(STAGES, start=1):
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
        result = int(pytest.main([*options, *arguments]))
        if result != 0:  # 1: a test failed; 2: it does not even import; more: pytest could not run
            os._exit(number if result in (1, 2) else BROKEN)
    os._exit(0)


def fork(file: str, source: str | None, limit: int) -> int:
    pid = os.fork()
    if pid == 0:
        # Processor time, not the clock: on a busy machine a survivor, which runs every test, must not look like a loop.
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        try:
            run_tests(file, source)
        finally:
            os._exit(99)
    return pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--every", type=int, default=1, help="only every n-th change")
    parser.add_argument("--offset", type=int, default=0, help="with --every: where to begin")
    parser.add_argument("--line", type=int, action="append", default=[], help="only changes on this line; repeatable")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop starting new ones after this long")
    parser.add_argument("--limit", type=int, default=600, help="processor seconds after which a run is given up")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src")]
    preload()

    todo = [
        (f, *change) for f in options.files for change in changes(f) if change[2] in options.line or not options.line
    ]
    todo = todo[options.offset :: options.every]
    print(f"{len(todo)} changes", flush=True)
    begin, survivors, done = time.monotonic(), list[tuple[str, int, str]](), 0
    running: dict[int, tuple[str, int, str, int, str]] = {}
    stages = [0] * (len(STAGES) + 1)

    def collect() -> None:
        nonlocal done
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                break
            time.sleep(0.05)
        file, _, what, line, _ = running.pop(pid)
        done += 1
        code = os.waitstatus_to_exitcode(status)
        text = (FOLDER / file).read_text().splitlines()[line - 1].strip()
        if code == 0:
            survivors.append((file, line, what))
            print(f"SURVIVOR {file}:{line} {what}: {text}", flush=True)
        elif code == BROKEN:
            raise SystemExit("pytest could not run the tests (was a file moved?); results would be worthless")
        elif 0 < code < len(stages):
            stages[code] += 1
        else:
            stages[0] += 1
            print(f"GIVEN UP {file}:{line} {what}: {text}", flush=True)  # an endless loop, most likely: look at it
        if done % 25 == 0:
            print(f"{done}/{len(todo)} after {time.monotonic() - begin:.0f} s, {len(survivors)} survive", flush=True)

    for item in todo:
        if time.monotonic() - begin > options.seconds:
            break
        running[fork(item[0], item[4], options.limit)] = item
        if len(running) >= options.jobs:
            collect()
    while running:
        collect()
    print(f"{done} of {len(todo)} changes tried in {time.monotonic() - begin:.0f} s; noticed by stage {stages[1:]}, "
          f"given up {stages[0]}; {len(survivors)} survive")  # fmt: skip
    return 1 if survivors else 0


def preload() -> None:
    """What every fork would import: everything but Pliant."""
    import pytest  # noqa: F401
    import scipy.integrate  # noqa: F401
    import torch

    torch.set_num_threads(1)
    try:
        import diffusers
        import torchdiffeq  # noqa: F401

        for name in ("DDIM", "DDPM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
                     "PNDM", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "EulerAncestralDiscrete", "KDPM2Discrete",
                     "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"):  # fmt: skip
            getattr(diffusers, f"{name}Scheduler")
    except ImportError:
        pass


if __name__ == "__main__":
    raise SystemExit(main())
