"""A denoiser: a network with its path, its prediction kind and its conventions; how calls are fed, read and priced."""

from pliant.denoiser.denoiser import Denoiser, Network
from pliant.denoiser.prediction import Prediction, Trained

__all__ = ["Denoiser", "Network", "Prediction", "Trained"]
