"""The emitted model: an ordinary GraphModule that also keeps what its graph does not call, and
both modes of control flow.
"""

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
from fxprune.trace.copying import copied

__all__ = ["PrunedModule"]

_NAME = "class name"  # no attribute can be called so
_MODES = "_own_modes"
_MODULE_STORES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that are plain attributes: torch.fx would make buffers of them."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


class PrunedModule(fx.GraphModule):
    """A GraphModule with the whole module tree of the original.

    ``torch.fx.GraphModule`` takes over only what its graph calls, so parameters that no operation
    uses would be missing from the state dict. And a graph has one path: a model that branches on
    ``self.training`` (an auxiliary head) has a second one, the ``training_graph``, which runs in
    training mode.
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
        # it would copy what the graph calls, one by one
        super().__init__(nn.Module(), fx.Graph(), class_name=class_name)
        for store in _MODULE_STORES:
            self.__dict__[store] = root.__dict__[store]
        self.__dict__.update(_constants(root))
        self.training = root.training
        self.__dict__["training_graph"] = training_graph
        self.graph = graph  # compiles it

    def behaving_like(self, original: nn.Module) -> PrunedModule:
        """Take over class and attributes of the module in the place of which this one stands:
        Python code calls its methods.
        """
        self.__dict__.update(
            {name: value for name, value in vars(original).items() if self._takes(name)}
        )
        self._inherit(getattr(type(original), "_original_class", type(original)))
        return self

    def holding_modes(self, modes: Mapping[bool, Mapping[str, bool]]) -> PrunedModule:
        """Give the modules below these modes, by their names, whenever :meth:`train` puts this one
        into the mode of the key.
        """
        if any(modes.values()):
            self.__dict__[_MODES] = modes
        return self

    def train(self, mode: bool = True) -> PrunedModule:
        """As in every module; those that the original's ``train()`` leaves in a mode of their own
        have it here as well.
        """
        super().train(mode)
        own = self.__dict__.get(_MODES, {}).get(mode)
        for path, module in self.named_modules() if own else ():
            module.training = own.get(path, module.training)
        return self

    def _takes(self, name: str) -> bool:
        """Whether an attribute of another module can be this one's: hooks, and what a GraphModule
        has no attribute for.
        """
        return name not in self.__dict__ or "_hooks" in name

    def _inherit(self, kind: type) -> None:
        # After construction: GraphModule's __init__ would call that of the other class. Its own
        # way of calling comes along, or recompile() would make a second one, around the first,
        # which calls the second.
        own = type(self)
        members = {"_original_class": kind, "_wrapped_call": vars(own)["_wrapped_call"]}
        self.__class__ = type(own.__name__, (own, kind), members)

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

            @functools.wraps(evaluation)
            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return (
                    training(self, *args, **kwargs)
                    if self.training
                    else evaluation(self, *args, **kwargs)
                )

            kind.forward = forward
        return code

    def _rebuild(
        self,
        stores: dict[str, Any],
        rest: dict[str, Any],
        graphs: tuple[fx.Graph, fx.Graph | None],
        kind: Any,
    ) -> None:
        """Make this object, which has nothing yet, a module of these parts."""
        name = rest.pop(_NAME)
        root = nn.Module()
        root.__dict__.update(
            {**stores, **{key: value for key, value in rest.items() if isinstance(value, Tensor)}}
        )
        root.training = rest["training"]
        PrunedModule.__init__(self, root, graphs[0], name, graphs[1])
        self.__dict__.update(rest)
        if kind is not None:
            self._inherit(kind)

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """What :meth:`_rebuild` takes beside the graphs: the stores, all other attributes, and the
        class it behaves like.
        """
        stores = {name: self.__dict__[name] for name in _MODULE_STORES}
        rest = {
            name: value
            for name, value in self.__dict__.items()
            if name not in {*stores, "_graph", "training_graph"}
        }
        return (
            stores,
            {**rest, _NAME: self._get_name()},
            getattr(type(self), "_original_class", None),
        )

    def _graphs(self) -> tuple[fx.Graph, fx.Graph | None]:
        return copy.deepcopy(self.graph), copy.deepcopy(self.training_graph)

    def __copy__(self) -> PrunedModule:
        new = _empty()
        stores, rest, kind = self._parts()
        new._rebuild(stores, rest, self._graphs(), kind)
        return new

    def __deepcopy__(self, memo: Memo) -> PrunedModule:
        stores, rest, kind = self._parts()
        # the code that it was compiled to is shared as well
        if from_memo(memo, self.graph, None) is self.graph:
            new = to_memo(memo, self, object.__new__(type(self)))
            del rest[_NAME]
            new.__dict__.update({key: copied(value, memo) for key, value in rest.items()})
            new.__dict__.update(
                copy.deepcopy(stores, memo), _graph=self.graph, training_graph=self.training_graph
            )
            return new
        new = to_memo(memo, self, _empty())
        # hooks refer to the modules around them
        rest = {key: copied(value, memo) for key, value in rest.items()}
        new._rebuild(copy.deepcopy(stores, memo), rest, self._graphs(), kind)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        stores, rest, kind = self._parts()
        graphs = (
            pack(self.graph),
            None if self.training_graph is None else pack(self.training_graph),
        )
        return _empty, (), {"stores": stores, "rest": rest, "graphs": graphs, "kind": kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph, training_graph = state["graphs"]
        graphs = unpack(graph), None if training_graph is None else unpack(training_graph)
        self._rebuild(state["stores"], dict(state["rest"]), graphs, state["kind"])


def sharing_graphs(model: nn.Module) -> Memo:
    """What ``copy.deepcopy`` is to know so that copies share the model's graphs, which makes them
    quick. None may change one.
    """
    graphs = [
        own
        for m in model.modules()
        if isinstance(m, PrunedModule)
        for own in (m.graph, m.training_graph)
    ]
    return memo_of((own, own) for own in graphs if own is not None)


def _empty() -> PrunedModule:
    """An object that :meth:`PrunedModule._rebuild` makes a module of: what refers to it can be
    copied or read before it is one.
    """
    return PrunedModule.__new__(PrunedModule)
