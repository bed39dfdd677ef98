"""Properties of every network, tested on random ones.

Hypothesis draws the networks as printable specs (see ``tests/specs``). A failure prints a spec. To
look at it alone, paste it::

    from tests.specs import *
    net = Network(input=(3, 8, 8), nodes=(Conv(0, out=8), Conv(1, out=4)), outputs=(2,))
    print(fxprune.analyze(build(net), example(net)))

Then keep it as a ``@hypothesis.example`` above the property that it broke.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune

from .specs import (
    KINDS,
    Activation,
    Add,
    Again,
    Attention,
    BatchNorm,
    Chunk,
    Concat,
    Conv,
    Dropout,
    Flatten,
    Flip,
    GlobalPool,
    Glu,
    Image,
    InstanceNorm,
    LayerNorm,
    Linear,
    Network,
    Node,
    Pad,
    PadChannels,
    Permute,
    Pool,
    PReLU,
    Recurrent,
    RMSNorm,
    Roll,
    Scale,
    Shuffle,
    Slice,
    Split,
    SqueezeExcite,
    Tokens,
    TransposedConv,
    Upsample,
    build,
    example,
    networks,
)

LARGEST_ERROR = 1e-9
RATIOS = (0.5, 0.25, 0.75)

# in some of the drawn networks nothing can be removed
pytestmark = pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")

#: Kinds that act on each channel separately, or on all channels of a position alike.
KEEPING = (
    Activation,
    BatchNorm,
    Dropout,
    GlobalPool,
    InstanceNorm,
    LayerNorm,
    Pad,
    Permute,
    Pool,
    PReLU,
    RMSNorm,
    Scale,
    SqueezeExcite,
    Tokens,
    Upsample,
)

#: Kinds that treat the channels of one axis by their position. Channels that a slice cuts off are
#: not interchangeable with those that it keeps, so units of one group need not be interchangeable.
#: Masked equivalence covers these kinds.
POSITIONAL = (Split, Chunk, Slice, Shuffle, Flip, Roll, PadChannels)


def share(divisor: int) -> settings:
    """Return the chosen profile with its number of examples divided by ``divisor``.

    This is for properties that need fewer networks.
    """
    return settings(max_examples=max(1, settings.default.max_examples // divisor))


def _outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = model(x)
    return tuple(y) if isinstance(y, (tuple, list)) else (y,)


def _plain_layers(net: Network) -> list[int]:
    """Return the values of dense layers that reach only dense layers, through ``KEEPING`` kinds.

    This does not use the tested code. It looks at the spec alone, and only at cases that leave no
    doubt.
    """
    readers: dict[int, list[int]] = {index: [] for index in range(len(net.nodes) + 1)}
    for index, node in enumerate(net.nodes, start=1):
        for value in node.inputs:
            readers[value].append(index)
    # A layer that runs twice couples its two inputs.
    shared = {node.of for node in net.nodes if isinstance(node, Again)}

    def ends_well(value: int) -> bool:
        return value not in net.outputs and all(
            (_is_dense(net.nodes[reader - 1]) and reader not in shared)
            or (isinstance(net.nodes[reader - 1], KEEPING) and ends_well(reader))
            for reader in readers[value]
        )

    return [
        index
        for index, node in enumerate(net.nodes, start=1)
        if index not in shared and _is_dense(node) and node.out > 1 and ends_well(index)
    ]


def _is_dense(node: Node) -> bool:
    return isinstance(node, Linear) or (isinstance(node, Conv) and node.groups == 1)


def _reached(model: nn.Module, x: Tensor) -> set[str]:
    """Return the parameters that a backward pass from all outputs reaches."""
    loss = sum(y.square().mean() for y in _outputs(model, x))
    assert isinstance(loss, Tensor)
    if loss.requires_grad:
        loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def _error(found: Tensor, expected: Tensor) -> float:
    """Return ``||found - expected|| / ||expected||``, or the numerator if ``expected`` is zero."""
    norm = expected.norm().item()
    return (found - expected).norm().item() / (norm if norm > 0 else 1.0)


@share(1)
@given(net=networks(), channels=st.sampled_from(RATIOS), units=st.sampled_from(("dims", "heads")))
@hypothesis.example(
    # Found by a random network: the rewrite of the gate failed if the grouped convolution had no
    # bias.
    net=Network(
        input=(3, 4, 4),
        nodes=(Conv(0, out=4), Conv(1, out=8, groups=2, bias=False), Glu(2)),
        outputs=(3,),
    ),
    channels=0.5,
    units="dims",
)
@hypothesis.example(
    # Found by a random network: positions of one unit were shuffled among each other, which labels
    # of units cannot show.
    net=Network(
        input=(3, 4, 4),
        nodes=(Conv(0, out=12), Shuffle(1, groups=6, style="function"), Conv(2, out=12, groups=3)),
        outputs=(3,),
    ),
    channels=0.5,
    units="dims",
)
@hypothesis.example(
    # Found by a random network: two labellings of one axis (the group, and the position in it)
    # were treated as one group of units.
    net=Network(
        input=(3, 4, 4),
        nodes=(
            *(Conv(0, out=4), Slice(1, start=0, stop=2), Conv(2, out=4)),
            *(TransposedConv(2, out=4, groups=2), GlobalPool(4)),
            *(GlobalPool(3), Concat((5, 6)), Linear(7, out=4)),
        ),
        outputs=(8,),
    ),
    channels=0.5,
    units="dims",
)
@hypothesis.example(
    # Found by a random network: units that padding adds and channels are at the same position of
    # two blocks.
    net=Network(
        input=(3, 4, 4),
        nodes=(Conv(0, out=4), PadChannels(1, before=1, after=1), Conv(2, out=4, groups=2)),
        outputs=(3,),
    ),
    channels=0.5,
    units="dims",
)
@hypothesis.example(
    # Found by a random network: with whole heads as units, unused views had no labels and were
    # emitted all the same.
    net=Network(
        input=(6, 3),
        nodes=(
            *(
                Image(0, height=2),
                Attention(0),
                Conv(1, out=24),
                Conv(3, out=4),
                Flatten(4),
                Add(3, 5),
            ),
            *(GlobalPool(6), GlobalPool(2), Concat((7, 8)), Linear(9, out=4)),
        ),
        outputs=(10,),
    ),
    channels=0.5,
    units="heads",
)
def test_equals_the_masked_original(net: Network, channels: float, units: str) -> None:
    """The emitted model computes what the original computes with the removed elements zeroed."""
    model, x = build(net), example(net)
    pruned = fxprune.prune(
        model, x, channels=channels, units=units if net.has(Attention) else "dims"
    )
    event(
        "something was removed" if _count(pruned.model) < _count(model) else "nothing was removed"
    )
    assert fxprune.verify(model, pruned, x).error <= LARGEST_ERROR


@share(5)
@given(net=networks(), channels=st.sampled_from(RATIOS))
def test_emitted_model_relabelled_matches(net: Network, channels: float) -> None:
    """The labelling of the emitted model unites the same elements: the structural half of verify,
    which raises.
    """
    model, x = build(net), example(net)
    fxprune.verify(model, fxprune.prune(model, x, channels=channels), x, numeric=False)


@share(5)
@given(net=networks(), channels=st.sampled_from(RATIOS))
def test_emitted_model_is_whole(net: Network, channels: float) -> None:
    """Batches of 1, 2 and 5 come out in the original's shapes; training mode runs and reaches
    every parameter left.
    """
    model = build(net)
    emitted = fxprune.prune(model, example(net), channels=channels).model
    for batch in (1, 2, 5):
        x = example(net, batch=batch)
        assert [y.shape for y in _outputs(emitted, x)] == [y.shape for y in _outputs(model, x)]
    emitted.train()
    model.train()
    assert _reached(emitted, example(net)) == _reached(model, example(net))


@share(5)
@given(net=networks())
def test_keeping_all_is_the_identity(net: Network) -> None:
    """``channels=1.0`` gives the same bits, in eval mode and, under one seed, in training mode."""
    model, x = build(net), example(net)
    emitted = fxprune.prune(model, x, channels=1.0).model
    assert _same_state(emitted, model)
    for training in (False, True):
        model.train(training)
        emitted.train(training)
        torch.manual_seed(3)
        expected = _outputs(model, x)
        torch.manual_seed(3)
        found = _outputs(emitted, x)
        for y, reference in zip(found, expected, strict=True):
            if net.bit_exact:
                assert torch.equal(y, reference)
            else:
                torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-6)


@share(5)
@given(net=networks())
def test_groups_partition_the_units(net: Network) -> None:
    """No two groups share a position of a labelling of an axis, and each unit of a group owns
    something.
    """
    model, x = build(net), example(net)
    coupling = fxprune.analyze(model, x)
    shapes = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
    owners: dict[tuple[str, int, int, int], str] = {}
    for group in coupling.groups:
        for axis in group.axes:
            assert axis.length == shapes[axis.parameter][axis.dim], axis
            assert 0 <= axis.start < axis.stop <= axis.length, axis
            for position in range(axis.start, axis.stop):
                owner = owners.setdefault(
                    (axis.parameter, axis.dim, axis.layer, position), group.name
                )
                assert owner == group.name, f"{axis} is in {owner} and in {group.name}"
        seen = torch.cat(
            [field.reshape(-1) for fields in coupling.elements(group).values() for field in fields]
        )
        assert seen[seen >= 0].unique().tolist() == list(range(group.size)), group.name
    assert len({group.name for group in coupling.groups}) == len(coupling.groups)


@share(5)
@given(net=networks(without=POSITIONAL), seed=st.integers(0, 3))
def test_permuting_the_units_of_a_group_changes_nothing(net: Network, seed: int) -> None:
    """The units of a group are interchangeable: permuted inside their blocks, they give the same
    outputs.
    """
    model, x = build(net, dtype=torch.float64), example(net, dtype=torch.float64)
    coupling = fxprune.analyze(model, x)
    expected = _outputs(model, x)
    generator = torch.Generator().manual_seed(seed)
    for group in coupling.groups:
        elements = coupling.elements(group)
        source = _permutation(elements, coupling.blocks(group), generator)
        permuted = copy.deepcopy(model)
        state = permuted.state_dict()
        with torch.no_grad():
            for name, fields in elements.items():
                for field in fields:
                    state[name].copy_(_permuted(state[name], field, source))
        for found, reference in zip(_outputs(permuted, x), expected, strict=True):
            assert _error(found, reference) <= LARGEST_ERROR, (
                f"{group.name}: unit i from unit {source.tolist()}[i]"
            )


@share(5)
@given(net=networks(), channels=st.sampled_from(RATIOS))
def test_replaying_the_plan_gives_the_same_model(net: Network, channels: float) -> None:
    """``apply`` repeats ``prune``, from the plan and from its JSON, to the last bit."""
    model, x = build(net), example(net)
    pruned = fxprune.prune(model, x, channels=channels)
    text = pruned.plan.to_json()
    assert fxprune.Plan.from_json(text).to_json() == text
    for plan in (pruned.plan, fxprune.Plan.from_json(text)):
        again = fxprune.apply(plan, model)
        assert _same_state(again.model, pruned.model)
        for found, reference in zip(
            _outputs(again.model, x), _outputs(pruned.model, x), strict=True
        ):
            assert torch.equal(found, reference)


@share(5)
@given(net=networks(), training=st.booleans())
def test_the_input_model_is_untouched(net: Network, training: bool) -> None:
    """Weights, buffers, modes, hooks, gradients and attributes of the user's model are what they
    were, bit for bit.
    """
    model, x = build(net).train(training), example(net)
    given_x, before, state = x.clone(), list(_anatomy(model)), copy.deepcopy(model.state_dict())
    pruned = fxprune.prune(model, x, channels=0.5)
    fxprune.analyze(model, x)
    fxprune.verify(model, pruned, x)
    for parameter in pruned.model.parameters():
        # the emitted model must share no storage with the given one
        parameter.data.fill_(float("nan"))
    assert list(_anatomy(model)) == before
    assert _bits_equal(model.state_dict(), state)
    assert torch.equal(x, given_x)


@share(5)
@given(net=networks())
def test_plain_chains_are_pruned(net: Network) -> None:
    """A layer read only by plain layers loses half of its channels: pinning it would be exact too,
    and useless.
    """
    model, x = build(net), example(net)
    emitted = fxprune.prune(model, x, channels=0.5).model
    plain = _plain_layers(net)
    event(f"plain layers: {min(len(plain), 3)}{'+' if len(plain) >= 3 else ''}")
    for index in plain:
        name = f"{type(net.nodes[index - 1]).__name__.lower()}{index}.weight"
        assert emitted.state_dict()[name].shape[0] == max(1, net.signals[index].channels // 2), (
            name
        )


@share(5)
@given(
    net=networks(
        only=(Linear, Attention, Recurrent, Activation, LayerNorm, Add, Concat, Tokens),
        max_nodes=12,
    )
)
def test_attention_and_recurrent_layers_are_pruned(net: Network) -> None:
    """Every head loses half of its dimensions, or half of the heads go; a recurrent layer loses
    half of its hidden units.
    """
    model, x = build(net), example(net)
    for units in ("dims", "heads"):
        state = fxprune.prune(model, x, channels=0.5, units=units).model.state_dict()
        for index, node in enumerate(net.nodes, start=1):
            name = f"{type(node).__name__.lower()}{index}"
            if isinstance(node, Attention):
                (read,) = (
                    t.shape[1]
                    for key, t in state.items()
                    if key.startswith(f"{name}.") and _reads_heads(key)
                )
                assert read == _left_of_heads(node, units), (name, units)
            elif isinstance(node, Recurrent) and not _is_output(net, index):
                assert state[f"{name}.weight_hh_l0"].shape[1] == node.out // 2, name


def _reads_heads(parameter: str) -> bool:
    return parameter.endswith((".proj.weight", "out_proj.weight"))


def _left_of_heads(node: Attention, units: str) -> int:
    """Return the total width of all heads after half is removed.

    A head of one dimension is removed whole, and a single head loses dimensions.
    """
    shared = (
        1 if node.style not in ("grouped", "rotary") else 2 if node.heads % 2 == 0 else node.heads
    )
    keys = node.heads // shared
    if units == "dims" and node.head_dim > 1:
        return node.heads * (node.head_dim // 2)
    if keys > 1:
        return keys // 2 * shared * node.head_dim
    return max(1, node.heads // 2) * max(1, node.head_dim // 2)


def _is_output(net: Network, index: int) -> bool:
    """Tell whether a value is returned, or reaches a returned one without a linear layer."""
    readers = [i for i, node in enumerate(net.nodes, start=1) if index in node.inputs]
    return index in net.outputs or any(
        not isinstance(net.nodes[i - 1], Linear) and _is_output(net, i) for i in readers
    )


@pytest.mark.long
def test_most_networks_get_smaller() -> None:
    """Over many random networks, pruning half the channels removes a quarter of the parameters."""
    sizes: list[tuple[int, int]] = []

    @settings(max_examples=60, derandomize=True, phases=[Phase.generate], database=None)
    @given(net=networks())
    def measure(net: Network) -> None:
        model, x = build(net), example(net)
        if len(net.nodes) >= 5:
            sizes.append((_count(model), _count(fxprune.prune(model, x, channels=0.5).model)))

    measure()
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    assert after <= 0.75 * before
    assert sum(small < large for large, small in sizes) >= 0.6 * len(sizes)


@pytest.mark.long
def test_the_strategy_draws_every_kind_and_long_networks() -> None:
    """Drawn networks are varied, print as their own source, and run at batch sizes 1, 2 and 5."""
    kinds: Counter[str] = Counter()
    lengths: list[int] = []

    @settings(max_examples=800, derandomize=True, phases=[Phase.generate], database=None)
    @given(net=networks())
    def look(net: Network) -> None:
        kinds.update({type(node).__name__ for node in net.nodes})
        lengths.append(len(net.nodes))
        names: dict[str, Any] = {}
        exec("from tests.specs import *", names)
        assert eval(repr(net), names) == net
        if len(lengths) > 150:
            return
        model = build(net)
        for batch in (1, 2, 5):
            for y, index in zip(
                _outputs(model, example(net, batch=batch)), net.outputs, strict=True
            ):
                assert y.shape == (batch, *net.signals[index].shape)
                assert y.isfinite().all()

    look()
    assert {kind.__name__ for kind in KINDS} == set(kinds)
    assert max(lengths) >= 20
    assert max(lengths) <= 30
    assert sum(length >= 8 for length in lengths) >= len(lengths) // 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _net("Conv(0, out=4, groups=2)"),
            "Conv(0, out=4, groups=2): groups do not divide chw (3, 8, 8)",
        ),
        (lambda: _net("Linear(0, out=4)"), "Linear(0, out=4): cannot take chw (3, 8, 8)"),
        (
            lambda: _net("Conv(1, out=4)"),
            "value 1, Conv(1, out=4): reads a value that does not exist yet",
        ),
    ],
)
def test_a_wrong_spec_names_its_node(make: Callable[[], Network], message: str) -> None:
    """The error of a wrong spec names the node, for specs that are edited by hand."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        make()
    assert str(caught.value) == message


