"""Run an exported file: ``runner.py FILE INPUTS OUTPUTS [PACKAGE ...]``.

The process has neither fxprune nor the model's code. The packages define operations of the
program; torch can read the program only after they are imported.
"""

import importlib
import sys


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
    from torch.utils._pytree import tree_leaves, tree_map_only

    for package in packages:
        importlib.import_module(package)
    calls = torch.load(given, weights_only=True)
    if file.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        fed = [
            [leaf.numpy() for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
            for call in calls
        ]
        results = [session.run(None, dict(zip(names, arrays, strict=True))) for arrays in fed]
        outputs = [[torch.from_numpy(array) for array in result] for result in results]
    else:
        exported = torch.export.load(file)
        place = next(
            (tensor.device for tensor in exported.state_dict.values()), torch.device("cpu")
        )
        program = exported.module()
        calls = tree_map_only(torch.Tensor, lambda tensor: tensor.to(place), calls)
        results = [tree_leaves(program(*args, **kwargs)) for args, kwargs in calls]
        outputs = [
            [leaf.detach().cpu() for leaf in result if isinstance(leaf, torch.Tensor)]
            for result in results
        ]
    if "fxprune" in sys.modules:
        raise RuntimeError("the file brought fxprune with it")
    torch.save(outputs, got)


if __name__ == "__main__":
    run_file(*sys.argv[1:])
