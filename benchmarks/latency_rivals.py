"""Compare the latency of models that fxprune and torch-pruning prune to equal MACs.

    # on the GPU if there is one, otherwise on the CPU
    python benchmarks/latency_rivals.py
    # two models with small images, about a minute
    python benchmarks/latency_rivals.py --quick
    python benchmarks/latency_rivals.py --round-to 8

Both tools start from the same weights in the same run. For each model, ``channels`` of
``fxprune.prune`` and ``pruning_ratio`` of torch-pruning are searched until both leave ``--macs``
of the dense model's multiply-accumulates. One counter counts both, and both counts are in the
table. Then the dense model and the two pruned ones take turns, in the form that the tools return,
channels-last.

torch-pruning gets the manual help that it needs: the classifier and the number of heads of each
attention layer are given, and a ViT's ``hidden_dim`` is corrected after pruning.

The figures go to ``benchmarks/results/latency_rivals_<device>.json`` and ``.md``; with
``--round-to`` its number is part of the name.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import _common as common
import _latency as shared
from torch import Tensor, nn

import fxprune

MODELS = ("resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "vit_b_16")
TOOLS = ("dense", "fxprune", "torch-pruning")


# -------------------------------------------------------------------------------------- equal MACs


def match_macs(
    make: Callable[[float], nn.Module],
    inputs: Tensor,
    dense: int,
    target: float,
    tolerance: float,
    attempts: int = 9,
) -> tuple[nn.Module, common.Record]:
    """Search the share of channels at which ``make(share)`` has ``target * dense`` MACs.

    MACs grow roughly with the square of the kept share, so each guess corrects the last one by the
    square root of the remaining factor, within the known bracket. A share at which ``make`` fails
    is skipped; if all fail, the last error is raised.

    Returns
    -------
    The closest model, and its cost.
    """
    low, high, share = 0.0, 1.0, target**0.5
    best: tuple[float, nn.Module, common.Record] | None = None
    failure: Exception | None = None
    for _ in range(attempts):
        try:
            model = make(share)
            macs = common.count_macs(model, inputs)
        except Exception as error:
            failure = error
            share = min(share * 1.013, (share + high) / 2)
            continue
        gap = abs(macs / dense / target - 1)
        if best is None or gap < best[0]:
            best = (
                gap,
                model,
                {"kept": share, "macs": macs, "parameters": common.parameter_count(model)},
            )
        if gap <= tolerance:
            break
        low, high = (share, high) if macs < target * dense else (low, share)
        guess = share * (target * dense / macs) ** 0.5
        share = guess if low < guess < high else (low + high) / 2
    if best is None:
        raise failure or RuntimeError("no attempt was made")
    return best[1], best[2]


def with_fxprune(dense: nn.Module, inputs: Tensor, kept: float, round_to: int) -> nn.Module:
    """Prune with fxprune, which needs only the share to keep."""
    return fxprune.prune(dense, inputs, channels=kept, round_to=round_to).model


def with_torch_pruning(dense: nn.Module, inputs: Tensor, kept: float, round_to: int) -> nn.Module:
    """Prune a copy with torch-pruning, and give the help that it needs.

    This is the classifier, the number of heads, and a ViT's ``hidden_dim``.
    """
    model = copy.deepcopy(dense)
    heads = {}
    for attention in (m for m in model.modules() if isinstance(m, nn.MultiheadAttention)):
        heads[attention] = attention.num_heads
    model = common.torch_pruning_prune(
        model,
        inputs,
        1 - kept,
        ignored=common.output_layers(model, inputs),
        round_to=round_to,
        num_heads=heads,
    )
    if isinstance(getattr(model, "hidden_dim", None), int) and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels
    if fault := common.torch_pruning_faults(dense, model, inputs):
        raise RuntimeError(fault)
    return model


# --------------------------------------------------------------------------------------- one model


def measure(name: str, found: argparse.Namespace) -> common.Record:
    """Prune one model with both tools to equal MACs and time all three models."""
    dense, inputs = shared.built(name, found.size)
    macs = common.count_macs(dense, inputs)
    models: dict[str, nn.Module] = {"dense": dense}
    cost: common.Record = {
        "dense": {"kept": 1.0, "macs": macs, "parameters": common.parameter_count(dense)}
    }
    failed: common.Record = {}
    for tool, prune in (("fxprune", with_fxprune), ("torch-pruning", with_torch_pruning)):
        try:
            models[tool], cost[tool] = match_macs(
                lambda kept, prune=prune: prune(dense, inputs, kept, found.round_to),
                inputs,
                macs,
                found.macs,
                found.tolerance,
            )
        except Exception as error:
            failed[tool] = common.one_line(error)
            print(f"  {tool} failed: {failed[tool]}", flush=True)
    return {"cost": cost, "failed": failed, "rows": shared.time_all(models, inputs, found)}


# ------------------------------------------------------------------------------------------ report


def report(results: common.Record) -> str:
    """Return the Markdown page of one device."""
    settings = results["settings"]
    costs, rows = [], []
    for name, record in results["models"].items():
        if "error" in record:
            continue
        total = record["cost"]["dense"]["macs"]
        for tool in TOOLS:
            if tool not in record["cost"]:
                costs.append([f"`{name}`", tool, "-", "-", "-", record["failed"].get(tool, "-")])
                continue
            own = record["cost"][tool]
            share = f"{own['macs'] / total:.3f}"
            costs.append(
                [
                    f"`{name}`",
                    tool,
                    f"{own['kept']:.3f}",
                    f"{own['macs'] / 1e6:.1f}",
                    share,
                    f"{own['parameters'] / 1e6:.2f}",
                ]
            )
    for line, row in shared.lines(results):
        if row is not None:
            ms = {tool: latency["ms"] for tool, latency in row["latency"].items()}
            line += [f"{ms[tool]:.3f}" if tool in ms else "-" for tool in TOOLS]
            line += [f"{ms[tool] / ms['dense']:.2f}" if tool in ms else "-" for tool in TOOLS[1:]]
        rows.append(line)
    header = [
        "model",
        "precision",
        "mode",
        "batch",
        *(f"{tool}, ms" for tool in TOOLS),
        *(f"{tool}, of dense" for tool in TOOLS[1:]),
    ]
    text = [
        f"Both tools prune to {settings['macs']} of the dense model's MACs (within "
        f"{settings['tolerance']:.0%} if the widths allow it), with widths",
        f"rounded to {settings['round_to']}. The models are timed as the tools return them, "
        "channels-last. Times are medians, in milliseconds",
        "per batch.",
    ]
    pruned = common.markdown_table(
        ["model", "tool", "channels kept", "MMACs", "of dense", "M parameters"], costs
    )
    title = "Latency of fxprune and torch-pruning at equal multiply-accumulates"
    return shared.page(
        results,
        title,
        text,
        common.markdown_table(header, rows),
        f"Costs of the models:\n\n{pruned}",
    )


def main() -> None:
    """Read the command line, measure each model, and write the results after each one."""
    made = shared.parser(__doc__, MODELS)
    made.add_argument(
        "--macs",
        type=float,
        default=0.5,
        help="share of the dense model's MACs that both tools must reach",
    )
    made.add_argument(
        "--tolerance", type=float, default=0.02, help="accepted relative deviation from --macs"
    )
    made.add_argument(
        "--round-to",
        type=int,
        default=1,
        help="both tools keep multiples of this many channels; default: any",
    )
    found = shared.options(made, MODELS)
    question = "latency_rivals" + (f"_{found.round_to}" if found.round_to > 1 else "")
    shared.run(found, question, measure, report, alike=("macs", "tolerance", "round_to", "quick"))


if __name__ == "__main__":
    main()
