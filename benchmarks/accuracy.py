"""Measure the accuracy of pruned networks, before and after fine-tuning, for each criterion.

    # scikit-learn's digits: about an hour on two cores
    python benchmarks/accuracy.py
    # one small network, one seed: a minute
    python benchmarks/accuracy.py --quick
    # generated images, harder than the digits
    python benchmarks/accuracy.py --data textures
    # CIFAR-10 with the papers' networks and recipe: needs a GPU
    python benchmarks/accuracy.py --full --data-dir /data/cifar
    # the effect of each part of CPMC
    python benchmarks/accuracy.py --ablation
    # the effect of fxprune.compensate before fine-tuning
    python benchmarks/accuracy.py --compensation
    # networks that other people trained, without any training: see benchmarks/pretrained.py
    python benchmarks/accuracy.py --data pretrained

Each network is trained once per seed. Then every criterion prunes these same weights, in one step,
until the given share of the multiply-accumulates is gone. The accuracy is measured, the network is
fine-tuned, and the accuracy is measured again. torch-pruning's magnitude and Taylor importances
prune the same weights globally; its ``pruning_ratio`` is searched until as few MACs are left.
Means and standard deviations are over the seeds.

Weights are fitted on the training part, and criteria that read data read it too. The settings of
CPMC were chosen on the validation part, which the ablation shows. The test part is only reported.

The recipe is the usual one for CIFAR: SGD with Nesterov momentum 0.9, weight decay 5e-4 for VGG
and 1e-4 for the others, a learning rate that falls tenfold after 50 % and after 75 % of the
epochs, and images that are moved (and mirrored if that keeps their class). Fine-tuning does the
same, starting at a tenth of the rate.

A criterion is a name, or ``cpmc`` with settings: ``cpmc:alpha=0:beta=1:gamma=0``,
``cpmc:by=mean:roles=own+scale``; or ``cpmc_flow:1``, with an exponent of the
computation. ``by=mean`` and ``by=max`` divide a value by that of its group
and by nothing else. ``weigh_groups=0`` ignores how much the group weighs in the network.
``of=roots`` and ``of=magnitudes`` use the roots of the sums of squares, or the sums of magnitudes.
With ``/constants`` or ``/least_squares`` at the end of the name, the pruned network is compensated
on the images that the criteria read.

Results go to ``benchmarks/results/accuracy_<data>.json``, ``.md`` and one plot per network. Rows
that exist already, measured under the same settings, are not measured again. ``--again`` discards
those of the named criteria.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import _common as common
import _data
import numpy as np
import pretrained
import torch
from _networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune import criteria
from fxprune.criteria import CPMC, UnitView
from fxprune.criteria.cpmc import share_left

CRITERIA = (
    "cpmc",
    "cpmc_flow",
    "l1",
    "l2",
    "bn_scale",
    "lamp",
    "fpgm",
    "taylor",
    "fisher",
    "activation",
    "random",
)
RIVALS = ("torch-pruning magnitude", "torch-pruning taylor")
REMOVED = (0.3, 0.5, 0.7, 0.85)
DEFAULT_NETWORKS = ("vgg_narrow", "resnet20", "densenet22")
FULL_NETWORKS = ("vgg16", "resnet20", "resnet56", "densenet40")
BATCH = 64
CALIBRATION = 256  # training images that the criteria read
PARTS = ("validation", "test")


# ---------------------------------------------------------------------------------------- ablation


def _ablation() -> dict[str, str]:
    """Return the variants of CPMC: what the table shows for each, and the criterion.

    Within a layer the order is always that of the value, because the costs of its units are equal.
    """
    alpha, beta, gamma = (f"{name}={getattr(CPMC(), name)}" for name in ("alpha", "beta", "gamma"))
    no_value, no_cost, no_parameters = "alpha=0", "beta=0", "gamma=0"
    return {
        "value": f"cpmc:{alpha}:{no_cost}:{no_parameters}",
        "computation": f"cpmc:{no_value}:{beta}:{no_parameters}",
        "parameters": f"cpmc:{no_value}:{no_cost}:{gamma}",
        "value + computation": f"cpmc:{alpha}:{beta}:{no_parameters}",
        "value + parameters": f"cpmc:{alpha}:{no_cost}:{gamma}",
        "computation + parameters": f"cpmc:{no_value}:{beta}:{gamma}",
        "all three": "cpmc",
        "value, own filter only": f"cpmc:{alpha}:{no_cost}:{no_parameters}:roles=own+scale",
        "all three, own filter only": "cpmc:roles=own+scale",
        "all three, costs weighted like the value": "cpmc:beta=1:gamma=1",
        "all three, without group weights": "cpmc:weigh_groups=0",
        "all three, divided by the group's mean": "cpmc:by=mean",
        "all three, divided by the group's maximum": "cpmc:by=max",
        "all three, roots of the sums of squares": "cpmc:of=roots",
        "all three, sums of magnitudes": "cpmc:of=magnitudes",
    }


@dataclass(frozen=True)
class Variant(CPMC):
    """CPMC with another magnitude or another normaliser within the group.

    The defaults were compared with these variants.
    """

    by: str = "proportional"
    of: str = "squares"

    def __call__(self, view: UnitView) -> Tensor:
        value = view.sum(torch.abs if self.of == "magnitudes" else torch.square, self.roles)
        value = value.sqrt() if self.of == "roots" else value
        if self.by == "proportional":
            return value / value.mean() * self._group_weight(view) / share_left(value, view.blocks)
        return value / {"max": value.max, "mean": value.mean}[self.by]().clamp_min(
            torch.finfo(value.dtype).tiny
        )

    def _group_weight(self, view: UnitView) -> float:
        """Return the mean value of the group divided by that of the network."""
        totals = view.views.totals(
            torch.abs if self.of == "magnitudes" else torch.square, self.roles
        )
        totals = np.sqrt(totals) if self.of == "roots" else totals
        units = view.views.coupling.units
        return (
            float(totals[view.group.units].mean() / totals[units].mean())
            if self.weigh_groups
            else 1.0
        )


def _compensation() -> dict[str, str]:
    """Return the criteria with and without compensation, by what the table shows for each."""
    methods = {"": "", ", constants": "/constants", ", least squares": "/least_squares"}
    return {
        name + shown: name + method
        for name in ("cpmc", "l2", "random")
        for shown, method in methods.items()
    }


def cpmc(text: str) -> CPMC:
    """Read ``cpmc`` or ``cpmc:name=value:...``.

    The result is a plain CPMC if only its own settings are named.
    """
    found = variant(text)
    own = {entry.name: getattr(found, entry.name) for entry in fields(CPMC)}
    return CPMC(**own) if found == Variant(**own) else found


def variant(text: str) -> Variant:
    """Return the criterion with all its settings in its ``repr``.

    So a row that was measured with other defaults of CPMC is not confused with a new one.
    """
    read = {
        "roles": lambda value: tuple(value.split("+")),
        "by": str,
        "of": str,
        "weigh_groups": lambda value: value != "0",
    }
    plain = CPMC()
    settings: dict[str, Any] = {"alpha": plain.alpha, "beta": plain.beta, "gamma": plain.gamma}
    for part in text.split(":")[1:]:
        name, _, value = part.partition("=")
        settings[name] = read.get(name, float)(value)
    return Variant(**settings)


def criterion_of(name: str, data: _data.Data, seed: int) -> Any:
    """Return the criterion for ``fxprune.prune``.

    Criteria that read data get the first images of the training part.
    """
    if _is_plain_cpmc(name):
        return cpmc(name)
    if name.startswith("cpmc_flow:"):
        return criteria.FlowCPMC(computation=float(name.partition(":")[2]))
    if name == "random":
        return criteria.Random(seed)
    if name == "taylor":
        return criteria.Taylor(_calibration(data, BATCH), F.cross_entropy)
    if name == "fisher":
        return criteria.Fisher(_calibration(data, 4), F.cross_entropy)
    if name == "activation":
        return criteria.Activation(_calibration(data, BATCH))
    return name


def _is_plain_cpmc(name: str) -> bool:
    return name == "cpmc" or name.startswith("cpmc:")


def _calibration(data: _data.Data, batch: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = data.train.images[:CALIBRATION], data.train.labels[:CALIBRATION]
    return list(zip(images.split(batch), labels.split(batch), strict=True))


# ---------------------------------------------------------------------------------------- training


def fit(
    model: nn.Module, data: _data.Data, *, epochs: int, rate: float, decay: float, seed: int
) -> None:
    """Train in place and keep the weights of the last epoch; none is selected."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, weight_decay=decay, nesterov=True
    )
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train.labels), generator=generator).to(
            data.train.labels.device
        )
        for batch in order.split(BATCH):
            if len(batch) == 1:
                continue  # batch normalisation has no variance over one image
            images = _data.augmented(data.train.images[batch], data, generator).contiguous(
                memory_format=torch.channels_last
            )
            loss = F.cross_entropy(model(images), data.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        steps.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, part: _data.Part) -> float:
    """Return the share of correct answers in percent."""
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(part.images.split(500), part.labels.split(500), strict=True)
    )
    return 100 * right / len(part.labels)


