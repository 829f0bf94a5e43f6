"""Let one timestep serve all rows of a call, beside a timestep for each."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class TimestepRowsPass(InPlacePass):
    """Expand the timestep to as many rows as there are latents.

        before   timestep (batch,) -> what reads it
        after    Shape(sample, 0 to 1), Expand(timestep, shape) -> what read it

    diffusers writes that Expand; the exporter drops it, because with a timestep for each row it changes nothing.
    Without it a graph given one timestep for two rows broadcasts where it can and fails where it cannot: optimum's
    pipelines give one. With the timestep of a row each, the result is the same, bit for bit.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite a graph with the inputs `timestep` and `sample`; `modified` says whether it is one."""
        inputs = {value.name: value for value in model.graph.inputs}
        timestep, sample = inputs.get("timestep"), inputs.get("sample")
        if timestep is None or sample is None:
            return PassResult(model, modified=False)
        shape = ir.node("Shape", [sample], attributes={"start": 0, "end": 1}, name="timestep_rows")
        expand = ir.node("Expand", [timestep, shape.outputs[0]], name="timestep_expand")
        rows, expanded = shape.outputs[0], expand.outputs[0]
        rows.name, rows.type, rows.shape = "timestep_rows", ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        expanded.name, expanded.type, expanded.shape = "timestep_expanded", timestep.type, timestep.shape
        timestep.replace_all_uses_with(expanded)
        expand.replace_input_with(0, timestep)
        model.graph.insert_before(model.graph[0], [shape, expand])
        return PassResult(model, modified=True)
