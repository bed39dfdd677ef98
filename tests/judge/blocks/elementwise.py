"""Functions of single elements, scales, and writing in place."""

from __future__ import annotations

from ..source import Signal, Writer
from .registry import block

ACTIVATIONS = (
    "F.relu({x})",
    "torch.relu({x})",
    "{x}.relu()",
    "F.relu(input={x})",
    "F.relu({x}, inplace=True)",
    "{x}.clamp(min=0)",
    "torch.clamp(input={x}, min=0.0)",
    "{x}.clamp_min(0.)",
    "torch.clip({x}, -1, 1)",
    "F.gelu({x})",
    "F.gelu({x}, approximate='tanh')",
    "F.silu({x})",
    "{x} * torch.sigmoid({x})",
    "{x} * {x}.sigmoid()",
    "{x}.mul(torch.sigmoid({x}))",
    "torch.tanh({x})",
    "{x}.tanh()",
    "{x}.sigmoid()",
    "torch.special.expit({x})",
    "F.leaky_relu({x}, 0.1)",
    "F.leaky_relu({x}, negative_slope=0.2, inplace=True)",
    "F.hardswish({x})",
    "F.hardtanh({x})",
    "F.elu({x})",
    "F.selu({x})",
    "F.celu({x}, alpha=2.)",
    "F.softplus({x})",
    "F.mish({x})",
    "F.relu6({x})",
    "F.softsign({x})",
    "F.logsigmoid({x})",
    "F.tanhshrink({x})",
    "F.softshrink({x}, 0.1)",
    "F.hardshrink({x})",
    "F.threshold({x}, 0.1, 0.2)",
    "torch.where({x} > 0, {x}, 0.1 * {x})",
    "torch.where(condition={x}.gt(0), input={x}, other={x}.exp() - 1)",
    "{x}.where({x} > 0, torch.zeros_like({x}))",
    "{x}.masked_fill({x} < 0, 0.)",
    "{x}.masked_fill(mask={x}.isnan(), value=0)",
    "torch.maximum({x}, torch.zeros_like({x}))",
    "torch.max({x}, {x} * 0.1)",
    "{x} * ({x} > 0)",
    "{x} * ({x} > 0).to({x}.dtype)",
    "{x}.square()",
    "{x} ** 2",
    "{x}.pow(2)",
    "torch.pow({x}, exponent=2)",
    "{x}.abs().sqrt()",
    "torch.exp(-{x} * {x})",
    "torch.sin({x})",
    "torch.cos({x} + 1)",
    "1 - {x}",
    "2.0 / (1 + {x}.exp()) - 1",
    "torch.addcmul({x}, {x}, {x}, value=0.5)",
    "torch.lerp({x}, {x}.tanh(), 0.3)",
    "{x}.lerp(torch.zeros_like({x}), weight=0.5)",
    "torch.add({x}, {x}, alpha=0.5)",
    "torch.sub({x}, 1.0)",
    "torch.rsub({x}, 1)",
    "{x}.add(1).mul(0.5)",
    "-{x}",
    "+{x}",
    "{x}.neg().exp()",
    "torch.nan_to_num({x})",
    "{x}.sign() * {x}.abs().log1p()",
    "torch.copysign({x}.abs(), {x})",
    "{x}.float().to({x}.dtype)",
    "{x}.round() + {x}",
    "{x} % 1.0",
    "torch.fmod({x}, 2)",
    "{x}.to(torch.float64) * 1.5",
    "{x}.type_as({x}) * 2",
    "(lambda t: t * 0.5)({x})",
    "{x}.erf()",
    "torch.atan2({x}, torch.ones_like({x}))",
    "torch.hypot({x}, {x})",
    "F.relu({x}) ** 2",
    "nn.functional.relu({x})",
    "torch.nn.functional.gelu({x})",
    "{x}.exp() / (1 + {x}.exp())",
    "{x} / (1 + {x}.abs())",
    "sum([{x}, {x} * 2])",
    "functools.reduce(torch.add, [{x}, {x}, {x}])",
    "{x}.sigmoid().mul_({x})",
    "{x}.clone().relu_()",
    "{x}.ceil() * 0.1 + {x}",
    "torch.xlogy({x}, {x}.abs() + 1)",
    "{x}.clamp(-2, 2)",
    "{x}.clamp(torch.tensor(-1.0), torch.tensor(1.0))",
    "{x} + {x}.detach()",
    "{x}.detach() * 0.5 + {x}",
    "torch.heaviside({x}, torch.zeros_like({x})) * {x}",
    "{x}.logit(eps=1e-3)",
)

