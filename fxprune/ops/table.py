"""The table of operations: what fxprune knows of each ATen op, in one row.

A row is written in the module of the op's family, as a decorator of its coupling rule. All facts
about ops are looked up here: no other module has a list of operations.

An op without a row follows the rule of pointwise ops if PyTorch tags it so; otherwise it is
decomposed into smaller ops or its operands are pinned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from fxprune.ops.context import Context

__all__ = [
    "OPS",
    "Axes",
    "Kind",
    "Op",
    "Trait",
    "add_row",
    "bind",
    "computes",
    "exact_row",
    "find_row",
    "has_trait",
    "moves",
    "name_of_op",
    "op",
    "row",
    "row_or_empty",
    "takes_sizes",
]

Rule: TypeAlias = "Callable[[Context, Any, dict[str, Any], Any], None]"
"""A function ``rule(context, op, arguments by name, result)``.

It reads the fields of the arguments and writes the fields of the result.
"""

Formula: TypeAlias = Callable[[tuple[Any, ...], Any], "int | None"]
"""A function ``formula(positional arguments, result)`` that counts MACs; it reads only shapes."""

Shape: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""A function ``shape(op, positional arguments, keyword arguments)``.

It returns a result without data, or None to leave the answer to PyTorch.
"""

InOrder: TypeAlias = "Callable[[Context, Mapping[str, Any]], bool]"
"""A function ``in_order(context, arguments by name)``; see :attr:`Op.in_order`."""

Corrector: TypeAlias = Callable[[Any, Any, Any], Any]
"""A function ``corrects(numbers, call, result in the original)``.

It returns the arguments that must change in the smaller model (see :mod:`fxprune.ops.literals`).
"""

OverSurvivors: TypeAlias = Callable[[dict[str, Any], torch.Tensor], Any]
"""A function ``survivors(arguments by name, mask)``; see :attr:`Op.survivors`."""


class Kind(Enum):
    """What an op does with its operands."""

    COMPUTES = auto()
    """Computes values from values; the same call works on fewer channels."""
    MOVES = auto()
    """Moves positions to new places."""
    CREATES = auto()
    """Creates a tensor of given sizes."""


class Axes(Enum):
    """How the axes of a result follow from the axes of its operands.

    :mod:`fxprune.rewrite.extents` reads it.
    """

    SAME = auto()
    """The axes of the first operand, unchanged."""
    RESHAPED = auto()
    """Products and factors of the axes of the first operand."""
    PERMUTED = auto()
    """The axes of the first operand in another order."""
    REDUCED = auto()
    """The axes of the first operand that ``dim`` does not name."""
    SELECTED = auto()
    """The axes of the first operand without ``dim``."""
    NARROWED = auto()
    """The axes of the first operand, with a part of ``dim``."""
    PADDED = auto()
    """The axes of the first operand, some of them longer."""
    EXPANDED = auto()
    """The axes of the first operand, or axes of a given size."""
    REPEATED = auto()
    """The axes of the first operand, each repeated a given number of times."""
    JOINED = auto()
    """The axes of the parts, concatenated along ``dim``."""
    STACKED = auto()
    """The axes of the parts and a new one."""
    MULTIPLIED = auto()
    """The rows of the first operand and the columns of the second."""
    ATTENDED = auto()
    """The axes of the query, with the last axis of the value."""
    LAYER = auto()
    """The axes of the first operand; the weight gives the width of the last one."""
    CONVOLVED = auto()
    """A channel axis whose width the weight gives, and new axes of positions."""
    POOLED = auto()
    """The axes of the first operand, with new axes of positions."""
    RESAMPLED = auto()
    """The batch and the channels of the first operand, and new axes of positions."""
    CUT = auto()
    """The axes of the first operand, of which each result has a part of one."""


class Trait(Flag):
    """Further properties of an op that other modules ask for."""

    NONE = 0
    GROWS = auto()
    """Expands dimensions of size 1; the new ones shrink with what they meet."""
    STATISTIC = auto()
    """A mean or a variance, in which the emitted graph can count the removed elements."""
    MAY_RETURN_ARGUMENT = auto()
    """Returns its argument or a part of it in some cases, although its schema does not say so."""
    BY_LAYOUT = auto()
    """Returns a view, a copy or an error, depending on its argument's memory layout."""
    READS_SHAPE = auto()
    """Reads only the shape, the dtype and the device of its argument."""
    READS_DTYPE = auto()
    """Reads only the dtype and the device of its other argument."""
    READS_KIND = auto()
    """Returns a tensor's dtype, device or number of dimensions."""
    READS_SIZES = auto()
    """Returns something that follows from a tensor's sizes or memory layout."""
    READS_VALUES = auto()
    """Passes values of a tensor to Python, as a truth value or a number."""
    SELECTS_BY_MASK = auto()
    """Returns what a mask, its first argument, selects; the result may be empty."""
    SELECTS_BY_INDEX = auto()
    """Like SELECTS_BY_MASK; the mask is the second argument or the first entry of a list there."""
    FROM_THE_END = auto()
    """Works on the last dimensions, however many come before them."""
    COUNTS_ALL = auto()
    """Counts every position that it reads, zero or not, so a removed one would count too."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """A row of the table: the facts about one ATen op.

    Attributes
    ----------
    name:
        Name of the overload packet: ``"convolution"``, ``"library::op"``.
    rule:
        Function that carries labels through the op. None: the op is decomposed or pinned.
    kind, axes, traits:
        See :class:`Kind`, :class:`Axes`, :class:`Trait`.
    macs:
        Formula for the number of multiply-accumulates. None: there is none.
    shape:
        Function that returns the result on tensors without data. None: PyTorch computes it.
    corrects:
        Function that corrects literal arguments for the smaller model. None: they stay.
    counting:
        For a statistic: the function that replaces it where removed elements count as zeros.
    survivors:
        For a fused normalisation: the same op with statistics over some elements only. It computes
        at full width what the pruned model computes.
    in_order:
        Whether the op commutes with removal: run on the survivors with the same arguments, it
        returns the survivors of its original result. It does not commute if it tells apart the
        positions of an axis that can shrink, by a size or an index.
    doc:
        One sentence that describes the rule.
    of_user:
        Whether a user registered the row. Models with such an op are proved.
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
        """Apply the rule: write the fields of the result."""
        if self.rule is not None:
            self.rule(context, func, bound, out)


