"""Moving data: permutations, cuts, joins, paddings, changes of resolution."""

from __future__ import annotations

from math import gcd

from ..source import Signal, Writer
from .layers import layer_of
from .registry import block


@block(weight=2.5, fits=lambda x: x.width % 2 == 0)
def permuted_channels(w: Writer, x: Signal) -> Signal:
    """The same channels in another order."""
    at, c, half = w.dim(x), x.width, x.width // 2
    order = list(range(c))
    w.file.rng.shuffle(order)
    head = ":, " if x.axis == 1 else "..., "
    groups = w.pick(2, gcd(c, 4))
    forms = [
        f"{{x}}.flip({at})",
        f"torch.flip({{x}}, dims=[{at}])",
        f"torch.flip({{x}}, ({at},))",
        f"{{x}}.roll(1, {at})",
        f"torch.roll({{x}}, shifts=-2, dims={at})",
        f"{{x}}.roll(shifts=(1,), dims=({at},))",
        f"{{x}}[{head}{order}]",
        f"{{x}}.index_select({at}, {w.buffer(f'torch.tensor({order})')})",
        f"{{x}}[{head}{w.buffer(f'torch.tensor({order})', saved=False)}]",
        f"torch.index_select({{x}}, dim={at}, index=torch.tensor({order}))",
        f"torch.cat([{{x}}[{head}{half}:], {{x}}[{head}:{half}]], dim={at})",
        f"torch.cat({{x}}.chunk(2, {at})[::-1], {at})",
        f"torch.cat(tensors=list(reversed({{x}}.split({half}, {at}))), dim={at})",
        f"torch.concat([{{x}}[{head}::2], {{x}}[{head}1::2]], {at})",
        f"torch.stack({{x}}.unbind({at})[::-1], dim={at})",
        f"torch.cat([t.neg() for t in torch.tensor_split({{x}}, 3, dim={at})], {at})",
        f"torch.stack([{{x}}[{head}::2], {{x}}[{head}1::2]], dim={x.axis + 1 if x.axis == 1 else x.rank}).flatten({x.axis}, {x.axis + 1})",
        f"torch.concatenate((-{{x}}[{head}{half}:], {{x}}[{head}:{half}]), {at})",
        f"{{x}}.take_along_dim(torch.tensor({order}).view({', '.join(str(-1 if a == x.axis else 1) for a in range(x.rank))}), dim={at})",
        f"torch.swapaxes({{x}}.unflatten({x.axis}, ({groups}, -1)), {x.axis}, {x.axis + 1}).flatten({x.axis}, {x.axis + 1})",
        f"{{x}}.unflatten({x.axis}, (-1, {groups})).transpose({x.axis}, {x.axis + 1}).contiguous().flatten({x.axis}, {x.axis + 1})",
    ]
    if x.kind == "image":
        forms += [
            f"{{x}}.view({w.batch(x)}, {groups}, {c // groups}, {{x}}.size(2), {{x}}.size(3)).transpose(1, 2).reshape({{x}}.shape)",
            f"{{x}}.reshape(-1, {groups}, {w.width(x)} // {groups}, *{{x}}.shape[-2:]).permute(0, 2, 1, 3, 4).flatten(1, 2)",
            f"F.channel_shuffle({{x}}, {groups})",
            f"nn.ChannelShuffle({groups})({{x}})",
            "F.pixel_unshuffle(F.pixel_shuffle({x}, 1), 1)",
        ]
    if x.kind == "vector":
        forms += [
            f"{{x}}.fliplr().view(-1, 2, {half}).transpose(1, 2).flatten(1)",
            f"{{x}}.view({{x}}.size(0), {half}, 2).mT.reshape(-1, {c})",
        ]
    return w.value(x, w.pick(*forms))


