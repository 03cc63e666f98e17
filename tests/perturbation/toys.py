"""Decoders of a few hundred weights, one for each way to write a FFN."""

import torch
from torch import nn

WIDTH, NEURONS, VOCABULARY = 8, 24, 32


class Mixer(nn.Module):
    """Attention without softmax: each token gets the mean of the preceding tokens."""

    def __init__(self):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        v = self.v_proj(x)
        return self.o_proj(v.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class Layer(nn.Module):
    def __init__(self, *ffns):
        super().__init__()
        self.mixer = Mixer()
        for number, ffn in enumerate(ffns):
            setattr(self, f"ffn_{number}", ffn)
        self.ffns = len(ffns)

    def forward(self, x):
        x = x + self.mixer(x)
        for number in range(self.ffns):
            x = x + getattr(self, f"ffn_{number}")(x)
        return x


class Decoder(nn.Module):
    """A decoder of token ids; the given functions create its layers."""

    def __init__(self, *makers):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(make() for make in makers)
        for parameter in self.parameters():
            parameter.data = 0.5 * torch.randn_like(parameter)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def decoder(*ffns):
    """Three layers, each with these FFNs."""
    return Decoder(*[lambda: Layer(*(make() for make in ffns))] * 3).train()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        self.act = nn.GELU()

    def neurons(self, x):
        return self.act(self.up(x))

    def forward(self, x):
        return self.down(self.neurons(x))


class Inline(Plain):
    """An FFN whose activation is a function call in its code."""

    def __init__(self):
        super().__init__()
        del self.act

    def neurons(self, x):
        return torch.tanh(self.up(x))


class Normed(Plain):
    """BitNet: a norm over the neurons."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(NEURONS)

    def neurons(self, x):
        return self.norm(super().neurons(x))


class Sparse(Plain):
    """Gemma 3n: neurons below the mean of all neurons are zero."""

    def neurons(self, x):
        neurons = super().neurons(x)
        return neurons * (neurons > neurons.mean(-1, keepdim=True))


class Permuted(Plain):
    """Adjacent neurons are swapped before the down projection."""

    def neurons(self, x):
        neurons = super().neurons(x)
        return neurons.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


class Interleaved(Plain):
    """gpt-oss: gate and up alternate in one projection."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * NEURONS)

    def neurons(self, x):
        both = self.up(x)
        return self.act(both[..., ::2]) * both[..., 1::2]


class Fixed(Plain):
    """Its neurons are multiplied by a vector of their full width."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(NEURONS))

    def neurons(self, x):
        return super().neurons(x) * self.scale


class Biased(Plain):
    """A bias after the down projection, in a module around it (JetMoE)."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return super().forward(x) + self.bias


class Residual(Plain):
    """Adds the residual itself (XLNet, BLOOM)."""

    def forward(self, x):
        return super().forward(x) + x


class PostNorm(nn.Module):
    """A norm with a bias after the FFN."""

    def __init__(self):
        super().__init__()
        self.mlp, self.norm = Plain(), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(self.mlp(x))


class ThreeInputs(nn.Module):
    """An FFN that is not found by shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, NEURONS) for _ in range(3))
        self.out = nn.Linear(NEURONS, WIDTH)

    def forward(self, x):
        return self.out(self.a(x).tanh() * self.b(x) * self.c(x))


class Table(nn.Module):
    """An FFN of two raw matrices."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.ones(NEURONS, WIDTH))
        self.values = nn.Parameter(torch.ones(NEURONS, WIDTH))

    def forward(self, x):
        return (x @ self.keys.t()).relu() @ self.values


class Experts(nn.Module):
    """Two experts in raw weights; `gate` computes the neurons."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(2, 2 * NEURONS, WIDTH))
        self.down_proj = nn.Parameter(torch.ones(2, WIDTH, NEURONS))

    def neurons(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return gate.sigmoid() * up

    def forward(self, x):
        gate_up = torch.einsum("...d,efd->e...f", x, self.gate_up_proj)
        return torch.einsum("e...f,edf->...d", self.neurons(gate_up), self.down_proj)


class GatedExperts(Experts):
    def _apply_gate(self, gate_up):
        return Experts.neurons(self, gate_up)

    def neurons(self, gate_up):
        return self._apply_gate(gate_up)


class LeakyExperts(Experts):
    """Experts whose down projection is multiplied by more than the result of the activation."""

    def __init__(self):
        super().__init__()
        self.act_fn = nn.SiLU()

    def neurons(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) + up


class Mixture(nn.Module):
    """A router, experts and a shared expert."""

    def __init__(self, experts=GatedExperts):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts, self.shared = experts(), Plain()

    def forward(self, x):
        return self.experts(x) * self.router(x).sigmoid().sum(-1, keepdim=True) + self.shared(x)


class LayerWithGate(Layer):
    """A layer with an FFN and a gate on another input (Gemma's embeddings of each layer)."""

    def __init__(self, names):
        super().__init__(Plain())
        self.names = names
        setattr(self, names[0], nn.Linear(WIDTH, NEURONS))
        setattr(self, names[1], nn.Linear(NEURONS, WIDTH))
        self.act_fn = nn.GELU()

    def forward(self, x):
        x = super().forward(x)
        gate, projection = (getattr(self, name) for name in self.names)
        beside = torch.linspace(-1, 1, x.shape[1] * NEURONS).view(x.shape[1], NEURONS)
        return x + projection(self.act_fn(gate(x)) * beside)


class LayerWithBorrowedKeys(Layer):
    """An attention with external keys and values, whose shapes are those of an FFN."""

    def __init__(self):
        super().__init__(Plain())
        self.attn = nn.Module()
        self.attn = BorrowedKeys()

    def forward(self, x):
        x = super().forward(x)
        return x + self.attn(x, torch.linspace(-1, 1, x.shape[1] * WIDTH).view(1, -1, WIDTH))


class BorrowedKeys(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, keys):
        scores = self.q_proj(x) @ keys.transpose(1, 2)
        length = x.shape[1]
        later = torch.ones(length, length).triu(1).bool()
        return self.o_proj(scores.masked_fill(later, float("-inf")).softmax(-1) @ keys)
