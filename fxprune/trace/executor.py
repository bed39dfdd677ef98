"""The executor: it runs the nodes of a graph on the example, and explains why a node fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.errors import ChanceError, FxpruneError, InputError, TraceError
from fxprune.trace.execution import (
    DrawsError,
    ModuleAtPath,
    NoDraws,
    execute,
    sources,
    with_zeros,
)
from fxprune.trace.user_code import user_line

if TYPE_CHECKING:
    pass

__all__ = ["Executor"]


class Executor:
    """Runs nodes on meta tensors.

    Parameters
    ----------
    root:
        The module that is traced.
    watch:
        Returns the context in which a node runs (see :func:`fxprune.trace.trace`).
    """

    # True while a node runs on meta tensors: modules then behave as outside of tracing
    executing = False

    def __init__(
        self, root: nn.Module, watch: Callable[[fx.Node], AbstractContextManager[Any]]
    ) -> None:
        self.root, self.watch = root, watch

    def _execute(self, node: fx.Node) -> Any:
        """Run a node on the values of its arguments, under ``watch``."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with self._outside_tracing(), self.watch(node):
                return execute(self.root, node, args, kwargs)
        except FxpruneError:
            raise
        except Exception as error:
            raise self._execution_error(node, args, kwargs, error) from error

    @contextmanager
    def _outside_tracing(self) -> Iterator[None]:
        """Run torch inside this context as if nothing were traced."""
        self.executing = True
        try:
            with torch.inference_mode():
                yield
        finally:
            self.executing = False

    def _execution_error(
        self, node: fx.Node, args: Any, kwargs: Any, error: Exception
    ) -> FxpruneError:
        """Return the error for a node that failed.

        A node that runs on zeros needs data: that is a TraceError, or a ChanceError if it depends
        on random numbers. A node that fails on zeros too is an InputError.
        """
        target = node.target
        name = str(target if isinstance(target, str) else getattr(target, "__name__", target))
        shapes = [tuple(tensor.shape) for tensor in tensors_of((args, kwargs))]
        parameters = self._parameter_shapes(node)
        failed = f"{name!r} failed on shapes {shapes}{parameters}: {error} (at {user_line()})."
        if self._runs_on_data(node, args, kwargs):
            error_class = ChanceError if self._is_random(node) else TraceError
            return error_class(
                f"{failed} The analysis runs on tensors without data, so no value can be read: "
                "rewrite that line without .item(), boolean indexing or other reads of values."
            )
        check = (
            "Check that the example input has the shape, dtype and order of arguments that the "
            "model is called with."
        )
        return InputError(f"{failed} {check}", user_line())

    def _parameter_shapes(self, node: fx.Node) -> str:
        """Return the shapes of a called module's parameters, for a message."""
        if node.op != "call_module":
            return ""
        parameters = self.root.get_submodule(str(node.target)).named_parameters()
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parameters)
        return f", with {shapes}" if shapes else ""

    def _is_random(self, node: fx.Node) -> bool:
        """Tell whether a node's value depends on random numbers."""
        for source in sources(node):
            args, kwargs = fx.node.map_arg((source.args, source.kwargs), lambda n: n.meta["val"])
            try:
                with self._outside_tracing(), NoDraws():
                    execute(self.root, source, args, kwargs)
            except DrawsError:
                return True
            except Exception:
                continue
        return False

    def _runs_on_data(self, node: fx.Node, args: Any, kwargs: Any) -> bool:
        """Tell whether an operation that fails on meta tensors runs on zeros."""
        state = torch.get_rng_state()
        try:
            args, kwargs = tree_map_only(Tensor, with_zeros, (args, kwargs))
            root = self.root
            if node.op == "call_module":
                path = str(node.target)
                module = copy.deepcopy(root.get_submodule(path)).to_empty(device="cpu")
                root = ModuleAtPath(path, module)
            with self._outside_tracing():
                execute(root, node, args, kwargs)
        except Exception:
            return False
        finally:
            torch.set_rng_state(state)
        return True
