"""Inception-v3 pool3 features, the ones an FID is defined on, through torch-fidelity's port of the TensorFlow
graph.

Optional: `pip install 'pliant[metrics]'`. The weights are torch-fidelity's release file; they are downloaded
on first use or given by path. Nothing here is a stand-in: without the package or the weights there is no FID.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.errors import FormatError, PliantError
from pliant.evaluation.features import SPATIAL_CHANNELS, fitted
from pliant.evaluation.images import to_uint8

MODULE = "torch_fidelity.feature_extractor_inceptionv3"


def _torch_fidelity_inception() -> Any:
    """The module that holds torch-fidelity's Inception.  Raises PliantError if it cannot be had."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or not spec.submodule_search_locations:
        raise PliantError("the FID needs torch-fidelity's Inception network: pip install 'pliant[metrics]'")
    if "torch_fidelity" in sys.modules:
        return importlib.import_module(MODULE)
    # The package's __init__ imports torchvision, which the network does not need and which often does not
    # match the installed torch. A bare parent module lets the one file be imported; it is removed again, so
    # that anybody who imports torch_fidelity afterwards gets the real one.
    parent = types.ModuleType("torch_fidelity")
    parent.__path__ = list(spec.submodule_search_locations)
    before = set(sys.modules)
    sys.modules["torch_fidelity"] = parent
    try:
        return importlib.import_module(MODULE)
    except ImportError as e:
        raise PliantError(f"torch-fidelity is installed but its Inception does not import ({e}); update it") from e
    finally:
        for name in {m for m in sys.modules if m.split(".")[0] == "torch_fidelity"} - before:
            del sys.modules[name]


class InceptionPool3:
    """2048 features per image; resizing to 299x299 is the TensorFlow 1 bilinear rule inside torch-fidelity.

    Logits are without bias, as the Inception score of ADM and torch-fidelity takes them (1008 classes). The spatial
    features are those of sFID: TensorFlow's mixed_6/conv, the first branch of torch-fidelity's Mixed_6d.
    """

    name = "inception-v3-pool3"
    dim = 2048
    num_classes = 1008
    preprocessing = "8-bit, TensorFlow-1 bilinear to 299x299 (torch-fidelity)"
    spatial_name = f"mixed_6/conv, first {SPATIAL_CHANNELS} channels"

    def __init__(self, network: torch.nn.Module, fingerprint: str) -> None:
        self._network, self.fingerprint = network, fingerprint
        self._spatial: Tensor | None = None

        def keep(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            self._spatial = output

        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(keep)

    @classmethod
    def load(cls, weights: str | Path | None = None) -> InceptionPool3:
        """weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None looks in torch.hub's
        cache and downloads it there. The file's SHA-256 goes into every recipe.

        Raises PliantError without torch-fidelity or network access, FormatError for a file that is not plain
        tensors.
        """
        module = _torch_fidelity_inception()
        path = Path(weights) if weights is not None else Path(torch.hub.get_dir(), "checkpoints", _file_name(module))
        if weights is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(module.URL_INCEPTION_V3, str(path))
            except OSError as e:
                raise PliantError(
                    f"the Inception weights could not be downloaded ({e}); fetch {module.URL_INCEPTION_V3} "
                    f"and put it at {path}"
                ) from e
        try:
            # torch-fidelity unpickles freely; a file that passes this restricted load holds tensors only.
            torch.load(path, weights_only=True)
            network = module.FeatureExtractorInceptionV3(cls.name, ["2048"], feature_extractor_weights_path=str(path))
            fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        except Exception as e:  # torch.load raises many kinds (pickle, zip, runtime, OS); all mean the same here
            raise FormatError(f"{path} is not torch-fidelity's Inception weight file ({e})") from e
        return cls(network, fingerprint)

    def __call__(self, images: Tensor) -> Tensor:
        return self.both(images)[0]

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_uint8(fitted(images, 3, (images.shape[-2], images.shape[-1]))).contiguous()
        with torch.inference_mode():
            features = self._network(x.to(self._weight.device))[0].clone()
            spatial, self._spatial = self._spatial, None
        if spatial is None:
            raise PliantError("torch-fidelity's Inception no longer calls Mixed_6d; use version 0.3 or 0.4")
        # Channels last, as TensorFlow flattens them: ADM's stored mu_s and sigma_s have that order.
        return features, spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().clone()

    def logits(self, features: Tensor) -> Tensor:
        with torch.inference_mode():
            return (features.to(self._weight) @ self._weight.T).clone()

    @property
    def _weight(self) -> Tensor:
        return self._network.get_submodule("fc").get_parameter("weight")

    def to(self, device: str | torch.device) -> InceptionPool3:
        self._network.to(device)
        return self


def _file_name(module: Any) -> str:
    return str(module.URL_INCEPTION_V3).rsplit("/", 1)[-1]
