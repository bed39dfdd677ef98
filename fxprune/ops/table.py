"""The table of operations: what fxprune knows of each ATen op, in one row.

A row stands in the file of the op's family, as the decorator of its coupling rule. Whoever wants
to know something of an op asks the table: no other module has a list of operations.

What has no row is decomposed into smaller ops, or pointwise by its tag, or pinned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fxprune.common.public import public
from fxprune.errors import ArgumentError

if TYPE_CHECKING:
    from fxprune.ops.context import Context

__all__ = [
    "OPS",
    "Axes",
    "Kind",
    "Op",
    "Trait",
    "bind",
    "computes",
    "find",
    "has",
    "known",
    "moves",
    "name_of_op",
    "op",
    "own_row",
    "register_rule",
    "row",
    "takes_sizes",
]

Rule: TypeAlias = "Callable[[Context, Any, dict[str, Any], Any], None]"
"""``rule(context, op, arguments by name, result)``: reads the fields of the arguments, puts those
of the result.
"""

Formula: TypeAlias = Callable[[tuple[Any, ...], Any], "int | None"]
"""``formula(positional arguments, result)``: multiply-accumulates; it reads shapes alone."""

Shape: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""``shape(op, positional arguments, keyword arguments)``: a result without data, or None where
PyTorch is to say.
"""

InOrder: TypeAlias = "Callable[[Context, Mapping[str, Any]], bool]"
"""``in_order(context, arguments by name)``: see :attr:`Op.in_order`."""

Corrector: TypeAlias = Callable[[Any, Any, Any], Any]
"""``corrects(numbers, call, result in the original)``: the arguments that are to be others (see
:mod:`fxprune.ops.literals`).
"""

OverSurvivors: TypeAlias = Callable[[dict[str, Any], torch.Tensor], Any]
"""``survivors(arguments by name, mask)``: see :attr:`Op.survivors`."""


class Kind(Enum):
    """What an op does with what it is given, if it does one of these."""

    COMPUTES = auto()
    """Values from values: the same call works on fewer channels."""
    MOVES = auto()
    """Lays positions out anew."""
    CREATES = auto()
    """Makes a tensor of given sizes."""


class Axes(Enum):
    """Which axes of its operands those of a result are (see :mod:`fxprune.rewrite.extents`)."""

    SAME = auto()
    """Those of the first operand, one by one."""
    RESHAPED = auto()
    """Products and factors of those of the first operand."""
    PERMUTED = auto()
    """Those of the first operand in another order."""
    REDUCED = auto()
    """Those of the first operand that ``dim`` does not name."""
    SELECTED = auto()
    """Those of the first operand without ``dim``."""
    NARROWED = auto()
    """Those of the first operand, a part of ``dim``."""
    PADDED = auto()
    """Those of the first operand, some of them longer."""
    EXPANDED = auto()
    """Those of the first operand, or of a given size."""
    REPEATED = auto()
    """Those of the first operand, so many times."""
    JOINED = auto()
    """Those of the parts, one after the other along ``dim``."""
    STACKED = auto()
    """Those of the parts, and a new one."""
    MULTIPLIED = auto()
    """Rows of the first operand by columns of the second."""
    ATTENDED = auto()
    """Those of the query; the last one is that of the value."""
    LAYER = auto()
    """Those of the first operand; the last one is as wide as the weight says."""
    CONVOLVED = auto()
    """Channels as the weight says, positions anew."""
    POOLED = auto()
    """Those of the first operand, positions anew."""
    RESAMPLED = auto()
    """The batch and the channels of the first operand, positions anew."""
    CUT = auto()
    """Of several results: those of the first operand, a part of one."""


