"""Following channels from node to node of a traced model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from merge_ray.errors import CheckpointError
from merge_ray.matching.groups import Member

POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Identity,
    nn.Dropout, nn.Dropout2d,
)  # fmt: skip
SPATIAL = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.Upsample,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
LAYERS = (*POINTWISE, *SPATIAL, *NORMS, nn.Conv2d, nn.Linear, nn.MultiheadAttention)


@dataclass(eq=False)
class Channels:
    """The channels along an axis of a value; axes that are combined element by element share one.

    fixed: whether their order is not ours to change, as that of a model's inputs and outputs.
    """

    size: int
    fixed: bool = False
    members: list[Member] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    heads: set[int] = field(default_factory=set)
    parent: Channels | None = None

    def root(self) -> Channels:
        """What stands for all channels that this one was joined with."""
        return self if self.parent is None else self.parent.root()

    def join(self, other: Channels) -> Channels:
        """Make both the same channels."""
        one, two = self.root(), other.root()
        if one is not two:
            two.parent = one
            one.fixed |= two.fixed
            one.heads |= two.heads
            one.members += [member for member in two.members if member not in one.members]
            one.consumers += two.consumers
        return one


Axes = list[Channels]


def is_packed_attention(module: nn.Module) -> bool:
    """Whether this is an attention as timm builds it: one linear layer for queries, keys and values, and one after."""
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj")) and hasattr(
        module, "num_heads"
    )


class Flow:
    """Follows channels from node to node of a graph.

    read: the channels in the order in which they are read by a layer.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule, paths: dict[fx.Node, str]) -> None:
        self.model, self.traced, self.paths = model, traced, paths
        self.names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
        self.values: dict[fx.Node, Axes] = {}
        self.read: list[Channels] = []

    def follow(self, graph: fx.Graph) -> None:
        """Go through the graph; raises :class:`CheckpointError` naming the module in the way."""
        for node in graph.nodes:
            if node.op == "output":
                for axes in self._operands(node.all_input_nodes):
                    self._fix(axes)
            elif _is_tensor(node) or node.op == "call_module":
                self.values[node] = self._value(node)

    def _operands(self, nodes: Iterable[Any]) -> list[Axes]:
        return [self.values[node] for node in nodes if isinstance(node, fx.Node) and node in self.values]

    def _value(self, node: fx.Node) -> Axes:
        if node.op == "placeholder":
            return self._fixed(node)
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            return self._layer(node, module, str(node.target))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
        rule = RULES.get(str(name).lstrip("_"))
        if rule is None:
            raise self._unsupported(node, f"{name}() is not an operation that channels can be followed through")
        return rule(self, node)

    def _unsupported(self, node: fx.Node, why: str) -> CheckpointError:
        where = str(node.target) if node.op == "call_module" else self.paths.get(node, "")
        named = f"{where or 'the model'} ({type(self.model.get_submodule(where)).__name__})"
        return CheckpointError(f"no permutation groups: {named} is in the way: {why}")

    # Values

    def _shape(self, node: fx.Node) -> Sequence[int]:
        return list(node.meta["tensor_meta"].shape)

    def _fixed(self, node: fx.Node) -> Axes:
        return [Channels(size, fixed=True) for size in self._shape(node)]

    def _fix(self, axes: Axes) -> None:
        for channels in axes:
            channels.root().fixed = True

    def _attribute(self, path: str) -> Axes:
        """A parameter that is used as it is: every axis may be channels, until something says otherwise."""
        tensor: Any = self.traced
        for part in path.split("."):
            tensor = getattr(tensor, part)
        name = self.names.get(id(tensor))
        if name is None:
            return [Channels(size, fixed=True) for size in tensor.shape]
        return [Channels(size, members=[Member(name, axis, "out")]) for axis, size in enumerate(tensor.shape)]

    def _made(self, size: int, *members: Member) -> Channels:
        return Channels(size, members=list(members))

    def _reads(self, channels: Channels, path: str | None, member: Member) -> None:
        """Note that the layer at ``path`` (None where it is no module) reads the channels."""
        root = channels.root()
        root.members.append(member)
        root.consumers += [path] if path else []
        self.read.append(root)

    # Layers

    def _layer(self, node: fx.Node, module: nn.Module, path: str) -> Axes:
        axes = list(self._operands(node.args)[0])
        if isinstance(module, POINTWISE):
            return axes
        if isinstance(module, SPATIAL):
            return self.pool(node)
        if isinstance(module, NORMS):
            self._normalise(node, module, path, axes)
            return axes
        if isinstance(module, nn.Conv2d):
            return self._convolve(node, module, path, axes)
        if isinstance(module, nn.Linear):
            self._reads(axes[-1], path, Member(f"{path}.weight", 1, "in"))
            return [*axes[:-1], self._made(module.out_features, *_weights(module, path))]
        return self._attend(node, module, path, axes)

    def _normalise(self, node: fx.Node, module: nn.Module, path: str, axes: Axes) -> None:
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            raise self._unsupported(node, f"it normalises over {len(module.normalized_shape)} axes")
        channels = axes[-1 if isinstance(module, nn.LayerNorm) else 1].root()
        if isinstance(module, nn.LayerNorm) and channels.size != module.normalized_shape[0]:
            raise self._unsupported(node, "it does not normalise over the last axis")
        names = [name for name, tensor in module.state_dict().items() if tensor.dim() == 1]
        channels.members += [Member(f"{path}.{name}", 0, "out") for name in names]
        if isinstance(module, nn.GroupNorm):
            channels.heads.add(module.num_groups)

    def _convolve(self, node: fx.Node, module: nn.Conv2d, path: str, axes: Axes) -> Axes:
        spatial = self._fixed(node)[2:]
        if module.groups == 1:
            self._reads(axes[1], path, Member(f"{path}.weight", 1, "in"))
            return [axes[0], self._made(module.out_channels, *_weights(module, path)), *spatial]
        if module.groups == module.in_channels == module.out_channels:
            axes[1].root().members += _weights(module, path)
            return [*axes[:2], *spatial]
        raise self._unsupported(node, f"it convolves {module.groups} groups of channels")

    def _attend(self, node: fx.Node, module: nn.Module, path: str, axes: Axes) -> Axes:
        packed: Any = module
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is None or module.bias_k is not None:
                raise self._unsupported(node, "its queries, keys and values are not of one width, or have extra biases")
            first, weight, bias, last = path, "in_proj_weight", "in_proj_bias", "out_proj"
            for operand in self._operands(node.all_input_nodes):
                for one, two in zip(axes, operand, strict=True):
                    one.join(two)
        else:
            extras = {
                type(part).__name__ for part in module.children() if not isinstance(part, (nn.Linear, *POINTWISE))
            }
            if extras:
                raise self._unsupported(node, f"it normalises within ({', '.join(sorted(extras))})")
            first, weight, bias, last = f"{path}.qkv", "qkv.weight", "qkv.bias", "proj"
        output = getattr(packed, last)
        width = output.in_features
        starts = [0, width, 2 * width]
        inner = [Member(f"{path}.{weight}", 0, "out", start) for start in starts]
        if f"{path}.{bias}" in self.names.values():
            inner += [Member(f"{path}.{bias}", 0, "out", start) for start in starts]
        self._reads(axes[-1], first, Member(f"{path}.{weight}", 1, "in"))
        heads = self._made(width, *inner)
        heads.heads.add(packed.num_heads)
        self._reads(heads, f"{path}.{last}", Member(f"{path}.{last}.weight", 1, "in"))
        return [*axes[:-1], self._made(output.out_features, *_weights(output, f"{path}.{last}"))]

    # Functions

    def same(self, node: fx.Node) -> Axes:
        """Pointwise, of one value."""
        return list(self._operands(node.args)[0])

    def combine(self, node: fx.Node) -> Axes:
        """Pointwise, of several values whose axes are aligned at the end."""
        operands = self._operands(node.args)
        result: Axes = []
        for axis, size in enumerate(reversed(self._shape(node)), start=1):
            aligned = [axes[-axis] for axes in operands if len(axes) >= axis]
            wide = [channels for channels in aligned if channels.size == size]
            for channels in wide[1:]:
                wide[0].join(channels)
            result.insert(0, wide[0])
        return result

    def multiply(self, node: fx.Node) -> Axes:
        """A value times a matrix of parameters: a linear layer without a name."""
        matrix = node.args[1]
        axes, weight = self._operands(node.args)
        while isinstance(matrix, fx.Node) and matrix.op != "get_attr":
            matrix = matrix.args[0]
        if len(weight) != 2 or not weight[0].members:
            raise self._unsupported(node, "it multiplies two values that are not parameters")
        (member,) = weight[0].members
        self._reads(axes[-1], None, Member(member.tensor, 0, "in"))
        return [*axes[:-1], weight[1]]

    def reshape(self, node: fx.Node) -> Axes:
        """Axes that stay whole, at the same stride, keep their channels."""
        (axes,) = self._operands(node.args[:1])
        shape = self._shape(node)
        sizes = [channels.size for channels in axes]
        before = {(math.prod(sizes[:axis]), sizes[axis]): channels for axis, channels in enumerate(axes)}
        result, kept = [], set()
        for axis, size in enumerate(shape):
            channels = before.get((math.prod(shape[:axis]), size), Channels(size, fixed=True))
            kept.add(id(channels))
            result.append(channels)
        if lost := [c.size for c in axes if id(c) not in kept and c.size > 1 and not c.root().fixed]:
            raise self._unsupported(node, f"it takes {lost[0]} channels apart, or together with positions")
        return result

    def move(self, node: fx.Node) -> Axes:
        """Axes in another order."""
        (axes,) = self._operands(node.args[:1])
        order: Any = node.args[1:]
        if node.target in ("transpose", torch.transpose):
            one, two = order
            moved = list(axes)
            moved[one], moved[two] = axes[two], axes[one]
            return moved
        return [axes[axis] for axis in (order[0] if isinstance(order[0], tuple | list) else order)]

    def join_up(self, node: fx.Node) -> Axes:
        """Values one after the other along an axis, which is then nobody's channels."""
        values: Any = node.args[0]
        operands = self._operands(values)
        dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        axis = dim % len(operands[0])
        result = []
        for index, parts in enumerate(zip(*operands, strict=True)):
            if index == axis:
                self._fix(list(parts))
                result.append(Channels(self._shape(node)[axis], fixed=True))
            else:
                for part in parts[1:]:
                    parts[0].join(part)
                result.append(parts[0])
        return result

    def reduce(self, node: fx.Node) -> Axes:
        """A mean (or other statistic) over axes that are not channels."""
        (axes,) = self._operands(node.args[:1])
        over: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [over] if isinstance(over, int) else over or range(len(axes))
        gone = {dim % len(axes) for dim in dims}
        if any(not axes[axis].root().fixed for axis in gone):
            raise self._unsupported(node, "it reduces over channels")
        if len(self._shape(node)) == len(axes):
            return [Channels(1, fixed=True) if axis in gone else channels for axis, channels in enumerate(axes)]
        return [channels for axis, channels in enumerate(axes) if axis not in gone]

    def take(self, node: fx.Node) -> Axes:
        """A part of a value, by slices and integers; or one of several results, of which the first is a value."""
        (axes,) = self._operands(node.args[:1])
        if not _is_tensor(node.args[0]):
            return axes
        index: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if Ellipsis in index or None in index:
            raise self._unsupported(node, "it indexes with an ellipsis or a new axis")
        result = []
        for axis, channels in enumerate(axes):
            part = index[axis] if axis < len(index) else slice(None)
            if part == slice(None):
                result.append(channels)
                continue
            if not channels.root().fixed:
                raise self._unsupported(node, "it takes some of the channels")
            if isinstance(part, slice):
                result.append(Channels(self._shape(node)[len(result)], fixed=True))
        return result

    def pool(self, node: fx.Node) -> Axes:
        """Something done to every channel's positions."""
        return self._operands(node.args)[0][:2] + self._fixed(node)[2:]

    def expand(self, node: fx.Node) -> Axes:
        """Axes of one element repeated."""
        (axes,) = self._operands(node.args[:1])
        shape = self._shape(node)
        new: Axes = [Channels(size, fixed=True) for size in shape]
        for axis in range(1, len(axes) + 1):
            if axes[-axis].size == shape[-axis]:
                new[-axis] = axes[-axis]
        return new