def _net(node: str) -> Network:
    names: dict[str, Any] = {}
    exec("from tests.specs import *", names)
    return Network(input=(3, 8, 8), nodes=(eval(node, names),), outputs=(1,))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bits_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        for name, tensor in found.items()
    )


def _same_state(found: nn.Module, expected: nn.Module) -> bool:
    """Tell whether two models have the same keys, in any order, and the same bits."""
    return _bits_equal(
        dict(sorted(found.state_dict().items())), dict(sorted(expected.state_dict().items()))
    )


def _anatomy(model: nn.Module) -> Iterator[tuple[object, ...]]:
    """Yield everything about a model except its numbers.

    That is object identities, modes, hooks, gradients and attribute names.
    """
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        yield (
            name,
            id(module),
            module.training,
            tuple(sorted(hooks.items())),
            tuple(sorted(vars(module))),
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield (
            name,
            id(tensor),
            tensor.data_ptr(),
            tensor.requires_grad,
            tensor.grad,
            tensor._version,
        )


def _varying(field: Tensor) -> list[int]:
    """Return the dims along which unit indices differ."""
    return [d for d in range(field.dim()) if bool((field != field.narrow(d, 0, 1)).any())]


def _along(field: Tensor) -> tuple[list[int], Tensor]:
    """Return the varying dims of a field, and its unit indices over them, flattened."""
    dims = _varying(field)
    for d in range(field.dim()):
        if d not in dims:
            field = field.narrow(d, 0, 1)
    return dims, field.reshape(-1)


def _permutation(
    elements: dict[str, list[Tensor]], blocks: Tensor, generator: torch.Generator
) -> Tensor:
    """Return for each unit the unit whose elements it receives.

    Units are permuted only inside their block, and only among units that own as many elements of
    the same tensors: a unit that a residual sum couples to a second layer cannot replace one that
    is in the first layer only.
    """
    size = len(blocks)
    counts = [_along(field)[1] for fields in elements.values() for field in fields]
    owned = [torch.bincount(units[units >= 0], minlength=size).tolist() for units in counts]
    classes: dict[tuple[int, ...], list[int]] = {}
    for unit in range(size):
        classes.setdefault((int(blocks[unit]), *(count[unit] for count in owned)), []).append(unit)
    source = torch.arange(size)
    for alike in classes.values():
        order = torch.randperm(len(alike), generator=generator)
        source[torch.tensor(alike)] = torch.tensor(alike)[order]
    return source


def _permuted(tensor: Tensor, field: Tensor, source: Tensor) -> Tensor:
    """Return a copy of ``tensor`` in which unit u has the elements of unit ``source[u]``.

    The j-th position of unit u receives the j-th position of the other unit.
    """
    dims, units = _along(field)
    if not dims:
        return tensor.clone()
    index = torch.arange(len(units))
    for unit, other in enumerate(source.tolist()):
        index[units == unit] = (units == other).nonzero().flatten()
    first = tensor.movedim(dims, list(range(len(dims))))
    moved = first.flatten(0, len(dims) - 1)[index].reshape(first.shape)
    return moved.movedim(list(range(len(dims))), dims)
