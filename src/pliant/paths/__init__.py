"""How data becomes noise: paths, predictions, time conventions and grids."""

from pliant.paths.edm import EDM, PFGMpp
from pliant.paths.families import GVP, Cosine, Linear, SubVP, VPContinuous, VPDiscrete
from pliant.paths.grids import GRIDS, default_times, get_grid, make_grid
from pliant.paths.interpolants import GaussianInterpolant, Interpolant
from pliant.paths.levels import dynamic_shift, flux_mu, resolution_shift, shifted_times
from pliant.paths.matching import Match, carried, match
from pliant.paths.mean_reverting import MeanReverting
from pliant.paths.network_time import NetworkTime
from pliant.paths.path import Coefficients, Path, get_path, known_paths, like, path_from_config, register_path
from pliant.paths.preconditioning import Preconditioning
from pliant.paths.predictions import PREDICTION_TYPES, AlphaSigma, PredictionType, conversion, prediction_type
from pliant.paths.table import VPTable
from pliant.paths.times import TimeDensity, get_time_density, log_snr_times, respaced_times, uniform_times

__all__ = [
    "EDM",
    "GRIDS",
    "GVP",
    "PREDICTION_TYPES",
    "AlphaSigma",
    "Coefficients",
    "Cosine",
    "GaussianInterpolant",
    "Interpolant",
    "Linear",
    "Match",
    "MeanReverting",
    "NetworkTime",
    "PFGMpp",
    "Path",
    "Preconditioning",
    "PredictionType",
    "SubVP",
    "TimeDensity",
    "VPContinuous",
    "VPDiscrete",
    "VPTable",
    "carried",
    "conversion",
    "default_times",
    "dynamic_shift",
    "flux_mu",
    "get_grid",
    "get_path",
    "get_time_density",
    "known_paths",
    "like",
    "log_snr_times",
    "make_grid",
    "match",
    "path_from_config",
    "prediction_type",
    "register_path",
    "resolution_shift",
    "respaced_times",
    "shifted_times",
    "uniform_times",
]
