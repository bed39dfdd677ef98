"""Export of pruned models to ONNX files and exported programs, with a check of the file.

``runner`` is a program of its own. It runs a file in a process that has neither fxprune nor the
model's code.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.hooks import put_in_mode
from fxprune.common.numbers import as_path, check_bool
from fxprune.common.public import calling_user_code, public
from fxprune.errors import ArgumentError, ExportError, ModelError, VerificationError
from fxprune.inputs import Call, ExampleInputs, as_call, batch_size, random_like
from fxprune.verification.comparing import relative_error

__all__ = ["export", "packages_of"]


_TOLERANCE = 1e-4  # relative error of float32 in another library, over a whole output
_RUNNER = Path(__file__).with_name("runner.py")
# bytes of weights that one ONNX file may hold: protocol buffers are limited to 2 GiB
_ONE_FILE = 3 * 2**29
_FORMATS = {".onnx": "ONNX", ".pt2": "an exported program"}


@public
def export(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> float | None:
    """Write a model as ONNX (``.onnx``) or as a ``torch.export`` program (``.pt2``).

    Parameters
    ----------
    model:
        Any module. It is exported in ``eval`` mode and left as it is. Export the result of
        :func:`fxprune.deploy`.
    example_inputs:
        A tensor, a tuple of positional arguments or a dict of keyword arguments.
    path:
        Where to write; the suffix selects the format. An existing file is replaced only after the
        new one is written and checked.
    dynamic_batch:
        Accept any batch size. The batch is the first dimension of every tensor that has as many
        rows as the first tensor.
    check:
        Run the file on random inputs and compare with the model. This is done in a fresh process
        that imports neither fxprune nor the model's code; an ONNX file runs in onnxruntime. If the
        batch is dynamic, two batch sizes are tried.

    Returns
    -------
    The largest relative error of an output, ``||out - reference|| / ||reference||``; None without
    a check.

    Raises
    ------
    ArgumentError
        If the suffix is unknown, a package that ONNX needs is missing, or the path cannot be
        written.
    ModelError
        If ``model`` is not a module.
    ExportError
        If torch cannot export the model.
    VerificationError
        If the file does not run, or gives other results.

    Examples
    --------
    >>> import tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(net, torch.zeros(1, 3, 8, 8), f"{folder}/net.pt2", check=False)
    ...     torch.export.load(f"{folder}/net.pt2").module()(torch.zeros(5, 3, 8, 8)).shape
    torch.Size([5, 4, 4, 4])
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            "export(model, example_inputs, path) takes a torch.nn.Module as model, and got a "
            f"{type(model).__name__}."
        )
    target = as_path("path", path)
    dynamic_batch, check = check_bool("dynamic_batch", dynamic_batch), check_bool("check", check)
    _refuse_format(target)
    model = put_in_mode(copy.deepcopy(model), False)
    call = as_call(random_like(example_inputs, batch=2) if dynamic_batch else example_inputs)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        return _written(model, example_inputs, call, target, dynamic_batch, check)


def _refuse_format(target: Path) -> None:
    """Raise an error if the suffix is unknown, or packages for it are missing."""
    if target.suffix not in _FORMATS:
        raise ArgumentError(
            f"{target.name} ends with neither .onnx nor .pt2: the suffix says what to write."
        )
    packages = "onnx", "onnxscript", "onnxruntime"
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if target.suffix == ".onnx" and missing:
        raise ArgumentError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}.")


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn an error of the file system into one that names the target."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(
            f"{target} cannot be written: {error.strerror or error}. Name one that can be "
            "written to."
        ) from error


