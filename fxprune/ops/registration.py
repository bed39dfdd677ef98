"""Registration of a user's own operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fxprune.common.public import public
from fxprune.errors import ArgumentError
from fxprune.ops import table
from fxprune.ops.table import Formula, Op, Rule, Trait, add_row, first_paragraph

__all__ = ["register_rule"]


@public
def register_rule(
    name: str, *, like: str | None = None, macs: Formula | None = None
) -> Callable[[Rule], Rule]:
    """Register how channels pass through an op of your own.

    ``docs/extending.md`` describes how to write a rule. :func:`fxprune.prune` proves every model
    that uses such a rule against the masked original.

    Parameters
    ----------
    name:
        ``"library::op"``, as the op is registered with ``torch.library``. The rule holds for all
        its overloads.
    like:
        Name of an op with the same argument names whose row this op shares, such as ``"linear"``.
        ``"pointwise"`` fits any op that works element by element, with broadcasting. Without
        ``like``, use the result as a decorator of a function ``rule(context, op, arguments by
        name, result)``.
    macs:
        Function ``macs(positional arguments, result)`` that returns the multiply-accumulates of a
        call. Default: the formula of the op named by ``like``, or the one registered with
        ``torch.utils.flop_counter.register_flop_formula``.

    Returns
    -------
    Callable
        A decorator that registers the rule and returns it.

    Raises
    ------
    ArgumentError
        If the name has no library, belongs to PyTorch or already has a rule; if the op named by
        ``like`` has no rule; if ``macs`` or the rule is not callable.

    Examples
    --------
    >>> import fxprune, torch
    >>> @torch.library.custom_op("fxprune_doc::halve", mutates_args=())
    ... def halve(x: torch.Tensor) -> torch.Tensor:
    ...     return x / 2
    >>> halve.register_fake(torch.empty_like)  # doctest: +ELLIPSIS
    <...>
    >>> _ = fxprune.register_rule("fxprune_doc::halve", like="pointwise")
    >>> class Net(torch.nn.Sequential):
    ...     def forward(self, x):
    ...         return self[1](halve(self[0](x)))
    >>> net = Net(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
    >>> fxprune.prune(net, torch.zeros(1, 3), channels=0.5).model.get_submodule("1").weight.shape
    torch.Size([2, 4])
    """
    _check_registration(name, like, macs)

    def register(rule: Rule) -> Rule:
        """Add the user's row and return the rule."""
        if not callable(rule):
            raise ArgumentError(
                f"register_rule: a rule of {name} is a function rule(context, op, arguments by "
                f"name, result), not a {type(rule).__name__}."
            )
        doc = first_paragraph(rule)
        add_row(Op(name=name, rule=rule, doc=doc, macs=macs, of_user=True))
        return rule

    if like is None:
        return register
    # correctors and shape functions know the names of PyTorch's own ops only
    shared = replace(table.OPS[like], name=name, shape=None, corrects=None, traits=Trait.NONE)
    add_row(replace(shared, macs=macs or shared.macs, of_user=True))
    return register


def _check_registration(name: Any, like: Any, macs: Any) -> None:
    """Raise an error if :func:`register_rule` cannot accept these arguments."""
    library, _, op_name = name.partition("::") if isinstance(name, str) else ("", "", "")
    if not library or not op_name or library in ("aten", "prims", "prim"):
        raise ArgumentError(
            f'register_rule: {name!r} is no op of your own: give its name as "library::op".'
        )
    if name in table.OPS:
        raise ArgumentError(f"register_rule: {name} has a rule already.")
    has_rule = isinstance(like, str) and like in table.OPS and table.OPS[like].rule is not None
    if like is not None and not has_rule:
        raise ArgumentError(
            f"register_rule: {like!r} has no rule that {name} could share; docs/rules.md lists "
            "those that have."
        )
    if macs is not None and not callable(macs):
        raise ArgumentError(
            f"register_rule: macs of {name} is a function macs(positional arguments, result), not "
            f"a {type(macs).__name__}."
        )
