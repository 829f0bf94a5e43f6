"""What a LoRA does to one weight, in float32.

    LoRA   up @ down                                          Hu et al. 2021; of convolutions: LyCORIS' LoCon
    LoHa   (w1_a @ w1_b) * (w2_a @ w2_b)                      Hyeon-Woo et al. 2021, FedPara
    LoKr   kron(w1, w2), each whole or a product              Yeh et al. 2023, LyCORIS
    full   the difference itself                              LyCORIS, also of biases and norms
    DoRA   magnitude * (W + change) / |W + change|            Liu et al. 2024; the change is one of the above

A product of a convolution's factors may have a core between them, (rank, rank, kernel), as in Tucker's decomposition.
Changes are scaled by alpha / rank. The formulas are those of LyCORIS and peft.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .specs import Array

Floats = NDArray[np.float32]
_Shape = tuple[int, ...]
_EPSILON = np.finfo(np.float32).eps  # for weights that are all zero


class Factor(Protocol):
    """An array that is read when it is wanted, as a file holds it."""

    @property
    def shape(self) -> _Shape:
        """Of the values."""
        ...

    @property
    def read(self) -> Callable[[], Array]:
        """Reads the values."""
        ...


class _Product(NamedTuple):
    """The roles of the factors of one product, or of the whole matrix in their place."""

    whole: str
    a: str
    b: str
    core: str


_METHODS = {
    "LoRA": (_Product("", "up", "down", "mid"),),
    "LoHa": tuple(_Product("", f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2)),
    "LoKr": tuple(_Product(f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}") for n in (1, 2)),
    "full": (_Product("diff", "", "", ""),),
}


@dataclass(frozen=True, eq=False)
class Delta:
    """The change of one weight or bias; its factors are not yet read.

    Attributes:
        factors: by role: up, down, mid, diff, or the name that LyCORIS has for it.
        alpha: the numerator of the scale; None where the file has none, and the scale is 1.
        rank_stabilized: whether alpha is divided by the rank's square root.
        magnitude: DoRA's norms of the weights of each output.
        by_input: whether they are of the weights of each input instead.
        keys: of the file.

    Raises:
        ValueError: the factors do not belong together, or their shapes do not.
    """

    factors: Mapping[str, Factor]
    alpha: float | None = None
    rank_stabilized: bool = False
    magnitude: Factor | None = None
    by_input: bool = False
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse factors that make no change."""
        complete = any(_complete(products, self.factors) for products in _METHODS.values())
        if not (
            complete and all(factor.shape and all(factor.shape) for factor in self.factors.values()) and self.shape
        ):
            found = ", ".join(f"{role} {factor.shape}" for role, factor in self.factors.items())
            raise ValueError(f"expected the factors of a LoRA, LoHa or LoKr, of shapes that fit, got {found or 'none'}")

    @property
    def method(self) -> str:
        """LoRA, LoHa, LoKr or full; DoRA is told by `magnitude`."""
        return next(name for name, products in _METHODS.items() if _complete(products, self.factors))

    @property
    def shape(self) -> _Shape:
        """Of the change as the factors have it; a convolution's may have its last axes in one.

        Raises:
            ValueError: the factors do not fit.
        """
        shapes = {role: factor.shape for role, factor in self.factors.items()}
        first, *others = (_product_shape(product, shapes) for product in _METHODS[self.method])
        if self.method == "LoKr":
            return _kron_shape(first, others[0])
        if any(other != first for other in others):
            raise ValueError(f"expected factors of one shape, got {first} and {others[0]}")
        return first

    @property
    def strength(self) -> float:
        """Alpha by rank; 1 where nothing is of a rank."""
        ranks = [self.factors[b].shape[0] for *_, b, _ in _METHODS[self.method] if b in self.factors]
        if self.alpha is None or not ranks:
            return 1.0
        return self.alpha / (math.sqrt(ranks[0]) if self.rank_stabilized else ranks[0])


