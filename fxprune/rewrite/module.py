"""The emitted model: a GraphModule with all modules of the original and a graph for each mode."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from fxprune.common.identity import Memo, from_memo, memo_of, to_memo
from fxprune.rewrite.containers import containers_named
from fxprune.rewrite.pickled import pack, unpack
from fxprune.trace.context_managers import blocks
from fxprune.trace.copying import copy_rebound

__all__ = ["PrunedModule", "copy_behaviour", "hold_modes", "memo_that_shares_graphs"]

_NAME = "class name"  # key that cannot be the name of an attribute, because of its space
_MODES = "_own_modes"
_MODULE_STORES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _attribute_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are plain attributes of a module.

    torch.fx would turn them into buffers.
    """
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


class PrunedModule(fx.GraphModule):
    """A GraphModule with the whole module tree of the original.

    It differs from ``torch.fx.GraphModule`` in two ways. That class keeps only the modules that
    its graph calls, so the state dict would lack parameters that no operation uses. And a graph
    has no branches: a model that branches on ``self.training`` (for an auxiliary head) gets a
    second graph, the ``training_graph``, which runs in training mode.

    Parameters
    ----------
    root:
        The module whose parameters, buffers, children and mode the new one shares.
    graph:
        The graph to run; in evaluation mode only, if there is a ``training_graph``.
    class_name:
        The name of the new class.
    training_graph:
        The graph to run in training mode, if it is another one.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations, and does not know this one
        training_graph: fx.Graph | None

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        class_name: str = "Pruned",
        training_graph: fx.Graph | None = None,
    ) -> None:
        self.__dict__["training_graph"] = None
        # with an empty root and graph, because it would copy each module that the graph calls
        super().__init__(nn.Module(), fx.Graph(), class_name=class_name)
        for store in _MODULE_STORES:
            self.__dict__[store] = root.__dict__[store]
        self.__dict__.update(_attribute_tensors(root))
        self.training = root.training
        self.__dict__["training_graph"] = training_graph
        self.graph = graph  # compiles it

    def train(self, mode: bool = True) -> PrunedModule:
        """Set the mode of this module and of those below.

        Modules that the original's ``train()`` leaves in a mode of their own get that mode here,
        too.
        """
        super().train(mode)
        modes = self.__dict__.get(_MODES, {}).get(mode)
        for path, module in self.named_modules() if modes else ():
            module.training = modes.get(path, module.training)
        return self

    def recompile(self) -> Any:
        """Compile the graph, or the graphs of both modes, into ``forward``."""
        with containers_named(self.graph), blocks(self.graph):
            code = super().recompile()
        training_graph = self.__dict__.get("training_graph")
        if training_graph is not None:
            kind = type(self)
            evaluation = kind.forward
            with containers_named(training_graph), blocks(training_graph):
                training = type(fx.GraphModule(self, training_graph)).forward
            kind.forward = _forward_by_mode(evaluation, training)
        return code

    def __copy__(self) -> PrunedModule:
        new = _empty()
        stores, rest, kind = _parts(self)
        _rebuild(new, stores, rest, _copy_graphs(self), kind)
        return new

    def __deepcopy__(self, memo: Memo) -> PrunedModule:
        stores, rest, kind = _parts(self)
        # the memo shares the graph (see memo_that_shares_graphs): share its compiled code as well
        if from_memo(memo, self.graph, None) is self.graph:
            new = to_memo(memo, self, object.__new__(type(self)))
            del rest[_NAME]
            new.__dict__.update({key: copy_rebound(value, memo) for key, value in rest.items()})
            new.__dict__.update(
                copy.deepcopy(stores, memo), _graph=self.graph, training_graph=self.training_graph
            )
            return new
        new = to_memo(memo, self, _empty())
        # copied with the memo, because hooks may refer to modules around this one
        rest = {key: copy_rebound(value, memo) for key, value in rest.items()}
        _rebuild(new, copy.deepcopy(stores, memo), rest, _copy_graphs(self), kind)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        stores, rest, kind = _parts(self)
        inference = pack(self.graph)
        training = None if self.training_graph is None else pack(self.training_graph)
        graphs = inference, training
        return _empty, (), {"stores": stores, "rest": rest, "graphs": graphs, "kind": kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph, training_graph = state["graphs"]
        graphs = unpack(graph), None if training_graph is None else unpack(training_graph)
        _rebuild(self, state["stores"], dict(state["rest"]), graphs, state["kind"])


def _rebuild(
    module: PrunedModule,
    stores: dict[str, Any],
    rest: dict[str, Any],
    graphs: tuple[fx.Graph, fx.Graph | None],
    kind: Any,
) -> None:
    """Set up a module, which is still empty, from the parts of another one.

    Parameters
    ----------
    stores, rest, kind:
        The result of :func:`_parts`. ``rest`` loses an entry.
    graphs:
        The graph, and the training graph or None.
    """
    name = rest.pop(_NAME)
    root = nn.Module()
    constants = {key: value for key, value in rest.items() if isinstance(value, Tensor)}
    root.__dict__.update({**stores, **constants})
    root.training = rest["training"]
    PrunedModule.__init__(module, root, graphs[0], name, graphs[1])
    module.__dict__.update(rest)
    if kind is not None:
        _inherit(module, kind)


def _parts(module: PrunedModule) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return what :func:`_rebuild` needs besides the graphs.

    These are the stores of parameters, buffers and modules; all other attributes and the name
    of the class; and the class that the module also inherits from, or None.
    """
    stores = {name: module.__dict__[name] for name in _MODULE_STORES}
    rest = {**module.__dict__, _NAME: module._get_name()}
    for name in (*stores, "_graph", "training_graph"):
        rest.pop(name, None)
    return stores, rest, getattr(type(module), "_original_class", None)


