"""Solvers by name. A new solver is a class, or just one line here: a class with options.

Defects of other libraries (sheet D, section 1; diffusers 0.42.1) and what becomes of them here:

- DPM-Solver 3M lacks half of its quadratic term and is second order: `dpm-3m-published`, `dpmpp-3m-published`
  (`mrs-3` inherits it); `dpm-3m` and `dpmpp-3m` have the full term.
- sde-dpmsolver++ of order 3 also has a wrong sign: `sde-dpmpp-3m-diffusers`, for bit-compatibility only.
- UniPC with bh1 is NaN at sigma = 0: the limit is taken. Its `vary_coeff` corrector has an index slip: not offered.
- PNDM converts a combination of v-predictions at the current state: each is converted at its own state here.
- Karras grids with final sigma "sigma_min" repeat the last sigma and pay for a call that does nothing: a grid that
  repeats a time is refused.
- EDM churn in EulerDiscrete evaluates before the noise is raised: `edm-churn` follows the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, TypeAlias

from pliant.errors import PlanError, suggest
from pliant.solvers.ancestral import DDPM, FullNoise
from pliant.solvers.churn import Churn
from pliant.solvers.exponential import DDIM, Multistep
from pliant.solvers.jump import Jump
from pliant.solvers.pndm import PNDM
from pliant.solvers.predict_correct import PredictCorrect
from pliant.solvers.renoise import Renoise
from pliant.solvers.rows import Rows
from pliant.solvers.runge_kutta import RungeKutta
from pliant.solvers.sde import SiTSDE
from pliant.solvers.singlestep import GridSinglestep, Singlestep
from pliant.solvers.solver import Solver
from pliant.solvers.unipc import DCSolver, UniPC
from pliant.solvers.usf import USF


@dataclass(frozen=True)
class Entry:
    """A name: the class, the options it stands for, and the paper. alias: another name for the same thing.

    compat: reproduces a known defect of another library; never what one wants otherwise.
    """

    solver: type[Solver]
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    alias: bool = False
    compat: bool = False

    def __call__(self, **options: Any) -> Solver:
        return self.solver(**{**self.options, **options})

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the options, in order."""
        return tuple(f.name for f in fields(self.solver))  # type: ignore[arg-type]


def _multi(source: str, order: int, form: str, fit: str, tau: float = 0.0, **flags: bool) -> Entry:
    return Entry(Multistep, source, {"order": order, "form": form, "fit": fit, "tau": tau}, **flags)


def _single(cls: type[Solver], source: str, order: int, form: str) -> Entry:
    return Entry(cls, source, {"order": order, "form": form})


def _rk(source: str, method: str, form: str = "velocity", **flags: bool) -> Entry:
    return Entry(RungeKutta, source, {"method": method, "form": form}, **flags)


_DPM, _DPMPP, _UNIPC, _EDM = "arXiv 2206.00927", "arXiv 2211.01095", "arXiv 2302.04867", "arXiv 2206.00364"
_PNDM, _DEIS, _MRS, _USF = "arXiv 2202.09778", "arXiv 2204.13902", "arXiv 2502.07856", "arXiv 2312.07243"
_BOOK = "Hairer, Norsett, Wanner: Solving ODEs I"

