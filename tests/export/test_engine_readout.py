from __future__ import annotations

import json

import pytest

from latentrt.export.engine_readout import check_precision, inspector_types, read_memory
from latentrt.runtime.engine_sidecar import PrecisionReadout
from latentrt.runtime.errors import BuildError


def readout(**weights: int) -> PrecisionReadout:
    return PrecisionReadout(layers={}, weights=weights, method="")


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        ("fp16", {"Half": 90, "Float": 10}),
        ("fp32", {"Float": 100}),
        ("mixed", {"Half": 10, "Float": 90}),
        ("int8", {"Int8": 50, "Half": 50}),
        ("mxfp4", {"Float": 1}),
    ],
)
def test_an_engine_that_is_what_it_is_called_passes(precision: str, weights: dict[str, int]) -> None:
    check_precision("unet", precision, readout(**weights))


@pytest.mark.parametrize(
    ("precision", "weights", "said"),
    [
        ("fp16", {"Half": 89, "Float": 11}, "Float 11.0%, Half 89.0%"),
        ("fp16", {"Float": 5}, "Float 100.0%"),
        ("fp16", {}, "no weights"),
        ("int8", {"Int8": 49, "Half": 51}, "at least 50%"),
        ("mixed", {"Float": 100}, "at least 10% of its weights in Half layers, got Float 100.0%"),
        ("fp32", {"Half": 1}, "in Float layers, got Half 100.0%"),
    ],
)
def test_an_engine_that_is_not_fails_with_its_shares(precision: str, weights: dict[str, int], said: str) -> None:
    with pytest.raises(BuildError, match=r"^unet: expected") as caught:
        check_precision("unet", precision, readout(**weights))
    assert said in str(caught.value)


def test_memory_is_the_largest_figure_of_each_kind() -> None:
    log = ["Max Scratch Memory: 10 bytes", "Total Activation Memory: 20 bytes", "Total Activation Memory: 5 bytes", "x"]
    assert read_memory(log) == {"scratch_bytes": 10, "activation_bytes": 20}


def test_inspector_layers_are_counted_by_their_output() -> None:
    formats = ["Row major linear FP16 format", "Half", "Channel major INT8", "Float", "Int64", "strange", None]
    layers: list[object] = [{"Outputs": [{"Format/Datatype": text}] if text else []} for text in formats]
    counts = inspector_types(json.dumps({"Layers": [*layers, "a name only"]}))
    assert counts == {"Half": 2, "Int8": 1, "Float": 1, "Int64": 1, "unstated": 3}