def _is_tensor(node: Any) -> bool:
    """Whether a node's value was a tensor, not a size or several results."""
    return isinstance(node.meta.get("tensor_meta"), TensorMetadata)


def _weights(module: nn.Module, path: str) -> list[Member]:
    """The tensors that make a layer's output channels."""
    return [Member(f"{path}.{name}", 0, "out") for name, _ in module.named_parameters(recurse=False)]


RULES: dict[str, Callable[[Flow, fx.Node], Axes]] = {
    **dict.fromkeys(
        ("relu", "relu_", "gelu", "silu", "sigmoid", "tanh", "dropout", "contiguous", "to", "type", "float", "clone"),
        Flow.same,
    ),
    **dict.fromkeys(("add", "iadd", "mul", "imul", "sub", "add_", "mul_", "truediv", "div"), Flow.combine),
    **dict.fromkeys(("matmul",), Flow.multiply),
    **dict.fromkeys(("reshape", "view", "flatten", "squeeze", "unsqueeze"), Flow.reshape),
    **dict.fromkeys(("permute", "transpose"), Flow.move),
    **dict.fromkeys(("cat", "concat"), Flow.join_up),
    **dict.fromkeys(("mean", "amax", "sum"), Flow.reduce),
    **dict.fromkeys(("getitem",), Flow.take),
    **dict.fromkeys(("expand",), Flow.expand),
    **dict.fromkeys(("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "pad"), Flow.pool),
}
