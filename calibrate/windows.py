"""What the positions of a layer's output read of its input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from .reservoir import Rows

Pair = tuple[int, int]
_HALF_MAX = float(np.finfo(np.float16).max)


def geometry(module: nn.Module) -> tuple[Pair, Pair, Pair]:
    """Kernel, stride and padding, each (y, x); a linear layer is a convolution of one tap."""
    if not isinstance(module, nn.Conv2d):
        return (1, 1), (1, 1), (0, 0)
    assert not isinstance(module.padding, str)
    pairs = [(int(pair[0]), int(pair[1])) for pair in (module.kernel_size, module.stride, module.padding)]
    return pairs[0], pairs[1], pairs[2]


def taps(module: nn.Module) -> int:
    """Positions of the input that an output position reads."""
    (height, width), *_ = geometry(module)
    return height * width


def reader(maps: torch.Tensor, module: nn.Module) -> Callable[[NDArray[np.int64]], Rows]:
    """Reads windows of maps (rows, channels, y, x) by the indices (m,) of output positions, counted over all rows.

    A window is (channels · taps,), laid out as a weight's row, with zeros beyond the border.
    """
    kernel, stride, padding = geometry(module)

    def read(indices: NDArray[np.int64]) -> Rows:
        windows = F.pad(maps, (padding[1], padding[1], padding[0], padding[0])).unfold(2, kernel[0], stride[0])
        windows = windows.unfold(3, kernel[1], stride[1])  # (rows, channels, y, x, kernel height, kernel width)
        places = (windows.shape[0], windows.shape[2], windows.shape[3])
        row, y, x = (torch.from_numpy(each) for each in np.unravel_index(indices, places))
        # What float16 cannot hold is far from what any layer of a sound checkpoint is given.
        chosen = windows[row, :, y, x].flatten(1).clamp(-_HALF_MAX, _HALF_MAX)
        return np.asarray(chosen.half().cpu().numpy(), np.float16)

    return read
