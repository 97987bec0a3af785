"""Plans that were found in advance for models inside the package, with the evidence that came with them."""

from __future__ import annotations

import json
from pathlib import Path as FilePath

from pliant.denoiser import Denoiser
from pliant.planning.result import PlanResult
from pliant.planning.task import Task

ASSETS = FilePath(__file__).resolve().parents[1] / "assets"
GUIDANCE_SLACK = 1e-6
LEAST_SPENT = 0.5
"""Of the budget: a stored plan that spends less was made for a smaller one, and the closed form may be better."""


def ready_results(model: Denoiser) -> list[PlanResult]:
    """Every stored result whose plan this model can be shown to run; none for models from elsewhere."""
    name = str(model.metadata.get("name", ""))
    folder = ASSETS / name / "plans"
    if not name or not folder.is_dir():
        return []
    found = [PlanResult.from_dict(json.loads(f.read_text(encoding="utf-8"))) for f in sorted(folder.glob("*.json"))]
    return [r for r in found if r.single.model.get("fingerprint") == model.fingerprint() and runs(r, model)]


def runs(result: PlanResult, model: Denoiser) -> bool:
    """Relatives of a shipped model may lack a patch size that it has."""
    from pliant.errors import PliantError

    try:
        result.plan.check(model)
    except PliantError:
        return False
    return True


def ready(task: Task) -> PlanResult | None:
    """The stored result for this guidance that is the best within the budget; None if there is none."""
    asked = 1.0 if task.guidance is None else task.guidance
    fitting = []
    for result in ready_results(task.model):
        made_for = result.settings.get("guidance")
        same = abs((1.0 if made_for is None else float(made_for)) - asked) < GUIDANCE_SLACK
        spent = task.budget.spent(result.plan, task.model) if same else 0.0
        if result.quality is not None and LEAST_SPENT * task.limit <= spent <= task.limit:
            fitting.append(result)
    return min(fitting, key=lambda r: r.quality.value if r.quality else 0.0) if fitting else None
