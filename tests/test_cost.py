"""Tests of MACs and parameters.

They are compared with closed forms and with torch's own formulas. Counting leaves the model
unharmed.
"""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import flop_registry

import fxprune
from fxprune.cost import MacCounter, cost_of, count_parameters
from fxprune.errors import CallbackError
from fxprune.ops import Op, exact_row
from fxprune.ops.macs import op_macs
from fxprune.trace import without_fast_path
from tests.support.counting import CheckedCounter
from tests.torchvision_models import CASES, COMPOSITE
from tests.zoo import in_turn


def check(module, example_inputs, macs):
    found = cost_of(module, example_inputs)
    assert found.macs == macs
    assert found.params == sum(parameter.numel() for parameter in module.parameters())


def test_linear():
    check(nn.Linear(4, 8), torch.randn(3, 4), 3 * 4 * 8)


def test_convolution_strided_and_grouped():
    check(
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4),
        torch.randn(2, 8, 10, 10),
        2 * 16 * (8 // 4) * 9 * 25,
    )


def test_depthwise_convolution():
    check(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 6, 6), 8 * 9 * 36)


def test_transposed_convolution():
    check(
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, groups=2),
        torch.randn(2, 8, 5, 5),
        2 * 8 * 25 * (6 // 2) * 16,
    )


def test_same_padding_convolution():
    check(nn.Conv1d(4, 6, 5, padding="same"), torch.randn(2, 4, 9), 2 * 6 * 9 * 4 * 5)


class Matmul(nn.Module):
    def forward(self, a, b):
        return a @ b


@pytest.mark.parametrize(
    ("a", "b", "macs"),
    [
        ((5,), (5,), 5),
        ((3, 5), (5,), 15),
        ((5,), (5, 7), 35),
        ((2, 3, 5), (5, 7), 210),
        ((4, 1, 3, 5), (2, 5, 7), 840),
    ],
)
def test_matmul_of_any_rank(a, b, macs):
    check(Matmul(), (torch.randn(a), torch.randn(b)), macs)


@pytest.mark.parametrize("vectors", [1, 2])
def test_bilinear(vectors):
    check(
        nn.Bilinear(3, 4, 5),
        (torch.randn(vectors, 3), torch.randn(vectors, 4)),
        vectors * 5 * 3 * 4,
    )


class Einsum(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.equation = equation

    def forward(self, *tensors):
        return torch.einsum(self.equation, *tensors)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk->ik", [(3, 5), (5, 7)], 3 * 5 * 7),
        ("ij,jk", [(3, 5), (5, 7)], 3 * 5 * 7),
        ("bhqd,bhkd->bhqk", [(2, 4, 6, 8), (2, 4, 7, 8)], 2 * 4 * 6 * 7 * 8),
        ("b...i,ij->b...j", [(2, 3, 4, 5), (5, 6)], 2 * 3 * 4 * 5 * 6),
        ("...i,oi", [(2, 3, 5), (6, 5)], 2 * 3 * 5 * 6),
        ("i,j->ij", [(3,), (5,)], 0),  # every element is one product, nothing is added up
        ("bij,bij->bij", [(2, 3, 5), (2, 3, 5)], 0),
        ("ij->ji", [(3, 5)], 0),
        # an axis of one operand alone is summed first
        ("ia,jk,kl->il", [(3, 4), (5, 6), (6, 7)], 3 * 6 * 7),
        ("ij,jk,kl->il", [(3, 4), (4, 5), (5, 6)], 3 * 4 * 5 + 3 * 5 * 6),
    ],
)
def test_einsum(equation, shapes, macs):
    tensors = tuple(torch.randn(shape) for shape in shapes)
    check(Einsum(equation), tensors, macs)
    with CheckedCounter() as kernels:
        Einsum(equation)(*tensors)
    assert kernels.macs == macs


class Products(nn.Module):
    def forward(self, matrix, vector):
        return (
            matrix @ vector,
            torch.dot(vector, vector),
            torch.addmv(matrix @ vector, matrix, vector),
        )


