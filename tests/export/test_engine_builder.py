"""Real builds of a tiny graph, some of which are made to fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from engine_bundle import FLOAT, unet_graph

from latentrt.export.engine_builder import build_engine
from latentrt.export.engine_config import EngineConfig
from latentrt.export.engine_weights import refittable_weights
from latentrt.runtime.engine_sidecar import ShapeProfile
from latentrt.runtime.errors import BuildError
from latentrt.runtime.trt_log import shared_logger

trt: Any = pytest.importorskip("tensorrt_rtx", reason="pip install 'latentrt[tensorrt-rtx]'")
OUT_OF_MEMORY = "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested size was 9 bytes.)"


def bucket(rows: int) -> dict[str, ShapeProfile]:
    shapes = {"sample": (rows, 4, 8, 8), "timestep": (rows,), "encoder_hidden_states": (rows, 77, 64)}
    return {name: ShapeProfile(*[shape] * 3) for name, shape in shapes.items()}


CONFIG = EngineConfig("unet", "fp16", (bucket(2), bucket(1), bucket(4)), ("sm89",))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    onnx.save(unet_graph(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


class Failing:
    """TensorRT whose first builds log an error and give nothing; keeps the settings of every build."""

    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)
        self.builds: list[dict[str, Any]] = []
        self.__name__ = trt.__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(trt, name)

    def Builder(self, logger: Any) -> Any:  # as TensorRT has it
        return FailingBuilder(trt.Builder(logger), self)


class FailingBuilder:
    def __init__(self, builder: Any, library: Failing) -> None:
        self.builder, self.library = builder, library

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    def build_serialized_network(self, network: Any, settings: Any) -> Any:
        self.library.builds.append(
            {
                "workspace": settings.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
                "level": settings.builder_optimization_level,
                "profiles": settings.num_optimization_profiles,
            }
        )
        if self.library.errors:
            shared_logger(self.library).messages.append(("ERROR", self.library.errors.pop(0)))
            return None
        return self.builder.build_serialized_network(network, settings)


def test_an_engine_of_several_profiles_with_its_shares_and_report(graph: Path) -> None:
    built = build_engine(trt, graph, CONFIG)
    assert built.plan.nbytes > 10_000
    assert (built.config, built.attempts, built.refittable) == (CONFIG, (), ())
    assert built.precisions.weights == {"Half": 1088}
    assert built.flops == {"Half": 1.0}
    report = json.loads(built.layer_report)
    # Two rows of 8 x 8: the first profile's.
    assert report["flops"] == 2 * 2 * (8 * 8 * 288 * 2 + 77 * 64 * 8)
    assert [layer["name"] for layer in report["layers"]] == ["conv_in", "to_k", "conv_out"]
    assert report["engine"] is None


def test_a_workspace_that_is_too_small_for_a_kernel_is_lifted(graph: Path) -> None:
    said: list[str] = []
    config = dataclasses.replace(CONFIG, workspace_mib=1)
    built = build_engine(trt, graph, config, progress=lambda phase, part: said.append(phase))
    assert built.config == dataclasses.replace(config, workspace_mib=512)
    (attempt,) = built.attempts
    assert attempt.settings == {"workspace_mib": 1, "optimization_level": None, "profiles": 3}
    assert attempt.problem.startswith("unet: the builder failed: a layer needs more scratch memory than --workspace")
    assert "no tactics to implement the operation within workspace limit" in attempt.problem
    assert "failed; again with workspace 512 MiB" in said


def test_a_build_without_memory_is_tried_with_less_and_every_attempt_is_kept(graph: Path) -> None:
    library = Failing(*[OUT_OF_MEMORY] * 5)
    built = build_engine(library, graph, dataclasses.replace(CONFIG, narrow=True))
    own = library.builds[0]["workspace"]
    assert library.builds == [
        {"workspace": own, "level": 3, "profiles": 3},
        {"workspace": 4096 << 20, "level": 3, "profiles": 3},
        {"workspace": 512 << 20, "level": 3, "profiles": 3},
        {"workspace": 512 << 20, "level": 2, "profiles": 3},
        {"workspace": 512 << 20, "level": 0, "profiles": 3},
        {"workspace": 512 << 20, "level": 0, "profiles": 2},
    ]
    assert built.config.profiles == (bucket(2), bucket(1))
    assert [attempt.settings["profiles"] for attempt in built.attempts] == [3] * 5
    assert all("the builder ran out of memory" in attempt.problem for attempt in built.attempts)


def test_sizes_are_kept_and_the_failure_is_told_where_narrowing_is_not_allowed(graph: Path) -> None:
    library = Failing(*[OUT_OF_MEMORY] * 9)
    with pytest.raises(BuildError, match=r"ran out of memory.*OutOfMemory.* Tried 5 times, each with less\.$"):
        build_engine(library, graph, CONFIG)
    assert {build["profiles"] for build in library.builds} == {3}


def test_a_failure_that_less_would_not_help_is_told_at_once(graph: Path) -> None:
    library = Failing("something new")
    with pytest.raises(BuildError, match=r"^unet: the builder failed: something new$"):
        build_engine(library, graph, CONFIG)
    assert len(library.builds) == 1


def test_attention_in_float_beside_half_weights_is_no_fp16_engine(graph: Path) -> None:
    """All weights are half; the product without weights, most of the operations, is not."""
    model = unet_graph()
    for node in model.graph.node:
        if node.name == "scale_by_time":
            node.input[0] = "attended"
    new = [
        onnx.helper.make_node("Cast", ["out"], ["wide"], to=FLOAT),
        onnx.helper.make_node("MatMul", ["wide", "wide"], ["mixed"], name="scores"),
        onnx.helper.make_node("Cast", ["mixed"], ["attended"], to=onnx.TensorProto.FLOAT16),
    ]
    at = next(index for index, node in enumerate(model.graph.node) if node.name == "conv_out") + 1
    for offset, node in enumerate(new):
        model.graph.node.insert(at + offset, node)
    onnx.save(model, graph)
    large = {**bucket(1), "sample": ShapeProfile(*[(1, 4, 512, 512)] * 3)}
    with pytest.raises(BuildError, match=r"90% of its operations in Half layers, got Float 78\.0%"):
        build_engine(trt, graph, dataclasses.replace(CONFIG, profiles=(large,)))


def parsed(graph: Path) -> tuple[Any, Any]:
    builder = trt.Builder(shared_logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, shared_logger(trt))
    assert parser.parse_from_file(str(graph))
    return network, parser


def test_all_weights_of_a_stripped_engine_are_the_graphs_own(graph: Path) -> None:
    network, _parser = parsed(graph)
    config = dataclasses.replace(CONFIG, strip=True)
    assert refittable_weights(trt, network, CONFIG, graph) == ()
    assert refittable_weights(trt, network, config, graph) == ()  # only the same weights may go in again
    replaceable = refittable_weights(trt, network, dataclasses.replace(config, refit="all"), graph)
    assert replaceable == ("conv_in.weight", "conv_out.weight", "to_k.weight")
    model = onnx.load(graph)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "to_k.weight")
    for name, dims, said in (
        ("to_k.weight", (63, 8), r"got float16 \[63, 8\] for to_k\.weight \(Half, 512 values\)"),
        ("val_7", (64, 8), r"hold all weights .* got none of that name for to_k\.weight \(Half, 512"),
    ):
        tensor.name, tensor.dims[:] = name, dims
        onnx.save(model, graph)
        with pytest.raises(BuildError, match=said):
            refittable_weights(trt, network, config, graph)


def test_single_weights_are_marked_by_name(graph: Path) -> None:
    network, _parser = parsed(graph)
    config = dataclasses.replace(CONFIG, refit="individual", refittable=("to_k.weight",))
    assert refittable_weights(trt, network, config, graph) == ("to_k.weight",)
    assert network.are_weights_marked_refittable("to_k.weight")
    assert not network.are_weights_marked_refittable("conv_in.weight")
    with pytest.raises(BuildError, match="weights named to_v, which are to be refitted"):
        refittable_weights(trt, network, dataclasses.replace(config, refittable=("to_v",)), graph)