def _copy_graphs(module: PrunedModule) -> tuple[fx.Graph, fx.Graph | None]:
    """Return copies of the graph and of the training graph."""
    return copy.deepcopy(module.graph), copy.deepcopy(module.training_graph)


def copy_behaviour(module: PrunedModule, original: nn.Module) -> None:
    """Give a module the class and the attributes of the one that it replaces.

    Python code that is not traced calls methods of the original. This is a function, because a
    method would hide a method of the user's that has its name.
    """
    for name, value in vars(original).items():
        if name not in module.__dict__ or "_hooks" in name:
            module.__dict__[name] = value
    _inherit(module, getattr(type(original), "_original_class", type(original)))


def hold_modes(module: PrunedModule, modes: Mapping[bool, Mapping[str, bool]]) -> None:
    """Make ``train()`` leave some modules below in a mode of their own.

    Parameters
    ----------
    modes:
        Mode of this module -> name of a module below -> mode of that module.
    """
    if any(modes.values()):
        module.__dict__[_MODES] = modes


def _inherit(module: PrunedModule, kind: type) -> None:
    """Make ``kind`` a base class of the class of a module.

    This happens after construction, because GraphModule's ``__init__`` would call that of
    ``kind``.
    """
    # Copy _wrapped_call: recompile() would make a second one around the first, and the two would
    # call each other without end.
    graph_class = type(module)
    members = {"_original_class": kind, "_wrapped_call": vars(graph_class)["_wrapped_call"]}
    module.__class__ = type(graph_class.__name__, (graph_class, kind), members)


def memo_that_shares_graphs(model: nn.Module) -> Memo:
    """Return a memo for ``copy.deepcopy`` with which the copies share the model's graphs.

    This makes copying fast. Neither the model nor a copy may change its graph afterwards.
    """
    graphs: list[fx.Graph | None] = []
    for module in model.modules():
        if isinstance(module, PrunedModule):
            graphs += [module.graph, module.training_graph]
    return memo_of((graph, graph) for graph in graphs if graph is not None)


def _forward_by_mode(evaluation: Any, training: Any) -> Any:
    """Return a forward that calls one of two functions, by the mode of the module."""

    @functools.wraps(evaluation)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the module's mode."""
        forward_of_mode = training if self.training else evaluation
        return forward_of_mode(self, *args, **kwargs)

    return forward


def _empty() -> PrunedModule:
    """Return an empty object for :func:`_rebuild` to set up.

    Objects that refer to the module can then be copied or read before the module is complete.
    """
    return PrunedModule.__new__(PrunedModule)