def test_matrix_vector_products():
    check(Products(), (torch.randn(6, 4), torch.randn(4)), 2 * 6 * 4 + 4 + 6 * 4)


def test_attention_counts_projections_and_both_products():
    # In eval mode PyTorch takes a fused path that hides the products. The count must not depend on
    # it.
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    tokens = torch.randn(2, 5, 16)
    inputs = {"query": tokens, "key": tokens, "value": tokens, "need_weights": False}
    check(attention, inputs, 2 * (4 * 5 * 16 * 16 + 2 * 5 * 5 * 16))


def test_grouped_query_attention():
    class Attend(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 10)
    check(Attend(), (q, k, v), 2 * 4 * 6 * 7 * (8 + 10))


def test_counts_the_same_under_inference_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    outside = cost_of(model, torch.randn(1, 3, 8, 8))
    with torch.inference_mode():
        assert cost_of(model, torch.randn(1, 3, 8, 8)) == outside


QUICK = (
    "resnet18",
    "shufflenet_v2_x0_5",
    "densenet121",
    "lraspp_mobilenet_v3_large",
    "vit_b_16",
    "swin_t",
    "mc3_18",
)
"""One model of each kind.

These are convolutions, grouped convolutions, concatenations, segmentation, attention as a module
and by hand, and video.
"""

QUICK_IN_PARTS = ("ssdlite320_mobilenet_v3_large", "raft_small")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_agrees_with_the_kernels(name):
    """`cost_of` and the report, before and after pruning, equal the kernels' count exactly.

    Large models are counted on the meta device, where they need no memory.
    """
    model, image = CASES[name].build(), CASES[name].inputs()
    if name not in QUICK:
        model = model.to("meta")
    pruned = fxprune.prune(model, image, macs=0.7, criterion="random")
    found = [cost_of(model, image).macs, pruned.report.macs_before, pruned.report.macs_after]
    counted = []
    for network in (model, model, pruned.model):
        with without_fast_path(), torch.no_grad(), CheckedCounter() as kernels:
            network.to("meta")(image.to("meta"))
        counted.append(kernels.macs)
    assert found == counted
    assert 0 < found[2] <= 0.7 * found[1]


def test_published_figures():
    # torchvision publishes 4.089 and 17.564 billion for these two.
    image = torch.randn(1, 3, 224, 224)
    for name, published in [("resnet50", 4.089), ("vit_b_16", 17.564)]:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None).eval()
        assert cost_of(model, image).macs / 1e9 == pytest.approx(published, abs=5e-4)


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 40
    check(model, torch.tensor([[1, 2, 3]]), 3 * 4 * 10)


class Constants(nn.Module):
    """A model that makes tensors in forward, and holds one that is no buffer.

    One of the tensors is made on a named device.
    """

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        positions = torch.arange(4, device="cpu", dtype=x.dtype)
        return self.linear(x * self.scale + positions) + torch.tensor(1.0)


def test_constants_on_another_device():
    check(Constants(), torch.randn(2, 4), 2 * 4 * 4)


def test_names_what_was_not_counted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    uncounted = cost_of(model, torch.randn(1, 3, 8, 8)).uncounted
    assert any("max_pool2d" in name for name in uncounted)
    assert not any("relu" in name or "convolution" in name for name in uncounted)


