"""Vision encoders of transformers as feature extractors: DINOv2, CLIP and relatives, from a folder or the Hub.

Preprocessing is done here, from the numbers in the checkpoint's preprocessor_config.json, so torchvision is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from pliant.errors import FormatError, PliantError
from pliant.evaluation.features import fitted
from pliant.files import tensors_sha256

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _side(values: Mapping[str, Any], fallback: int) -> tuple[int, int]:
    """(H, W) that images are resized to: the crop where there is one, else the size."""
    for key in ("crop_size", "size"):
        size = values.get(key)
        if isinstance(size, int):
            return size, size
        if isinstance(size, Mapping):
            if "height" in size:
                return int(size["height"]), int(size["width"])
            if "shortest_edge" in size:
                return int(size["shortest_edge"]), int(size["shortest_edge"])
    return fallback, fallback


class VisionEncoder:
    """One embedding per image: the projected image embedding where the model has one (CLIP), else the pooled output
    (DINOv2: the class token after the last norm), else the class token.

    Images are resized to the checkpoint's crop in one step (bicubic, antialiased; the aspect ratio is not kept), never
    cropped, as CMMD and the DINOv2 distances do.
    """

    def __init__(self, name: str, network: torch.nn.Module, processor: Mapping[str, Any]) -> None:
        config: Any = network.config
        vision = getattr(config, "vision_config", config)
        self._size = _side(processor, int(getattr(vision, "image_size", 224)))
        self._mean = torch.tensor(processor.get("image_mean", IMAGENET_MEAN)).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.get("image_std", IMAGENET_STD)).view(1, 3, 1, 1)
        self._network = network.eval().requires_grad_(False).float()
        self.name = f"{config.model_type} ({name})"
        self.fingerprint = tensors_sha256(network.state_dict())
        h, w = self._size
        mean, std = (", ".join(f"{v:.3g}" for v in t.flatten().tolist()) for t in (self._mean, self._std))
        self.preprocessing = f"8-bit, bicubic antialiased to {h}x{w}, mean ({mean}), std ({std})"
        self.dim = int(self(torch.zeros(1, 3, h, w)).shape[1])

    @classmethod
    def load(cls, source: str) -> VisionEncoder:
        """A Hub id or a folder with config.json and weights.

        Raises PliantError without transformers, FormatError for anything that is not such a model or is not to be had.
        """
        try:
            from transformers import AutoModel
        except ImportError as e:
            raise PliantError(f"vision encoders need transformers: pip install 'pliant[diffusers]' ({e})") from e
        try:
            network = AutoModel.from_pretrained(source)
            processor = _processor_config(source)
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            reason = shorten(str(e), 200, placeholder=" ...")
            raise FormatError(f"{source} is not a vision encoder that transformers can load here: {reason}") from e
        if not hasattr(network, "get_image_features") and getattr(network, "main_input_name", "") != "pixel_values":
            raise FormatError(f"{source} does not take images (model type {network.config.model_type!r})")
        return cls(Path(source).name if Path(source).is_dir() else source, network, processor)

    def __call__(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W) float in [-1, 1] -> (B, dim) float32."""
        x = (fitted(images, 3, self._size) + 1) / 2
        network: Any = self._network
        x = ((x - self._mean.to(x)) / self._std.to(x)).to(next(network.parameters()).device)
        with torch.inference_mode():
            if hasattr(network, "get_image_features"):
                found = network.get_image_features(pixel_values=x)
            else:
                found = network(pixel_values=x)
            if not isinstance(found, Tensor):
                pooled = getattr(found, "pooler_output", None)
                found = found.last_hidden_state[:, 0] if pooled is None else pooled
            return found.float().clone()

    def to(self, device: str | torch.device) -> VisionEncoder:
        self._network.to(device)
        return self


def _processor_config(source: str) -> dict[str, Any]:
    """preprocessor_config.json, or nothing where the checkpoint has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = "preprocessor_config.json"
    if Path(source).is_dir():
        file = Path(source) / name
    else:
        try:
            file = Path(hf_hub_download(source, name))
        except LocalEntryNotFoundError:
            raise  # offline and not cached is not the same as absent: other numbers would come out
        except EntryNotFoundError:
            return {}
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
