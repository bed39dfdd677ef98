"""Python around the network: several inputs and outputs, branches on shapes, writes, sharing."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, classify, floats, several


class Backbone(nn.Module):
    """Two convolutions to `2 * width` channels, with which most networks here begin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 2 * width, 3, padding=1),
        )
        self.norm = nn.BatchNorm2d(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))

    def linear(self, x: Tensor) -> Tensor:
        """Compute the same without the last ReLU.

        The backward pass of the ReLU would forbid to write into its output.
        """
        return self.norm(self.c2(F.relu(self.c1(x))))


class TwoInputs(nn.Module):
    """An image and a vector, embedded separately and concatenated; a FiLM scales the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.embed, self.film = nn.Linear(4, width), nn.Linear(width, 4 * width)
        self.fc, self.head = nn.Linear(3 * width, 2 * width), nn.Linear(2 * width, 10)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        x, y = self.backbone(image), F.relu(self.embed(meta))
        scale, shift = self.film(y).chunk(2, dim=1)
        x = classify(x * scale[:, :, None, None] + shift[:, :, None, None])
        return self.head(F.relu(self.fc(torch.cat([x, y], dim=1))))


class Siamese(nn.Module):
    """One backbone on two images: their absolute difference and their product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.fc, self.head = nn.Linear(4 * width, 2 * width), nn.Linear(2 * width, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = classify(self.backbone(left)), classify(self.backbone(right))
        return self.head(F.relu(self.fc(torch.cat([(a - b).abs(), a * b], dim=-1))))


class NestedInput(nn.Module):
    """A network whose arguments are a dict and a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.two = TwoInputs(width)

    def forward(self, batch: dict[str, Tensor], extra: list[Tensor]) -> Tensor:
        return self.two(batch["image"], batch["meta"]) + extra[0] * extra[1]


class Outputs(nn.Module):
    """A network whose output is nested as `kind` says."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.backbone = Backbone(width)
        self.c3 = nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.mask, self.head = nn.Conv2d(2 * width, 2, 1), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.backbone(x)
        y = F.relu(self.c3(x))
        mask, logits = self.mask(x), self.head(classify(y))
        if self.kind == "dict":
            return {"mask": mask, "aux": {"logits": logits, "none": None}}
        if self.kind == "list":
            return [mask, logits]
        return (mask, (logits, logits.argmax(1)))


class FeatureOutput(nn.Module):
    """A network that also outputs a hidden feature.

    The width of this feature must stay, and the hidden channels before and behind it may go.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = (
            nn.Conv2d(3, 2 * width, 3, padding=1),
            nn.Conv2d(2 * width, 8, 3, padding=1),
        )
        self.c3, self.c4 = (
            nn.Conv2d(8, 2 * width, 3, padding=1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.c2(F.relu(self.c1(x)))
        return feature, self.head(classify(F.relu(self.c4(F.relu(self.c3(F.relu(feature)))))))


class ControlFlow(nn.Module):
    """Branches and loops that depend on shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2 * width, width, 1)
        self.backbone, self.last = Backbone(width), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"expected (B, 3, H, W), got {tuple(x.shape)}")
        pad_h, pad_w = -x.shape[2] % 4, -x.shape[3] % 4
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        x = self.backbone(x)
        while x.shape[-1] > 4:
            x = F.max_pool2d(x, 2)
        if x.shape[1] != self.last.in_channels:
            x = self.proj(x)
        return self.head(classify(F.relu(self.last(x))))


