"""Write constraints.txt: the exact versions, in this environment, of everything that pliant[all,dev] needs.

    .venv/bin/python .ci/freeze.py > constraints.txt

Local version labels (2.13.0+cpu) are dropped, so that any build of that version satisfies the line. A package
that needs a newer Python than Pliant does is only pinned there; older Pythons take the newest they can.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST = Version("3.10")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def ours(extra: str) -> list[Requirement]:
    """What `pliant[extra]` requires, extras of extras resolved."""
    listed = [Requirement(text) for text in PROJECT["optional-dependencies"][extra]]
    nested = [inner for r in listed if r.name == "pliant" for name in r.extras for inner in ours(name)]
    return [r for r in listed if r.name != "pliant"] + nested


def closure(requirements: list[Requirement]) -> set[str]:
    """Canonical names of the installed packages that these require, directly or not."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        try:
            texts = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        seen.add((name, wanted))
        for requirement in map(Requirement, texts):
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in wanted or {""}
            ):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen}


def line(name: str) -> str:
    """`numpy==2.4.6; python_version >= "3.11"`."""
    package = distribution(name)
    pin = f"{name}=={Version(package.version).public}"
    pythons = SpecifierSet(str(package.metadata.json.get("requires_python", "")))
    if OLDEST in pythons:
        return pin
    first = next(minor for minor in range(OLDEST.minor, 100) if Version(f"3.{minor}") in pythons)
    return f'{pin}; python_version >= "3.{first}"'


if __name__ == "__main__":
    print("# Versions the tests ran with; written by .ci/freeze.py. `make setup` installs exactly these.")
    for name in sorted(closure([*map(Requirement, PROJECT["dependencies"]), *ours("all"), *ours("dev")])):
        print(line(name))
