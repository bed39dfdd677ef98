"""The first prune of a process loads what it needs and no more."""

import json
import subprocess
import sys

import pytest

FIRST = """
import json, sys, torch
from torch import nn
import fxprune

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.side, self.wide = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.side(x), self.wide(x)], 1)[:, ::2]
        x = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(nn.functional.gelu(x).mean(1))

before = set(sys.modules)
pruned = fxprune.prune(Net().eval(), torch.randn(1, 3, 16, 16), channels=0.5)
assert pruned.report.params_after < pruned.report.params_before
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def loaded():
    ran = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("package", ["torch._dynamo", "torch._inductor", "torch.distributed", "torch.fx", "sympy", "triton"])
def test_the_first_prune_does_not_load(package, loaded):
    assert [name for name in loaded if name == package or name.startswith(f"{package}.")] == []