SOLVERS: dict[str, Entry] = {
    # First order.
    "ddim": Entry(DDIM, "arXiv 2010.02502"),
    "ddpm": Entry(DDPM, "arXiv 2006.11239"),
    "euler-ancestral": Entry(DDIM, "k-diffusion", {"eta": 1.0}, alias=True),
    "flow-stochastic": Entry(FullNoise, "diffusers FlowMatchEuler(stochastic_sampling)"),
    "jump": Entry(Jump, "arXiv 2310.02279"),
    "pec": Entry(PredictCorrect, "arXiv 2409.18128", {"reuse": True}),
    "pece": Entry(PredictCorrect, "arXiv 2409.18128", {"reuse": False}),
    "renoise": Entry(Renoise, "arXiv 2405.20320"),
    "sit-sde": Entry(SiTSDE, "arXiv 2401.08740"),
    # Multistep: exponential integrators in log-SNR.
    "multistep": Entry(Multistep, _DPMPP),
    "dpm-2m": _multi(_DPM, 2, "epsilon", "midpoint"),
    "dpm-3m": _multi(_DPM, 3, "epsilon", "lagrange"),
    "dpmpp-2m": Entry(Multistep, _DPMPP, {"order": 2, "form": "sample", "tau": 0.0}),
    "dpmpp-3m": _multi(_DPMPP, 3, "sample", "lagrange"),
    "dpm-3m-published": _multi(_DPM, 3, "epsilon", "published3"),
    "dpmpp-3m-published": _multi(_DPMPP, 3, "sample", "published3"),
    "sde-dpmpp-2m": _multi(_DPMPP, 2, "sample", "midpoint", 1.0),
    "sde-dpmpp-3m": _multi(_DPMPP, 3, "sample", "lagrange", 1.0),
    "sde-dpm-2m": _multi(_DPM, 2, "epsilon", "midpoint", 1.0),
    "sde-dpmpp-3m-diffusers": _multi(
        "diffusers 0.42.1, with its sign", 3, "sample", "diffusers-sde3", 1.0, compat=True
    ),
    "deis-2": _multi(_DEIS, 2, "epsilon", "lagrange"),
    "deis-3": _multi(_DEIS, 3, "epsilon", "lagrange", alias=True),
    "deis-4": _multi(_DEIS, 4, "epsilon", "lagrange"),
    "mrs-1": _multi(_MRS, 1, "sample", "mr-sampler"),
    "mrs-2": _multi(_MRS, 2, "sample", "mr-sampler"),
    "mrs-3": _multi(_MRS, 3, "sample", "mr-sampler"),
    "mrs-eps-2": _multi(_MRS, 2, "epsilon", "mr-sampler"),
    "mrs-eps-3": _multi(_MRS, 3, "epsilon", "mr-sampler"),
    "mrs-sde-1": _multi(_MRS, 1, "sample", "mr-sampler", 1.0),
    "mrs-sde-2": _multi(_MRS, 2, "sample", "mr-sampler", 1.0),
    "mrs-eps-sde-1": _multi(_MRS, 1, "epsilon", "mr-sampler", 1.0),
    "mrs-eps-sde-2": _multi(_MRS, 2, "epsilon", "mr-sampler", 1.0),
    # Multistep: Adams-Bashforth in EDM's sigma, in t, in the angle.
    "deis-rho-ab-2": _multi(_DEIS, 2, "epsilon-rho", "lagrange"),
    "deis-rho-ab-3": _multi(_DEIS, 3, "epsilon-rho", "lagrange"),
    "lms-4": _multi("k-diffusion", 4, "epsilon-rho", "lagrange"),
    "flow-ab-2": _multi(_BOOK, 2, "velocity", "lagrange"),
    "flow-ab-3": _multi(_BOOK, 3, "velocity", "lagrange"),
    "angle-ab-2": _multi("arXiv 2202.00512", 2, "angle", "lagrange"),
    # Singlestep.
    "singlestep": Entry(Singlestep, _DPMPP),
    "dpm-2s": _single(Singlestep, _DPM, 2, "epsilon"),
    "dpm-3s": _single(Singlestep, _DPM, 3, "epsilon"),
    "dpmpp-2s": _single(Singlestep, _DPMPP, 2, "sample"),
    "dpmpp-3s": _single(Singlestep, _DPMPP, 3, "sample"),
    "kdpm2": Entry(Singlestep, "k-diffusion", {"order": 2, "form": "epsilon", "fit": "midpoint"}, alias=True),
    "grid-singlestep": Entry(GridSinglestep, _DPMPP),
    "dpm-2s-grid": _single(GridSinglestep, _DPM, 2, "epsilon"),
    "dpm-3s-grid": _single(GridSinglestep, _DPM, 3, "epsilon"),
    "dpmpp-2s-grid": _single(GridSinglestep, _DPMPP, 2, "sample"),
    "dpmpp-3s-grid": _single(GridSinglestep, _DPMPP, 3, "sample"),
    # Predictor and corrector.
    "unipc": Entry(UniPC, _UNIPC),
    "unipc-1": _single(UniPC, _UNIPC, 1, "sample"),
    "unipc-2": _single(UniPC, _UNIPC, 2, "sample"),
    "unipc-3": _single(UniPC, _UNIPC, 3, "sample"),
    "unipc-eps-2": _single(UniPC, _UNIPC, 2, "epsilon"),
    "unipc-eps-3": _single(UniPC, _UNIPC, 3, "epsilon"),
    "dc-solver": Entry(DCSolver, "arXiv 2409.03755"),
    "usf": Entry(USF, _USF),
    # PNDM.
    "pndm": Entry(PNDM, _PNDM),
    "plms": Entry(PNDM, _PNDM, {"order": 4, "warmup": "plms"}),
    "f-pndm": Entry(PNDM, _PNDM, {"order": 4, "warmup": "prk"}),
    "s-pndm": Entry(PNDM, _PNDM, {"order": 2, "warmup": "plms"}),
    # Runge-Kutta in t, and in EDM's sigma.
    "runge-kutta": Entry(RungeKutta, _BOOK),
    "euler": _rk(_BOOK, "euler"),
    "midpoint": _rk(_BOOK, "midpoint"),
    "rf-solver": _rk("arXiv 2411.04746", "midpoint", alias=True),
    "heun": _rk(_BOOK, "heun"),
    "ralston": _rk(_BOOK, "ralston"),
    "kutta-3": _rk(_BOOK, "kutta-3"),
    "heun-3": _rk(_BOOK, "heun-3"),
    "ssprk-3": _rk(_BOOK, "ssprk-3"),
    "bogacki-shampine-3": _rk(_BOOK, "bogacki-shampine-3"),
    "rk4": _rk(_BOOK, "rk4"),
    "rk-38": _rk(_BOOK, "rk-38"),
    "dormand-prince-5": _rk(_BOOK, "dormand-prince-5"),
    "euler-edm": _rk(_EDM, "euler", "epsilon-rho"),
    "heun-edm": _rk(_EDM, "heun", "epsilon-rho"),
    "midpoint-edm": _rk(_EDM, "midpoint", "epsilon-rho"),
    "rk4-edm": _rk(_EDM, "rk4", "epsilon-rho"),
    "edm-churn": Entry(Churn, _EDM),
    # Given coefficients.
    "rows": Entry(Rows, "sheet D, 14.3", alias=True),
}

