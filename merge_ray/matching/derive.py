"""Permutation groups of a model, found by following its channels through a trace of its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from merge_ray.errors import CheckpointError
from merge_ray.matching.flow import LAYERS, Flow, is_packed_attention
from merge_ray.matching.groups import Group, Member, PermutationGroups


def derive_groups(
    module: nn.Module, example: Tensor, *, prefix: str = "", path: str = "", own: Iterable[str] = ()
) -> PermutationGroups:
    """The permutation groups of ``module``, whose forward pass takes ``example`` (a batch of one or more).

    Knows convolutions (plain and depthwise), linear layers, batch, group and layer normalisation, attention, pooling,
    pointwise functions, sums and reshapes that leave channels whole: the ResNets of torchvision, timm and Taskonomy,
    and the ViT towers of torchvision, timm and open_clip. Attention's channels are permuted alike in queries, keys and
    values, and its heads as wholes. prefix: stands before tensor names in the weights. path: where ``module`` is in
    the model whose activations are observed, with a dot behind. own: see :class:`PermutationGroups`.

    Raises :class:`CheckpointError` naming the module in which channels cannot be followed.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Exception as error:
        where = tracer.path or type(module).__name__
        raise CheckpointError(f"no permutation groups: {where} cannot be traced ({error})") from error
    traced = fx.GraphModule(tracer.root, graph)
    training = module.training
    with torch.no_grad():
        ShapeProp(traced.eval()).propagate(example)
    module.train(training)
    flow = Flow(module, traced, tracer.paths)
    flow.follow(graph)
    groups: list[Group] = []
    consumed = {id(channels.root()): channels.root() for channels in flow.read}
    for channels in consumed.values():
        if not channels.fixed:
            heads = channels.heads or {1}
            if len(heads) > 1:
                raise CheckpointError(
                    f"no permutation groups: the channels of {channels.members[0].tensor} come in groups of different "
                    f"numbers, {sorted(heads)}"
                )
            members = tuple(Member(prefix + m.tensor, m.axis, m.side, m.start) for m in dict.fromkeys(channels.members))
            observed = path + channels.consumers[-1] if channels.consumers else ""
            groups.append(Group(str(len(groups)), channels.size, members, observed, heads.pop()))
    return PermutationGroups(tuple(groups), frozenset(own))


class _Tracer(fx.Tracer):
    """Stops at the layers that are known, also where a library subclasses them; remembers where it is."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.path = ""
        self.paths: dict[fx.Node, str] = {}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, LAYERS) or is_packed_attention(module)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = outer
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.paths[node] = self.path
        return node