MODULES = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.GELU()",
    "nn.SiLU(inplace=True)",
    "nn.Tanh()",
    "nn.Sigmoid()",
    "nn.LeakyReLU(0.2)",
    "nn.ELU()",
    "nn.Hardswish()",
    "nn.Softplus()",
    "nn.PReLU()",
    "nn.PReLU({c})",
    "nn.Mish()",
    "nn.Identity()",
    "nn.Hardtanh(-1, 1)",
    "nn.Threshold(0.1, 0.0)",
    "nn.ReLU6()",
    "nn.CELU()",
    "nn.LogSigmoid()",
    "nn.Softsign()",
    "nn.RReLU()",
)


@block(weight=4)
def activation(w: Writer, x: Signal) -> Signal:
    """A function of each element, as a module, a method or a function."""
    if w.chance(0.35):
        code = w.pick(*MODULES).replace("{c}", str(x.width))
        if "PReLU(" in code and x.kind == "tokens" and code != "nn.PReLU()":
            code = "nn.PReLU()"  # it looks for channels in axis 1
        if code == "nn.RReLU()":
            code = "nn.RReLU(0.25, 0.25)"  # one slope, so that training draws nothing
        return w.value(x, f"{w.module(code, 'act')}({{x}})")
    code = w.pick(*ACTIVATIONS)
    if "inplace=True" in code and w.chance(0.5):
        w.line(code.replace("{x}", x.name))  # nobody reads what the call returns
        return x
    return w.value(x, code)


@block(weight=2)
def scale(w: Writer, x: Signal) -> Signal:
    """A parameter or buffer per channel."""
    vector = w.pick(w.parameter, lambda n: w.buffer(f"torch.rand({n})"))(x.width)
    met = w.along(x, vector)
    forms = (
        f"{{x}} * {met}",
        f"{met} * {{x}}",
        f"{{x}}.mul({met})",
        f"torch.mul({{x}}, {met})",
        f"{{x}} + {met}",
        f"torch.add(input={{x}}, other={met})",
        f"{{x}} - {met}",
        f"{{x}} / ({met}.abs() + 1)",
        f"{{x}} * (1 + {met})",
        f"torch.addcmul({{x}}, {{x}}, {met})",
        f"torch.lerp({{x}}, {met}, 0.25)",
        f"torch.where({{x}} > {met}, {{x}}, {met})",
        f"{{x}} * {met}.sigmoid()",
        f"torch.maximum({{x}}, {met})",
        f"{{x}} * torch.exp(-{met}.abs())",
        f"{{x}} * {vector}.mean()",
        f"{{x}} * {met}.softmax({w.dim(x) if x.axis == x.rank - 1 else 0})"
        if x.axis == x.rank - 1
        else f"{{x}} * {met} * 2",
        f"{{x}} * {met} + {met}",
        f"{{x}}.sub({met}, alpha=0.1)",
        f"{{x}}.mul({met}).add_({met})",
    )
    if w.chance(0.15):
        y = w.value(x, "{x}.clone()")
        w.line(w.pick(f"{y} *= {met}", f"{y}.mul_({met})", f"{y} += {met}", f"{y}.sub_({met})"))
        return y
    if (
        x.rank > 2 and x.axis == 1 and w.chance(0.2)
    ):  # along the channels by moving them to the end
        return w.value(x, f"({{x}}.movedim(1, -1) * {vector}).movedim(-1, 1)")
    return w.value(x, w.pick(*forms))


