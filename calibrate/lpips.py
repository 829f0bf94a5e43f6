"""LPIPS, the learned distance of pictures, with weights that the user brings.

Zhang et al. 2018 (arXiv 1801.03924), version 0.1 with AlexNet. The weights are a safetensors file of the state of the
authors' `lpips.LPIPS(net="alex")`, written with `safetensors.torch.save_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.image import Pictures

from .picture_metrics import Doubles, PictureMetric, check_pictures

# AlexNet's convolutions: name of the weight in the file, shape, stride and padding. Features are taken after each,
# and pictures are halved by a 3 x 3 maximum before the second and the third.
_CONVOLUTIONS = (
    ("net.slice1.0", (64, 3, 11, 11), 4, 2),
    ("net.slice2.3", (192, 64, 5, 5), 1, 2),
    ("net.slice3.6", (384, 192, 3, 3), 1, 1),
    ("net.slice4.8", (256, 384, 3, 3), 1, 1),
    ("net.slice5.10", (256, 256, 3, 3), 1, 1),
)
_POOLED = (1, 2)
# The authors' scaling layer: ImageNet's mean and deviation for pictures in [-1, 1].
_SHIFT = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
_SCALE = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
_EPSILON = 1e-10


def open_lpips(path: Path) -> PictureMetric:
    """LPIPS with the weights of a file, as a metric of pictures: distances (n,), 0 for equal ones.

    Raises:
        ArtifactError: the file cannot be read or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ArtifactError(f"{path}: expected a safetensors file with LPIPS's weights, got {err}.") from err
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape, _, _ in _CONVOLUTIONS}
    wanted |= {f"{name}.bias": shape[:1] for name, shape, _, _ in _CONVOLUTIONS}
    wanted |= {_linear(index): (1, shape[0], 1, 1) for index, (_, shape, _, _) in enumerate(_CONVOLUTIONS)}
    for name, shape in wanted.items():
        found = tuple(weights[name].shape) if name in weights else "nothing"
        if found != shape:
            raise ArtifactError(
                f"{path}: expected {name} of {shape}, got {found}. Save the state of lpips.LPIPS(net='alex')."
            )

    def distance(reference: Pictures, pictures: Pictures) -> Doubles:
        check_pictures(reference, pictures)
        pairs = zip(reference, pictures, strict=True)
        with torch.inference_mode():
            return np.array([_distance(weights, _tensor(a), _tensor(b)) for a, b in pairs])

    return distance


def _distance(weights: Mapping[str, torch.Tensor], one: torch.Tensor, other: torch.Tensor) -> float:
    total = 0.0
    pairs = zip(_features(weights, one), _features(weights, other), strict=True)
    for index, (x, y) in enumerate(pairs):
        differences = (_normed(x) - _normed(y)) ** 2
        total += float(F.conv2d(differences, weights[_linear(index)]).mean())
    return total


def _features(weights: Mapping[str, torch.Tensor], picture: torch.Tensor) -> list[torch.Tensor]:
    values, found = (picture - _SHIFT) / _SCALE, []
    for index, (name, _, stride, padding) in enumerate(_CONVOLUTIONS):
        if index in _POOLED:
            values = F.max_pool2d(values, 3, 2)
        values = F.conv2d(values, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding).relu()
        found.append(values)
    return found


def _normed(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + _EPSILON)


def _linear(index: int) -> str:
    return f"lin{index}.model.1.weight"


def _tensor(picture: Pictures) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
