"""Programs built by hand, a few lines each, for tests that want one thing and nothing else in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from xllm.ir import Dim, KVLayer, LayerSource, Program, Source, Weight
from xllm.ir.build import emit

torch.set_num_threads(1)
aten = torch.ops.aten
xllm = torch.ops.xllm
HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 16, 24, 4, 2, 4


class Builder:
    """A step program under construction. `call` adds an operator, `weight` a parameter, `finish` gives the program."""

    def __init__(self, layers: int = 1, fixed_floats: int = 0) -> None:
        shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        self.graph = fx.Graph()
        sizes = {name: _symbol(shapes, name, hint) for name, hint in (("T", 1009), ("S", 211))}
        kv = tuple(KVLayer(KV_HEADS, HEAD_DIM, HEAD_DIM, fixed_floats=fixed_floats) for _ in range(layers))
        self.program = Program(
            name="small",
            graph=self.graph,
            dims=(Dim("T", 1, 64), Dim("S", 1, 8)),
            weights={},
            constants={},
            kv=kv,
            layers=tuple(LayerSource(index, (index,)) for index in range(layers)),
            layers_path="model.layers",
        )
        self.layer: int | None = None
        self.ids = self._input("ids", (sizes["T"],), torch.int32)
        self.positions = self._input("positions", (sizes["T"],), torch.int32)
        self.slots = self._input("slots", (sizes["T"],), torch.int32)
        self.last = self._input("last", (sizes["S"],), torch.int32)
        width = KV_HEADS * 2 * HEAD_DIM
        self.kv = self._input("kv", (layers, 4, 32, width), torch.float32)
        if fixed_floats:
            self.fixed = self._input("fixed", (layers, 4, fixed_floats), torch.float32)

    def call(self, target: Callable[..., Any], *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        like = fx.Node(self.graph, "like", "call_function", torch.relu, (), {})
        like.meta["custom"] = {"path": path, "layer": self.layer}
        return emit(self.program, target, args, like=like, kwargs=kwargs)

    def weight(self, name: str, *shape: int) -> fx.Node:
        if self.layer is not None:
            name = f"model.layers.{self.layer}.{name}"
        self.program.weights[name] = Weight(shape, Source((name,)))
        with self.graph.inserting_after(self.kv):  # as canonicalize puts them
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        return self._typed(node, shape, torch.float32, name.rpartition(".")[0])

    def linear(self, x: fx.Node, leaf: str, outputs: int, bias: bool = False) -> fx.Node:
        width = x.meta["val"].shape[-1]
        path = f"model.layers.{self.layer}.{leaf}"
        held = self.weight(f"{leaf}.bias", outputs) if bias else None
        return self.call(xllm.linear.default, x, self.weight(f"{leaf}.weight", outputs, width), held, path=path)

    def finish(self, x: fx.Node) -> Program:
        """`x` [T, HIDDEN] becomes logits [S, VOCAB]."""
        self.layer = None
        rows = self.call(xllm.rows.default, x, self.last)
        head = self.weight("lm_head.weight", VOCAB, HIDDEN)
        self.graph.output((self.call(xllm.linear.default, rows, head, None, path="lm_head"),))
        return self.program

    def _input(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
        return self._typed(self.graph.placeholder(name), shape, dtype, "")

    def _typed(self, node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype, path: str) -> fx.Node:
        with self.mode:
            node.meta = {"val": torch.empty(shape, dtype=dtype, device="meta"), "custom": {"path": path, "layer": None}}
        return node


def small(body: Callable[[Builder, fx.Node], fx.Node], layers: int = 1, fixed_floats: int = 0) -> Program:
    """Embedding, then what `body(builder, x [T, HIDDEN])` gives for each layer, then the output head."""
    builder = Builder(layers, fixed_floats)
    x = builder.call(
        xllm.embedding.default, builder.ids, builder.weight("model.embed_tokens.weight", VOCAB, HIDDEN),
        path="model.embed_tokens",
    )  # fmt: skip
    for builder.layer in range(layers):
        x = body(builder, x)
    return builder.finish(x)


def attend(b: Builder, x: fx.Node) -> fx.Node:
    """Plain attention of its own projections: the smallest body with state."""
    parts = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}
    q, k, v = (heads(b, b.linear(x, name, count * HEAD_DIM), count) for name, count in parts.items())
    return attention(b, q, k, v)


RECURRENT_FLOATS = HIDDEN * 2 + HEADS * HEAD_DIM * HEAD_DIM


def recur(b: Builder, x: fx.Node) -> fx.Node:
    """A convolution of three taps and a delta rule behind it, beside attention: a layer with both kinds of state."""
    layer, place = b.layer or 0, (b.positions, b.slots, b.layer or 0)
    mixed = b.call(xllm.causal_conv.default, b.fixed, x, b.weight("conv.weight", HIDDEN, 3), None, *place, 0, "silu")
    q, k, v = (b.call(aten.reshape.default, mixed, [-1, HEADS, HEAD_DIM]) for _ in range(3))
    decay, beta = b.linear(x, "a_proj", HEADS), b.linear(x, "b_proj", HEADS)
    offset = HIDDEN * 2
    seen = b.call(
        xllm.gated_delta.default, b.fixed, q, k, v, decay, beta, b.positions, b.slots, layer, offset, 0.5, 1e-6
    )
    return b.call(aten.add.Tensor, attend(b, x), b.call(aten.reshape.default, seen, [-1, HIDDEN]))


def heads(b: Builder, x: fx.Node, count: int) -> fx.Node:
    return b.call(aten.reshape.default, x, [-1, count, HEAD_DIM])


def attention(b: Builder, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Write, attend and project back: [T, HIDDEN]."""
    layer = b.layer or 0
    b.call(xllm.kv_write.default, b.kv, k, v, b.positions, b.slots, layer)
    seen = b.call(
        xllm.attention.default, b.kv, q, b.positions, b.slots, None, layer, KV_HEADS, HEAD_DIM, 0.5, 0, 0.0
    )  # fmt: skip
    return b.linear(b.call(aten.reshape.default, seen, [-1, HEADS * HEAD_DIM]), "o_proj", HIDDEN)


def _symbol(shapes: ShapeEnv, name: str, hint: int) -> Any:
    source = ConstantSource(name)
    symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=hint, source=source)