@block(weight=2, fits=lambda x: x.width >= 4)
def cut(w: Writer, x: Signal) -> Signal:
    """Fewer channels: a slice, a part of a split, a gate of one half by the other."""
    at, c, half = w.dim(x), x.width, x.width // 2
    less = w.between(1, c - 1)
    head = ":, " if x.axis == 1 else "..., "
    forms = [
        (f"{{x}}[{head}:{less}]", less),
        (f"{{x}}[{head}{less}:]", c - less),
        (f"{{x}}[{head}-{less}:]", less),
        (f"{{x}}.narrow({at}, {c - less}, {less})", less),
        (f"torch.narrow(input={{x}}, dim={at}, start=0, length={less})", less),
        (f"{{x}}[{head}::2]", (c + 1) // 2),
        (f"{{x}}[{head}1::2]", c // 2),
        (f"{{x}}.split([{less}, {c - less}], {at})[0]", less),
        (f"torch.split({{x}}, ({less}, {c - less}), dim={at})[1].relu()", c - less),
        (f"torch.split(tensor={{x}}, split_size_or_sections={half}, dim={at})[0]", half),
        (f"{{x}}.tensor_split([{less}], dim={at})[1]", c - less),
        (f"{{x}}[{head}[0, 2, 1]]", 3),
        (f"torch.gather({{x}}, {at}, torch.zeros_like({{x}}, dtype=torch.long))", c),
        (f"{{x}}.index_select({at}, torch.arange(0, {c}, 2))", (c + 1) // 2),
        (
            f"{{x}}[{head}torch.tensor([{', '.join('True' if n % 3 else 'False' for n in range(c))}])]",
            sum(bool(n % 3) for n in range(c)),
        ),
        (f"{{x}}.split({half}, dim={at})[0] + {{x}}.split({half}, dim={at})[1]", half)
        if c % 2 == 0
        else (f"{{x}}[{head}:{half}]", half),
        (f"torch.chunk({{x}}, 2, dim={at})[0].sigmoid()", (c + 1) // 2),
        (f"{{x}}[{head}slice(None, {less})]", less),
        (f"{{x}}[(slice(None),) * {x.axis} + (slice({less}),)]", less),
        (f"{{x}}.swapaxes(0, {x.axis})[:{less}].swapaxes(0, {x.axis})", less),
        (f"torch.cat([{{x}}, {{x}}.relu()], {at})[{head}{half}:-{half}]", 2 * c - 2 * half),
        (f"{{x}}[{head}:{{x}}.shape[{x.axis}] // 2]", half),
        (f"{{x}}.unfold({at}, 2, 2).sum(-1)", half),
        (
            f"{{x}}.unflatten({x.axis}, (-1, 2)).amax({x.axis + 1})"
            if c % 2 == 0
            else f"{{x}}[{head}:{half}]",
            half,
        ),
    ]
    if c % 2 == 0:
        forms += [
            (f"F.glu({{x}}, dim={at})", half),
            (f"F.glu(input={{x}}, dim={at})", half),
            (f"{w.module(f'nn.GLU({at})', 'glu')}({{x}})", half),
            (f"(lambda a, b: a * b.sigmoid())(*{{x}}.chunk(2, {at}))", half),
            (f"(lambda a, b: F.silu(a) * b)(*torch.split({{x}}, {half}, {at}))", half),
            (f"torch.mul(*{{x}}.chunk(2, dim={at}))", half),
            (f"{{x}}.chunk(2, {at})[0] * F.gelu({{x}}.chunk(2, {at})[1])", half),
            (f"torch.maximum(*{{x}}.tensor_split(2, {at}))", half),
            (f"{{x}}[{head}:{half}] * {{x}}[{head}{half}:].tanh()", half),
        ]
    # a vector may be an image laid out as one row: for another size other positions are half of it
    w.file.branches |= x.kind == "vector"
    code, width = w.pick(*forms)
    return w.value(x, code, width=width)


@block(weight=2)
def joined(w: Writer, x: Signal) -> Signal:
    """More channels: repeated, padded, or several values side by side."""
    at, c = w.dim(x), x.width
    after = 2 * (x.rank - 1 - x.axis)
    zeros = "0, " * after
    others = [y for y in w.pool if (y.kind, y.size) == (x.kind, x.size)]
    y = w.pick(*others) if others and w.chance(0.6) else layer_of(w, x, w.some_width())
    ones = lambda n: ", ".join(str(n if a == x.axis else 1) for a in range(x.rank))  # noqa: E731
    forms = [
        (f"torch.cat([{{x}}, {y}], {at})", c + y.width),
        (f"torch.cat(({y}, {{x}}), dim={at})", c + y.width),
        (f"torch.cat(tensors=[{{x}}, {y}, {{x}}.relu()], dim={at})", 2 * c + y.width),
        (f"torch.concat([{y}.tanh(), {{x}}], axis={at})", c + y.width),
        (f"torch.cat([{{x}}, -{{x}}], {at}).relu()", 2 * c),
        (f"{{x}}.repeat({ones(2)})", 2 * c),
        (f"{{x}}.repeat_interleave(2, dim={at})", 2 * c),
        (f"torch.repeat_interleave({{x}}, repeats=2, dim={at})", 2 * c),
        (f"{{x}}.tile({ones(2)})", 2 * c),
        (f"torch.tile({{x}}, ({ones(2)}))", 2 * c),
        (f"F.pad({{x}}, ({zeros}1, 2))", c + 3),
        (f"F.pad(input={{x}}, pad=[{zeros}0, 2], mode='constant', value=0.5)", c + 2),
        (f"torch.nn.functional.pad({{x}}, pad=({zeros}2, 0), value=0)", c + 2),
        (f"torch.constant_pad_nd({{x}}, [{zeros}1, 1])", c + 2),
        (f"torch.stack([{{x}}, {{x}}.tanh()], {x.axis}).flatten({x.axis}, {x.axis + 1})", 2 * c),
        (
            f"torch.stack([{{x}}, {{x}} * 2], dim={x.axis + 1}).flatten({x.axis}, {x.axis + 1})",
            2 * c,
        ),
        (f"torch.cat([{{x}}, {{x}}.mean({at}, keepdim=True)], {at})", c + 1),
        (f"torch.cat([{{x}}.amax({at}, keepdim=True), {{x}}], dim={at})", c + 1),
        (f"torch.cat([{{x}}, torch.zeros_like({{x}})], {at})", 2 * c),
        (f"F.pad({{x}}, ({zeros}0, {c}))", 2 * c),
        (
            f"{{x}}.unsqueeze({x.axis + 1}).expand({', '.join('-1' for _ in range(x.axis + 1))}, 2{', -1' * (x.rank - 1 - x.axis)}).flatten({x.axis}, {x.axis + 1})",
            2 * c,
        ),
        (f"torch.cat([{{x}}] + [{y}], {at})", c + y.width),
        (f"torch.cat([*{{x}}.chunk(2, {at}), {y}], dim={at})", c + y.width),
        (f"torch.cat([{{x}}, {{x}}.new_ones(()).expand_as({{x}})], {at})", 2 * c),
    ]
    if x.kind == "vector":
        forms += [
            (f"torch.hstack([{{x}}, {y}])", c + y.width),
            (f"torch.column_stack(({{x}}, {y}))", c + y.width),
            ("torch.cat([{x}, {x}.new_zeros({x}.shape[0], 2)], 1)", c + 2),
            ("torch.outer({x}[0], {x}[0])[:1].expand({x}.size(0), -1)", c),
        ]
    if x.kind == "image":
        forms += [
            (
                "torch.cat([{x}, torch.linspace(-1, 1, {x}.size(3), dtype={x}.dtype).expand({x}.size(0), 1, {x}.size(2), -1)], 1)",
                c + 1,
            ),
            ("torch.cat([{x}, {x}.new_zeros({x}.size(0), 3, *{x}.shape[2:])], dim=1)", c + 3),
            ("nn.ConstantPad3d((0, 0, 0, 0, 1, 0), 0.5)({x})", c + 1),
            ("F.pad({x}.unsqueeze(0), (0, 0, 0, 0, 0, 2)).squeeze(0)", c + 2),
        ]
    code, width = w.pick(*forms)
    return w.value(x, code, width=width)


@block(weight=1.2)
def skipped(w: Writer, x: Signal) -> Signal:
    """A sum or a product with an earlier value."""
    others = [y for y in w.pool if (y.kind, y.size) == (x.kind, x.size)]
    y = w.pick(*others) if others else x
    if y.width < x.width and w.chance(0.5):
        zeros = "0, " * (2 * (x.rank - 1 - x.axis))
        y = w.value(
            y,
            f"F.pad({{x}}, ({zeros}{w.pick(f'0, {x.width - y.width}', f'{x.width - y.width}, 0')}))",
            width=x.width,
        )
    elif y.width > x.width and w.chance(0.5):
        y = w.value(y, f"{{x}}[{':, ' if x.axis == 1 else '..., '}:{x.width}]", width=x.width)
    if y.width != x.width:
        y = layer_of(w, y, x.width)
    if w.chance(0.2):
        z = w.value(x, "{x} * 1")
        w.line(w.pick(f"{z} += {y}", f"{z}.add_({y})", f"{z} -= {y}"))
        return z
    return w.value(
        x,
        w.pick(
            f"{{x}} + {y}",
            f"{y} + {{x}}",
            f"torch.add({{x}}, {y})",
            f"{{x}}.add({y}, alpha=0.5)",
            f"{{x}} * {y}",
            f"{{x}} - {y}",
            f"torch.lerp({{x}}, {y}, 0.5)",
            f"torch.stack([{{x}}, {y}]).sum(0)",
            f"torch.stack(({{x}}, {y}), -1).mean(-1)",
            f"torch.where({{x}} > 0, {{x}}, {y})",
            f"sum(({{x}}, {y}))",
            f"torch.maximum({{x}}, {y})",
        ),
    )


@block("image", weight=1.5)
def moved_pixels(w: Writer, x: Signal) -> Signal:
    """Pixels in another order; the picture keeps its size."""
    forms = [
        "{x}.flip(-1)",
        "{x}.flip((2, 3))",
        "torch.roll({x}, (1, -1), dims=(2, 3))",
        "{x}.roll(1, -1)",
        "{x}.contiguous(memory_format=torch.channels_last)",
        "{x}.unsqueeze(1).squeeze(1)",
        "{x}[None][0]",
        "{x}[:, :, ::1]",
        "F.pad({x}, (1, 1, 0, 0))[..., 1:-1]",
        "F.pad({x}, (0, 0, 1, 0))[:, :, :-1]",
        "F.max_pool2d({x}, 3, 1, 1)",
        "F.avg_pool2d({x}, kernel_size=3, stride=1, padding=1)",
        "nn.MaxPool2d(3, stride=1, padding=1)({x})",
        "F.pad({x}, [1, 1, 1, 1], mode='replicate')[:, :, 1:-1, 1:-1]",
        "{x}.flatten(2).unflatten(2, {x}.shape[2:])",
        "{x}.reshape({x}.size(0), {x}.size(1), -1).view_as({x})",
        "F.fold(F.unfold({x}, 3, padding=1), {x}.shape[-2:], 3, padding=1)",
        "torch.fft.irfft2(torch.fft.rfft2({x}), s={x}.shape[-2:])",
        "torch.rot90({x}, 2, (2, 3))",
        "F.grid_sample({x}, torch.stack(torch.meshgrid(torch.linspace(-1, 1, {x}.size(2), dtype={x}.dtype), torch.linspace(-1, 1, {x}.size(3), dtype={x}.dtype), indexing='ij')[::-1], -1).expand({x}.size(0), -1, -1, -1), align_corners=True)",
        "torch.einsum('bchw->bchw', {x})",
        "{x}.clone(memory_format=torch.contiguous_format)",
        "{x}.transpose(2, 3).transpose(-1, -2)",
        "torch.cumsum({x}, -1) * 0.1",
        "{x}.unfold(2, 1, 1).squeeze(-1)",
        "{x}.as_strided({x}.size(), {x}.stride())",
    ]
    if x.size[0] == x.size[1] and w.chance(0.2):
        forms = ["{x}.transpose(-1, -2)", "{x}.mT", "{x} + {x}.transpose(2, 3)", "torch.tril({x})"]
    return w.value(x, w.pick(*forms))


@block("image", keeps=False, weight=2, fits=lambda x: min(x.size) >= 4)
def smaller(w: Writer, x: Signal) -> Signal:
    """Half of the picture's size."""
    down = tuple(n // 2 for n in x.size)
    if w.chance(0.4):
        out = w.some_width()
        code = w.pick(
            f"nn.Conv2d({x.width}, {out}, 2, stride=2)",
            f"nn.Conv2d({x.width}, {out}, kernel_size=(2, 2), stride=(2, 2), bias=False)",
        )
        return w.value(x, f"{w.module(code, 'down')}({{x}})", width=out, size=down)
    if all(n % 2 == 0 for n in x.size) and w.chance(0.3):
        forms = (
            "F.pixel_unshuffle({x}, 2)",
            "torch.cat([{x}[..., ::2, ::2], {x}[..., 1::2, ::2], {x}[..., ::2, 1::2], {x}[..., 1::2, 1::2]], 1)",
            "torch.pixel_unshuffle({x}, downscale_factor=2)",
            "{x}.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)",
        )
        return w.value(x, w.pick(*forms), width=4 * x.width, size=down)
    forms = (
        "F.max_pool2d({x}, 2)",
        "F.avg_pool2d({x}, (2, 2))",
        "nn.AvgPool2d(2, 2)({x})",
        f"{w.module('nn.MaxPool2d(kernel_size=2)', 'pool')}({{x}})",
        "F.adaptive_avg_pool2d({x}, ({x}.size(2) // 2, {x}.size(3) // 2))",
        "{x}[:, :, :{x}.size(2) // 2 * 2:2, :{x}.size(3) // 2 * 2:2]",
        "F.max_pool2d(input={x}, kernel_size=2, stride=2)",
        "F.lp_pool2d({x}, 2, 2)",
        "torch.max_pool2d({x}, kernel_size=2)",
        "F.interpolate({x}, size=({x}.shape[2] // 2, {x}.shape[3] // 2), mode='nearest')",
        "F.max_pool2d({x}, 2, return_indices=True)[0]",
    )
    return w.value(x, w.pick(*forms), size=down)


@block("image", keeps=False, weight=0.8, fits=lambda x: max(x.size) <= 6)
def larger(w: Writer, x: Signal) -> Signal:
    """Twice the picture's size."""
    up = tuple(2 * n for n in x.size)
    if w.chance(0.3):
        out = w.some_width()
        return w.value(
            x,
            f"{w.module(f'nn.ConvTranspose2d({x.width}, {out}, 2, stride=2)', 'up')}({{x}})",
            width=out,
            size=up,
        )
    if x.width % 4 == 0 and w.chance(0.4):
        forms = (
            "F.pixel_shuffle({x}, 2)",
            f"{w.module('nn.PixelShuffle(2)', 'up')}({{x}})",
            "{x}.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)",
        )
        return w.value(x, w.pick(*forms), width=x.width // 4, size=up)
    forms = (
        "F.interpolate({x}, scale_factor=2)",
        "F.interpolate({x}, scale_factor=2.0, mode='bilinear', align_corners=False)",
        "F.interpolate({x}, size=(2 * {x}.size(2), 2 * {x}.size(3)))",
        f"{w.module('nn.Upsample(scale_factor=2)', 'up')}({{x}})",
        "{x}.repeat_interleave(2, -1).repeat_interleave(2, -2)",
        "{x}[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape({x}.size(0), {x}.size(1), 2 * {x}.size(2), 2 * {x}.size(3))",
        "F.upsample({x}, scale_factor=2)",
        "torch.kron({x}, torch.ones(2, 2, dtype={x}.dtype))",
    )
    return w.value(x, w.pick(*forms), size=up)


@block("tokens", weight=1.2)
def moved_tokens(w: Writer, x: Signal) -> Signal:
    """Tokens in another order, of the same number."""
    forms = (
        "{x}.flip(1)",
        "{x}.roll(1, 1)",
        "torch.roll({x}, shifts=1, dims=-2)",
        "torch.cat([{x}[:, 1:], {x}[:, :1]], 1)",
        "torch.cat(({x}[:, :1], {x}[:, :-1]), dim=-2)",
        "F.pad({x}, (0, 0, 1, -1))",
        "F.pad({x}[:, :-1], pad=(0, 0, 1, 0))",
        "{x}[:, torch.arange({x}.size(1) - 1, -1, -1)]",
        "{x}.gather(1, {x}.argsort(1))",
        "{x}.sort(dim=1).values",
        "{x}[:, [-1] + list(range({x}.shape[1] - 1))]",
        "torch.stack([t for t in {x}.unbind(1)][::-1], 1)",
        "{x}.transpose(0, 1).transpose(0, 1)",
        "F.avg_pool1d({x}.mT, 3, 1, 1).mT",
        "F.max_pool1d({x}.transpose(1, 2), 3, stride=1, padding=1).transpose(1, 2)",
        "torch.stack([{x}[:, t] for t in range({x}.shape[1])], dim=1)",
        "{x}.unfold(1, 1, 1)[..., 0]",
        "torch.cat(list(reversed({x}.split(1, 1))), 1)",
        "{x} - {x}.roll(-1, 1)",
        "torch.cat([{x}[:, ::2], {x}[:, 1::2]], 1)",
        "{x}.take_along_dim({x}.sum(-1, keepdim=True).argsort(1), 1)",
    )
    return w.value(x, w.pick(*forms))


@block("tokens", keeps=False, weight=0.7)
def other_tokens(w: Writer, x: Signal) -> Signal:
    """More or fewer tokens."""
    (n,) = x.size
    if w.chance(0.5):
        token = w.parameter(1, 1, x.width)
        forms = (
            f"torch.cat([{token}.expand({{x}}.size(0), -1, -1), {{x}}], 1)",
            f"torch.cat(({{x}}, {token}.repeat({w.batch(x)}, 1, 1)), dim=1)",
            f"torch.cat([{token}.expand({{x}}.shape[0], 1, {w.width(x)}), {{x}}], dim=-2)",
        )
        return w.value(x, w.pick(*forms), size=(n + 1,))
    forms = ["{x}[:, 1:]", "{x}[:, :-1]", "{x}.narrow(1, 1, {x}.size(1) - 1)", "{x}.diff(dim=1)"]
    return w.value(x, w.pick(*forms), size=(n - 1,)) if n > 2 else x
