"""Which tensors an engine writes to memory: a graph's nodes gathered into the kernels that TensorRT makes of them.

The rules are those found in the builder's own lists of kernels:

- A view (Reshape, Transpose, …) moves nothing: the kernels on either side read and write in the order they like.
- What works element by element joins the kernel before it, and only what another kernel reads is written.
- A convolution adds a tensor of its own shape; a matrix product does whatever follows element by element.
- Attention in half precision keeps its scores on the chip, if its heads are narrow.
- Products of one tensor with several weights are one: a U-Net's text is projected for all its attentions at once.
- A matrix product whose result is split becomes one for each part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

# Quantization is done by the kernels on either side; what is kept as int8 is counted in the type it came from.
_VIEWS = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "QuantizeLinear", "DequantizeLinear"}
)
_PRODUCTS = ("MatMul", "Gemm")
_KINDS = {
    **dict.fromkeys(("Conv", "ConvTranspose"), "convolution"),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization", "LayerNormalization", "Softmax"), "norm"),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ArgMax"), "norm"),
    **dict.fromkeys(("Resize", "Concat", "Split", "Pad", "DepthToSpace", "SpaceToDepth"), "move"),
}
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# What may stand between the scores and their softmax, and between that and the second product.
_ON_SCORES = _VIEWS | {"Add", "Mul", "Div", "Cast"}
_WIDEST_FUSED_HEAD = 256


@dataclass(eq=False)
class Kernel:
    """Nodes that run as one.

    Attributes:
        kind: `convolution`, `product`, `attention`, `norm`, `move` or `pointwise`.
        index: its place in the order in which kernels run.
        reads: what it reads from memory, each value once.
        makes: the outputs of its nodes.
        nodes: in the graph's order; views are in no kernel.
    """

    kind: str
    index: int
    reads: list[ir.Value] = field(default_factory=list)
    makes: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its last node."""
        return self.nodes[-1].name or self.nodes[-1].op_type


@dataclass(eq=False)
class _Fusion:
    """The kernels so far, and which of them makes a value."""

    kernels: list[Kernel] = field(default_factory=list)
    maker: dict[ir.Value, Kernel] = field(default_factory=dict)
    products: dict[ir.Value, Kernel] = field(default_factory=dict)

    def start(self, kind: str, *nodes: ir.Node) -> Kernel:
        kernel = Kernel(kind, len(self.kernels))
        self.kernels.append(kernel)
        for node in nodes:
            self.join(kernel, node)
        return kernel

    def multiply(self, node: ir.Node) -> None:
        """Put a product into the kernel that multiplies the same tensor by other weights, or into one of its own."""
        factors = list(operands(node))
        if len(factors) > 1:
            self.start("product", node)
        elif factors[0] in self.products:
            self.join(self.products[factors[0]], node)
        else:
            self.products[factors[0]] = self.start("product", node)

    def join(self, kernel: Kernel, node: ir.Node) -> None:
        kernel.nodes.append(node)
        kernel.reads += [v for v in operands(node) if self.maker.get(v) is not kernel and v not in kernel.reads]
        kernel.makes += node.outputs
        self.maker.update(dict.fromkeys(node.outputs, kernel))

    def split(self, kernel: Kernel, node: ir.Node) -> None:
        """Let a product write the parts that its result is split into, each part by a kernel of its own."""
        for part in node.outputs[1:]:
            twin = Kernel(kernel.kind, len(self.kernels), list(kernel.reads), [part], [*kernel.nodes, node])
            self.kernels.append(twin)
            self.maker[part] = twin
        kernel.nodes.append(node)
        kernel.makes.append(node.outputs[0])
        self.maker[node.outputs[0]] = kernel


def origin(value: ir.Value) -> ir.Value:
    """The value whose memory a view shows."""
    node = value.producer()
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads that is not constant, seen through views."""
    for value in node.inputs:
        if value is not None and (source := origin(value)).const_value is None:
            yield source


def readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a value, itself or through views."""
    for node in value.consumers():
        if node.op_type in _VIEWS:
            yield from readers(node.outputs[0])
        else:
            yield node


def elements(value: ir.Value) -> int:
    """How many numbers a value of known shape has."""
    return math.prod(value.shape.numpy()) if value.shape is not None else 0


def kernels_of(graph: ir.Graph) -> list[Kernel]:
    """The kernels of a graph whose shapes are all known, in an order in which they can run."""
    fusion = _Fusion()
    attentions = {nodes[-1]: nodes for nodes in map(_fused_attention, graph) if nodes}
    inside = {node for nodes in attentions.values() for node in nodes}
    for node in graph:
        if node in attentions:
            fusion.start("attention", *attentions[node])
        elif node in inside or node.op_type in _VIEWS or not any(operands(node)):
            continue
        elif node.op_type == "Split" and (source := _product_only_for(fusion, node)) is not None:
            fusion.split(source, node)
        elif node.op_type in _PRODUCTS:
            fusion.multiply(node)
        elif (kind := _KINDS.get(node.op_type)) is not None:
            fusion.start(kind, node)
        elif (before := _joinable(fusion, node)) is not None:
            fusion.join(before, node)
        else:
            fusion.start("pointwise", node)
    return fusion.kernels


def _joinable(fusion: _Fusion, node: ir.Node) -> Kernel | None:
    """The kernel that an elementwise node joins: the one that makes its latest operand of full size."""
    size = elements(node.outputs[0])
    sources = [(value, fusion.maker[value]) for value in operands(node) if value in fusion.maker]
    full = [(value, kernel) for value, kernel in sources if elements(value) == size]
    if not full:
        return None
    value, latest = max(full, key=lambda source: source[1].index)
    if any(kernel.index > latest.index for _, kernel in sources):
        return None  # it waits for a smaller operand that is made later
    alone = len(list(readers(value))) == 1
    if latest.kind == "convolution":
        residual = node.op_type == "Add" and len(latest.nodes) == 1 and len(full) == len(node.inputs)
        return latest if alone and residual else None
    if latest.kind == "product":
        # An output of the graph is written at once, by the way.
        return latest if alone or node.outputs[0].is_graph_output() else None
    return latest if latest.kind in ("norm", "pointwise") else None


def _product_only_for(fusion: _Fusion, node: ir.Node) -> Kernel | None:
    """The product whose result nothing but this node reads."""
    source = next(operands(node))
    kernel = fusion.maker.get(source)
    alone = kernel is not None and kernel.kind == "product" and source.consumers() == (node,)
    return kernel if alone else None


def _fused_attention(softmax: ir.Node) -> list[ir.Node]:
    """From the product that makes the scores to the one that weighs the values, if the attention is fused."""
    if softmax.op_type != "Softmax":
        return []
    nodes = [softmax]
    while nodes[0].op_type != "MatMul":
        behind = [made for value in nodes[0].inputs if value is not None and (made := value.producer()) is not None]
        step = max(behind, key=lambda made: elements(made.outputs[0]), default=None)
        if step is None or step.op_type not in {*_ON_SCORES, "MatMul"} or len(step.outputs[0].consumers()) != 1:
            return []
        nodes.insert(0, step)
    while nodes[-1].op_type != "MatMul":
        following = nodes[-1].outputs[0].consumers()
        if len(following) != 1 or following[0].op_type not in {*_VIEWS, "Cast", "MatMul"}:
            return []
        nodes.append(following[0])
    query = nodes[0].inputs[0]
    if query is None or query.shape is None or query.dtype not in _HALVES:
        return []
    return nodes if int(query.shape.numpy()[-1]) <= _WIDEST_FUSED_HEAD else []