def _written(
    model: nn.Module,
    example_inputs: ExampleInputs,
    call: Call,
    path: Path,
    dynamic_batch: bool,
    check: bool,
) -> float | None:
    """Write a file next to its place, check it, move it there, and return the measured error."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        file = Path(folder) / path.name
        packages = _write(model, call, file, dynamic_batch)
        sizes = (2, 5) if dynamic_batch else (None,)
        batches = [
            random_like(example_inputs, batch=rows, seed=seed) for seed, rows in enumerate(sizes)
        ]
        error = _check(model, list(map(as_call, batches)), file, packages) if check else None
        for written in Path(folder).iterdir():  # ONNX puts large weights into a second file
            if written.name.startswith(file.name):
                os.replace(written, path.parent / written.name)
    return error


def _write(model: nn.Module, call: Call, file: Path, dynamic_batch: bool) -> list[str]:
    """Write the file, and return the packages that must be imported before it is read."""
    shapes = _dynamic_shapes(call) if dynamic_batch else None
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            by_name = None if shapes is None else _by_name(model, shapes)
            if file.suffix == ".pt2":
                return _write_program(model, call, file, by_name)
            _write_onnx(model, call, file, by_name)
            return []  # onnxruntime brings its own operations
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds of errors
        hint = " Leave the batch as it is with dynamic_batch=False." if dynamic_batch else ""
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f"this {type(model).__name__} cannot be exported as {_FORMATS[file.suffix]}: "
            f"{first}.{hint}"
        ) from error


def _dynamic_shapes(call: Call) -> Any:
    """Return the arguments of a call with the dynamic dimensions of a tensor in its place."""
    batch = torch.export.Dim("batch", min=1)
    rows = batch_size(call)

    def dimensions(tensor: Tensor) -> dict[int, Any]:
        """Return the batch dimension of a tensor, if it has one."""
        return {0: batch} if tensor.dim() and tensor.shape[0] == rows else {}

    return tree_map_only(Tensor, dimensions, (call.args, call.kwargs))


def _write_program(model: nn.Module, call: Call, file: Path, shapes: Any) -> list[str]:
    """Write a program of ``torch.export``, and return the packages that it needs."""
    program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes)
    # to memory first: if the disk is full, torch's own writer ends the process
    written = io.BytesIO()
    torch.export.save(program, written)
    file.write_bytes(written.getvalue())
    return packages_of(program)


def _write_onnx(model: nn.Module, call: Call, file: Path, shapes: Any) -> None:
    """Write an ONNX file, with large weights in a second file."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    options: dict[str, Any] = {
        "dynamic_shapes": shapes,
        "dynamo": True,
        "verbose": False,
        "external_data": size > _ONE_FILE,
    }
    torch.onnx.export(model, call.args, file, kwargs=call.kwargs or None, **options)


def packages_of(program: torch.export.ExportedProgram) -> list[str]:
    """Return the names of the packages that define operations of an exported program.

    A package counts if it is imported here under the namespace of its operations.
    """
    found = set()
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            is_op = isinstance(node.target, OpOverload)
            if is_op and node.target.namespace in sys.modules:
                found.add(node.target.namespace)
    return sorted(found)


def _by_name(model: nn.Module, shapes: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Return dynamic shapes in the form that ``torch.export`` expects.

    By position if there are no keyword arguments, and by parameter name otherwise.
    """
    args, kwargs = shapes
    if not kwargs:
        return args
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress that exporters print."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _check(model: nn.Module, calls: list[Call], file: Path, packages: list[str]) -> float:
    """Run the file on all calls in a process of its own, and return the largest relative error."""
    with torch.no_grad(), calling_user_code(f"the {type(model).__name__}"):
        expected = [tensors_of(model(*args, **kwargs)) for args, kwargs in calls]
    worst = 0.0
    for outputs, references in zip(_run_apart(calls, file, packages), expected, strict=True):
        if [output.shape for output in outputs] != [reference.shape for reference in references]:
            shapes = f"{_shapes_of(outputs)}, the model {_shapes_of(references)}"
            raise VerificationError(f"{file.name} gives tensors of the shapes {shapes}.")
        for output, reference in zip(outputs, references, strict=True):
            worst = max(worst, relative_error(output, reference.cpu()))
    if not worst <= _TOLERANCE:
        raise VerificationError(
            f"{file.name} differs from the model by {worst:.1e}, relative, where "
            f"{_TOLERANCE:.0e} is rounding."
        )
    return worst


def _run_apart(calls: list[Call], file: Path, packages: list[str]) -> list[list[Tensor]]:
    """Run the file in a process of its own, and return the output tensors of each call."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.pt", Path(folder) / "outputs.pt"
        packed = io.BytesIO()
        plain = [(args, kwargs) for args, kwargs in calls]  # plain tuples: no class of fxprune
        torch.save(tree_map_only(Tensor, Tensor.cpu, plain), packed)
        inputs.write_bytes(packed.getvalue())
        ran = subprocess.run(
            [sys.executable, _RUNNER, file, inputs, outputs, *packages],
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            last = next(iter(ran.stderr.strip().splitlines()[::-1]), f"exit code {ran.returncode}")
            raise VerificationError(
                f"{file.name} was written, but does not run in a process of its own: {last}"
            )
        results: list[list[Tensor]] = torch.load(outputs, weights_only=True)
    return results


def _shapes_of(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of tensors, in the form of a message."""
    return [tuple(tensor.shape) for tensor in tensors]
