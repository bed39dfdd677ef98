"""Models named on the command line, their weights and their example inputs."""

from __future__ import annotations

import difflib
import importlib
import inspect as inspection
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fxprune import api
from fxprune.cli.terminal import stderr
from fxprune.common.hooks import put_in_mode
from fxprune.common.public import calling_user_code
from fxprune.errors import ArgumentError, CallbackError, InputError

__all__ = [
    "example",
    "import_attribute",
    "load_model",
    "model_and_inputs",
    "note_random",
    "usual_shapes",
]


def note_random(
    model: str, weights: str | None, checkpoint: Path | None, saved: Path | None
) -> None:
    """Print a note to standard error if a torchvision model was built with random weights."""
    if weights is None and checkpoint is None and saved is None and ":" not in model:
        stderr().print(
            "note: the weights are random; --weights, --checkpoint or --saved gives trained ones",
            style="yellow",
            soft_wrap=True,
        )


def model_and_inputs(
    spec: str,
    input_shapes: list[str] | None,
    weights: str | None,
    checkpoint: Path | None,
    saved: Path | None = None,
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the model that ``spec`` names, in eval mode, and example inputs for it.

    Parameters
    ----------
    spec:
        A torchvision name, or ``package.module:factory``.
    input_shapes:
        The values of ``--input``. None: the usual shapes of the torchvision model.
    weights:
        Name of published torchvision weights.
    checkpoint:
        File with a state dict.
    saved:
        Folder that an earlier run wrote.

    Raises
    ------
    InputError
        If the model is not from torchvision and no shapes are given, or if a shape is malformed.
    ArgumentError
        If the model or its weights cannot be loaded.
    """
    module = load_model(spec, weights, checkpoint, saved)
    if not input_shapes and ":" in spec:
        raise InputError(
            f"{spec} is not a torchvision name, so its input is not known: pass --input, as "
            "--input 1,3,224,224."
        )
    return module, tuple(example(text) for text in input_shapes or usual_shapes(spec))


def load_model(
    spec: str, weights: str | None, checkpoint: Path | None, saved: Path | None
) -> nn.Module:
    """Return the model that ``spec`` names, with the requested weights, in eval mode.

    See :func:`model_and_inputs` for the parameters.

    Raises
    ------
    ArgumentError
        If the options exclude each other, or if the model or its weights cannot be loaded.
    """
    torch.manual_seed(0)  # the same command gives the same plan, even with random weights
    if saved is not None and (weights is not None or checkpoint is not None):
        raise ArgumentError(
            "--saved holds weights of its own: leave out --weights and --checkpoint."
        )
    if ":" in spec:
        if weights is not None:
            raise ArgumentError(
                f"--weights is for torchvision names; {spec} is your own: load its weights with "
                "--checkpoint."
            )
        module = _own_model(spec)
    else:
        module = _torchvision_model(spec, weights)
    if saved is not None:
        module = api.load(saved, module).model
    if checkpoint is not None:
        _load_checkpoint(module, checkpoint)
    return put_in_mode(module, False)


def _import_torchvision(name: str) -> ModuleType:
    """Return torchvision; ``name`` is the model that needs it, for the error message."""
    try:
        import torchvision
    except ImportError as error:
        raise ArgumentError(
            f"{name!r} is read as the name of a torchvision model, which needs torchvision: pip "
            'install "fxprune[cli]". Your own '
            "model is named as package.module:factory."
        ) from error
    return torchvision


def _torchvision_model(name: str, weights: str | None) -> nn.Module:
    """Return a torchvision model, with published weights or random ones.

    Raises
    ------
    ArgumentError
        If the model or the weights are unknown, or if the weights cannot be downloaded.
    """
    torchvision = _import_torchvision(name)
    known = torchvision.models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ArgumentError(
            f"No torchvision model is named {name!r}. {hint}Your own is named as "
            "package.module:factory."
        )
    try:
        module = _call_builder(torchvision.models.get_model_builder(name), weights)
    except (KeyError, ValueError) as error:
        choices = ", ".join(torchvision.models.get_model_weights(name).__members__) or "none"
        raise ArgumentError(
            f"{name} has no weights named {weights!r}. Available: {choices}."
        ) from error
    except OSError as error:  # the download or the disk failed
        raise ArgumentError(
            f"the weights {weights!r} of {name} cannot be had: {error}. Give a file with "
            "--checkpoint."
        ) from error
    assert isinstance(module, nn.Module)
    return module


def _call_builder(builder: Callable[..., Any], weights: str | None) -> Any:
    """Call a function of torchvision that builds a model; never download a separate backbone."""
    options: dict[str, Any] = {"weights": weights}
    if "weights_backbone" in inspection.signature(builder).parameters:
        options["weights_backbone"] = None  # the default would download a backbone
    with warnings.catch_warnings():
        # inception_v3 and googlenet warn that their random initialisation will change
        warnings.filterwarnings(
            "ignore", message="The default weight initialization", category=FutureWarning
        )
        return builder(**options)


def usual_shapes(name: str) -> list[str]:
    """Return the default of ``--input`` for a torchvision model, one text per input.

    The batch size is 1 and the resolution is what the published weights of the model expect. Video
    models get 16 frames, optical flow models two images, detectors a list of two images.
    """
    for entry in _import_torchvision(name).models.get_model_weights(name):
        transform = entry.transforms  # a preset class, usually wrapped in functools.partial
        preset = getattr(transform, "func", transform).__name__
        if preset == "VideoClassification":
            height, width = transform.keywords["crop_size"]
            return [f"1,3,16,{height},{width}"]
        if preset == "OpticalFlow":
            height, width = entry.meta["min_size"]
            return 2 * [f"1,3,{height},{width}"]
        if preset == "ObjectDetection":
            return ["3,320,320+3,300,400+"]
    # the auxiliary classifier of inception_v3, used in training, needs a larger image
    return ["1,3,299,299" if name == "inception_v3" else "1,3,224,224"]


def _own_model(spec: str) -> nn.Module:
    """Return the user's model: a module, or the result of calling a factory without arguments."""
    found = import_attribute(spec, "MODEL")
    with calling_user_code(f"{spec}, called without arguments,"):
        model = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{spec} gave {type(model).__name__}, not a torch.nn.Module.")
    return model


def import_attribute(spec: str, role: str) -> Any:
    """Import and return the object that ``package.module:attribute`` names.

    Parameters
    ----------
    spec:
        The name. The attribute may contain dots.
    role:
        What error messages call the object.

    Raises
    ------
    ArgumentError
        If the name is malformed, or if the module or the attribute does not exist.
    CallbackError
        If the user's code raises another error while it is imported.
    """
    module_name, attribute = _split_spec(spec, role)
    found: Any = _import_module(module_name, f"{role} {spec!r}")
    missing = object()
    for part in attribute.split("."):
        with calling_user_code(f"{spec}, asked for {part!r},"):
            found = getattr(found, part, missing)
        if found is missing:
            raise ArgumentError(
                f"{module_name!r} has no {attribute!r} ({role} is named as "
                "package.module:attribute)."
            )
    return found


def _split_spec(spec: str, role: str) -> tuple[str, str]:
    """Split ``package.module:attribute`` into the names of the module and of the attribute."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(
            f"{role} {spec!r} must be named as package.module:attribute, or be one that fxprune "
            "knows by name."
        )
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ArgumentError(
            f"{role} {spec!r} is no Python name: write package.module:attribute, with dots and "
            "without .py, and run fxprune in the folder that holds the package."
        )
    return module_name, attribute


def _import_module(module_name: str, purpose: str) -> ModuleType:
    """Import a module of the user; an error message says that it is for ``purpose``."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does: finds modules in the working folder
    try:
        with calling_user_code(f"the import of {module_name!r}"):
            return importlib.import_module(module_name)
    except CallbackError as error:
        if isinstance(error.__cause__, ImportError):
            raise ArgumentError(
                f"Cannot import {module_name!r} for {purpose}: {error.__cause__}."
            ) from error
        raise


def _load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load a state dict from a file into a module.

    Raises
    ------
    ArgumentError
        If the file cannot be read, or if its content does not fit the module.
    """
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.load_model(module, str(path))
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        # training scripts often store the state_dict next to an epoch and an optimiser
        if isinstance(state, dict):
            state = state.get("state_dict", state.get("model", state))
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ArgumentError(
                f"it holds a {type(state).__name__}, and no tensors by their names"
            )
        module.load_state_dict(state)
    except OSError as error:
        raise ArgumentError(
            f"Cannot read checkpoint {path}: {error.strerror or error}."
        ) from error
    except Exception as error:
        # pickle, safetensors and torch raise different errors, which all mean the same here
        reason = " ".join(f"{error or type(error).__name__}".split()).rstrip(".")
        raise ArgumentError(
            f"Checkpoint {path} does not fit the model: {reason:.600}. Give what "
            "torch.save(model.state_dict(), path) writes."
        ) from error


def example(text: str) -> Tensor | list[Tensor]:
    """Return a random tensor of a shape, or a list of tensors for shapes joined by ``+``.

    Values lie in [0, 1), because detectors refuse others.

    Raises
    ------
    InputError
        If the text is not a shape, or if the tensor would be too large.

    Examples
    --------
    >>> example("1,3,8,8").shape, [image.shape[1] for image in example("3,4,4+3,5,5+")]
    (torch.Size([1, 3, 8, 8]), [4, 5])
    """
    if "+" in text:
        parts = text.removesuffix("+").split("+")
        return [torch.rand(_shape_from_text(part, text)) for part in parts]
    return torch.rand(_shape_from_text(text, text))


_LARGEST = 2**32  # upper limit on the elements of an example: 16 GiB


def _shape_from_text(text: str, given: str) -> tuple[int, ...]:
    """Return the sizes in ``text``; ``given`` is the whole option value, for the error message."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or math.prod(shape) > _LARGEST:
        raise InputError(
            f"--input {given!r} is not a shape: write positive sizes with commas, as "
            f"1,3,224,224, or several with + behind each; at most {_LARGEST:,} elements."
        )
    return shape
