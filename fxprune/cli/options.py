"""Types of the options that commands share, and parsers of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fxprune.cli.loading import import_attribute
from fxprune.criteria import CRITERIA
from fxprune.errors import ArgumentError
from fxprune.latency import MODES, PRECISIONS

__all__ = [
    "Batch",
    "Batches",
    "Channels",
    "ChannelsLast",
    "Checkpoint",
    "Criterion",
    "Device",
    "Input",
    "Json",
    "Keep",
    "LatencyShare",
    "Layers",
    "Macs",
    "MaxRatio",
    "MinChannels",
    "Mode",
    "Model",
    "Modes",
    "Out",
    "Params",
    "Precision",
    "Precisions",
    "RoundTo",
    "Rounds",
    "Saved",
    "Scope",
    "Scopes",
    "Seconds",
    "UnitKind",
    "Verify",
    "Weights",
    "criterion_of",
    "layer_of",
    "listed",
    "max_ratio_of",
    "rank_scopes",
    "removed_shares",
    "several_criteria",
    "sizes",
    "units_of",
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A torchvision name (resnet50), or package.module:factory for your own.",
        show_default=False,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A module name or glob that must not be pruned; may be repeated.",
        show_default=False,
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of an example input, as 1,3,224,224; once per positional argument. A list of "
        "tensors has + behind each: 3,320,320+3,300,400+. A torchvision name needs none.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="torchvision weights to load, as DEFAULT or IMAGENET1K_V1 (downloads).",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A state_dict to load: .safetensors, or what torch.save wrote.",
        show_default=False,
    ),
]
Saved = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Start from an earlier result of -o, which was made from MODEL.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="Where plan.json, model.safetensors, report.json and report.txt go; made if missing.",
        show_default=False,
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Prove that the result equals the masked original.")
]
Channels = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of units to keep, in (0, 1]: of every group, see --scope.",
        show_default=False,
    ),
]
Macs = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of multiply-accumulates to keep, in (0, 1].",
        show_default=False,
    ),
]
Params = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Share of parameters to keep, in (0, 1].", show_default=False
    ),
]
LatencyShare = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help=(
            "Share of the time of one call to keep, in (0, 1], measured on this machine in the "
            "inference form."
        ),
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="cuda or cpu; default: the GPU if there is one.", show_default=False
    ),
]
Precision = Annotated[
    str, typer.Option(metavar="NAME", help=f"For --latency: {', '.join(PRECISIONS)}.")
]
Mode = Annotated[str, typer.Option(metavar="NAME", help=f"For --latency: {', '.join(MODES)}.")]
Batch = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="For --latency: images per call; default: as in the example.",
        show_default=False,
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        metavar="SCOPE",
        help="What --channels counts: group (each group) or global (all together).",
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="GLOB=SHARE",
        help=(
            "Share of units that matching layers keep, whatever the budgets ask for; may be "
            "repeated."
        ),
        show_default=False,
    ),
]
UnitKind = Annotated[
    list[str] | None,
    typer.Option(
        metavar="UNIT",
        help="What a unit of an attention is: dims (of its heads, the default) or heads (whole "
        "ones); GLOB=UNIT for single modules, may be repeated.",
        show_default=False,
    ),
]
Criterion = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=(
            f"How important a unit is: {', '.join(CRITERIA)}, or package.module:criterion of "
            "your own."
        ),
    ),
]
RoundTo = Annotated[int, typer.Option(metavar="N", help="Keep a multiple of N units per group.")]
MinChannels = Annotated[int, typer.Option(metavar="N", help="Keep at least N units per group.")]
MaxRatio = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHARE",
        help="Largest share of its units that a group may lose; GLOB=SHARE for single modules, "
        "may be repeated.",
        show_default=False,
    ),
]
Scopes = Annotated[
    list[str] | None,
    typer.Option(
        "--scopes",
        metavar="NAME=GLOB",
        help="Rank units only against units of the same scope: isomorphic, or NAME=GLOB, which "
        "may be repeated.",
        show_default=False,
    ),
]
Precisions = Annotated[
    str,
    typer.Option(
        "--precision", metavar="NAMES", help=f"Any of {', '.join(PRECISIONS)}, with commas."
    ),
]
Modes = Annotated[
    str, typer.Option("--mode", metavar="NAMES", help=f"Any of {', '.join(MODES)}, with commas.")
]
Batches = Annotated[
    str, typer.Option("--batch", metavar="SIZES", help="Images per call, with commas.")
]
ChannelsLast = Annotated[bool, typer.Option(help="Lay images out channels-last.")]
Rounds = Annotated[int, typer.Option(metavar="N", help="How many turns each model has.")]
Seconds = Annotated[float, typer.Option(metavar="S", help="About how long each turn lasts.")]


def layer_of(text: str, option: str = "--layer") -> tuple[str, float]:
    """Split a value of ``--layer``, or of a similar option, into its glob and its share."""
    glob, _, share = text.rpartition("=")
    try:
        if glob:
            return glob, float(share)
    except ValueError:
        pass
    raise ArgumentError(
        f"{option} {text!r} is not GLOB=SHARE: write for instance {option} 'layer4.*=0.3'."
    )


def max_ratio_of(texts: list[str] | None) -> float | dict[str, float]:
    """Return the values of ``--max-ratio`` as a share, or as a dict from globs to shares.

    Beside globs, a share without a glob applies to all modules.

    >>> max_ratio_of(None), max_ratio_of(["0.8"]), max_ratio_of(["0.8", "layer1.*=0.5"])
    (1.0, 0.8, {'*': 0.8, 'layer1.*': 0.5})
    """
    pairs = []
    for text in texts or ():
        pairs.append(layer_of(text if "=" in text else f"*={text}", "--max-ratio"))
    if not any("=" in text for text in texts or ()):
        return pairs[-1][1] if pairs else 1.0
    return dict(pairs)


def rank_scopes(texts: list[str] | None) -> str | dict[str, list[str]] | None:
    """Return the values of ``--scopes`` as the keyword of the same name.

    >>> rank_scopes(None), rank_scopes(["isomorphic"]), rank_scopes(["a=0", "b=2.*", "a=4"])
    (None, 'isomorphic', {'a': ['0', '4'], 'b': ['2.*']})
    """
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    scopes: dict[str, list[str]] = {}
    for name, is_pair, glob in (text.partition("=") for text in texts):
        if not is_pair:
            raise ArgumentError(
                f"--scopes {name!r} is not NAME=GLOB: write for instance --scopes 'late=layer4.*'."
            )
        scopes.setdefault(name, []).append(glob)
    return scopes


def units_of(texts: list[str] | None) -> dict[str, str]:
    """Return the values of ``--units`` as a dict from globs of module names to kinds of units.

    A value without a glob applies to all modules. If several globs match a module, the last one
    counts.

    >>> units_of(["heads", "layer1.*=dims"])
    {'*': 'heads', 'layer1.*': 'dims'}
    """
    return {glob or "*": unit for glob, _, unit in (text.rpartition("=") for text in texts or ())}


def criterion_of(text: str) -> Any:
    """Return the name of a built-in criterion, or the user's criterion object.

    Raises
    ------
    ArgumentError
        If the name is unknown, or if it names something that is not a criterion.
    """
    if ":" not in text:
        if text not in CRITERIA:
            raise ArgumentError(
                f"No criterion is named {text!r}: choose from {', '.join(CRITERIA)}, or name "
                "your own as package.module:criterion."
            )
        return text
    found = import_attribute(text, "a criterion")
    if not callable(found) and not hasattr(found, "scores"):
        raise ArgumentError(
            f"{text} is a {type(found).__name__}: a criterion is a function or has "
            "scores(coupling, model)."
        )
    return found


Numeral = TypeVar("Numeral", int, float)


def listed(text: str) -> list[str]:
    """Split a text at its commas.

    >>> listed("cpmc, l1,")
    ['cpmc', 'l1']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def sizes(text: str) -> list[int]:
    """Split a text at its commas into whole numbers.

    >>> sizes("1,64")
    [1, 64]
    """
    return _numbers_in(
        text, int, "--batch {} is not a list of sizes: write for instance --batch 1,64."
    )


def removed_shares(text: str) -> list[float]:
    """Split a value of ``--removed`` at its commas into shares.

    >>> removed_shares("0.25,0.5")
    [0.25, 0.5]
    """
    message = "--removed {} is not a list of shares: write for instance --removed 0.25,0.5."
    return _numbers_in(text, float, message)


def _numbers_in(text: str, read: Callable[[str], Numeral], message: str) -> list[Numeral]:
    """Split a text at its commas into numbers; ``message`` says what is wrong with the text.

    Raises
    ------
    ArgumentError
        If the text holds something else.
    """
    try:
        return [read(each) for each in listed(text)]
    except ValueError:
        raise ArgumentError(message.format(repr(text))) from None


def several_criteria(names: str) -> dict[str, Any]:
    """Return the criteria of ``compare`` by name.

    Raises
    ------
    ArgumentError
        If there are fewer than two, or if one is named twice or is unknown.
    """
    found = listed(names)
    if len(set(found)) < 2 or len(set(found)) < len(found):
        raise ArgumentError(
            f"--criteria {names!r} must name two criteria or more, each once, as --criteria "
            "cpmc,l1."
        )
    return {name: criterion_of(name) for name in found}
