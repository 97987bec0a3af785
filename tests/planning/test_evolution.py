"""The evolutionary engine: it finds what was planted, repeats itself, and survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from pliant.errors import PlanError
from pliant.planning.evolution import Genes, Rules, evolve
from pliant.planning.genes import Categorical, Integer, Listed, Real, Record, Steps
from pliant.planning.journal import Journal
from pliant.planning.objective import Score

PLANTED = {"solver": "c", "steps": 7, "shift": 2.5, "patch": [1, 1, 0, 0, 0, 1]}
SPACE = Genes(
    Record(
        {
            "solver": Categorical("abcdef"),
            "steps": Integer(1, 20, 3),
            "shift": Real(0.1, 10.0, log=True),
            "patch": Listed(Categorical([0, 1]), 6),
        }
    )
)


def score(value: float) -> Score:
    return Score(value, value, value)


def distance(genome: dict) -> Score:
    """0 at the planted candidate; 5.8 on average over the space (6 * 20 * 64 discrete choices)."""
    wrong = sum(a != b for a, b in zip(genome["patch"], PLANTED["patch"], strict=True))
    off = abs(genome["steps"] - 7) / 4 + abs(genome["shift"] - 2.5) / 2.5
    return score((genome["solver"] != "c") + wrong / 2 + off)


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_best_is_found_within_400_evaluations(seed):
    found = evolve(SPACE, distance, 400, seed=seed)
    best = found.best.candidate
    discrete = {k: best[k] for k in ("solver", "steps", "patch")}
    assert discrete == {k: PLANTED[k] for k in discrete}
    assert abs(best["shift"] - 2.5) < 0.25
    assert len(found.history) == 400


def test_it_beats_random_search_at_the_same_number_of_evaluations():
    rng = Random(1)
    random = min(distance(SPACE.sample(rng)).value for _ in range(400))
    assert evolve(SPACE, distance, 400, seed=1).best.value < 0.3 * random


def test_the_seed_decides_everything():
    a, b = (evolve(SPACE, distance, 60, seed=3) for _ in range(2))
    assert a.history == b.history
    assert evolve(SPACE, distance, 60, seed=4).history != a.history


def test_no_candidate_is_measured_twice_and_none_breaks_the_constraint():
    asked = []

    def measure(genome):
        asked.append(json.dumps(genome))
        return distance(genome)

    def cheap(genome, rng):
        return genome if genome["steps"] <= 5 else {**genome, "steps": rng.randint(1, 5)}

    found = evolve(Genes(SPACE.gene, cheap), measure, 120, initial=[PLANTED])
    assert len(set(asked)) == len(asked) == 120
    assert all(e.candidate["steps"] <= 5 for e in found.history)


def test_a_predictor_spares_measurements():
    """With the true order as the predictor the planted choice needs fewer evaluations."""

    def needed(screen):
        history = evolve(SPACE, distance, 300, seed=0, screen=screen).history
        return next((i for i, e in enumerate(history) if e.value < 0.6), 300)

    oracle = needed(lambda history, rng: lambda genome: distance(genome).value)
    liar = needed(lambda history, rng: lambda genome: -distance(genome).value)
    assert oracle < needed(None) < liar


def test_candidates_that_cannot_run_are_skipped_not_fatal():
    def picky(genome):
        if genome["solver"] == "c":
            raise PlanError("no")
        return distance(genome)

    found = evolve(SPACE, picky, 80)
    assert found.best.candidate["solver"] != "c"
    assert any(e.score is None for e in found.history)


def test_the_clock_stops_it_and_the_journal_remembers_the_time(tmp_path):
    ticks = iter(range(10_000))
    clock = lambda: float(next(ticks))  # noqa: E731 (every measurement takes one second)
    file = tmp_path / "journal.jsonl"
    first = evolve(SPACE, distance, 400, seconds=25.0, journal=Journal(file), clock=clock)
    assert first.stopped == "time" and len(first.history) == 25 and first.seconds == 25.0
    totals = []
    evolve(SPACE, distance, 400, seconds=25.0, clock=clock, progress=lambda done, total, text: totals.append(total))
    assert totals == [25] * 25, "progress is of what the clock allows"
    refuse = lambda genome: pytest.fail("measured again")  # noqa: E731
    again = evolve(SPACE, refuse, 400, seconds=25.0, journal=Journal(file), clock=clock)
    assert again.history == first.history
    longer = evolve(SPACE, distance, 400, seconds=30.0, journal=Journal(file), clock=clock)
    assert len(longer.history) == 30 and longer.history[:25] == first.history


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}]
from test_evolution import SPACE, distance
from pliant.planning.evolution import evolve
from pliant.planning.journal import Journal

def slow(genome):
    time.sleep(0.01)
    return distance(genome)

evolve(SPACE, slow, 150, seed=5, journal=Journal({file!r}, {{"seed": 5}}))
"""