def test_leaves_the_model_alone_even_after_an_error():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(inplace=True)
    ).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    random_state = torch.get_rng_state()
    cost_of(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(CallbackError, match=r"Sequential.*RuntimeError"):
        cost_of(model, torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert model.training
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_recurrent_layer_counts_every_step():
    # Four gates, each input x hidden and hidden x hidden, for each of the 7 steps.
    check(nn.LSTM(3, 5, batch_first=True), torch.randn(2, 7, 3), 2 * 7 * 4 * (3 * 5 + 5 * 5))


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_in_both_directions(kind, gates):
    first, second = 3 * 5 + 5 * 5, 10 * 5 + 5 * 5
    check(
        kind(3, 5, num_layers=2, bidirectional=True),
        torch.randn(7, 2, 3),
        7 * 2 * gates * 2 * (first + second),
    )


def test_projected_lstm():
    check(nn.LSTM(3, 5, proj_size=2), torch.randn(7, 4, 3), 7 * 4 * (4 * (3 * 5 + 2 * 5) + 5 * 2))


@pytest.mark.parametrize(("kind", "op", "gates"), [(nn.LSTM, "lstm", 4), (nn.GRU, "gru", 3)])
def test_packed_sequences_count_what_is_there(kind, op, gates):
    func, weights, hidden = (
        getattr(torch.ops.aten, op).data,
        list(kind(3, 5).parameters()),
        torch.zeros(1, 2, 5),
    )
    state = [hidden, hidden] if op == "lstm" else hidden
    args = (torch.randn(5, 3), torch.tensor([2, 2, 1]), state, weights, True, 1, 0.0, False, False)
    assert op_macs(func, args, {}, func(*args)) == 5 * gates * (3 * 5 + 5 * 5)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_recurrent_cells(kind, gates):
    check(kind(3, 5), torch.randn(2, 3), 2 * gates * (3 * 5 + 5 * 5))


@in_turn("batch", 1, 3)
def test_the_report_counts_as_the_counter(case, batch):
    """The report's MACs before and after pruning equal those that `cost_of` counts.

    This includes products of weights alone, recurrent layers, and cases where the analysis widens
    the batch.
    """
    model, inputs = case.build(case.width).eval(), case.inputs(batch)
    pruned = fxprune.prune(model, inputs, channels=0.5)
    with without_fast_path():
        assert pruned.report.macs_before == cost_of(model, inputs).macs
        assert pruned.report.macs_after == cost_of(pruned.model, inputs).macs


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK_IN_PARTS else pytest.param(n, marks=pytest.mark.slow) for n in COMPOSITE],
)
def test_what_is_not_traced_whole_counts_as_the_counter(name):
    """The MACs of detectors and optical flow equal those of the kernels that run.

    The kernels run on the example of the analysis, because the amount of work depends on the data.
    Where a detector finds nothing, its mask head counts as for two boxes.
    """
    model, inputs = COMPOSITE[name].build(), COMPOSITE[name].inputs(batch=2)
    coupling = fxprune.analyze(model, inputs)
    args, kwargs = coupling.example
    with torch.no_grad(), CheckedCounter() as kernels:
        found = model(*args, **kwargs)
        if isinstance(found[0], dict) and not any(len(image.get("masks", "?")) for image in found):
            heads = model.roi_heads
            heads.mask_predictor(heads.mask_head(torch.zeros(2, 256, 14, 14)))
    assert coupling.macs() == kernels.macs


def test_every_formula_of_torch_has_its_own_here():
    """Every forward operation with a formula in torch has one in fxprune.

    Otherwise the operation would count as 0 in a version of torch without the formula.
    """
    kernels = [
        packet for packet in flop_registry if isinstance(packet, torch._ops.OpOverloadPacket)
    ]
    backward = [packet for packet in kernels if packet.__name__.endswith("_backward")]
    without = [packet for packet in kernels if (exact_row(packet) or Op(name="")).macs is None]
    assert [str(packet) for packet in without if packet not in backward] == []


class Attend(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


def layer_of_an_encoder():
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)