@block(weight=3, fits=lambda x: x.width >= 4)
def in_place(w: Writer, x: Signal) -> Signal:
    """Writing into views of a tensor."""
    y = w.value(
        x,
        w.pick(
            "{x}.clone()",
            "{x} * 1.5",
            "{x} + 0.1",
            "{x}.contiguous().clone()",
            "torch.clone({x})",
            "{x}.new_empty({x}.shape).copy_({x})",
            "torch.empty_like({x}).copy_({x})",
        ),
    )
    at, half = w.dim(x), x.width // 2
    head = ":, " if x.axis == 1 else "..., "
    source = w.pick(f"{x}", f"{x}.tanh()", f"{y}.sigmoid()")
    window = lambda cut: f"{head}{cut}"  # noqa: E731
    forms = [
        f"{y}[{window('1::2')}] += 1",
        f"{y}[{window(f':{half}')}] = {source}[{window(f':{half}')}]",
        f"{y}[{window(f':{half}')}] += {source}[{window(f'-{half}:')}]",
        f"{y}[{window(f'{half}:')}] *= 0.5",
        f"{y}[{window('0')}] = 0",
        f"{y}[{window('-1')}] *= 2",
        f"{y}[{window('::2')}] -= {source}[{window('::2')}]",
        f"{y}[{window('[0, 2]')}] = 1.0",
        f"{y}[{window('[1, 3]')}] += {source}[{window('[0, 2]')}]",
        f"{y}.narrow({at}, 1, {half}).add_(1)",
        f"{y}.narrow(dim={at}, start=0, length={half}).copy_({source}.narrow({at}, {x.width - half}, {half}))",
        f"{y}.select({at}, 1).zero_()",
        f"{y}.select({at}, 0).add_({source}.select({at}, -1), alpha=0.5)",
        f"{y}.transpose(-1, -2).mul_(2)" if x.rank > 2 else f"{y}.t().mul_(2)",
        f"{y}.unsqueeze(-1)[:, :2] *= 0.3",
        f"{y}.flatten(1)[:, ::3].mul_(0.5)",
        f"{y}.chunk(2, {at})[0].relu_()",
        f"{y}.split([{half}, {x.width - half}], dim={at})[1].tanh_()",
        f"{y}.unbind({at})[0].fill_(0.5)",
        f"{y}.index_fill_({at}, torch.tensor([0, 1]), 0.5)",
        f"{y}.index_add_({at}, torch.tensor([0, 2]), {source}.narrow({at}, 0, 2))",
        f"{y}.index_copy_({at}, torch.tensor([1]), {source}.narrow({at}, 0, 1))",
        f"{y}.masked_fill_({source} > 0.5, 0)",
        f"{y}.clamp_(min=-1)",
        f"{y}[{y} < 0] = 0",
        f"{y}[0] = 0",
        f"{y}[:, {'0' if x.kind != 'image' else ':, 0'}] += 1",
        f"{y}.diagonal(dim1=-2, dim2=-1).add_(1)" if x.rank > 2 else f"{y}.add_(1)",
        f"{y}.copy_({source})",
        f"{y}.fill_diagonal_(0)" if x.rank == 2 else f"{y}.unsqueeze(0).mul_(0.9)",
        f"{y} += {source}",
        f"{y}.div_(2)",
        f"torch.relu_({y})",
        f"{y}[..., -1:] = {y}[..., :1].clone()",
        f"{y}[None][0] *= 0.3",
        f"{y}.scatter_({at}, torch.zeros_like({y}, dtype=torch.long).narrow({at}, 0, 1), 0.5)",
        f"{y}[{window(f'{half}:{half + 1}')}] /= 3",
        f"{y}.addcmul_({source}, {source})",
        f"{y}.lerp_({source}, 0.5)",
        f"{y}[{window('torch.arange(0, 3)')}] = 0.25",
        f"{y}[{window(f'slice({half}, None)')}] = 0.0",
    ]
    for _ in range(w.between(1, 2)):
        w.line(w.pick(*forms))
    return y


@block(weight=1.5, fits=lambda x: x.width % 2 == 0 and x.width >= 4)
def aliases(w: Writer, x: Signal) -> Signal:
    """Two names of the same memory, written to under one of them and read under the other."""
    y = w.value(x, w.pick("{x}.clone()", "{x} * 0.9", "{x}.relu()"))
    at = w.dim(x)
    a, b = w.fresh("a"), w.fresh("b")
    w.line(
        w.pick(
            f"{a}, {b} = {y}.chunk(2, dim={at})",
            f"{a}, {b} = torch.split({y}, {x.width // 2}, {at})",
            f"{a}, {b} = torch.chunk(input={y}, chunks=2, dim={at})",
        )
    )
    w.line(
        w.pick(
            f"{a} += {b}",
            f"{a}.mul_({b}.sigmoid())",
            f"{b}.copy_({a})",
            f"{a}.sub_({b}).relu_()",
            f"{b} *= 0.5",
            f"{a}[...] = {b} * 2",
        )
    )
    forms = ("{y}", f"torch.cat([{b}, {a}], {at})", f"torch.cat((-{a}, {b}), dim={at})", "{y} * 2")
    return w.value(y, w.pick(*forms).replace("{y}", y.name))
