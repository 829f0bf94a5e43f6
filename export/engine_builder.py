"""One ONNX graph to one serialized engine, through `tensorrt` or `tensorrt_rtx`."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentrt.runtime.engine_sidecar import BuildAttempt, PrecisionReadout
from latentrt.runtime.errors import BuildError
from latentrt.runtime.trt_log import shared_logger

from .engine_cancel import run_cancellable
from .engine_config import EngineConfig
from .engine_flavour import (
    check_supported,
    configure,
    network_flags,
    read_timings,
    set_flags,
    strips_weights,
    write_timings,
)
from .engine_log import Progress, make_monitor
from .engine_messages import failure_text, meaning_of
from .engine_readout import (
    Layer,
    check_precision,
    flops_shares,
    inspector_types,
    layer_report,
    precisions_of,
    read_layers,
    read_memory,
)
from .engine_retry import FailedBuildError, describe_change, next_config, settings_of
from .engine_thinning import thin_engine
from .engine_weights import refittable_weights

_ONE_BUILD = threading.Lock()


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine and what was read of it.

    Attributes:
        plan: what its file will hold: TensorRT's own buffer, or the thin form of it.
        config: what it was really built with, which after failures is less than what was asked for.
        seconds: of the build that succeeded.
        memory: figures of `read_memory`, replaced by the engine's own where a GPU could load it.
        flags: builder flags that were set, TensorRT's defaults included.
        obtained: how the figures were obtained.
        flops: share of the operations by type, at the first profile's usual shapes.
        layer_report: JSON text that lists the layers, to be kept beside the engine.
        thin: whether `plan` leaves out what the graph holds.
        refittable: names of the weights that may be replaced in the engine.
        attempts: builds that failed before this one.
        inspected_layers: layers of the built engine by type, where a GPU could load it.
    """

    plan: memoryview
    config: EngineConfig
    seconds: float
    precisions: PrecisionReadout
    memory: Mapping[str, int]
    flags: tuple[str, ...]
    obtained: Mapping[str, str]
    flops: Mapping[str, float]
    layer_report: str
    thin: bool = False
    refittable: tuple[str, ...] = ()
    attempts: tuple[BuildAttempt, ...] = ()
    inspected_layers: Mapping[str, int] = field(default_factory=dict)


def build_engine(
    trt: Any,
    graph: Path,
    config: EngineConfig,
    *,
    on_gpu: bool = False,
    progress: Progress = lambda _name, _part: None,
) -> BuiltEngine:
    """Build one engine; where memory or kernels do not suffice, with less, which is said and recorded.

    Args:
        trt: the module of the flavour.
        on_gpu: one of the targets is this machine's GPU, so the engine can be loaded and inspected.

    Raises:
        UsageError: the flavour cannot do what the config asks for.
        BuildError: the graph is refused, all builds fail, or the engine is not of the precision asked for.
        KeyboardInterrupt: Ctrl-C; the builder stops at its next step.
    """
    check_supported(trt, config)
    thin = config.strip and not strips_weights(trt)
    if thin:
        config = dataclasses.replace(config, strip=False)
    with _ONE_BUILD:
        # Before the build: a wrong type shows in a second here and would cost minutes.
        layers = _survey(trt, graph, config)
        tried: list[EngineConfig] = []
        attempts: list[BuildAttempt] = []
        while True:
            try:
                built = _build(trt, graph, config, layers, progress)
                break
            except FailedBuildError as err:
                tried.append(config)
                attempts.append(BuildAttempt(settings_of(config), str(err), round(err.seconds, 3)))
                following = next_config(config, err.kind, tried)
                if following is None:
                    before = f" Tried {len(tried)} times, each with less." if len(tried) > 1 else ""
                    raise BuildError(f"{err}{before}") from err
                progress(f"failed; again with {describe_change(config, following)}", 0.0)
                config = following
        built = dataclasses.replace(built, attempts=tuple(attempts))
        if on_gpu:
            built = _inspect(trt, built, layers)
        if thin:
            progress("leaving out the weights that the graph holds", 1.0)
            built = dataclasses.replace(built, plan=memoryview(thin_engine(built.plan, graph)), thin=True)
        return built


