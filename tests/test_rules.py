"""The rule of each operation alone: one small call, and its expected coupling as text.

The table below is the specification of ``fxprune.ops``. The module
``tests/support/coupling_text.py`` explains the notation. A case has the name of an ATen operation
that it executes; what follows a comma says what is special about it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision

from fxprune.ops import OPS
from tests.support.coupling_text import Operand, Seen, constant, couple_one, labelled, weight

DOCS = Path(__file__).parents[1] / "docs"

t, w, c = labelled, weight, constant


def ix(*shape: int) -> Operand:
    return constant(*shape, dtype=torch.long)


def mask(*shape: int) -> Operand:
    return constant(*shape, dtype=torch.bool)


class Case:
    """One operation with its operands and expected coupling.

    With ``inside``, the operation runs inside a larger fx node, whose literals the rewriter cannot
    correct.
    """

    def __init__(
        self,
        name: str,
        text: str,
        function: Callable[..., Any],
        *operands: Operand,
        inside: bool = False,
    ) -> None:
        self.name, self.text = name, text
        self.function, self.operands = function, operands
        self.target = None if inside else torch.mean

    @property
    def op(self) -> str:
        return self.name.split(",")[0]

    def run(self) -> Seen:
        return couple_one(self.function, self.operands, self.target)


put = torch.ops.aten.index_put


# fmt: off
RULES = {name: row for name, row in OPS.items() if row.rule is not None}

CASES = [
    Case("_cdist_forward, has no rule", "(!,!),(!,!)->(2,4)", torch.cdist, t(2, 3), t(4, 3)),
    Case("_weight_norm", "(i,j),(i,1)->(i,j)", lambda v, g: torch._weight_norm(v, g, 0), t(4, 3), t(4, 1)),
    Case("adaptive_avg_pool2d", "(i,j,!,!)->(i,j,1,1)", lambda x: F.adaptive_avg_pool2d(x, 1), t(2, 3, 4, 4)),
    Case("adaptive_max_pool2d", "(i,j,!,!)->(i,j,2,2)", lambda x: F.adaptive_max_pool2d(x, 2), t(2, 3, 4, 4)),
    Case("add", "(i,j),(i,j)->(i,j)", torch.add, t(2, 3), t(2, 3)),
    Case("add, broadcast", "(i,j),(j)->(i~,j)", torch.add, t(2, 3), t(3)),
    Case("add, by a weight", "(i,j),(j)->(i~,j)", torch.add, t(2, 3), w(3)),
    Case("add, fixed batch", "(!,i),(2,1)->(2,i~)", torch.add, t(2, 3), c(2, 1)),
    Case("add, fixed size", "(!,!),(2,3)->(2,3)", torch.add, t(2, 3), c(2, 3)),
    Case("add_, into a view", "(i,j),(j[0:2])->(i~,j[0:2]~)", lambda x, y: x[:, :2].add_(y), t(4, 3), t(2)),
    Case("addbmm", "(i,j),(k,i,l),(k,l,j)->(i,j)", torch.addbmm, t(4, 6), t(2, 4, 5), t(2, 5, 6)),
    Case("addcmul", "(i,j),(i,j),(j)->(i,j)", torch.addcmul, t(2, 3), t(2, 3), t(3)),
    Case("addmm", "(i),(j,k),(k,i)->(j~,i)", torch.addmm, w(4), t(2, 3), t(3, 4)),
    Case("addmv", "(i),(i,j),(j)->(i)", torch.addmv, t(2), t(2, 3), t(3)),
    Case("all", "(i,!)->(i)", lambda x: x.bool().all(1), t(2, 3)),
    Case("alpha_dropout", "(i,j)->(i~,j~)", lambda x: F.alpha_dropout(x, 0.5, True), t(2, 3)),
    Case("amax", "(i,!)->(i)", lambda x: x.amax(1), t(2, 3)),
    Case("amax, within blocks", "(i,2*j)->(i,j)", lambda x: x.view(4, 2, 3).amax(1), t(4, 6)),
    Case("aminmax", "(i,!)->(i),(i)", lambda x: x.aminmax(dim=1), t(2, 3)),
    Case("any", "(i,!)->(i)", lambda x: x.any(1), t(2, 3)),
    Case("arange, met", "(i,!)->(i~,3)", lambda x: x + torch.arange(3.0), t(2, 3)),
    Case("argmax", "(i,!)->(i~)", lambda x: x.argmax(1), t(2, 3)),
    Case("argsort", "(i,!)->(i~,3)", lambda x: x.argsort(1), t(2, 3)),
    Case("avg_pool1d", "(i,j,!)->(i,j,2)", lambda x: F.avg_pool1d(x, 2), t(2, 3, 4)),
    Case("baddbmm", "(i,j,k),(i,j,l),(i,l,k)->(i,j,k)", torch.baddbmm, t(2, 4, 6), t(2, 4, 5), t(2, 5, 6)),
    Case(
        "batch_norm",
        "(i,j,k),(j),(j),(j),(j)->(i~,j,k~)",
        lambda x, mean, var, weight, bias: F.batch_norm(x, mean, var, weight, bias),
        t(2, 3, 4),
        w(3),
        w(3),
        w(3),
        w(3),
    ),
    Case(
        "batch_norm, in training",
        "(i,j,k),(j),(j),(j),(j)->(i~,j,k~); statistics over i,k",
        lambda x, mean, var, weight, bias: F.batch_norm(x, mean, var, weight, bias, True),
        t(2, 3, 4),
        w(3),
        w(3),
        w(3),
        w(3),
    ),
    Case(
        "batch_norm, no scale",
        "(i,j,k),(j),(j)->(i~,j,k~)",
        lambda x, mean, var: F.batch_norm(x, mean, var),
        t(2, 3, 4),
        w(3),
        w(3),
    ),
    Case("bernoulli", "(i,j)->(i,j)", torch.bernoulli, t(2, 3)),
    Case("bernoulli, of a given probability", "(i,j)->(i~,j~)", lambda x: torch.bernoulli(x, 0.5), t(2, 3)),
    Case("bmm", "(i,j,k),(i,k,l)->(i,j,l)", torch.bmm, t(2, 4, 5), t(2, 5, 6)),
    Case("broadcast_to", "(i)->(a~,i)", lambda x: x.broadcast_to(2, 3), t(3)),
    Case("cat", "(i,j),(i,k)->(i,j+k)", lambda x, y: torch.cat([x, y], 1), t(2, 3), t(2, 4)),
    Case("cat, fixed size", "(!,i),(2,4)->(2,i+4)", lambda x, y: torch.cat([x, y], 1), t(2, 3), c(2, 4)),
    Case("cat, with itself", "(i,j)->(i,2*j)", lambda x: torch.cat([x, x], 1), t(2, 3)),
    Case("celu", "(i,j)->(i,j)", F.celu, t(2, 3)),
    Case(
        "channel_shuffle",
        "(i,j,k,l)->(i,j2*j1,k,l) with (j1*j2) with (j2*j1)",
        lambda x: F.channel_shuffle(x, 2),
        t(2, 6, 2, 2),
    ),
    Case("chunk", "(i,j)->(i,j[0:3]),(i,j[3:6])", lambda x: x.chunk(2, 1), t(2, 6)),
    Case(
        "chunk, outer half of a split",
        "(i)->(i1[0:2],i2),(i1[2:4],i2) with (i1*i2) with (i1[2:4],i2) with (i1[0:2],i2)",
        lambda x: x.view(4, 3).chunk(2),
        t(12),
    ),
    Case("clip", "(i,j)->(i~,j~)", lambda x: x.clip(1, 2), t(2, 3)),
    Case("clone", "(i,j)->(i,j)", torch.clone, t(2, 3)),
    Case("col2im", "(i,j*4,!)->(i,j,4,4)", lambda x: F.fold(x, (4, 4), 2), t(2, 12, 9)),
    Case("constant_pad_nd", "(i,j)->(i,a+j+b)", lambda x: torch.constant_pad_nd(x, (1, 2)), t(2, 3)),
    Case("contiguous", "(i,j)->(j,i)", lambda x: x.t().contiguous(), t(2, 3)),
    Case(
        "conv1d, concatenated input",
        "(1,i,!),(1,j,!),(k,i+j,!)->(1,k,2)",
        lambda x, y, k: F.conv1d(torch.cat([x, y], 1), k),
        t(1, 3, 4),
        t(1, 2, 4),
        w(4, 5, 3),
    ),
    Case("conv1d, fixed input", "(2,3,4),(i,!,!)->(2,i,2)", F.conv1d, c(2, 3, 4), w(5, 3, 3)),
    Case(
        "conv1d, flattened input",
        "(1,i,j,!),(k,i*j,!)->(1,k,2)",
        lambda x, k: F.conv1d(x.flatten(1, 2), k),
        t(1, 3, 2, 4),
        w(4, 6, 3),
    ),
    Case("conv1d, unbatched", "(i,!),(j,i,!)->(j,2)", F.conv1d, t(3, 4), w(4, 3, 3)),
    Case("conv2d", "(!,i,!,!),(j,i,!,!),(j)->(2,j,2,2)", F.conv2d, t(2, 3, 4, 4), w(5, 3, 3, 3), w(5)),
    Case(
        "conv2d, depth multiplier",
        "(!,i,!,!),(i*2,1,!,!)->(2,i*2,2,2)",
        lambda x, k: F.conv2d(x, k, groups=3),
        t(2, 3, 4, 4),
        w(6, 1, 3, 3),
    ),
    Case(
        "conv2d, depthwise",
        "(!,i,!,!),(i,1,!,!),(i)->(2,i,2,2)",
        lambda x, k, b: F.conv2d(x, k, b, groups=3),
        t(2, 3, 4, 4),
        w(3, 1, 3, 3),
        w(3),
    ),
    Case(
        "conv2d, grouped",
        "(!,i,!,!),([i1*2 j],i2,!,!),(j)->(2,j,2,2) with (i1!,i2) with (j1!,j2)",
        lambda x, k, b: F.conv2d(x, k, b, groups=2),
        t(2, 6, 4, 4),
        w(4, 3, 3, 3),
        w(4),
    ),
    Case(
        "conv2d, grouped, weight met before",
        "(!,2*i,!,!),(j,i,!,!),(j)->(2,j,2,2) with (j1!,j2)",
        lambda x, k, b: F.conv2d(x, k, b, groups=2),
        t(2, 6, 4, 4),
        t(4, 3, 3, 3),
        t(4),
    ),
    Case(
        "conv_transpose2d",
        "(!,i,!,!),(i,j,!,!),(j)->(2,j,6,6)",
        F.conv_transpose2d,
        t(2, 3, 4, 4),
        w(3, 5, 3, 3),
        w(5),
    ),
    Case(
        "conv_transpose2d, grouped",
        "(!,i,!,!),(i,j,!,!)->(2,2*j,6,6) with (i1!,i2)",
        lambda x, k: F.conv_transpose2d(x, k, groups=2),
        t(2, 6, 4, 4),
        w(6, 2, 3, 3),
    ),
    Case("copy_", "(i,j),(j)->(i~,j~)", lambda x, y: x.copy_(y), t(2, 3), t(3)),
    Case("copy_, into a view", "(i,j),(i,j[0:2])->(i,j[0:2])", lambda x, y: x[:, :2].copy_(y), t(3, 4), t(3, 2)),
    Case("count_nonzero", "(i,j)->(i)", lambda x: x.count_nonzero(1), t(2, 3)),
    Case("cummax", "(i,!)->(i~,3),(i~,3)", lambda x: x.cummax(1), t(2, 3)),
    Case("cumprod", "(i,!)->(i,3)", lambda x: x.cumprod(1), t(2, 3)),
    Case("cumsum", "(i,!)->(i,3)", lambda x: x.cumsum(1), t(2, 3)),
    Case("detach", "(i,j)->(i,j)", torch.detach, t(2, 3)),
    Case("diagonal", "(i,!,!)->(i,3)", lambda x: x.diagonal(dim1=1, dim2=2), t(2, 3, 3)),
    Case("div", "(i,j),(j)->(i,j)", torch.div, t(2, 3), t(3)),
    Case("dot", "(i),(i)->()", torch.dot, t(4), t(4)),
    Case("dropout", "(i,j)->(i,j)", lambda x: F.dropout(x, 0.5, True), t(2, 3)),
    Case(
        "einsum",
        "(i,j,k,l),(i,j,m,l)->(i,j,k,m)",
        lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
        t(2, 3, 4, 5),
        t(2, 3, 6, 5),
    ),
    Case(
        "einsum, ellipsis",
        "(i,j,k),(l,k)->(i,j,l)",
        lambda x, y: torch.einsum("...d,ed->...e", x, y),
        t(2, 3, 4),
        w(5, 4),
    ),
    Case("einsum, implicit result", "(i,j),(j,k)->(i,k)", lambda x, y: torch.einsum("ij,jk", x, y), t(3, 4), t(4, 5)),
    Case("einsum, repeated letter", "(!,!)->(3)", lambda x: torch.einsum("ii->i", x), t(3, 3)),
    Case("embedding", "(2,5),(!,i)->(2,5,i)", lambda i, table: F.embedding(i, table), ix(2, 5), w(7, 3)),
    Case("exp", "(i,j)->(i~,j~)", torch.exp, t(2, 3)),
    Case("expand", "(i)->(a~,i)", lambda x: x.expand(2, 3), t(3)),
    Case("expand, of a constant", "(!,i),(3,1)->(3,i)", lambda x, y: x * y.expand(3, 4), t(3, 4), c(3, 1)),
    Case("expand_as", "(i),(j,i)->(j~,i)", lambda x, y: x.expand_as(y), t(3), t(2, 3)),
    Case("fill_", "(i,j)->(i~,j~)", lambda x: x.fill_(1), t(2, 3)),
    Case("flatten", "(i,j,k)->(i,j*k)", lambda x: x.flatten(1), t(2, 3, 4)),
    Case(
        "flatten, fixed positions",
        "(1,i,1),(2,1,4)->(2,i*4)",
        lambda x, y: (x * y).flatten(1),
        t(1, 3, 1),
        c(2, 1, 4),
    ),
    Case("flip", "(i,j)->(i,j[::-1])", lambda x: x.flip(1), t(2, 3)),
    Case("float_power", "(i,j)->(i,j)", lambda x: x.float_power(2), t(2, 3)),
    Case("full", "(i,j)->(i,j)", lambda x: x * torch.full((2, 3), 2.0), t(2, 3)),
    Case("gather", "(!,!),(2,4)->(2,4)", lambda x, i: x.gather(1, i), t(2, 3), ix(2, 4)),
    Case("glu", "(i,2*j)->(i,j)", lambda x: F.glu(x, 1), t(2, 6)),
    Case("glu, of a split", "(2*i)->(i1,i2) with (2*i1*i2) with (i1,i2)", lambda x: F.glu(x.view(4, 3), 0), t(12)),
    Case(
        "grid_sampler",
        "(!,i,!,!),(2,5,5,2)->(2,i,5,5)",
        lambda x, grid: F.grid_sample(x, grid, align_corners=False),
        t(2, 3, 4, 4),
        c(2, 5, 5, 2),
    ),
    Case(
        "group_norm",
        "(!,i,!),(i),(i)->(2,i,4) with (i1!,i2); statistics over i",
        lambda x, weight, bias: F.group_norm(x, 2, weight, bias),
        t(2, 6, 4),
        w(6),
        w(6),
    ),
    Case("group_norm, one channel each", "(!,i,!)->(2,i,4)", lambda x: F.group_norm(x, 6), t(2, 6, 4)),
    Case("group_norm, one group", "(!,i,!)->(2,i~,4); statistics over i", lambda x: F.group_norm(x, 1), t(2, 6, 4)),
    Case(
        "gru",
        "(!,1,i),(1,1,j),(3*j,i),(3*j,j)->(2,1,j),(1,1,j)",
        lambda x, h, i, o: torch.gru(x, h, (i, o), False, 1, 0.0, False, False, False),
        t(2, 1, 3),
        t(1, 1, 4),
        w(12, 3),
        w(12, 4),
    ),
    Case(
        "gru_cell",
        "(!,i),(!,j),(3*j,i),(3*j,j)->(2,j)",
        lambda x, h, i, o: torch.gru_cell(x, h, i, o),
        t(2, 3),
        t(2, 4),
        t(12, 3),
        t(12, 4),
    ),
    Case("hardsigmoid", "(i,j)->(i~,j~)", F.hardsigmoid, t(2, 3)),
    Case("hardswish", "(i,j)->(i,j)", F.hardswish, t(2, 3)),
    Case("hsplit", "(i,j)->(i,j[0:3]),(i,j[3:6])", lambda x: x.hsplit(2), t(2, 6)),
    Case("im2col", "(i,j,!,!)->(i,j*4,9)", lambda x: F.unfold(x, 2), t(2, 3, 4, 4)),
    Case("index", "(i,!),(4)->(i,4)", lambda x, i: x[:, i], t(2, 3), ix(4)),
    Case("index, two apart", "(!,i,!),(5),(5)->(5,i)", lambda x, i, j: x[i, :, j], t(2, 3, 4), ix(5), ix(5)),
    Case("index_put", "(!,i),(2),(!,i)->(3,i)", lambda x, i, y: x.index_put((i,), y), t(3, 4), ix(2), t(2, 4)),
    Case("index_put, behind", "(i,!),(2),(i,!)->(i,3)", lambda x, i, y: put(x, [None, i], y), t(4, 3), ix(2), t(4, 2)),
    Case("index_put, by a mask", "(!,!),(3),(!)->(3,4)", lambda x, i, y: x.index_put((i > 0,), y), t(3, 4), ix(3), t(4)),
    Case("index_put, one for all", "(!,i,j),(2),(i,j)->(3,i,j)", lambda x, i, y: put(x, [i], y), t(3, 4, 5), ix(2), t(4, 5)),
    Case(
        "index_put, two apart",
        "(!,i,!),(2),(2),(!,i)->(3,i,5)",
        lambda x, i, j, y: put(x, [i, None, j], y),
        t(3, 4, 5),
        ix(2),
        ix(2),
        t(2, 4),
    ),
    Case("index_select", "(i,!),(4)->(i,4)", lambda x, i: x.index_select(1, i), t(2, 3), ix(4)),
    Case(
        "instance_norm",
        "(!,i,!),(i),(i)->(2,i,4)",
        lambda x, weight, bias: F.instance_norm(x, None, None, weight, bias),
        t(2, 3, 4),
        w(3),
        w(3),
    ),
    Case(
        "layer_norm",
        "(i,j,k),(k),(k)->(i~,j~,k); statistics over k",
        lambda x, weight, bias: F.layer_norm(x, (4,), weight, bias),
        t(2, 6, 4),
        w(4),
        w(4),
    ),
    Case(
        "layer_norm, two dimensions",
        "(i,j,k),(j,k),(j,k)->(i~,j,k); statistics over j,k",
        lambda x, weight, bias: F.layer_norm(x, (6, 4), weight, bias),
        t(2, 6, 4),
        w(6, 4),
        w(6, 4),
    ),
    Case("lerp", "(i,j),(i,j),(i,j)->(i,j)", torch.lerp, t(2, 3), t(2, 3), t(2, 3)),
    Case("linalg_inv_ex, has no rule", "(!,!)->(3,3)", torch.linalg.inv, t(3, 3)),
    Case("linalg_vector_norm", "(i,j)->(i)", lambda x: torch.linalg.vector_norm(x, dim=1), t(2, 3)),
    Case("linalg_vector_norm, order 0", "(i,!)->(i)", lambda x: torch.linalg.vector_norm(x, 0, dim=1), t(2, 3)),
    Case("linear", "(i,j),(k,j),(k)->(i~,k)", F.linear, t(2, 3), w(4, 3), w(4)),
    Case(
        "linear, after a sigmoid",
        "(i,j),(k,j)->(i~,k)",
        lambda x, weight: F.linear(x.sigmoid(), weight),
        t(2, 3),
        w(4, 3),
    ),
    Case("linear, fixed input", "(2,3),(i,!),(i)->(2,i)", F.linear, c(2, 3), w(4, 3), w(4)),
    Case("linear, tied to itself", "(i,j)->(i,i)", lambda x: F.linear(x, x), t(2, 3)),
    Case("linear, weight is a vector", "(i,j),(j)->(i)", F.linear, t(2, 3), w(3)),
    Case("log_softmax", "(i,!)->(i~,3)", lambda x: x.log_softmax(1), t(2, 3)),
    Case("logcumsumexp", "(i,!)->(i~,3)", lambda x: x.logcumsumexp(1), t(2, 3)),
    Case("logical_not", "(i,j)->(i~,j~)", torch.logical_not, t(2, 3)),
    Case("logsumexp", "(i,!)->(i~)", lambda x: x.logsumexp(1), t(2, 3)),
    Case(
        "lstm",
        "(!,1,i),(1,1,j),(1,1,j),(4*j,i),(4*j,j),(4*j),(4*j)->(2,1,j),(1,1,j),(1,1,j)",
        lambda x, h, c, i, o, a, b: torch.lstm(x, (h, c), (i, o, a, b), True, 1, 0.0, False, False, False),
        t(2, 1, 3),
        t(1, 1, 4),
        t(1, 1, 4),
        w(16, 3),
        w(16, 4),
        w(16),
        w(16),
    ),
    Case(
        "lstm, both directions",
        "(!,1,i),(!,1,j),(!,1,j),(4*j,i),(4*j,j),(4*j,i),(4*j,j)->(2,1,2*j),(2,1,j),(2,1,j)",
        lambda x, h, c, i, o, j, p: torch.lstm(x, (h, c), (i, o, j, p), False, 1, 0.0, False, True, False),
        t(2, 1, 3),
        t(2, 1, 4),
        t(2, 1, 4),
        w(16, 3),
        w(16, 4),
        w(16, 3),
        w(16, 4),
    ),
    Case(
        "lstm, fixed state",
        "(!,1,i),(1,1,4),(1,1,4),(!,i),(!,!)->(2,1,4),(1,1,4),(1,1,4)",
        lambda x, h, c, i, o: torch.lstm(x, (h, c), (i, o), False, 1, 0.0, False, False, False),
        t(2, 1, 3),
        c(1, 1, 4),
        c(1, 1, 4),
        w(16, 3),
        w(16, 4),
    ),
    Case(
        "lstm, projected",
        "(!,1,i),(1,1,j),(1,1,k),(4*k,i),(4*k,j),(j,k)->(2,1,j),(1,1,j),(1,1,k)",
        lambda x, h, c, i, o, p: torch.lstm(x, (h, c), (i, o, p), False, 1, 0.0, False, False, False),
        t(2, 1, 3),
        t(1, 1, 2),
        t(1, 1, 4),
        w(16, 3),
        w(16, 2),
        w(2, 4),
    ),
    Case(
        "lstm_cell",
        "(1,i),(1,j),(1,j),(4*j,i),(4*j,j)->(1,j),(1,j)",
        lambda x, h, c, i, o: torch.lstm_cell(x, (h, c), i, o),
        t(1, 3),
        t(1, 4),
        t(1, 4),
        w(16, 3),
        w(16, 4),
    ),
    Case("mT", "(i,j,k)->(i,k,j)", lambda x: x.mT, t(2, 3, 4)),
    Case("masked_fill", "(i,!),(1,3)->(i,3)", lambda x, m: x.masked_fill(m, 0.0), t(2, 3), mask(1, 3)),
    Case(
        "masked_fill, with minus one",
        "(i,!),(1,3)->(i~,3)",
        lambda x, m: x.masked_fill(m, -1.0),
        t(2, 3),
        mask(1, 3),
    ),
    Case("masked_fill_", "(!,i),(2,1)->(2,i)", lambda x, m: x.masked_fill_(m, 0.0), t(2, 3), mask(2, 1)),
    Case("matmul", "(i,j,k),(k,l)->(i,j,l)", torch.matmul, t(2, 4, 5), t(5, 6)),
    Case("matmul, fixed size", "(!,i,!),(2,5,6)->(2,i,6)", torch.matmul, t(2, 4, 5), c(2, 5, 6)),
    Case("max, along a dimension", "(i,!)->(i),(i)", lambda x: x.max(1), t(2, 3)),
    Case("max, of two tensors", "(i,j),(j)->(i~,j)", torch.max, t(2, 3), t(3)),
    Case("max_pool2d", "(i,j,!,!)->(i,j,2,2)", lambda x: F.max_pool2d(x, 2), t(2, 3, 4, 4)),
    Case(
        "max_pool3d_with_indices",
        "(i,j,!,!,!)->(i,j,2,2,2),(i~,j~,2,2,2)",
        lambda x: F.max_pool3d(x, 2, return_indices=True),
        t(2, 3, 4, 4, 4),
    ),
    Case("mean", "(i,j)->(i,1); mean over j", lambda x: x.mean(1, keepdim=True), t(2, 3)),
    Case("mean, inside a larger operation", "(i,!)->(i)", lambda x: x.mean(1), t(2, 3), inside=True),
    Case("median", "(i,!)->(i~),(i~)", lambda x: x.median(1), t(2, 3)),
    Case("mm", "(i,j),(j,k)->(i,k)", torch.mm, t(2, 3), t(3, 4)),
    Case("movedim", "(i,j,k)->(j,k,i)", lambda x: x.movedim(0, 2), t(2, 3, 4)),
    Case("mul", "(i,j),(j)->(i,j)", torch.mul, t(2, 3), t(3)),
    Case("mul, by a gate", "(i,j),(i,j)->(i,j)", lambda x, y: x * y.sigmoid(), t(2, 3), t(2, 3)),
    Case("mv", "(i,j),(j)->(i)", torch.mv, t(2, 4), t(4)),
    Case("nansum", "(i,j)->(i)", lambda x: x.nansum(1), t(2, 3)),
    Case("narrow", "(i,j)->(i,j[1:3])", lambda x: x.narrow(1, 1, 2), t(2, 5)),
    Case("narrow, from the end", "(i,j)->(i,j[1:3])", lambda x: x.narrow(1, -4, 2), t(2, 5)),
    Case(
        "native_channel_shuffle",
        "(i,j,k,l)->(i,j2*j1,k,l) with (j1*j2) with (j2*j1)",
        lambda x: torch.native_channel_shuffle(x, 2),
        t(2, 6, 2, 2),
    ),
    Case("native_dropout", "(i,j)->(i,j),(2,3)", lambda x: torch.native_dropout(x, 0.5, True), t(2, 3)),
    Case("new_ones", "(i,j)->(a~,b~)", lambda x: x.new_ones(4, 3), t(2, 3)),
    Case("normal_", "(i,j)->(i~,j~)", lambda x: x.normal_(), t(2, 3)),
    Case("numpy_T", "(i,j)->(j,i)", lambda x: x.T, t(2, 3)),
    Case("ones", "->(a~,b~)", lambda: torch.ones(2, 3)),
    Case("ones_like", "(i,j)->(i~,j~)", torch.ones_like, t(2, 3)),
    Case("pad, by a constant", "(i,j)->(i~,a+j~)", lambda x: F.pad(x, (1, 0), value=1.0), t(2, 3)),
    Case("pad, by nothing but positions", "(i,j,1)->(i,j,3)", lambda x: F.pad(x, (1, 1)), t(2, 3, 1)),
    Case("pad, cropping", "(i,!)->(i,5)", lambda x: F.pad(x, (-1, 0)), t(2, 6)),
    Case("pad, reflecting", "(i,j,!)->(i,j,8)", lambda x: F.pad(x, (1, 2), mode="reflect"), t(2, 4, 5)),
    Case("permute", "(i,j,k)->(k,i,j)", lambda x: x.permute(2, 0, 1), t(2, 3, 4)),
    Case("pixel_shuffle", "(i,j*4,!,!)->(i,j,4,4)", lambda x: F.pixel_shuffle(x, 2), t(2, 12, 2, 2)),
    Case("pixel_unshuffle", "(i,j,!,!)->(i,j*4,2,2)", lambda x: F.pixel_unshuffle(x, 2), t(2, 3, 4, 4)),
    Case("pow", "(i,j)->(i,j)", lambda x: x**2, t(2, 3)),
    Case("prelu", "(i,j,k),(j)->(i,j,k)", F.prelu, t(2, 3, 4), w(3)),
    Case("prelu, one slope", "(i,j,k),(1)->(i,j,k)", F.prelu, t(2, 3, 4), w(1)),
    Case("prod", "(i,!)->(i)", lambda x: x.prod(1), t(2, 3)),
    Case("relu6", "(i,j)->(i,j)", F.relu6, t(2, 3)),
    Case("relu_", "(i,j)->(i,j)", torch.relu_, t(2, 3)),
    Case("repeat", "(i)->(a~,2*i)", lambda x: x.repeat(2, 2), t(3)),
    Case("repeat_interleave", "(i,j)->(i,j*2)", lambda x: x.repeat_interleave(2, 1), t(2, 3)),
    Case("repeat_interleave, a dimension of size 1", "(i,1)->(i,a~)", lambda x: x.repeat_interleave(4, 1), t(2, 1)),
    Case("repeat_interleave, a vector", "(i)->(i*2)", lambda x: x.repeat_interleave(2), t(3)),
    Case("reshape, merged", "(i,j)->(i*j)", lambda x: x.reshape(6), t(2, 3)),
    Case("reshape, regrouped", "(i,j)->(i*j1,j2) with (2*j1*j2)", lambda x: x.reshape(4, 3), t(2, 6)),
    Case("reshape, with sizes of one", "(i)->(1,i,1)", lambda x: x.reshape(1, 6, 1), t(6)),
    Case(
        "rms_norm",
        "(i,j,k),(k)->(i,j,k); statistics over k",
        lambda x, weight: F.rms_norm(x, (4,), weight),
        t(2, 6, 4),
        w(4),
    ),
    Case(
        "rnn_relu",
        "(!,1,i),(1,1,j),(j,i),(j,j)->(2,1,j),(1,1,j)",
        lambda x, h, i, o: torch.rnn_relu(x, h, (i, o), False, 1, 0.0, False, False, False),
        t(2, 1, 3),
        t(1, 1, 4),
        w(4, 3),
        w(4, 4),
    ),
    Case(
        "rnn_relu_cell",
        "(1,i),(1,j),(j,i),(j,j)->(1,j)",
        lambda x, h, i, o: torch.rnn_relu_cell(x, h, i, o),
        t(1, 3),
        t(1, 4),
        w(4, 3),
        w(4, 4),
    ),
    Case(
        "rnn_tanh, two layers",
        "(!,1,i),(!,1,j),(j,i),(j,j),(j,j),(j,j)->(2,1,j),(2,1,j)",
        lambda x, h, i, o, j, p: torch.rnn_tanh(x, h, (i, o, j, p), False, 2, 0.0, False, False, False),
        t(2, 1, 3),
        t(2, 1, 4),
        w(4, 3),
        w(4, 4),
        w(4, 4),
        w(4, 4),
    ),
    Case(
        "rnn_tanh_cell",
        "(1,i),(1,j),(j,i),(j,j)->(1,j)",
        lambda x, h, i, o: torch.rnn_tanh_cell(x, h, i, o),
        t(1, 3),
        t(1, 4),
        w(4, 3),
        w(4, 4),
    ),
    Case("roll", "(i,j)->(i,j[5]+j[0:5])", lambda x: x.roll(1, 1), t(2, 6)),
    Case(
        "roll, the outer half of a split",
        "(i)->({i[4:6]|i[0:2]|i[2:4]},{..}) with (i1!*i2) with ({i[4:6]|i[0:2]|i[2:4]},{..})",
        lambda x: x.view(3, 2).roll(1, 0),
        t(6),
    ),
    Case("rot90", "(i,j,k)->(i,k[::-1],j)", lambda x: x.rot90(1, (1, 2)), t(2, 3, 4)),
    Case("rrelu", "(i,j)->(i,j)", lambda x: F.rrelu(x, training=True), t(2, 3)),
    Case(
        "scaled_dot_product_attention",
        "(i,j,!,k),(i,j,!,k),(i,j,!,l)->(i,j,4,l)",
        F.scaled_dot_product_attention,
        t(2, 3, 4, 5),
        t(2, 3, 6, 5),
        t(2, 3, 6, 7),
    ),
    Case(
        "scaled_dot_product_attention, bias per head",
        "(i,j,!,k),(i,j,!,k),(i,j,!,l),(j,!,!)->(i,j,4,l)",
        F.scaled_dot_product_attention,
        t(2, 3, 4, 5),
        t(2, 3, 6, 5),
        t(2, 3, 6, 7),
        w(3, 4, 6),
    ),
    Case(
        "scaled_dot_product_attention, fixed bias per head",
        "(i,!,!,j),(i,!,!,j),(i,!,!,k),(3,4,6)->(i,3,4,k)",
        F.scaled_dot_product_attention,
        t(2, 3, 4, 5),
        t(2, 3, 6, 5),
        t(2, 3, 6, 7),
        c(3, 4, 6),
    ),
    Case(
        "scaled_dot_product_attention, fixed mask",
        "(i,j,!,k),(i,j,!,k),(i,j,!,l),(4,6)->(i,j,4,l)",
        F.scaled_dot_product_attention,
        t(2, 3, 4, 5),
        t(2, 3, 6, 5),
        t(2, 3, 6, 7),
        mask(4, 6),
    ),
    Case(
        "scaled_dot_product_attention, grouped queries",
        "(i,j*2,!,k),(i,j,!,k),(i,j,!,l)->(i,j*2,3,l)",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        t(2, 4, 3, 5),
        t(2, 2, 3, 5),
        t(2, 2, 3, 6),
    ),
    Case("select", "(i,j[0]+!+j[2:6])->(i)", lambda x: x[:, 1], t(2, 6)),
    Case("select, a row of a split", "(i)->(i[3:6]) with (i1!*i2)", lambda x: x.view(2, 3)[1], t(6)),
    Case("selu", "(i,j)->(i,j)", F.selu, t(2, 3)),
    Case("sigmoid", "(i,j)->(i~,j~)", torch.sigmoid, t(2, 3)),
    Case("slice", "(i,j)->(i,j[2:5])", lambda x: x[:, 2:5], t(2, 6)),
    Case("slice, of a split", "(i)->(i1,i2[1:3]) with (i1*i2) with (i1,i2[1:3])", lambda x: x.view(2, 3)[:, 1:], t(6)),
    Case("slice, with a step", "(i,j*2)->(i,j)", lambda x: x[:, 1::2], t(2, 6)),
    Case("slice, with a step that does not divide", "(i,!)->(i,2)", lambda x: x[:, ::4], t(2, 6)),
    Case("softmax", "(i,!,j)->(i~,3,j~)", lambda x: x.softmax(1), t(2, 3, 4)),
    Case("softmax, within blocks", "(i,2*j)->(i~,2,j~)", lambda x: x.view(4, 2, 3).softmax(1), t(4, 6)),
    Case("sort", "(i,!)->(i~,3),(i~,3)", lambda x: x.sort(1), t(2, 3)),
    Case("split", "(i,j)->(i,j[0:4]),(i,j[4:6])", lambda x: x.split(4, 1), t(2, 6)),
    Case("split_with_sizes", "(i,j)->(i,j[0:2]),(i,j[2:6])", lambda x: x.split([2, 4], 1), t(2, 6)),
    Case("square", "(i,j)->(i,j)", torch.square, t(2, 3)),
    Case("squeeze", "(i,1,j)->(i,j)", torch.squeeze, t(2, 1, 3)),
    Case("squeeze_", "(i,1,j)->(i,j)", lambda x: x.squeeze_(1), t(2, 1, 3)),
    Case("squeeze_, dimension not named", "(!,1,!)->(2,3)", lambda x: x.squeeze_(), t(2, 1, 3)),
    Case("stack", "(i,j),(i,j)->(2,i,j)", lambda x, y: torch.stack([x, y]), t(2, 3), t(2, 3)),
    Case("std", "(i,j)->(i); mean over j", lambda x: x.std(1), t(2, 3)),
    Case("std_mean", "(i,j)->(i),(i); mean over j", lambda x: torch.std_mean(x, 1), t(2, 3)),
    Case("sum", "(i,j)->(i)", lambda x: x.sum(1), t(2, 3)),
    Case("sum, after a sigmoid", "(i,!)->(i~)", lambda x: x.sigmoid().sum(1), t(2, 3)),
    Case("sum, of everything", "(i,j)->()", torch.sum, t(2, 3)),
    Case("sum, within blocks", "(i,2*j)->(i,j)", lambda x: x.view(4, 2, 3).sum(1), t(4, 6)),
    Case("swapaxes", "(i,j)->(j,i)", lambda x: x.swapaxes(0, 1), t(2, 3)),
    Case("t", "(i,j)->(j,i)", torch.t, t(2, 3)),
    Case("t_", "(i,j)->(j,i)", lambda x: x.t_(), t(2, 3)),
    Case("take_along_dim", "(!,!),(2,4)->(2,4)", lambda x, i: x.take_along_dim(i, 1), t(2, 3), ix(2, 4)),
    Case("tensor_split", "(i,j)->(i,j[0:3]),(i,j[3:5])", lambda x: x.tensor_split(2, 1), t(2, 5)),
    Case("threshold", "(i,j)->(i~,j~)", lambda x: F.threshold(x, 0.1, 1.0), t(2, 3)),
    Case("tile", "(i,j)->(2*i,2*j)", lambda x: x.tile(2, 2), t(2, 3)),
    Case("to", "(i,j)->(i,j)", lambda x: x.to(torch.float64), t(2, 3)),
    Case("topk", "(i,!)->(i~,2),(i~,2)", lambda x: x.topk(2, 1), t(2, 3)),
    Case(
        "torchvision::roi_align",
        "(!,i,!,!),(5,5)->(5,i,3,3)",
        lambda x, boxes: torchvision.ops.roi_align(x, boxes, 3),
        t(2, 3, 8, 8),
        c(5, 5),
    ),
    Case(
        "torchvision::roi_pool",
        "(!,i,!,!),(5,5)->(5,i,3,3)",
        lambda x, boxes: torchvision.ops.roi_pool(x, boxes, 3),
        t(2, 3, 8, 8),
        c(5, 5),
    ),
    Case("transpose", "(i,j)->(j,i)", lambda x: x.transpose(0, 1), t(2, 3)),
    Case("transpose_", "(i,j)->(j,i)", lambda x: x.transpose_(0, 1), t(2, 3)),
    Case("tril, has no rule", "(!,!)->(3,3)", torch.tril, t(3, 3)),
    Case("type_as", "(i,j),(4)->(i,j)", lambda x, y: x.type_as(y), t(2, 3), c(4, dtype=torch.float64)),
    Case("unbind", "(i,!)->(i),(i),(i)", lambda x: x.unbind(1), t(2, 3)),
    Case("unbind, a split", "(i)->(i[0:3]),(i[3:6]) with (i1!*i2)", lambda x: x.view(2, 3).unbind(0), t(6)),
    Case("unflatten", "(i)->(i1,i2) with (i1*i2)", lambda x: x.unflatten(0, (2, 3)), t(6)),
    Case("unfold", "(i,!)->(i,4,2)", lambda x: x.unfold(1, 2, 1), t(2, 5)),
    Case("unsqueeze", "(i,j)->(i,1,j)", lambda x: x.unsqueeze(1), t(2, 3)),
    Case("unsqueeze_", "(i,j)->(1,i,j)", lambda x: x.unsqueeze_(0), t(2, 3)),
    Case(
        "upsample_bilinear2d",
        "(i,j,!,!)->(i,j,8,8)",
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        t(2, 3, 4, 4),
    ),
    Case("upsample_nearest2d", "(i,j,!,!)->(i,j,8,8)", lambda x: F.interpolate(x, scale_factor=2), t(2, 3, 4, 4)),
    Case("var", "(i,j)->(i); mean over j", lambda x: x.var(1), t(2, 3)),
    Case("var, inside a larger operation", "(i,!)->(i)", lambda x: x.var(1), t(2, 3), inside=True),
    Case("var, of what is not zero", "(i,!)->(i~)", lambda x: x.exp().var(1), t(2, 3)),
    Case("var_mean", "(i,j)->(i),(i); mean over j", lambda x: torch.var_mean(x, 1), t(2, 3)),
    Case("view", "(i)->(i1,i2) with (i1*i2)", lambda x: x.view(2, 3), t(6)),
    Case("view, as another dtype", "(!)->(6)", lambda x: x.view(torch.int32), t(6)),
    Case(
        "view, heads to the front",
        "(i,j)->(j1,i,j2) with (j1*j2)",
        lambda x: x.view(2, 2, 3).transpose(0, 1),
        t(2, 6),
    ),
    Case(
        "view, shuffled and back",
        "(i,j)->(i,j2*j1) with (j1*j2) with (j2*j1)",
        lambda x: x.view(2, 2, 3).transpose(1, 2).reshape(2, 6),
        t(2, 6),
    ),
    Case("view_as", "(i,j),(i,j)->(i,j)", lambda x, y: x.view_as(y), t(2, 3), t(2, 3)),
    Case("where", "(2,1),(1,i),(i)->(2,i)", torch.where, mask(2, 1), t(1, 3), t(3)),
    Case("where, fixed mask", "(3),(i,1),(!)->(i~,3)", torch.where, mask(3), t(2, 1), t(3)),
    Case("zero_", "(i,j)->(i,j)", lambda x: x.zero_(), t(2, 3)),
    Case("zeros", "(i,j)->(a,b)", lambda x: torch.zeros(2, 3), t(2, 3)),
    Case("zeros, met", "(i,j)->(i,j)", lambda x: x + torch.zeros(2, 3), t(2, 3)),
    Case("zeros_like", "(i,j)->(i,j)", torch.zeros_like, t(2, 3)),
]
# fmt: on

# Operations without a case of their own: the one on the left has a case and the same rule. Those
# in ON_DATA read values, so they run only between parts: tests/test_ways.py prunes through them.
ON_DATA = {"_pack_padded_sequence", "_pad_packed_sequence"}
ALIASES = {
    "_weight_norm": "_weight_norm_interface",
    "adaptive_avg_pool2d": (
        "_adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa "
        "_upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "_upsample_nearest_exact3d adaptive_avg_pool1d adaptive_avg_pool3d adaptive_max_pool1d "
        "adaptive_max_pool3d avg_pool2d avg_pool3d max_pool1d max_pool1d_with_indices "
        "max_pool2d_with_indices max_pool3d reflection_pad1d reflection_pad2d reflection_pad3d "
        "replication_pad1d replication_pad2d replication_pad3d upsample_bicubic2d "
        "upsample_linear1d upsample_nearest1d upsample_nearest3d upsample_trilinear3d"
    ),
    "all": "amin argmin kthvalue min mode",
    "index_put": "index_put_",
    "conv2d": "conv3d conv_transpose1d conv_transpose3d convolution",
    "celu": (
        "celu_ clip_ elu_ hardsigmoid_ hardswish_ hardtanh_ leaky_relu leaky_relu_ mish_ relu6_ "
        "rrelu_with_noise selu_ silu_ square_ threshold_"
    ),
    "fill_": "fill",
    "normal_": "bernoulli_ exponential_ log_normal_ uniform_",
    "to": "_to_copy",
    "argsort": "_log_softmax _softmax cummin",
    "broadcast_to": "expand_copy",
    "cat": "concat concatenate",
    "contiguous": "_conj alias conj lift_fresh resolve_conj resolve_neg",
    "flip": "fliplr flipud matrix_H moveaxis swapdims",
    "chunk": "dsplit unsafe_chunk unsafe_split unsafe_split_with_sizes vsplit",
    "count_nonzero": "frobenius_norm norm",
    "flatten": "_reshape_alias _unsafe_view reshape_as",
    "full": "empty new_empty new_full new_zeros rand randn",
    "grid_sampler": "grid_sampler_2d grid_sampler_3d",
    "ones_like": "empty_like full_like rand_like randn_like",
}

WITHOUT_RULE = {case.op for case in CASES if case.name.endswith("has no rule")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_coupling(case):
    seen = case.run()
    assert seen.text == case.text
    assert case.op in seen.executed, (
        f"the case is named after an op that it does not execute: {sorted(seen.executed)}"
    )


def test_the_table_is_alphabetical():
    names = [case.name for case in CASES]
    assert names == sorted(set(names))


def test_every_rule_has_a_case():
    served = frozenset().union(*(case.run().served for case in CASES))
    aliases = {alias: op for op, others in ALIASES.items() for alias in others.split()}
    assert sorted(aliases) == sorted(RULES.keys() - served - ON_DATA), (
        "ALIASES lists just the entries that no case reaches"
    )
    for alias, op in aliases.items():
        assert op in served, f"{op} has no case"
        assert RULES[alias].rule is RULES[op].rule, f"{alias} is not served by the rule of {op}"


def test_an_op_without_a_rule_pins_all_that_enters():
    assert WITHOUT_RULE
    assert not WITHOUT_RULE & RULES.keys()
    for case in CASES:
        if case.op in WITHOUT_RULE:
            left, _, right = case.text.partition("->")
            assert not any(character.isalpha() for character in left + right)


# In these cases a weight that already has labels is coupled differently from one that takes over
# labels. In a grouped convolution, its rows would share one labelling of the input axis. A
# flattened input has labels of two dimensions, which a single label per position cannot express.
MET_BEFORE = {"conv1d, flattened input", "conv2d, grouped"}
WEIGHTED = [case for case in CASES if any(operand.kind == "weight" for operand in case.operands)]


@pytest.mark.parametrize("case", WEIGHTED, ids=lambda case: case.name)
def test_a_weight_met_before_couples_alike(case):
    """The axes of a weight take over the first labels that they meet.

    If they already have labels, both sets of labels are united, and the coupling is the same.
    """
    fresh = [
        labelled(*operand.shape) if operand.kind == "weight" else operand
        for operand in case.operands
    ]
    alike = couple_one(case.function, fresh, case.target).text == case.text
    assert alike == (case.name not in MET_BEFORE)


def test_the_page_of_rules_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_rules", DOCS / "generate_rules.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    committed = (DOCS / "rules.md").read_text(encoding="utf-8")
    assert committed == generator.page(), "run python docs/generate_rules.py"


def test_every_rule_says_what_it_does():
    for name, rule in RULES.items():
        assert rule.doc.endswith("."), (
            f"the docstring of {name}'s rule has to begin with a paragraph of whole sentences"
        )
        assert "|" not in rule.doc