class Frames(nn.Module):
    """A video, processed frame by frame in a loop, then stacked and mixed over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.time = nn.Conv1d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        frames = [classify(self.backbone(x[:, t])) for t in range(x.shape[1])]
        return self.head(F.relu(self.time(torch.stack(frames, dim=2))).mean(2))


class FoldedFrames(nn.Module):
    """A video whose frames are folded into the batch and unfolded again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone, self.fc, self.head = (
            Backbone(width),
            nn.Linear(2 * width, width),
            nn.Linear(width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        x = self.backbone(x.reshape(b * t, c, h, w))
        x = x.view(b, t, *x.shape[1:]).mean((1, 3, 4))
        return self.head(F.relu(self.fc(x)))


class InPlace(nn.Module):
    """A network that writes into tensors and into views of them, as `how` says."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how, self.half = how, width
        self.backbone = Backbone(width)
        self.side, self.last = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.full = (
            nn.Conv2d(3, 2 * width, 3, padding=1) if how in ("operators", "copy", "mask") else None
        )
        self.head = nn.Linear(2 * width, 10)
        if self.full is not None:
            del self.side

    def forward(self, image: Tensor) -> Tensor:
        x = self.backbone.linear(image)
        if self.full is not None:
            y = self.full(image)
            if self.how == "operators":
                x += y
                x.mul_(0.5).add_(y, alpha=2)
                x = F.relu(x, inplace=True)
            elif self.how == "copy":
                z = torch.empty_like(x)
                z.copy_(x)
                z -= y
                x = z
            else:
                x = x.masked_fill_(image.mean(1, keepdim=True) > 0, 0.0) + y
        else:
            y = self.side(image)
            if self.how == "add to slice":
                x[:, : self.half] += y
            elif self.how == "assign slice":
                x[:, self.half :] = y
            elif self.how == "assign strided":
                x[:, ::2] = x[:, 1::2] + y
            else:  # a fresh tensor, filled part by part
                z = x.new_zeros(x.shape[0], 2 * self.half, *x.shape[2:])
                z[:, : self.half] = y
                z[:, self.half :] = x[:, self.half :]
                x = z
        return self.head(classify(F.relu(self.last(x))))


class Shared(nn.Module):
    """One convolution used three times in a row, one parameter used by two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.body = (
            nn.Conv2d(3, 2 * width, 3, padding=1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.a, self.b = nn.Conv2d(2 * width, width, 1), nn.Conv2d(2 * width, width, 1)
        self.b.weight = self.a.weight
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.body(x)) + x
        return self.head(classify(torch.cat([self.a(x), self.b(F.relu(x))], 1)))


class Containers(nn.Module):
    """Sequential, ModuleList, ModuleDict and ParameterList, by index, by name and in loops."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)]
        )
        self.by_name = nn.ModuleDict(
            {"act": nn.ReLU(inplace=True), "norm": nn.BatchNorm2d(2 * width)}
        )
        self.scales = nn.ParameterList(
            [nn.Parameter(torch.ones(2 * width, 1, 1)) for _ in range(2)]
        )
        self.tail = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.Dropout2d(0.1), nn.ReLU()
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.by_name["act"](layer(x))
        x = self.by_name["norm"](x)
        for scale in self.scales:
            x = x * scale
        return self.head(classify(self.tail(x)))


def video(batch: int) -> Tensor:
    return torch.randn(batch, 2, 3, 4, 4)


def keywords(batch: int) -> dict[str, Tensor]:
    return {"meta": torch.randn(batch, 4), "image": torch.randn(batch, 3, 8, 8)}


def nested(batch: int) -> dict[str, Any]:
    return {"batch": keywords(batch), "extra": [torch.randn(batch, 10), torch.randn(batch, 10)]}


IMAGE = floats(3, 8, 8)
IN_PLACE = (
    "operators",
    "copy",
    "mask",
    "add to slice",
    "assign slice",
    "assign strided",
    "fill by slices",
)
CASES = [
    Case("two_inputs", TwoInputs, several((3, 8, 8), (4,)), slack=0.08),
    Case("two_inputs_by_keyword", TwoInputs, keywords, slack=0.08),
    Case("siamese", Siamese, several((3, 8, 8), (3, 8, 8))),
    Case("nested_inputs", NestedInput, nested, slack=0.08),
    *(
        Case(f"output_{kind}", lambda w, k=kind: Outputs(w, k), IMAGE)
        for kind in ("dict", "list", "tuple")
    ),
    Case("feature_output", FeatureOutput, IMAGE),
    Case("control_flow_on_shapes", ControlFlow, floats(3, 7, 9)),
    Case("frames_in_a_loop", Frames, video),
    Case("frames_folded_into_batch", FoldedFrames, video),
    *(
        Case(
            f"in_place_{how.replace(' ', '_')}",
            lambda w, how=how: InPlace(w, how),
            IMAGE,
            slack=0.1,
        )
        for how in IN_PLACE
    ),
    Case("shared_modules", Shared, IMAGE),
    Case("containers", Containers, IMAGE),
]