TOKENS = torch.randn(2, 5, 8)
VOLUME = torch.randn(1, 2, 4, 6, 8)
HEADS = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
KERNELS = {
    "attention": (Attend, HEADS, 2 * 4 * 6 * 7 * 16),
    "attention of other widths": (Attend, (*HEADS[:2], HEADS[2][..., :5]), 2 * 4 * 6 * 7 * 13),
    "attention module": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        (TOKENS,) * 3,
        2 * (4 * 5 * 64 + 2 * 25 * 8),
    ),
    "encoder layer": (
        layer_of_an_encoder,
        (TOKENS,),
        2 * (4 * 5 * 64 + 2 * 25 * 8 + 2 * 5 * 8 * 12),
    ),
    "lstm": (lambda: nn.LSTM(8, 3, bidirectional=True), (TOKENS,), 2 * 10 * 4 * (8 * 3 + 3 * 3)),
    "projected lstm": (
        lambda: nn.LSTM(8, 3, proj_size=2),
        (TOKENS,),
        10 * (4 * (8 * 3 + 2 * 3) + 3 * 2),
    ),
    "gru": (lambda: nn.GRU(8, 3), (TOKENS,), 10 * 3 * (8 * 3 + 3 * 3)),
    "cell": (lambda: nn.LSTMCell(8, 3), (TOKENS[0],), 5 * 4 * (8 * 3 + 3 * 3)),
    "linear": (lambda: nn.Linear(8, 3), (TOKENS,), 10 * 24),
    "bilinear": (lambda: nn.Bilinear(8, 8, 3), (TOKENS, TOKENS), 10 * 64 * 3),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (HEADS[0],), 2 * 6 * 4 * 6 * 2 * 9),
    "dilated convolution": (
        lambda: nn.Conv2d(4, 6, 3, dilation=2),
        (HEADS[0],),
        2 * 6 * 2 * 4 * 4 * 9,
    ),
    "depthwise convolution": (
        lambda: nn.Conv2d(4, 4, 3, groups=4),
        (HEADS[0],),
        2 * 4 * 4 * 6 * 9,
    ),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        (HEADS[0],),
        2 * 4 * 48 * 3 * 9,
    ),
    "convolution of a sequence": (
        lambda: nn.Conv1d(5, 6, 3, padding="same"),
        (TOKENS,),
        2 * 6 * 8 * 5 * 3,
    ),
    "convolution of a volume": (lambda: nn.Conv3d(2, 3, 2), (VOLUME,), 3 * 3 * 5 * 7 * 2 * 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernels", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", KERNELS)
def test_whatever_torch_runs_is_counted(name, kernels, dtype):
    """MACs are counted on every path that torch takes through a module.

    Operations run as called, fused for inference, or as kernels. The path differs with the mode,
    the dtype and the version of torch.
    """
    build, inputs, macs = KERNELS[name]
    model, inputs = build().eval().to(dtype), tuple(tensor.to(dtype) for tensor in inputs)
    with kernels(), CheckedCounter() as counter:
        model(*inputs)
    assert counter.macs == macs


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_named_not_counted():
    encoder = nn.TransformerEncoder(layer_of_an_encoder(), 1).eval()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), MacCounter() as counter:
        encoder(TOKENS, src_key_padding_mask=mask)
    assert counter.macs == 0
    assert any("transformer_encoder_layer" in name for name in counter.uncounted)


class Merged(nn.Module):
    """A layer that adds a product of two low-rank matrices to its weight at every call."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 2)
        self.down, self.up = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return self.last(nn.functional.linear(x, self.first.weight + self.up @ self.down).relu())


def test_products_of_weights_do_not_grow_with_the_batch():
    report = fxprune.prune(Merged(), torch.randn(1, 8), macs=0.6).report
    assert report.macs_before == 6 * 3 * 8 + 8 * 6 + 6 * 2
    assert report.macs_after <= 0.6 * report.macs_before


def test_what_forward_remembers_is_not_what_counting_left():
    """Counting leaves no cached tensor and no changed buffer in the model."""

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.grid = nn.Conv2d(3, 4, 1), None
            self.register_buffer("last", torch.zeros(1))

        def forward(self, x):
            self.grid = x.new_ones(1) if self.grid is None else self.grid
            self.last = x.mean().reshape(1)
            return self.conv(x) * self.grid

    model, x = Remembers(), torch.randn(1, 3, 4, 4)
    assert cost_of(model, x).macs == 4 * 3 * 16
    assert model.grid is None
    assert torch.equal(model.last, torch.zeros(1))
    assert torch.equal(model(x), model.conv(x))
