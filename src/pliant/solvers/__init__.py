"""Solvers write programs; one interpreter runs them."""

from pliant.solvers.ancestral import DDPM
from pliant.solvers.builder import ProgramBuilder, Row, Stored, nodes_of
from pliant.solvers.compiler import check_times, compile_program
from pliant.solvers.exponential import DDIM, DPMSolverPP2M
from pliant.solvers.interpreter import Evaluate, NetworkOutput, Noise, Output, StepResult, run
from pliant.solvers.normal_form import NormalForm, consistency, normal_form
from pliant.solvers.program import Eval, Instruction, LearnedNoise, Lin, Node, Program
from pliant.solvers.registry import SOLVERS, SolverLike, get_solver
from pliant.solvers.runge_kutta import Euler, Heun, Midpoint
from pliant.solvers.sde import SiTSDE, sde_times
from pliant.solvers.solver import Solver

__all__ = [
    "DDIM",
    "DDPM",
    "SOLVERS",
    "DPMSolverPP2M",
    "Euler",
    "Eval",
    "Evaluate",
    "Heun",
    "Instruction",
    "LearnedNoise",
    "Lin",
    "Midpoint",
    "NetworkOutput",
    "Node",
    "Noise",
    "NormalForm",
    "Output",
    "Program",
    "ProgramBuilder",
    "Row",
    "SiTSDE",
    "Solver",
    "SolverLike",
    "StepResult",
    "Stored",
    "check_times",
    "compile_program",
    "consistency",
    "get_solver",
    "nodes_of",
    "normal_form",
    "run",
    "sde_times",
]
