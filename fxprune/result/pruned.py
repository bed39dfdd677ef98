"""What a pruning gives: the smaller model, its plan and its report."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn

from fxprune.common.public import public
from fxprune.errors import ArgumentError
from fxprune.result.plan import (
    Plan,
)
from fxprune.result.report import Report
from fxprune.result.serialization import save_pruned

__all__ = ["Pruned"]


@public
@dataclass(frozen=True)
class Pruned:
    """The result of :func:`prune` and :func:`apply`.

    Attributes
    ----------
    model:
        The smaller model; trains, compiles and exports like any module, for any batch size.
    plan:
        What survived, as data.
    report:
        What changed; ``print`` it.
    """

    model: nn.Module
    plan: Plan
    report: Report

    @public
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write plan.json, model.safetensors, report.json, report.txt and a manifest of them;
        :func:`load` reads them.

        Nothing is pickled. The folder is made if missing, an earlier save in it is replaced as a
        whole, other files in it are left alone. A save that is interrupted, even killed, leaves
        the old state or the new one, never a torn one.

        Raises
        ------
        ArgumentError
            If the folder cannot be written to.
        ModelError
            If the state dict holds what only a pickle could.
        """
        if (
            not isinstance(self.model, nn.Module)
            or not isinstance(self.plan, Plan)
            or not isinstance(self.report, Report)
        ):
            raise ArgumentError(
                "a Pruned holds a module, a Plan and a Report, as those of prune do: this one "
                "does not."
            )
        save_pruned(folder, self.model, self.plan, self.report)