class Trait(Flag):
    """What else others need to know of an op."""

    NONE = 0
    GROWS = auto()
    """Makes large dimensions of small ones, which shrink with what they meet."""
    STATISTIC = auto()
    """A mean or a variance: the emitted graph can count what was removed."""
    MAY_GIVE_BACK = auto()
    """Gives back its argument, or a part of it, for some arguments; its schema does not say so."""
    BY_LAYOUT = auto()
    """Gives a view, a copy or an error, as its argument lies in memory."""
    READS_SHAPE = auto()
    """Takes of its argument the shape, the dtype and the device alone."""
    READS_DTYPE = auto()
    """Takes of its other argument the dtype and the device alone."""
    ASKS = auto()
    """Asks a tensor what kind it is: its dtype, its device, the number of its dimensions."""
    ASKS_SIZES = auto()
    """Asks for what follows from a tensor's sizes, or from how it lies in memory."""
    READS_VALUES = auto()
    """Hands values of a tensor to Python, as a truth or a number."""
    FINDS = auto()
    """Gives what a mask, its first argument, chooses; of nothing it gives nothing."""
    FINDS_BY_INDEX = auto()
    """The same; the mask is its second argument, or the first of a list there."""
    FROM_THE_END = auto()
    """Works on the last dimensions, whatever the number of the others."""
    COUNTS_ALL = auto()
    """Each position of what it reads counts, zero or not: a removed one would as well."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """A row: what is known of one ATen op.

    Attributes
    ----------
    name:
        Of its overload packet: ``"convolution"``, ``"library::op"``.
    rule:
        How labels pass through it. None: it is taken apart, or nothing can pass.
    kind, axes, traits:
        See :class:`Kind`, :class:`Axes`, :class:`Trait`.
    macs:
        How many multiply-accumulates it takes. None: it has no formula.
    shape:
        What it returns on tensors without data. None: PyTorch says.
    corrects:
        Its literals in the smaller model. None: they are the original's.
    counting:
        For a statistic the function that takes its place where removed elements count as zeros.
    survivors:
        For a fused normalisation the same over some elements only: what the pruned model computes,
        at full width.
    in_order:
        Whether it commutes with removal: run on the survivors, with the same arguments, it gives
        the survivors of what it gave. It does not where it tells the positions of an axis that can
        shrink apart, by a size or an index.
    doc:
        What its rule says, in a sentence.
    of_user:
        Whether a user registered it: what it says is to be proved.
    """

    name: str
    rule: Rule | None = None
    kind: Kind | None = None
    axes: Axes | None = None
    traits: Trait = Trait.NONE
    macs: Formula | None = None
    shape: Shape | None = None
    corrects: Corrector | None = None
    counting: Callable[..., Any] | None = None
    survivors: OverSurvivors | None = None
    in_order: bool | InOrder = False
    doc: str = ""
    of_user: bool = False

    def follow(self, context: Context, func: Any, bound: dict[str, Any], out: Any) -> None:
        """Let the rule say what a result carries."""
        if self.rule is not None:
            self.rule(context, func, bound, out)


OPS: dict[str, Op] = {}


def op(*names: str, **facts: Any) -> Callable[[Rule], Rule]:
    """Write the rows of ops that share a rule, as its decorator; ``facts`` are the fields of
    :class:`Op`.

    Ops that only compute are in order unless ``in_order`` says something else.
    """
    facts.setdefault("in_order", facts.get("kind") is Kind.COMPUTES)

    def write(rule: Rule) -> Rule:
        row(*names, rule=rule, doc=_first_paragraph(rule), **facts)
        return rule

    return write


def row(*names: str, **facts: Any) -> None:
    """Write the rows of ops without a rule of their own."""
    for name in names:
        if name in OPS:
            raise ValueError(f"{name} has two rows")
        OPS[name] = Op(name=name, **facts)


computes = functools.partial(op, kind=Kind.COMPUTES)
"""Write the rows of ops that compute values from values."""

moves = functools.partial(op, kind=Kind.MOVES)
"""Write the rows of ops that lay positions out anew."""


def _first_paragraph(rule: Rule) -> str:
    return " ".join((rule.__doc__ or "").strip().partition("\n\n")[0].split())


@public
def register_rule(
    name: str, *, like: str | None = None, macs: Formula | None = None
) -> Callable[[Rule], Rule]:
    """Write the row of an op of your own: how channels pass through it; see ``docs/extending.md``
    for the verbs of a rule.

    :func:`fxprune.prune` proves every model in which such a rule takes part against the masked
    original.

    Parameters
    ----------
    name:
        ``"library::op"``, as the op is registered with ``torch.library``; all its overloads have
        the rule.
    like:
        The name of an op whose row serves for this one too, its arguments being called the same:
        ``"linear"``; ``"pointwise"`` for any op that works element by element, broadcast included.
        Without it, use the result as a decorator of a function ``rule(context, op, arguments by
        name, result)``.
    macs:
        How many multiply-accumulates a call takes, as ``macs(positional arguments, result)``.
        Without it, those that ``torch.utils.flop_counter.register_flop_formula`` was told, or
        those of the op that it is ``like``.

    Raises
    ------
    ArgumentError
        If the name has no library, is one of PyTorch's own, or has a rule already; if ``like`` has
        none.

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
    library, _, own = name.partition("::") if isinstance(name, str) else ("", "", "")
    if not library or not own or library in ("aten", "prims", "prim"):
        raise ArgumentError(
            f'register_rule: {name!r} is no op of your own: give its name as "library::op".'
        )
    if name in OPS:
        raise ArgumentError(f"register_rule: {name} has a rule already.")
    if like is not None and (
        not isinstance(like, str) or like not in OPS or OPS[like].rule is None
    ):
        raise ArgumentError(
            f"register_rule: {like!r} has no rule that {name} could share; docs/rules.md lists "
            "those that have."
        )
    if macs is not None and not callable(macs):
        raise ArgumentError(
            f"register_rule: macs of {name} is a function macs(positional arguments, result), not "
            f"a {type(macs).__name__}."
        )

    def register(rule: Rule) -> Rule:
        if not callable(rule):
            raise ArgumentError(
                f"register_rule: a rule of {name} is a function rule(context, op, arguments by "
                f"name, result), not a {type(rule).__name__}."
            )
        _write_for_user(
            Op(name=name, rule=rule, doc=_first_paragraph(rule), macs=macs, of_user=True)
        )
        return rule

    if like is None:
        return register
    # literals and shapes are found by PyTorch's own names alone
    shared = replace(OPS[like], name=name, shape=None, corrects=None, traits=Trait.NONE)
    _write_for_user(replace(shared, macs=macs or shared.macs, of_user=True))
    return register


