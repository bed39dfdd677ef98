"""GraphModule + plan -> smaller GraphModule.

``survivors`` slices arrays by what is alive, ``leaves`` corrects what a module of torch.nn
remembers about its size, ``literals`` corrects numbers that stand in the graph, ``emit`` writes
the new graph and checks it label by label while doing so, ``containers`` sees to it that modules
in it are found as fast as in the classes that it was traced from.
"""

from fxprune.rewrite.emit import emit
from fxprune.rewrite.module import PrunedModule, sharing_graphs
from fxprune.rewrite.survivors import Survivors

__all__ = ["PrunedModule", "Survivors", "emit", "sharing_graphs"]
