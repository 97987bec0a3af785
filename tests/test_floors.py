"""The architecture as a test: imports point downward, and importing Pliant stays cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "pliant"

FLOORS = (
    {"allocator", "errors", "files", "imaging", "mappings", "pictures", "processes"},
    {"paths", "compute"},
    {"solvers", "models"},
    {"adapters", "formats", "denoiser", "guidance"},
    {"plans"},
    {"planning", "training", "distillation", "steering", "evaluation", "quantization"},
    {"tasks", "integrations"},
    # "" is the facade, `pliant/__init__.py`: only the top may use Pliant through it.
    {"serving", "cli", "__main__", ""},
)
LEVEL = {unit: level for level, units in enumerate(FLOORS) for unit in units}

HEAVY = (
    "accelerate",
    "datasets",
    "diffusers",
    "matplotlib",
    "pandas",
    "peft",
    "scipy",
    "sklearn",
    "transformers",
)


def unit_of(file: Path, package: Path = PACKAGE) -> str:
    """The part of Pliant a file belongs to: `paths/times.py` -> "paths", `errors.py` -> "errors"."""
    parts = file.relative_to(package).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(source: str, module: str, units: set[str]) -> Iterator[tuple[int, str]]:
    """(line, unit of Pliant) of every import in a source, wherever it stands. `module`: its package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "pliant" else [base]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first != "pliant" or (rest and rest[0].startswith("__")):
                continue
            yield node.lineno, rest[0] if rest and rest[0] in units else ""


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def known_units() -> set[str]:
    return {unit_of(file) for file in source_files()} | LEVEL.keys()


@pytest.mark.parametrize("unit", sorted({unit_of(file) for file in source_files()}))
def test_imports_point_downward(unit: str) -> None:
    assert unit in LEVEL, f"pliant.{unit} has no floor yet: add it to FLOORS (and to CONTRIBUTING.md)"
    if unit == "":
        return
    wrong = []
    for file in source_files():
        if unit_of(file) != unit:
            continue
        module = ".".join(["pliant", *file.relative_to(PACKAGE).parent.parts])
        for line, target in imports(file.read_text(encoding="utf-8"), module, known_units()):
            if LEVEL.get(target, len(FLOORS)) > LEVEL[unit]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports pliant.{target}".rstrip("."))
    assert not wrong, "imports that point upward:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pliant.cli", ["cli"]),
        ("def f():\n    from pliant.plans.plan import Plan", ["plans"]),
        ("from pliant import cli, load", ["cli", ""]),
        ("from pliant import __version__", []),
        ("import pliant", [""]),
        ("from . import program", ["solvers"]),
        ("from ..plans import plan", ["plans"]),
        ("from .. import plans", ["plans"]),
        ("import torch, pliantly", []),
    ],
)
def test_the_test_sees_every_form_of_import(source: str, found: list[str]) -> None:
    units = {"cli", "plans", "solvers", ""}
    assert [unit for _, unit in imports(source, "pliant.solvers", units)] == found


def test_every_folder_with_code_is_a_package() -> None:
    """Wheels leave out folders without __init__.py."""
    packages = {file.parent for file in PACKAGE.rglob("__init__.py")}
    missing = {str(file.parent.relative_to(ROOT)) for file in source_files() if file.parent not in packages}
    assert not missing


def test_importing_pliant_is_cheap() -> None:
    code = f"import sys, pliant; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == [], "import pliant brings these; import them where they are used"


def test_no_module_hides_a_public_name() -> None:
    """Importing `pliant.x` sets the attribute x of the package: a public function of that name would be lost."""
    import pliant

    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not modules & set(pliant.__all__)


def test_no_torchvision() -> None:
    folders = ("src", "tests", "scripts", "benchmarks", "examples", "gpu")
    users = []
    for file in (file for name in folders for file in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            if any(name.split(".")[0] == "torchvision" for name in names):
                users.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not users
