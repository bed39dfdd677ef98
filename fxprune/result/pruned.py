"""The result of pruning: the smaller model, its plan and its report."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn

from fxprune.common.public import public
from fxprune.errors import ArgumentError
from fxprune.result.plan import Plan
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
        The smaller model, an ordinary module: it can be trained, compiled and exported, for any
        batch size.
    plan:
        The surviving units of each group. :func:`apply` prunes another model of the same
        architecture by it.
    report:
        Sizes and costs before and after pruning; ``print`` it.

    Examples
    --------
    >>> import fxprune, torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> pruned = fxprune.prune(net, torch.zeros(1, 3, 8, 8), channels=0.5)
    >>> pruned.model(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 4, 4, 4])
    >>> pruned.report.params_before, pruned.report.params_after
    (516, 260)
    """

    model: nn.Module
    plan: Plan
    report: Report

    @public
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the result to a folder; :func:`load` reads it.

        The folder holds ``plan.json``, ``model.safetensors``, ``report.json``, ``report.txt`` and
        a manifest of them. Nothing is pickled. A save that is interrupted, even killed, leaves the
        old state or the new one, never a mixture.

        Parameters
        ----------
        folder:
            Created if missing. An earlier save in it is replaced as a whole; other files in it
            stay as they are.

        Raises
        ------
        ArgumentError
            If the folder cannot be written to.
        ModelError
            If the state dict holds something that is not a tensor.

        Examples
        --------
        >>> import fxprune, tempfile, torch
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxprune.prune(net, torch.zeros(1, 3), channels=0.5).save(folder)
        ...     loaded = fxprune.load(folder, net)
        >>> loaded.model.get_parameter("0.weight").shape
        torch.Size([4, 3])
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
