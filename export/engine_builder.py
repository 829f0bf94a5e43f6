"""One ONNX graph to one serialized engine, through `tensorrt` or `tensorrt_rtx`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentrt.runtime.engine_sidecar import PrecisionReadout, ShapeProfile
from latentrt.runtime.errors import BuildError

from .engine_log import Progress, error_text, make_monitor, shared_logger
from .engine_readout import check_precision, inspector_types, read_memory, read_precisions

# Full layer information for the engine inspector; it names layers and changes no kernel.
VERBOSITY = "DETAILED"
_ONE_BUILD = threading.Lock()


class Abandoned(KeyboardInterrupt):
    """A second interrupt came before the builder had stopped: its thread is still at work."""


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine and what was read of it.

    Attributes:
        plan: the engine's bytes, a memoryview of TensorRT's own buffer.
        memory: figures of `read_memory`, replaced by the engine's own where a GPU could load it.
        flags: builder flags that were set, TensorRT's defaults included.
        obtained: how the figures were obtained.
    """

    plan: memoryview
    seconds: float
    precisions: PrecisionReadout
    memory: Mapping[str, int]
    flags: tuple[str, ...]
    obtained: Mapping[str, str]
    inspected_layers: Mapping[str, int] = field(default_factory=dict)


def build_engine(
    trt: Any,
    graph: Path,
    *,
    component: str,
    precision: str,
    targets: tuple[str, ...],
    profiles: Mapping[str, ShapeProfile],
    workspace_mib: int | None = None,
    on_gpu: bool = False,
    progress: Progress = lambda _name, _part: None,
) -> BuiltEngine:
    """Build one engine.

    Args:
        trt: the module of the flavour.
        targets: compute capabilities to build for ahead of time; empty builds for the GPU that is here.
        profiles: shapes by input.
        workspace_mib: limit of the builder's scratch memory; None leaves TensorRT's own.
        on_gpu: one of the targets is this machine's GPU, so the engine can be loaded and inspected.

    Raises:
        BuildError: the graph is refused, the build fails, or the engine is not of the precision asked for.
        KeyboardInterrupt: Ctrl-C; the builder stops at its next step.
    """
    with _ONE_BUILD:
        logger = shared_logger(trt)
        logger.messages.clear()
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        _parse(trt, network, logger, component, graph)
        # Before the build: a wrong type shows in a second here and would cost minutes.
        precisions = read_precisions(trt, network)
        check_precision(component, precision, precisions)
        config = builder.create_builder_config()
        _configure(trt, builder, config, component, targets, profiles, workspace_mib)
        cancelled = threading.Event()
        monitor = make_monitor(trt, progress, cancelled)
        config.progress_monitor = monitor
        started = time.perf_counter()
        plan = run_cancellable(
            lambda: builder.build_serialized_network(network, config),
            cancelled,
            lambda: progress("stopping at the builder's next step; Ctrl-C again leaves at once", 0.0),
        )
        seconds = time.perf_counter() - started
        if plan is None:
            raise BuildError(f"{component}: the builder failed: {error_text(logger.messages)}")
        built = BuiltEngine(
            plan=memoryview(plan),
            seconds=seconds,
            precisions=precisions,
            memory=read_memory(text for _, text in logger.messages),
            flags=_flags(trt, config),
            obtained={
                "precisions": f"{precisions.method}; engine inspector not run: no GPU of its targets here",
                "activation_bytes": "the builder's log, Total Activation Memory",
                "weight_bytes": "the builder's log, Total Weights Memory",
                "build_seconds": "wall clock of the build call",
            },
        )
        return _inspect(trt, logger, component, built) if on_gpu else built


def _parse(trt: Any, network: Any, logger: Any, component: str, graph: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    named = [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors]
    raise BuildError(f"{component}: the parser refused {graph.name}: {'; '.join(named) or error_text(logger.messages)}")


def _configure(
    trt: Any,
    builder: Any,
    config: Any,
    component: str,
    targets: tuple[str, ...],
    profiles: Mapping[str, ShapeProfile],
    workspace_mib: int | None,
) -> None:
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, VERBOSITY)
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, sm in enumerate(targets):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, sm.upper()), index):
                raise BuildError(f"{component}: {trt.__name__} {trt.__version__} refused the target {sm}.")
    profile = builder.create_optimization_profile()
    for name, shapes in profiles.items():
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"{component}: the builder refused the shapes {dict(profiles)}.")


def _flags(trt: Any, config: Any) -> tuple[str, ...]:
    members = trt.BuilderFlag.__members__.items()
    return tuple(sorted(name for name, flag in members if config.get_flag(flag)))


def _inspect(trt: Any, logger: Any, component: str, built: BuiltEngine) -> BuiltEngine:
    """Load the engine on the GPU and put its own figures in place of the builder's."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(built.plan)
    if engine is None:
        raise BuildError(f"{component}: the engine does not load on this GPU: {error_text(logger.messages)}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    own = {
        "activation_bytes": int(engine.device_memory_size_v2),
        "weight_bytes": int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)),
    }
    return BuiltEngine(
        plan=built.plan,
        seconds=built.seconds,
        precisions=built.precisions,
        memory={**built.memory, **own},
        flags=built.flags,
        obtained={
            **built.obtained,
            "precisions": f"{built.precisions.method}; inspected_layers from the engine inspector",
            "activation_bytes": "the loaded engine, device_memory_size_v2",
            "weight_bytes": "the loaded engine, TOTAL_WEIGHTS_SIZE",
        },
        inspected_layers=inspector_types(text),
    )


def run_cancellable(
    work: Callable[[], Any], cancelled: threading.Event, on_cancel: Callable[[], None] = lambda: None
) -> Any:
    """Run `work` in a thread so that Ctrl-C reaches Python while the builder is inside its library.

    An interrupt sets `cancelled`, calls `on_cancel` and waits for the work to end.

    Raises:
        KeyboardInterrupt: after an interrupt, once the work has ended.
        Abandoned: a second interrupt came while waiting.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    ended = threading.Event()

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as err:  # handed to the caller's thread below
            failure.append(err)
        finally:
            ended.set()

    worker = threading.Thread(target=target, name="engine build", daemon=True)
    try:
        worker.start()
        _wait(ended)
    except KeyboardInterrupt:
        cancelled.set()
        on_cancel()
        try:
            if worker.ident is not None:
                _wait(ended)
        except KeyboardInterrupt as err:
            raise Abandoned from err
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def _wait(ended: threading.Event) -> None:
    while not ended.wait(0.1):  # on Windows a wait without a limit cannot be interrupted
        pass