def fits(delta: Delta, shape: _Shape) -> bool:
    """Whether a change is one of a weight of this shape.

    A linear layer's may stand for a 1 x 1 convolution's and the other way round, as old and new U-Nets have them.
    """
    axis = _axis(delta)
    if delta.magnitude is not None and shape[axis : axis + 1] != (math.prod(delta.magnitude.shape),):
        return False
    ours, theirs = delta.shape, _trimmed(shape)
    return _trimmed(ours) == theirs or (len(ours) == 2 and ours == _as_matrix(theirs))


def delta_of(delta: Delta, shape: _Shape) -> Floats:
    """The change of a weight of this shape, scaled by alpha / rank; what DoRA does on top is in `fused_values`."""
    factors = {role: np.asarray(factor.read(), dtype=np.float32) for role, factor in delta.factors.items()}
    first, *others = (_product(product, factors) for product in _METHODS[delta.method])
    for other in others:
        first = _kron(first, other) if delta.method == "LoKr" else first * other
    return np.float32(delta.strength) * first.reshape(shape)


def fused_values(values: Array, delta: Delta, scale: float) -> Floats:
    """A weight with its change folded in, in float32.

    Args:
        values: the weight.
        scale: 1 for the change as it was trained. Of a DoRA it scales the change that is normed, as in peft.
    """
    result = delta_of(delta, values.shape)
    result *= np.float32(scale)
    result += np.asarray(values, dtype=np.float32)
    if delta.magnitude is None:
        return result
    magnitude = np.asarray(delta.magnitude.read(), dtype=np.float32)
    axis = _axis(delta)
    others = tuple(index for index in range(result.ndim) if index != axis)
    norm = np.maximum(np.sqrt(np.square(result).sum(axis=others, keepdims=True)), _EPSILON)
    fused: Floats = result * (magnitude.reshape(norm.shape) / norm)
    return fused


def _axis(delta: Delta) -> int:
    """The axis of a weight that the magnitudes run along."""
    return int(delta.by_input)


def _trimmed(shape: _Shape) -> _Shape:
    """A 1 x 1 convolution's as a linear layer's."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _complete(products: tuple[_Product, ...], factors: Mapping[str, Factor]) -> bool:
    """Whether these are all the factors of a method, and no more."""
    roles = set(factors)
    for product in products:
        whole, core = {product.whole} & roles, {product.core} & roles
        if not whole and not {product.a, product.b} <= roles:
            return False
        roles -= whole or {product.a, product.b} | core
    return not roles


def _product(product: _Product, factors: Mapping[str, Floats]) -> Floats:
    if product.whole in factors:
        return factors[product.whole]
    a, b = _matrix(factors[product.a]), _matrix(factors[product.b])
    if product.core not in factors:
        return a @ b
    core = np.tensordot(factors[product.core], b, axes=(1, 0))  # (rank, kernel…, inputs)
    return np.moveaxis(np.tensordot(a if product.core == "mid" else a.T, core, axes=1), -1, 1)


def _product_shape(product: _Product, shapes: Mapping[str, _Shape]) -> _Shape:
    if product.whole in shapes:
        return shapes[product.whole]
    (outputs, rank), b = _as_matrix(shapes[product.a]), shapes[product.b]
    core = shapes.get(product.core)
    if core is None:
        fit, shape = rank == b[0], (outputs, *b[1:])
    else:
        if product.core != "mid":  # LyCORIS stores (rank, outputs) beside a core
            outputs, rank = rank, outputs
        fit, shape = core[:2] == (rank, b[0]), (outputs, math.prod(b[1:]), *core[2:])
    if not fit:
        raise ValueError(f"expected factors of one rank, got {', '.join(f'{r} {s}' for r, s in shapes.items())}")
    return shape


def _matrix(factor: Floats) -> Floats:
    return factor.reshape(_as_matrix(factor.shape))


def _as_matrix(shape: _Shape) -> tuple[int, int]:
    return (*shape, 1)[0], math.prod(shape[1:])


def _kron(w1: Floats, w2: Floats) -> Floats:
    return np.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - w1.ndim)), w2)


def _kron_shape(w1: _Shape, w2: _Shape) -> _Shape:
    if len(w1) > len(w2):
        raise ValueError(f"expected a first factor of no more axes than the second, got {w1} and {w2}")
    return tuple(math.prod(pair) for pair in itertools.zip_longest(w1, w2, fillvalue=1))
