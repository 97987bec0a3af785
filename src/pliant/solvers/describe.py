"""Programs for people: a table with one line per instruction."""

from __future__ import annotations

from pliant.solvers.program import Eval, Instruction, Program, Terms


def _sum(terms: list[tuple[str, float]]) -> str:
    """`+0.5000 x1 -0.2500 m0`"""
    return " ".join(f"{c:+.4f} {name}" for name, c in terms) or "0"


def _named(letter: str, terms: Terms) -> list[tuple[str, float]]:
    return [(f"{letter}{i}", c) for i, c in terms]


def describe_instruction(op: Instruction) -> str:
    """One instruction as one line of algebra."""
    if isinstance(op, Eval):
        return f"m{op.out} = network(x{op.state})"
    terms = _named("x", op.x) + _named("m", op.m) + _named("z", op.z)
    if op.mu != 0.0:
        terms.append(("mu", op.mu))
    learned = f" +learned(m{op.learned.output}) z{op.learned.slot}" if op.learned is not None else ""
    return f"x{op.out} = {_sum(terms)}{learned}"


def describe_program(program: Program) -> str:
    """Header and table; t and half log-SNR are those of the node an instruction evaluates or arrives at."""
    name = program.path.get("name", "?")
    noises = f", {len(program.noise_slots)} noises" if program.noise_slots else ""
    width = max(12, *map(len, program.labels))
    lines = [
        f"{len(program.steps)} steps, {program.num_evaluations} network calls{noises}; path {name}, stores "
        f"{program.stored}, t {program.start.t:g} -> {program.end.t:g}, sample in x{program.final}",
        f"{'step':>4}  {'solver':<{width}}  {'t':>8}  {'log-SNR':>8}  instruction",
    ]
    for number, (label, step) in enumerate(zip(program.labels, program.steps, strict=True)):
        for place, op in enumerate(step):
            head = f"{number:>4}  {label:<{width}}" if place == 0 else " " * (6 + width)
            lines.append(f"{head}  {op.node.t:>8.5f}  {op.node.log_snr:>8.3f}  {describe_instruction(op)}")
    return "\n".join(lines)
