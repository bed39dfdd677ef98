"""Run an exported file: ``runner.py FILE INPUTS OUTPUTS [PACKAGE ...]``.

The process has neither fxprune nor the model's code. The packages define operations of the
program; torch can read the program only after they are imported.
"""

import importlib
import sys
from typing import Any


def run_file(file: str, given: str, got: str, *packages: str) -> None:
    """Run an exported file on a list of calls, and write the output tensors of each call.

    Parameters
    ----------
    file:
        The exported file.
    given:
        The file with the calls: a list of ``(args, kwargs)``.
    got:
        The file to write: a list of lists of tensors.
    *packages:
        The packages to import first.

    Raises
    ------
    RuntimeError
        If loading the file imports fxprune.
    """
    import torch

    for package in packages:
        importlib.import_module(package)
    calls = torch.load(given, weights_only=True)
    outputs = _run_onnx(file, calls) if file.endswith(".onnx") else _run_program(file, calls)
    if "fxprune" in sys.modules:
        raise RuntimeError("the file brought fxprune with it")
    torch.save(outputs, got)


def _run_onnx(file: str, calls: list[Any]) -> list[list[Any]]:
    """Run an ONNX file on each call, and return the output tensors of each."""
    import onnxruntime
    import torch
    from torch.utils._pytree import tree_leaves

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    outputs = []
    for call in calls:
        tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
        arrays = [tensor.numpy() for tensor in tensors]
        results = session.run(None, dict(zip(names, arrays, strict=True)))
        outputs.append([torch.from_numpy(array) for array in results])
    return outputs


def _run_program(file: str, calls: list[Any]) -> list[list[Any]]:
    """Run an exported program on each call, and return the output tensors of each."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    exported = torch.export.load(file)
    devices = (tensor.device for tensor in exported.state_dict.values())
    device = next(devices, torch.device("cpu"))
    program = exported.module()
    outputs = []
    for args, kwargs in tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), calls):
        results = tree_leaves(program(*args, **kwargs))
        tensors = [leaf for leaf in results if isinstance(leaf, torch.Tensor)]
        outputs.append([leaf.detach().cpu() for leaf in tensors])
    return outputs


if __name__ == "__main__":
    run_file(*sys.argv[1:])