def accuracies(model: nn.Module, data: _data.Data) -> dict[str, float]:
    """Return the accuracies on the validation and the test part."""
    return {part: accuracy(model, getattr(data, part)) for part in PARTS}


@dataclass(frozen=True)
class Setting:
    """What the figures of a row depend on, apart from the versions of the software."""

    data: str
    size: int
    network: str
    seed: int
    epochs: int
    finetune: int
    rate: float

    @property
    def decay(self) -> float:
        """The weight decay."""
        return 5e-4 if self.network.startswith("vgg") else 1e-4


@dataclass(frozen=True)
class Where:
    """What the figures do not depend on: folders and the device."""

    cache: str
    folder: str | None
    device: str


@lru_cache(maxsize=1)
def _loaded(name: str, size: int, where: Where) -> _data.Data:
    return _data.load(name, size, Path(where.folder) if where.folder else None, where.device)


@lru_cache(maxsize=1)
def trained(setting: Setting, where: Where) -> nn.Module:
    """Return the dense network from the cache, or train it and store it there."""
    data = _loaded(setting.data, setting.size, where)
    torch.manual_seed(setting.seed)
    model = NETWORKS[setting.network](data.channels, data.classes).to(
        where.device, memory_format=torch.channels_last
    )
    trained_by = replace(setting, finetune=0)
    digest = hashlib.sha256(repr(trained_by).encode()).hexdigest()[:12]
    path = Path(where.cache) / f"{setting.data}_{setting.network}_{setting.seed}_{digest}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=where.device, weights_only=True))
        return model.eval()
    fit(
        model,
        data,
        epochs=setting.epochs,
        rate=setting.rate,
        decay=setting.decay,
        seed=setting.seed,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as new:
        torch.save(model.state_dict(), new)
    return model


class _replacing:  # noqa: N801 - used like a function
    """A path to write to, which replaces the real one only after everything is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.new = path, path.with_name(f"{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.new

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.new, self.path)
        else:
            self.new.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------- pruning


def with_fxprune(
    dense: nn.Module, data: _data.Data, name: str, kept: float, seed: int
) -> nn.Module:
    """Prune to at most ``kept`` of the MACs, and compensate if the name says so."""
    name, _, method = name.partition("/")
    pruned = fxprune.prune(
        dense, data.example, macs=kept, criterion=criterion_of(name, data, seed)
    )
    if method:
        fxprune.compensate(dense, pruned, _calibration(data, BATCH), method=method)
    return pruned.model


def with_torch_pruning(dense: nn.Module, data: _data.Data, name: str, kept: float) -> nn.Module:
    """Prune to at most ``kept`` of the MACs with an importance of torch-pruning."""
    import torch_pruning

    def importance(model: nn.Module) -> Any:
        if not name.endswith("taylor"):
            return torch_pruning.importance.GroupMagnitudeImportance(p=2)
        for images, labels in _calibration(data, BATCH):
            F.cross_entropy(model(images), labels).backward()
        return torch_pruning.importance.GroupTaylorImportance()

    def ignored(model: nn.Module) -> list[nn.Module]:
        return common.output_layers(model, data.example)

    return common.torch_pruning_to_macs(dense, data.example, kept, importance, ignored)


def dense_row(setting: Setting, where: Where) -> common.Record:
    """Train a network, or read a trained one, and measure it."""
    data, start = _loaded(setting.data, setting.size, where), time.perf_counter()
    model = trained(setting, where)
    return {
        "accuracy": accuracies(model, data),
        "macs": common.count_macs(model, data.example),
        "parameters": common.parameter_count(model),
        "seconds": round(time.perf_counter() - start, 1),
    }


def pruned_row(setting: Setting, name: str, removed: float, where: Where) -> common.Record:
    """Prune, measure, fine-tune and measure again."""
    data, dense, start = (
        _loaded(setting.data, setting.size, where),
        trained(setting, where),
        time.perf_counter(),
    )
    if name in RIVALS:
        model = with_torch_pruning(dense, data, name, 1 - removed)
    else:
        model = with_fxprune(dense, data, name, 1 - removed, setting.seed)
    left = common.count_macs(model, data.example) / common.count_macs(dense, data.example)
    record: common.Record = {
        "macs_left": left,
        "parameters_left": common.parameter_count(model) / common.parameter_count(dense),
        "before": accuracies(model, data),
    }
    if setting.finetune:
        torch.manual_seed(setting.seed)
        fit(
            model,
            data,
            epochs=setting.finetune,
            rate=setting.rate / 10,
            decay=setting.decay,
            seed=1000 + setting.seed,
        )
        record["after"] = accuracies(model, data)
    return {**record, "seconds": round(time.perf_counter() - start, 1)}


# --------------------------------------------------------------------------------- all of the rows


def key_of(setting: Setting, name: str = "", removed: float = 0.0) -> str:
    """Return the key of a row: everything that its figures depend on.

    The row of a dense network has no criterion.
    """
    plain, slash, method = name.partition("/")
    described = (repr(variant(plain)) if _is_plain_cpmc(plain) else plain) + slash + method
    shown = replace(setting, finetune=0) if not name else setting
    return f"{shown} {described} {removed:g}" if name else f"{shown}"


_OLD_NAMES = {"standing=": "weigh_groups=", "by='seats'": "by='proportional'"}
"""Earlier names of settings in the keys of stored rows, and their present names."""


def with_present_names(rows: common.Record) -> common.Record:
    """Return stored rows under the keys that :func:`key_of` gives them now."""
    renamed = {}
    for key, row in rows.items():
        for old, new in _OLD_NAMES.items():
            key = key.replace(old, new)
        renamed[key] = row
    return renamed


def _worker(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")


def _caught(function: Callable[..., common.Record], *arguments: Any) -> common.Record:
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": common.one_line(error)}


Job = tuple[str, str, Callable[..., common.Record], tuple[Any, ...]]


def run_all(
    jobs: Sequence[Job], rows: common.Record, save: Callable[[], None], workers: int, threads: int
) -> None:
    """Run the jobs that are not in ``rows`` yet, and store each result there.

    A job consists of a key, a description, a function and its arguments.
    """
    missing = [job for job in jobs if job[0] not in rows or "error" in rows[job[0]]]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_worker, initargs=(threads,)
    ) as pool:
        waiting = {
            pool.submit(_caught, function, *arguments): (key, what)
            for key, what, function, arguments in missing
        }
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                key, what = waiting[done]
                rows[key] = done.result()
                save()
                print(f"{number}/{len(missing)} {what}: {_line(rows[key])}", flush=True)
        except BaseException:  # Ctrl-C too: finished jobs are saved, waiting ones are dropped
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _line(row: common.Record) -> str:
    """Return a line about a finished row, with the accuracy on the validation part.

    The test part is not shown, so that nobody chooses settings by it.
    """
    if "error" in row:
        return row["error"]
    if "accuracy" in row:
        return f"{row['accuracy']['validation']:.1f} %, {row['seconds']:.0f} s"
    after = f", fine-tuned {row['after']['validation']:.1f} %" if "after" in row else ""
    return (
        f"{row['macs_left']:.3f} of the MACs, {row['before']['validation']:.1f} %{after}, "
        f"{row['seconds']:.0f} s"
    )


# ------------------------------------------------------------------------------------------ report


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return (
        f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        if len(values) > 1
        else f"{values[0]:.1f}"
    )


def _with_error(values: Sequence[float]) -> str:
    """Return the mean and its standard error."""
    if len(values) < 2:
        return "-"
    return f"{statistics.mean(values):+.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


class Table:
    """The rows of one run, by network, criterion and share removed."""

    def __init__(self, rows: common.Record, options: argparse.Namespace) -> None:
        self.rows, self.options = rows, options

    def settings(self, network: str) -> list[Setting]:
        """Return the settings of a network, one per seed."""
        return [setting_of(self.options, network, seed) for seed in self.options.seeds]

    def values(self, network: str, name: str, removed: float, when: str, part: str) -> list[float]:
        """Return the accuracies of all seeds measured so far."""
        found = [
            self.rows.get(key_of(setting, name, removed), {}) for setting in self.settings(network)
        ]
        return [row[when][part] for row in found if when in row]

    def dense(self, network: str, part: str) -> list[float]:
        """Return the accuracies before pruning."""
        found = [self.rows.get(key_of(setting), {}) for setting in self.settings(network)]
        return [row["accuracy"][part] for row in found if "accuracy" in row]

    def errors(self) -> Iterable[str]:
        """Return what could not be measured, with the reasons."""
        for network in self.options.networks:
            for label, name in self.options.shown.items():
                for removed in self.options.removed:
                    for setting in self.settings(network):
                        row = self.rows.get(key_of(setting, name, removed), {})
                        if "error" in row:
                            yield (
                                f"{network}, {label}, {removed:.0%} removed, seed "
                                f"{setting.seed}: {row['error']}"
                            )

    def markdown(self, network: str, when: str, part: str) -> str:
        """Return a table with one line per criterion and one column per share removed.

        The best mean of a column is bold.
        """
        means: dict[float, float] = {}
        for removed in self.options.removed:
            found = [
                self.values(network, name, removed, when, part)
                for name in self.options.shown.values()
            ]
            means[removed] = max((round(statistics.mean(v), 1) for v in found if v), default=0.0)
        lines = []
        for label, name in self.options.shown.items():
            line = [label]
            for removed in self.options.removed:
                values = self.values(network, name, removed, when, part)
                best = values and round(statistics.mean(values), 1) >= means[removed]
                line.append(f"**{_spread(values)}**" if best else _spread(values))
            every = [
                statistics.mean(v)
                for r in self.options.removed
                if (v := self.values(network, name, r, when, part))
            ]
            line.append(
                f"{statistics.mean(every):.1f}" if len(every) == len(self.options.removed) else "-"
            )
            lines.append(line)
        return self._by_share(lines)

    def ahead(self, network: str, when: str, part: str) -> str:
        """Return by how much the first criterion is ahead of each other one, on equal weights."""
        (_, first), *others = self.options.shown.items()

        def gap(name: str, removed: float, setting: Setting) -> float | None:
            pair = [
                self.rows.get(key_of(setting, of, removed), {}).get(when) for of in (first, name)
            ]
            return pair[0][part] - pair[1][part] if all(pair) else None

        lines = []
        for label, name in others:
            gaps = [
                [gap(name, removed, setting) for removed in self.options.removed]
                for setting in self.settings(network)
            ]
            columns = [
                [value for value in column if value is not None]
                for column in zip(*gaps, strict=True)
            ]
            every = [statistics.mean(row) for row in gaps if None not in row]
            lines.append([label, *map(_with_error, [*columns, every])])
        return self._by_share(lines)

    def _by_share(self, lines: Sequence[Sequence[str]]) -> str:
        header = [
            "criterion",
            *(f"{removed:.0%} removed" for removed in self.options.removed),
            "mean",
        ]
        return common.markdown_table(header, lines)

    def whole(self, network: str) -> list[float]:
        """Return, for all rows, the share of the MACs left minus the share asked for.

        It shows how closely the budgets were met.
        """
        out = []
        for name in self.options.shown.values():
            for removed in self.options.removed:
                for setting in self.settings(network):
                    row = self.rows.get(key_of(setting, name, removed), {})
                    if "macs_left" in row:
                        out.append(row["macs_left"] - (1 - removed))
        return out


_WHEN = {"before": "right after pruning", "after": "after fine-tuning"}


def report(record: common.Record, table: Table) -> str:
    """Return the Markdown page."""
    options = table.options
    part = options.judge
    moments = ["before"] + (["after"] if options.finetune else [])
    lines = [
        f"# Accuracy after pruning: {options.data}"
        + (f", {options.about}" if options.about else ""),
        "",
        f"Accuracy on the {part} part in percent, mean ± standard deviation over "
        f"{len(options.seeds)} seeds ({', '.join(map(str, options.seeds))}); {options.epochs} "
        f"epochs of training, {options.finetune} of fine-tuning, images of {options.size} x "
        f"{options.size} pixels. The best mean of a column is bold.",
        "",
        f"`{record['command']}`",
        "",
        common.machine_line(record["machine"]),
    ]
    for network in options.networks:
        lines += ["", f"## {network}", "", f"Dense: {_spread(table.dense(network, part))}."]
        gaps = table.whole(network)
        if gaps:
            lines.append(
                f"Share of MACs left minus the budget: {min(gaps):+.3f} to {max(gaps):+.3f}."
            )
        for when in moments:
            lines += ["", f"{_WHEN[when].capitalize()}:", ""]
            lines.append(table.markdown(network, when, part))
        if len(options.seeds) > 1 and len(options.shown) > 1:
            what = (
                f"Lead of `{next(iter(options.shown))}` over each other criterion "
                f"{_WHEN[moments[-1]]}, compared per seed"
            )
            lines += [
                "",
                f"{what}; mean ± standard error:",
                "",
                table.ahead(network, moments[-1], part),
            ]
        lines += ["", f"![{network}]({_plot_name(options, network)})"]
    failed = list(table.errors())
    if failed:
        lines += ["", "## Not measured", "", *(f"- {line}" for line in failed)]
    return "\n".join(lines)


def _plot_name(options: argparse.Namespace, network: str) -> str:
    return f"{options.stem}_{network}.png"


def plot(table: Table, network: str) -> None:
    """Plot accuracy against the MACs left before and after fine-tuning, one line per criterion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    options = table.options
    moments = ["before"] + (["after"] if options.finetune else [])
    figure, axes = plt.subplots(1, len(moments), figsize=(6.5 * len(moments), 5), squeeze=False)
    colours = plt.get_cmap("tab20").colors
    for axis, when in zip(axes[0], moments, strict=True):
        dense = table.dense(network, options.judge)
        if dense:
            axis.axhline(statistics.mean(dense), color="black", linestyle=":", label="dense")
        for number, (label, name) in enumerate(options.shown.items()):
            found = [
                (r, v)
                for r in options.removed
                if (v := table.values(network, name, r, when, options.judge))
            ]
            axis.errorbar(
                [100 * (1 - removed) for removed, _ in found],
                [statistics.mean(values) for _, values in found],
                [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in found],
                label=label,
                color="crimson" if not number else colours[number % len(colours)],
                linewidth=2.5 if not number else 1.2,
                linestyle="--" if name in RIVALS else "-",
                marker="os^vD<>ph*X"[number % 11],
                markersize=4,
                capsize=2,
            )
        axis.set_xlabel("MACs left, % of the dense network")
        axis.set_title(
            {
                "before": "right after pruning",
                "after": f"after {options.finetune} epochs of fine-tuning",
            }[when]
        )
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"{options.judge} accuracy, %")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{network}, {options.data}, {len(options.seeds)} seeds")
    figure.savefig(
        common.RESULTS / _plot_name(options, network),
        dpi=110,
        bbox_inches="tight",
        metadata={"Software": None},
    )
    plt.close(figure)


