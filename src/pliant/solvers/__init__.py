"""Solvers write programs; one interpreter runs them."""

from pliant.solvers.adaptive import Recorded, dpm_adaptive, ode_adaptive
from pliant.solvers.adjoint import continuous_run, differentiable_run
from pliant.solvers.ancestral import DDPM, FullNoise
from pliant.solvers.builder import ProgramBuilder, Row, Stored, Virtual, nodes_of
from pliant.solvers.churn import Churn
from pliant.solvers.compiler import check_times, compile_program
from pliant.solvers.exponential import DDIM, Multistep
from pliant.solvers.fused import fused_combine
from pliant.solvers.interpreter import Ask, Evaluate, NetworkOutput, Noise, Output, StepResult, run, stepwise
from pliant.solvers.jump import Jump
from pliant.solvers.normal_form import NormalForm, consistency, normal_form, normal_form_of
from pliant.solvers.pndm import PNDM
from pliant.solvers.predict_correct import PredictCorrect
from pliant.solvers.program import Eval, Instruction, LearnedNoise, Lin, Node, Program
from pliant.solvers.registry import SOLVERS, SolverInfo, SolverLike, get_solver, solver_infos
from pliant.solvers.rows import Rows
from pliant.solvers.runge_kutta import TABLEAUS, RungeKutta, Tableau
from pliant.solvers.sde import SiTSDE, sde_times
from pliant.solvers.singlestep import GridSinglestep, Singlestep, fast_orders, fast_plan
from pliant.solvers.solver import Solver
from pliant.solvers.unipc import DCSolver, UniPC
from pliant.solvers.usf import USF

__all__ = [
    "DDIM",
    "DDPM",
    "PNDM",
    "SOLVERS",
    "TABLEAUS",
    "USF",
    "Ask",
    "Churn",
    "DCSolver",
    "Eval",
    "Evaluate",
    "FullNoise",
    "GridSinglestep",
    "Instruction",
    "Jump",
    "LearnedNoise",
    "Lin",
    "Multistep",
    "NetworkOutput",
    "Node",
    "Noise",
    "NormalForm",
    "Output",
    "PredictCorrect",
    "Program",
    "ProgramBuilder",
    "Recorded",
    "Row",
    "Rows",
    "RungeKutta",
    "SiTSDE",
    "Singlestep",
    "Solver",
    "SolverInfo",
    "SolverLike",
    "StepResult",
    "Stored",
    "Tableau",
    "UniPC",
    "Virtual",
    "check_times",
    "compile_program",
    "consistency",
    "continuous_run",
    "differentiable_run",
    "dpm_adaptive",
    "fast_orders",
    "fast_plan",
    "fused_combine",
    "get_solver",
    "nodes_of",
    "normal_form",
    "normal_form_of",
    "ode_adaptive",
    "run",
    "sde_times",
    "solver_infos",
    "stepwise",
]