def _usual_shapes(config: EngineConfig) -> dict[str, tuple[int, ...]]:
    return {name: shapes.opt for name, shapes in config.profiles[0].items()}


def _survey(trt: Any, graph: Path, config: EngineConfig) -> tuple[Layer, ...]:
    """The layers of the network at its usual shapes, in the types that the precision asks for."""
    _, network, _ = _parsed(trt, graph, config.component)
    layers = read_layers(trt, network, _usual_shapes(config))
    check_precision(config.component, config.precision, precisions_of(layers), flops_shares(layers))
    return layers


def _parsed(trt: Any, graph: Path, component: str) -> tuple[Any, Any, Any]:
    """A builder, the network of a graph, and the parser, which owns the weights."""
    logger = shared_logger(trt)
    logger.messages.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        named = [("ERROR", f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}") for e in errors]
        raise BuildError(f"{component}: the parser refused {graph.name}: {failure_text(named or logger.messages)}")
    return builder, network, parser


def _build(trt: Any, graph: Path, config: EngineConfig, layers: tuple[Layer, ...], progress: Progress) -> BuiltEngine:
    # Anew for every attempt: after a failure, what the builder keeps of it makes other builds fail.
    builder, network, _parser = _parsed(trt, graph, config.component)
    refittable = refittable_weights(trt, network, config, graph)
    settings = builder.create_builder_config()
    configure(trt, builder, settings, config)
    read_timings(settings, config.timing_cache)
    cancelled = threading.Event()
    monitor = make_monitor(trt, progress, cancelled)
    settings.progress_monitor = monitor
    messages = shared_logger(trt).messages
    messages.clear()
    started = time.perf_counter()
    plan = run_cancellable(
        lambda: builder.build_serialized_network(network, settings),
        cancelled,
        lambda: progress("stopping at the builder's next step; Ctrl-C again leaves at once", 0.0),
    )
    seconds = time.perf_counter() - started
    if plan is None:
        meaning = meaning_of(messages)
        kind = "other" if meaning is None else meaning.kind
        raise FailedBuildError(f"{config.component}: the builder failed: {failure_text(messages)}", kind, seconds)
    write_timings(settings, config.timing_cache)
    precisions = precisions_of(layers)
    return BuiltEngine(
        plan=memoryview(plan),
        config=config,
        seconds=seconds,
        precisions=precisions,
        memory=read_memory(text for _, text in messages),
        flags=set_flags(trt, settings),
        obtained={
            "precisions": f"{precisions.method}; engine inspector not run: no GPU of its targets here",
            "flops": "shapes of the parsed network at the first profile's usual sizes",
            "activation_bytes": "the builder's log, Total Activation Memory",
            "weight_bytes": "the builder's log, Total Weights Memory",
            "build_seconds": "wall clock of the build call",
        },
        flops=flops_shares(layers),
        layer_report=layer_report(layers, _usual_shapes(config)),
        refittable=refittable,
    )


def _inspect(trt: Any, built: BuiltEngine, layers: tuple[Layer, ...]) -> BuiltEngine:
    """Load the engine on the GPU and put its own figures in place of the builder's."""
    logger = shared_logger(trt)
    logger.messages.clear()
    engine = trt.Runtime(logger).deserialize_cuda_engine(built.plan)
    if engine is None:
        raise BuildError(
            f"{built.config.component}: the engine does not load on this GPU: {failure_text(logger.messages)}"
        )
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    own = {
        "activation_bytes": int(engine.device_memory_size_v2),
        "weight_bytes": int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)),
    }
    return dataclasses.replace(
        built,
        memory={**built.memory, **own},
        obtained={
            **built.obtained,
            "precisions": f"{built.precisions.method}; inspected_layers from the engine inspector",
            "activation_bytes": "the loaded engine, device_memory_size_v2",
            "weight_bytes": "the loaded engine, TOTAL_WEIGHTS_SIZE",
        },
        layer_report=layer_report(layers, _usual_shapes(built.config), inspector=text),
        inspected_layers=inspector_types(text),
    )