# -------------------------------------------------------------------------------------------- main


def setting_of(options: argparse.Namespace, network: str, seed: int) -> Setting:
    """Return the setting of one dense network."""
    return Setting(
        options.data, options.size, network, seed, options.epochs, options.finetune, options.rate
    )


def _command(arguments: Sequence[str]) -> str:
    """Return the command line without the folders of this machine."""
    shown = re.sub(r"--(cache|workers|threads|device)[= ]\S+ ?", "", shlex.join(arguments))
    shown = re.sub(r"--data-dir[= ]\S+", "--data-dir ...", shown)
    return f"python benchmarks/accuracy.py {shown}".rstrip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks",
        type=common.names,
        help=f"names from {', '.join(NETWORKS)}; default: {','.join(DEFAULT_NETWORKS)}",
    )
    parser.add_argument(
        "--data",
        choices=(*_data.DATA, "pretrained"),
        help="default: cifar10 with --data-dir, else digits, else textures",
    )
    parser.add_argument(
        "--data-dir", help="torchvision's root folder for CIFAR, which is not downloaded"
    )
    parser.add_argument("--size", type=int, help="height and width of an image")
    parser.add_argument(
        "--criteria", type=common.names, help=f"default: {','.join(CRITERIA)} and torch-pruning's"
    )
    parser.add_argument(
        "--removed",
        type=common.shares,
        help="shares of the MACs to remove; default: 0.3,0.5,0.7,0.85",
    )
    parser.add_argument("--seeds", type=common.numbers, help="default: 0,1,2")
    parser.add_argument(
        "--epochs", type=int, help="epochs of training; default: 30 (160 with --full)"
    )
    parser.add_argument(
        "--finetune",
        type=int,
        help="epochs of fine-tuning; default: 6 (40 with --full); 0 for none",
    )
    parser.add_argument(
        "--rate", type=float, default=0.1, help="initial learning rate of training"
    )
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="compare variants of CPMC, on the validation part",
    )
    parser.add_argument(
        "--compensation",
        action="store_true",
        help="compare a few criteria with and without compensation",
    )
    parser.add_argument(
        "--judge",
        choices=PARTS,
        help="the part shown in tables and plots; default: test (validation with --ablation)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one network, one seed, two budgets, few epochs"
    )
    parser.add_argument(
        "--full", action="store_true", help="the papers' networks, image size and epochs"
    )
    parser.add_argument(
        "--again",
        type=common.names,
        default=(),
        help="criteria to measure again, or all",
    )
    parser.add_argument(
        "--cache",
        default=str(Path(tempfile.gettempdir()) / "fxprune-accuracy"),
        help="folder for trained weights",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, help="processes; default: one per core, or 1 on a GPU"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--stem", help="name of the results; default: accuracy_<data>")
    options = parser.parse_args()
    if options.data == "pretrained":
        named = {"--networks": options.networks, "--criteria": options.criteria}
        pretrained.main([f"{name}={','.join(given)}" for name, given in named.items() if given])
        parser.exit()
    _fill(options)
    unknown = [*set(options.networks) - set(NETWORKS)]
    known = {*CRITERIA, *RIVALS}
    plain = {
        name.removesuffix("/constants").removesuffix("/least_squares")
        for name in options.shown.values()
    }
    unknown += [name for name in plain if name not in known and ":" not in name]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    for name in plain:
        if name.startswith("cpmc:"):
            try:
                cpmc(name)
            except (TypeError, ValueError, fxprune.FxpruneError) as error:
                parser.error(f"{name}: {error}")
    if options.data.startswith("cifar") and not options.data_dir:
        parser.error(f"--data {options.data} needs --data-dir: nothing is downloaded")
    try:
        _data.load(options.data, options.size, Path(options.data_dir or "."))
    except (RuntimeError, OSError) as error:
        parser.error(f"{options.data} cannot be read: {error}")
    return options


def _fill(options: argparse.Namespace) -> None:
    """Set the options that the command line leaves open."""
    quick, full = options.quick, options.full
    options.data = options.data or (
        "cifar10" if options.data_dir else "digits" if _has_digits() else "textures"
    )
    options.size = options.size or (32 if full else _data.SIZES[options.data])
    options.networks = options.networks or (
        FULL_NETWORKS if full else ("vgg_narrow",) if quick else DEFAULT_NETWORKS
    )
    options.removed = options.removed or ((0.5, 0.85) if quick else REMOVED)
    options.seeds = options.seeds or ((0,) if quick else (0, 1, 2))
    options.epochs = (
        options.epochs if options.epochs is not None else 160 if full else 6 if quick else 30
    )
    options.finetune = (
        options.finetune if options.finetune is not None else 40 if full else 1 if quick else 6
    )
    options.judge = options.judge or ("validation" if options.ablation else "test")
    options.workers = options.workers or (
        1 if options.device.startswith("cuda") else os.cpu_count() or 1
    )
    if options.ablation:
        options.shown = _ablation()
    elif options.compensation:
        options.shown, options.finetune = _compensation(), 0
    else:
        options.shown = {name: name for name in options.criteria or (*CRITERIA, *RIVALS)}
    options.about = (
        "ablation" if options.ablation else "compensation" if options.compensation else ""
    )
    suffix = (f"_{options.about}" if options.about else "") + (
        "_full" if full else "_quick" if quick else ""
    )
    options.stem = options.stem or f"accuracy_{options.data}{suffix}"


def _has_digits() -> bool:
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        return False
    return True


def main() -> None:
    """Read the command line, measure what is missing, and write the results after each row."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end too
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    path = common.RESULTS / f"{options.stem}.json"
    rows = with_present_names(common.read(options.stem).get("rows", {}))
    again = set(options.shown.values()) if "all" in options.again else set(options.again)
    where = Where(options.cache, options.data_dir, options.device)
    settings = [
        setting_of(options, network, seed)
        for network in options.networks
        for seed in options.seeds
    ]
    for setting in settings:
        for name in again:
            for removed in options.removed:
                rows.pop(key_of(setting, name, removed), None)
    about = common.machine()
    about["threads"] = options.threads
    about["accelerator"] = about["accelerator"] if options.device.startswith("cuda") else None
    record: common.Record = {
        "machine": about,
        "command": _command(sys.argv[1:]),
        "seeds": list(options.seeds),
        "rows": rows,
    }

    def save() -> None:
        with _replacing(path) as new:
            new.write_text(json.dumps(record, indent=1) + "\n")

    dense: list[Job] = [
        (key_of(s), f"{s.network} seed {s.seed}, dense", dense_row, (s, where)) for s in settings
    ]
    run_all(dense, rows, save, options.workers, options.threads)
    pruned: list[Job] = [
        (
            key_of(s, name, removed),
            f"{s.network} seed {s.seed}, {name}, {removed:.0%} removed",
            pruned_row,
            (s, name, removed, where),
        )
        for s in settings
        for name in dict.fromkeys(options.shown.values())
        for removed in options.removed
    ]
    run_all(pruned, rows, save, options.workers, options.threads)
    table = Table(rows, options)
    for network in options.networks:
        plot(table, network)
    common.write(options.stem, record, report(record, table))
    print("\n" + report(record, table))


if __name__ == "__main__":
    main()