def _write_for_user(own: Op) -> None:
    OPS[own.name] = own
    for cached in (find, own_row):
        cached.cache_clear()


def name_of_op(func: Any) -> str:
    """The name under which an overload, or a packet of such, has its row."""
    name: str = (
        func._schema.name if isinstance(func, torch._ops.OpOverload) else func._qualified_op_name
    )
    return name.removeprefix("aten::")


def known(name: str) -> Op:
    """The row of this name; one that knows nothing, if there is none."""
    return OPS.get(name) or Op(name=name)


def has(name: str, trait: Trait) -> bool:
    """Whether the op of this name has a trait."""
    return name in OPS and bool(OPS[name].traits & trait)


@functools.cache
def own_row(func: Any) -> Op | None:
    """The row of an overload under its very name."""
    return OPS.get(name_of_op(func))


@functools.cache
def find(func: Any) -> Op | None:
    """The row whose rule an overload follows: its own, that of its functional form or of the view
    that it copies, or the one of all pointwise ops, by its tag.
    """
    name = name_of_op(func)
    in_place = name.endswith("_") and not name.endswith("__")
    for candidate in (name, name.removesuffix("_copy"), name[:-1] if in_place else name):
        if candidate in OPS and OPS[candidate].rule is not None:
            return OPS[candidate]
    # torch.equal is tagged, too
    gives_tensors = all(isinstance(given.type, torch.TensorType) for given in func._schema.returns)
    if torch.Tag.pointwise in func.tags and gives_tensors:
        return OPS["pointwise"]
    return None


@functools.cache
def _schema_arguments(func: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None)
        for a in func._schema.arguments
    )


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    named = _schema_arguments(func)
    bound = {
        name: args[i] if i < len(args) else default for i, (name, default) in enumerate(named)
    }
    bound.update(kwargs)
    return bound


_SIZES = frozenset({"size", "shape", "sizes", "repeats"})
_BESIDE = frozenset({"dim", "dtype", "fill_value", "layout"})  # that schemas call numbers, too


@functools.cache
def takes_sizes(name: str) -> bool:
    """Whether the numbers that an ATen op is told are the sizes of its result, axis by axis, as
    its schemas say.

    >>> [takes_sizes(name) for name in ("view", "zeros", "repeat", "split", "as_strided")]
    [True, True, True, False, False]
    """
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    told = [numbers for own in schemas if not own.is_mutable and (numbers := _numbers(own))]
    return bool(told) and all(len(own) == 1 and own <= _LISTS for own in told)


_LISTS = frozenset((name, "List[int]") for name in _SIZES)


def _numbers(schema: Any) -> frozenset[tuple[str, str]]:
    """The arguments that hold numbers: their names and types."""
    named = ((argument.name, str(argument.type)) for argument in schema.arguments)
    numbers = ("List[int]", "int", "float", "number")
    return frozenset(own for own in named if own[1] in numbers and own[0] not in _BESIDE)