SolverLike: TypeAlias = str | Mapping[str, Any] | Solver


def get_solver(spec: SolverLike) -> Solver:
    """A solver from its name, its config (`{"name": "ddim", "eta": 0.5}`) or itself.

    Raises PlanError for an unknown name or option, naming the nearest known one.
    """
    if isinstance(spec, Solver):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in SOLVERS:
        raise PlanError(f"unknown solver {name!r}: {suggest(str(name), SOLVERS)}")
    known = SOLVERS[name].takes
    for option, value in options.items():
        if option not in known:
            takes = suggest(option, known) if known else "it takes none."
            raise PlanError(f"solver {name!r} has no option {option!r}: {takes}")
        options[option] = _frozen(value)
    try:
        return SOLVERS[name](**options)
    except TypeError as error:
        raise PlanError(f"solver {name!r} does not take these options: {error}") from None


def _frozen(value: Any) -> Any:
    """Lists (from JSON) as tuples: solvers are hashable."""
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=1024)
def name_of(solver: Solver) -> str:
    """The registry's most specific name for a solver; its class's name if it is not from here."""
    found, matched = type(solver).__name__, -1
    for name, entry in SOLVERS.items():
        if type(solver) is not entry.solver or entry.alias:
            continue
        if len(entry.options) > matched and all(getattr(solver, k) == v for k, v in entry.options.items()):
            found, matched = name, len(entry.options)
    return found


@dataclass(frozen=True)
class SolverInfo:
    """What a named solver is, for tables. evaluations: network calls of a regular step."""

    name: str
    form: str
    order: int
    evaluations: int
    stochastic: bool
    source: str
    alias_of: str | None
    compat: bool


def solver_infos() -> list[SolverInfo]:
    """One line per registered name, in the registry's order, at its default options."""
    found = []
    for name, entry in SOLVERS.items():
        s = entry()
        same = s.name if s.name != name else None
        found.append(
            SolverInfo(
                name, s.form, s.convergence, s.evaluations_per_step, s.stochastic, entry.source, same, entry.compat
            )
        )
    return found
