from __future__ import annotations

import dataclasses
import json

import pytest

from latentrt.export.engine_readout import (
    Layer,
    check_precision,
    flops_shares,
    inspector_types,
    layer_report,
    precisions_of,
    read_memory,
)
from latentrt.runtime.engine_sidecar import PrecisionReadout
from latentrt.runtime.errors import BuildError


def readout(**weights: int) -> PrecisionReadout:
    return PrecisionReadout(layers={}, weights=weights, method="")


@pytest.mark.parametrize(
    ("precision", "weights", "flops"),
    [
        ("fp16", {"Half": 90, "Float": 10}, {"Half": 0.9, "Float": 0.1}),
        ("fp32", {"Float": 100}, {"Float": 1.0}),
        ("mixed", {"Half": 10, "Float": 90}, {"Float": 1.0}),
        ("int8", {"Int8": 50, "Half": 50}, {"Int8": 0.25, "Half": 0.75}),
        ("mxfp4", {"Float": 1}, {}),
    ],
)
def test_an_engine_that_is_what_it_is_called_passes(
    precision: str, weights: dict[str, int], flops: dict[str, float]
) -> None:
    check_precision("unet", precision, readout(**weights), flops)


@pytest.mark.parametrize(
    ("precision", "weights", "flops", "said"),
    [
        ("fp16", {"Half": 89, "Float": 11}, {"Half": 1.0}, "90% of its weights in Half layers, got Float 11.0%, Half"),
        ("fp16", {"Float": 5}, {"Float": 1.0}, "Float 100.0%"),
        ("fp16", {}, {}, "no weights"),
        ("fp16", {"Half": 9}, {"Half": 0.8, "Float": 0.2}, "90% of its operations in Half layers, got Float 20.0%"),
        ("int8", {"Int8": 49, "Half": 51}, {"Int8": 0.5}, "at least 50%"),
        ("int8", {"Int8": 60, "Half": 40}, {"Int8": 0.2, "Half": 0.8}, "at least 25% of its operations in Int8"),
        ("mixed", {"Float": 100}, {"Float": 1.0}, "at least 10% of its weights in Half layers, got Float 100.0%"),
        ("fp32", {"Half": 1}, {"Half": 1.0}, "in Float layers, got Half 100.0%"),
    ],
)
def test_an_engine_that_is_not_fails_with_its_shares(
    precision: str, weights: dict[str, int], flops: dict[str, float], said: str
) -> None:
    with pytest.raises(BuildError, match=r"^unet: expected") as caught:
        check_precision("unet", precision, readout(**weights), flops)
    assert said in str(caught.value)


def test_shares_are_of_layers_that_have_something_to_share() -> None:
    layers = (
        Layer("conv", "convolution", "Half", weights=30, flops=600),
        Layer("scores", "matrix_multiply", "Float", weights=0, flops=200),
        Layer("to_k", "matrix_multiply", "Half", weights=10, flops=0),
    )
    assert precisions_of(layers) == PrecisionReadout({"Half": 2}, {"Half": 40}, "types of the parsed network")
    assert flops_shares(layers) == {"Float": 0.25, "Half": 0.75}
    assert flops_shares(()) == {}
    report = json.loads(layer_report(layers, {"sample": (1, 4)}, inspector='{"Layers": [1]}'))
    assert report["flops"] == 800
    assert report["shapes"] == {"sample": [1, 4]}
    assert report["layers"][1] == dataclasses.asdict(layers[1])
    assert report["engine"] == {"Layers": [1]}


def test_memory_is_the_largest_figure_of_each_kind() -> None:
    log = ["Max Scratch Memory: 10 bytes", "Total Activation Memory: 20 bytes", "Total Activation Memory: 5 bytes", "x"]
    assert read_memory(log) == {"scratch_bytes": 10, "activation_bytes": 20}


def test_inspector_layers_are_counted_by_their_output() -> None:
    formats = ["Row major linear FP16 format", "Half", "Channel major INT8", "Float", "Int64", "strange", None]
    layers: list[object] = [{"Outputs": [{"Format/Datatype": text}] if text else []} for text in formats]
    counts = inspector_types(json.dumps({"Layers": [*layers, "a name only"]}))
    assert counts == {"Half": 2, "Int8": 1, "Float": 1, "Int64": 1, "unstated": 3}
