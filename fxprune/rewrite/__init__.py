"""Write the smaller model: a traced graph and the surviving units become a smaller GraphModule.

``emit`` is the entry point. It writes the new graph node by node, and ``checks`` compares the
labels of each new node with those of the original. ``survivors`` selects the surviving elements of
a tensor. ``skeleton`` copies the modules, and ``leaves`` corrects the sizes that modules of
``torch.nn`` store. ``literals`` corrects constants in the graph, ``numbers`` the numbers that the
graph computes from sizes; ``extents`` and ``axes`` tell how a size in the smaller model follows
from the original's. ``module`` holds the emitted GraphModule, ``containers`` speeds up how its
code looks up modules, and ``pickled`` turns its graphs into data that can be pickled.
"""

from fxprune.rewrite.emit import emit
from fxprune.rewrite.module import PrunedModule, memo_that_shares_graphs
from fxprune.rewrite.survivors import Survivors

__all__ = ["PrunedModule", "Survivors", "emit", "memo_that_shares_graphs"]
