"""Sequences of tokens: embeddings, mixers, gated MLPs and recurrent layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, floats
from tests.zoo.case import tokens as indices

VOCABULARY = 20


class TextConv(nn.Module):
    """An embedding, convolutions over time, and the maximum over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, k, padding=k // 2) for k in (1, 3, 5))
        self.fc, self.head = nn.Linear(3 * width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).transpose(1, 2)
        pooled = [F.relu(conv(x)).max(dim=2).values for conv in self.convs]
        return self.head(F.relu(self.fc(torch.cat(pooled, 1))))


class LanguageModel(nn.Module):
    """A causal language model of one block, whose output layer may be the token embedding."""

    def __init__(self, width: int, tied: bool) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(8, width)
        self.norm1, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.register_buffer("causal", torch.ones(8, 8).tril().bool())
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        b, t = idx.shape
        x = self.embedding(idx) + self.positions(torch.arange(t, device=idx.device))
        q, k, v = self.qkv(self.norm1(x)).split(self.proj.in_features, dim=2)
        q, k, v = (y.view(b, t, 4, -1).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * 0.5
        scores = scores.masked_fill(~self.causal[:t, :t], float("-inf")).softmax(-1)
        x = x + self.proj((scores @ v).transpose(1, 2).contiguous().view(b, t, -1))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x))


class TiedBag(nn.Module):
    """Tied embeddings without normalisation: the mean of the tokens predicts the next one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).mean(1)
        return F.linear(x + self.down(F.relu(self.up(x))), self.embedding.weight)


class Mixer(nn.Module):
    """MLP-Mixer: one MLP over the patches of a channel, one over the channels of a patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(16, 2 * width), nn.GELU(), nn.Linear(2 * width, 16))
        self.channels = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(dim=1))


class GatedMLP(nn.Module):
    """SwiGLU and similar gates, spelt as `how` says."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(6, width)
        if how == "two layers":
            self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        else:
            self.both = nn.Linear(width, 4 * width)
        self.down, self.head = nn.Linear(2 * width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.how == "two layers":
            y = F.silu(self.gate(x)) * self.up(x)
        elif self.how == "glu":
            y = F.glu(self.both(x), dim=-1)
        elif self.how == "chunk":
            a, b = self.both(x).chunk(2, dim=-1)
            y = F.gelu(a) * b
        else:
            a, b = self.both(x).unflatten(-1, (2, -1)).unbind(-2)
            y = a * torch.sigmoid(b)
        return self.head(x + self.down(y))


class Recurrent(nn.Module):
    """A convolution, a recurrent layer, and linear layers that read its outputs and last state."""

    def __init__(
        self, width: int, layer: type[nn.RNNBase], project: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, width, 3, padding=1)
        self.rnn = layer(
            width,
            2 * width,
            batch_first=True,
            **options,
            **({"proj_size": width} if project else {}),
        )
        seen = width if project else 2 * width
        self.fc, self.last = (
            nn.Linear(seen * (1 + self.rnn.bidirectional), 2 * width),
            nn.Linear(seen, 2 * width),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.rnn(F.relu(self.conv(x)).transpose(1, 2))
        state = state[0] if isinstance(self.rnn, nn.LSTM) else state
        return self.head(F.relu(self.fc(x[:, -1]) + self.last(state[-1])))


class Started(nn.Module):
    """A recurrent layer whose first state is a parameter, or computed from the input."""

    def __init__(self, width: int, learned: bool) -> None:
        super().__init__()
        self.width, self.learned = width, learned
        self.start = nn.Parameter(torch.randn(2, 1, width)) if learned else nn.Linear(8, 2 * width)
        self.embed, self.rnn, self.head = (
            nn.Linear(8, width),
            nn.GRU(width, width, 2),
            nn.Linear(width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.learned:
            start = self.start.expand(-1, x.shape[0], -1)
        else:
            start = self.start(x[:, 0]).tanh().unflatten(1, (2, self.width)).transpose(0, 1)
        out, _ = self.rnn(F.relu(self.embed(x)).transpose(0, 1), start.contiguous())
        return self.head(out[-1])


class Cells(nn.Module):
    """A recurrent cell in a loop over steps."""

    def __init__(self, width: int, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.embed, self.cell, self.head = (
            nn.Linear(8, width),
            cell(width, 2 * width),
            nn.Linear(2 * width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        state, memory = (
            x.new_zeros(x.shape[0], self.cell.hidden_size),
            x.new_zeros(x.shape[0], self.cell.hidden_size),
        )
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                state, memory = self.cell(step, (state, memory))
            else:
                state = self.cell(step, state)
        return self.head(state)


class OuterProduct(nn.Module):
    """Bilinear pooling: the flattened outer product of two vectors, two fields on one axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(6, 2 * width)
        self.fc, self.head = nn.Linear(2 * width * width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        outer = torch.einsum("bi,bj->bij", F.relu(self.a(x)), F.relu(self.b(x)))
        return self.head(F.relu(self.fc(outer.flatten(1))))


CASES = [
    Case("embedding", TextConv, indices(8, VOCABULARY), slack=0.08),
    Case(
        "language_model",
        lambda w: LanguageModel(w, tied=False),
        indices(8, VOCABULARY),
        zeroable=False,
    ),
    Case(
        "language_model_tied",
        lambda w: LanguageModel(w, tied=True),
        indices(8, VOCABULARY),
        zeroable=False,
    ),
    Case("embedding_tied", TiedBag, indices(8, VOCABULARY)),
    Case("mixer_token_axis", Mixer, floats(3, 8, 8), zeroable=False),
    *(
        Case(
            f"gated_mlp_{how.replace(' ', '_')}", lambda w, how=how: GatedMLP(w, how), floats(5, 6)
        )
        for how in ("two layers", "glu", "chunk", "unflatten")
    ),
    Case("lstm_in_the_middle", lambda w: Recurrent(w, nn.LSTM), floats(3, 8)),
    Case("lstm_bidirectional", lambda w: Recurrent(w, nn.LSTM, bidirectional=True), floats(3, 8)),
    Case(
        "lstm_of_several_layers",
        lambda w: Recurrent(w, nn.LSTM, num_layers=3, bias=False),
        floats(3, 8),
    ),
    Case(
        "lstm_projected",
        lambda w: Recurrent(w, nn.LSTM, project=True, num_layers=2, bidirectional=True),
        floats(3, 8),
    ),
    Case("gru_in_the_middle", lambda w: Recurrent(w, nn.GRU), floats(3, 8)),
    Case(
        "gru_of_several_layers",
        lambda w: Recurrent(w, nn.GRU, num_layers=2, bidirectional=True),
        floats(3, 8),
    ),
    Case("rnn_in_the_middle", lambda w: Recurrent(w, nn.RNN), floats(3, 8)),
    Case("recurrent_from_a_parameter", lambda w: Started(w, learned=True), floats(4, 8)),
    Case("recurrent_from_the_input", lambda w: Started(w, learned=False), floats(4, 8)),
    *(
        Case(cell.__name__, lambda w, cell=cell: Cells(w, cell), floats(4, 8))
        for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ),
    Case("outer_product", OuterProduct, floats(6), width=8),
]
