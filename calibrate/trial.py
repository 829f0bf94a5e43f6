"""Measuring a plan before any graph is written: the network computes it in PyTorch, and the runtime draws with that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from latentrt.export.engine_graph import graph_tensors, load_graph
from latentrt.export.recording import replaced_pipeline
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.specs import Array, ModelSpec

from .budget import Budget
from .calls import Call
from .fake_quant import simulated
from .judge import Judge, verdicts
from .layer_quant import LayerQuant
from .picture_metrics import PictureMetric
from .pictures import REFERENCE, Drawing, draw, read_pictures
from .prediction_noise import mean_db, share_db
from .sensitivity import measured
from .source import Source

Progress = Callable[[str, int, int], None]
_PLAN = "plan"


class TorchSession:
    """A network in PyTorch as a session of the runtime.

    Args:
        network: `Source.wrapper`, its weights at hand on `device`.
        spec: of its graph.
        device: that inputs are put on.
    """

    def __init__(self, network: nn.Module, spec: ModelSpec, *, device: str) -> None:
        self._network, self._spec, self._device = network, spec, device

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs of the graph."""
        return self._spec

    @property
    def backend(self) -> str:
        """For people."""
        return f"PyTorch {self._device}"

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; the network returns one tensor."""
        given = {name: torch.from_numpy(np.array(values)).to(self._device) for name, values in feeds.items()}
        with torch.inference_mode():
            answer = self._network(**given)
        return {self._spec.outputs[0].name: answer.float().cpu().numpy()}

    def close(self) -> None:
        """Nothing: the weights are the caller's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What plans are measured with; prompts and calls are not those of the calibration.

    Attributes:
        source: the network.
        network: `source.wrapper`, its weights at hand on `device`.
        device: of the network.
        calls: to predict.
        drawing: to draw.
        folder: for the reference's pictures.
        metrics: of pictures, by name.
        judge: of pictures; None where no budget asks for it.
    """

    source: Source
    network: nn.Module
    device: str
    calls: Sequence[Call]
    drawing: Drawing
    folder: Path
    metrics: Mapping[str, PictureMetric]
    judge: Judge | None

    def pipeline(self) -> Pipeline:
        """The bundle in fp32 with the network in PyTorch."""
        return replaced_pipeline(
            self.source.bundle,
            REFERENCE,
            self.source.component,
            lambda: TorchSession(self.network, graph_spec(self.source), device=self.device),
            backend=self.drawing.backend,
            loras=self.drawing.loras,
        )


def graph_spec(source: Source) -> ModelSpec:
    """Inputs and outputs of a source's graph, which is not opened for it."""
    graph = load_graph(source.graph).graph
    return ModelSpec(source.component, graph_tensors(graph.input), graph_tensors(graph.output))


def measure_plan(
    bench: Bench,
    quants: Mapping[str, LayerQuant],
    budgets: Iterable[Budget],
    *,
    on_progress: Progress = lambda what, done, total: None,
) -> dict[str, float]:
    """The values of the budgets' metrics for a plan; `sqnr` and `noise_db` always, which are cheap.

    `noise_db` is what a solver predicts: of the mean over timesteps of noise over signal. `sqnr` is the mean of the
    ratio in dB, which timesteps with much noise weigh less in.

    Args:
        bench: what to measure with.
        quants: the plan's layers.
        budgets: whose metrics are wanted.
        on_progress: told what is done, how much of it, and of how much.

    Raises:
        CalibrationError: a prediction is not finite, or the judge failed.
        BackendError: a picture is not finite, or black.
    """
    noise = measured(bench.network, {_PLAN: quants}, bench.calls, device=bench.device)
    values = {"sqnr": mean_db(noise.together([_PLAN])), "noise_db": share_db(noise.together([_PLAN]))}
    wanted = {budget.metric for budget in budgets} - {"sqnr"}
    if not wanted:
        return values
    count = len(bench.drawing.prompts)
    draw(bench.drawing, REFERENCE, bench.folder, on_progress=on_progress)
    references = np.stack(list(read_pictures(bench.folder, count)))
    with simulated(bench.network, quants), bench.pipeline() as pipeline:
        pictures = np.concatenate(list(_batches(bench.drawing, pipeline, on_progress)))
    for name in wanted - {"accuracy"}:
        values[name] = float(bench.metrics[name](references, pictures).mean())
    if "accuracy" in wanted and bench.judge is not None:
        before, after = (verdicts(bench.judge, bench.drawing.prompts, each) for each in (references, pictures))
        values["accuracy"] = float(np.mean(before) - np.mean(after))
    return values


def _batches(drawing: Drawing, pipeline: Pipeline, on_progress: Progress) -> Iterable[Array]:
    for start in range(0, len(drawing.prompts), drawing.batch):
        on_progress("draw a trial", start, len(drawing.prompts))
        prompts = drawing.prompts[start : start + drawing.batch]
        seeds = [drawing.seed + index for index in range(start, start + len(prompts))]
        yield pipeline(list(prompts), seed=seeds, **drawing.settings, safety_checker=False).images
