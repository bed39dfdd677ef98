"""The first prune of a process does not import large packages that it does not need."""

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
        conv, norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.stem = nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2))
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


OTHERS = """
import json, sys, tempfile, torch
from torch import nn
from torch.nn import functional as F
import fxprune

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3))
        self.pad, self.mid = nn.ReflectionPad2d(1), nn.Conv2d(16, 16, 3)
        self.taken, self.head = nn.Linear(16 * 9, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = F.adaptive_max_pool2d(self.mid(self.pad(self.stem(x).relu())), 4)
        std, mean = torch.std_mean(x, (2, 3), keepdim=True)
        x = F.unfold((x - mean) / (std + 1), 3)
        x = self.taken(x.transpose(1, 2)).log_softmax(1)
        x = x.cumsum(1).gather(1, x.sort(1).indices)[:, torch.tensor([0, 1])]
        return self.head(x), x.argmax(2)

before = set(sys.modules)
model, x = Net().eval(), torch.randn(1, 3, 16, 16)
pruned = fxprune.prune(model, x, channels=0.5)
assert pruned.report.params_after < pruned.report.params_before
with tempfile.TemporaryDirectory() as folder:
    pruned.save(f"{folder}/pruned")
    fxprune.load(f"{folder}/pruned", Net())
fxprune.verify(model, pruned)
fxprune.deploy(pruned.model)
fxprune.latency.measure({"model": model}, x, rounds=1, seconds=0.001)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
"""Operations whose meta kernels import the compiler on their first call, and other functions."""


@pytest.fixture(scope="module", params=[FIRST, OTHERS], ids=["small", "others"])
def loaded(request):
    ran = subprocess.run(
        [sys.executable, "-c", request.param], capture_output=True, text=True, check=True
    )
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    "package",
    ["torch._dynamo", "torch._inductor", "torch.distributed", "torch.fx", "sympy", "triton"],
)
def test_the_first_prune_does_not_load(package, loaded):
    assert [name for name in loaded if name == package or name.startswith(f"{package}.")] == []