def test_killed_in_the_middle_it_ends_where_an_undisturbed_search_ends(tmp_path):
    file = tmp_path / "search.jsonl"
    code = SCRIPT.format(tests=str(Path(__file__).parent), file=str(file))
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not file.exists() or file.read_bytes().count(b"\n") < 40):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_bytes().count(b"\n") - 1
    assert 39 <= kept < 150
    with file.open("ab") as stream:  # a line that the kill cut off
        stream.write(b'{"candidate": {"solver"')
    measured = []

    def measure(genome):
        measured.append(genome)
        return distance(genome)

    resumed = evolve(SPACE, measure, 150, seed=5, journal=Journal(file, {"seed": 5}))
    whole = evolve(SPACE, distance, 150, seed=5)
    assert resumed.history == whole.history
    assert len(measured) == 150 - kept
    assert len(Journal(file, {"seed": 5}).entries) == 150


def test_a_journal_of_another_search_is_refused(tmp_path):
    file = tmp_path / "search.jsonl"
    Journal(file, {"seed": 1, "budget": "10%"}).close()
    with pytest.raises(PlanError, match="differs in seed"):
        Journal(file, {"seed": 2, "budget": "10%"})
    other = tmp_path / "notes.txt"
    other.write_text("hello\n")
    with pytest.raises(PlanError, match="not a search journal"):
        Journal(other, {})
    assert other.read_text() == "hello\n"
    other.write_text("hello without an end")
    with pytest.raises(PlanError, match="not a search journal"):
        Journal(other, {})
    assert other.read_text() == "hello without an end"


def test_nonsense_is_refused():
    with pytest.raises(PlanError, match="at least one evaluation"):
        evolve(SPACE, distance, 0)
    with pytest.raises(PlanError, match="some time"):
        evolve(SPACE, distance, 5, seconds=0.0)
    with pytest.raises(PlanError, match="keeps its constraints"):
        evolve(Genes(SPACE.gene, lambda g, rng: None), distance, 5)
    with pytest.raises(PlanError, match="could be run"):
        _ = evolve(SPACE, lambda g: score(float("nan")), 5).best


def test_a_small_space_is_exhausted():
    found = evolve(Genes(Record({"solver": Categorical("abc")})), lambda g: score(ord(g["solver"])), 50)
    assert found.stopped == "exhausted" and len(found.history) == 3
    assert found.best.candidate == {"solver": "a"}


# Genes ------------------------------------------------------------------------------------------------------------


def test_genes_stay_in_range():
    rng = Random(0)
    integer, real = Integer(2, 9, 4), Real(0.5, 2.0, 0.5, log=True)
    for _ in range(300):
        a, b = integer.sample(rng), integer.sample(rng)
        assert 2 <= integer.mutate(a, rng) <= 9 and min(a, b) <= integer.cross(a, b, rng) <= max(a, b)
        x, y = real.sample(rng), real.sample(rng)
        assert 0.5 <= real.mutate(x, rng) <= 2.0
        assert min(x, y) - 1e-12 <= real.cross(x, y, rng) <= max(x, y) + 1e-12


def test_steps_keep_falling_times_and_their_genes():
    gene = Steps(Record({"order": Integer(1, 4)}), 3, 8)
    rng = Random(2)
    value, other = gene.sample(rng), gene.sample(rng)
    lengths = set()
    for _ in range(300):
        value, other = gene.mutate(value, rng), gene.cross(value, other, rng)
        for rows in (value, other):
            times = [row["t"] for row in rows]
            assert times[0] == 1.0 and times[-1] > 0.0
            assert all(a - b >= 1e-3 - 1e-12 for a, b in pairwise(times))
            assert 3 <= len(rows) <= 8
        lengths.add(len(value))
    assert len(lengths) > 3


def test_crossing_steps_takes_rows_of_the_parents():
    gene = Steps(Record({"order": Categorical([1, 2])}), 2, 9)
    a = [{"t": t, "order": 1} for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
    b = [{"t": t, "order": 2} for t in (1.0, 0.7, 0.5, 0.3)]
    rng = Random(3)
    mixed = 0
    for _ in range(50):
        child = gene.cross(a, b, rng)
        assert all(row in a or row in b for row in child)
        mixed += len({row["order"] for row in child}) == 2
    assert mixed > 20


def test_rules_are_a_value():
    assert Rules(population=4) == Rules(population=4)