OPS: dict[str, Op] = {}


def op(*names: str, **facts: Any) -> Callable[[Rule], Rule]:
    """Return a decorator that adds rows for ops with the decorated rule.

    Parameters
    ----------
    names:
        Names of the ops.
    facts:
        Fields of :class:`Op`. ``in_order`` defaults to True for ops that compute, otherwise to
        False.
    """
    facts.setdefault("in_order", facts.get("kind") is Kind.COMPUTES)

    def write(rule: Rule) -> Rule:
        """Add the rows and return the rule."""
        row(*names, rule=rule, doc=first_paragraph(rule), **facts)
        return rule

    return write


def row(*names: str, **facts: Any) -> None:
    """Add a row for each named op; ``facts`` are fields of :class:`Op`.

    Raises
    ------
    ValueError
        If an op already has a row.
    """
    for name in names:
        if name in OPS:
            raise ValueError(f"{name} has two rows")
        OPS[name] = Op(name=name, **facts)


computes = functools.partial(op, kind=Kind.COMPUTES)
"""Return a decorator as :func:`op` does, for ops that compute values from values."""

moves = functools.partial(op, kind=Kind.MOVES)
"""Return a decorator as :func:`op` does, for ops that move positions."""


def first_paragraph(rule: Rule) -> str:
    return " ".join((rule.__doc__ or "").strip().partition("\n\n")[0].split())


def name_of_op(func: Any) -> str:
    """Return the name under which an overload or an overload packet has its row."""
    name: str = (
        func._schema.name if isinstance(func, torch._ops.OpOverload) else func._qualified_op_name
    )
    return name.removeprefix("aten::")


def row_or_empty(name: str) -> Op:
    """Return the row of this name, or an empty row if there is none."""
    return OPS.get(name) or Op(name=name)


def has_trait(name: str, trait: Trait) -> bool:
    """Tell whether the op of this name has a trait."""
    return name in OPS and bool(OPS[name].traits & trait)


def add_row(row: Op) -> None:
    """Add a row after all others; earlier look-ups may have missed it."""
    OPS[row.name] = row
    for cached in (find_row, exact_row):
        cached.cache_clear()


@functools.cache
def exact_row(func: Any) -> Op | None:
    """Return the row under exactly the overload's name, or None."""
    return OPS.get(name_of_op(func))


@functools.cache
def find_row(func: Any) -> Op | None:
    """Return the row whose rule an overload follows, or None.

    The first row with a rule counts, in this order: the overload's own row, the row of the op
    without ``_copy``, the row of its functional form (without the underscore), and the row of all
    pointwise ops if the overload is tagged as pointwise.
    """
    name = name_of_op(func)
    in_place = name.endswith("_") and not name.endswith("__")
    for candidate in (name, name.removesuffix("_copy"), name[:-1] if in_place else name):
        if candidate in OPS and OPS[candidate].rule is not None:
            return OPS[candidate]
    # torch.equal is tagged as pointwise too, but returns a bool
    gives_tensors = all(isinstance(given.type, torch.TensorType) for given in func._schema.returns)
    if torch.Tag.pointwise in func.tags and gives_tensors:
        return OPS["pointwise"]
    return None


@functools.cache
def _schema_arguments(func: Any) -> tuple[tuple[str, Any], ...]:
    """Return the name and the default of each argument; None where there is no default."""
    arguments = []
    for argument in func._schema.arguments:
        default = argument.default_value if argument.has_default_value() else None
        arguments.append((argument.name, default))
    return tuple(arguments)


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with defaults filled in."""
    bound = {}
    for i, (name, default) in enumerate(_schema_arguments(func)):
        bound[name] = args[i] if i < len(args) else default
    bound.update(kwargs)
    return bound


_SIZES = frozenset((name, "List[int]") for name in ("size", "shape", "sizes", "repeats"))
# schemas type these as numbers too
_NOT_NUMBERS = frozenset({"dim", "dtype", "fill_value", "layout"})


@functools.cache
def takes_sizes(name: str) -> bool:
    """Tell whether the numbers that an ATen op takes are the sizes of its result, axis by axis.

    The op's schemas decide.

    >>> [takes_sizes(name) for name in ("view", "zeros", "repeat", "split", "as_strided")]
    [True, True, True, False, False]
    """
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    numbers = [_numbers(schema) for schema in schemas if not schema.is_mutable]
    taken = [names for names in numbers if names]
    return bool(taken) and all(len(names) == 1 and names <= _SIZES for names in taken)


def _numbers(schema: Any) -> frozenset[tuple[str, str]]:
    """Return the arguments of a schema that hold numbers, as pairs of name and type."""
    arguments = ((argument.name, str(argument.type)) for argument in schema.arguments)
    types = ("List[int]", "int", "float", "number")
    numbers = [(name, kind) for name, kind in arguments if kind in types]
    return frozenset((name, kind) for name, kind in numbers if name not in _NOT_NUMBERS)
