# Copyright The ngc-jax authors. SPDX-License-Identifier: Apache-2.0
"""A model of neuronal groups in PyTorch: its architecture's own model, with weight matrices in factors.

The members of a group share an encoder. It turns a block's input x into the group's signal, which every member reads:

    signal = x phi(Q_in) M,    y = signal phi(Q_out)^T + bias

Kernels: `bilinear`, phi(Q) = Q and M = 1; `riemannian`, M = diag(exp(l)) + F F^T; `lifted`, phi(Q) = tanh(Q P), on the
output side times an amplitude for each neuron, and M a number.

Input states that are unit vectors are not stored: `order` lists those inputs (the pivots) first, then all others, whose
states `input_states` has.
"""

import torch
from torch import nn
from torch.nn.functional import linear, pad
from transformers import LlamaForCausalLM as BaseModel

from .configuration_ngc import NgcConfig

PLACES = {
    "attn.q": ("self_attn", "q_proj"),
    "attn.k": ("self_attn", "k_proj"),
    "attn.v": ("self_attn", "v_proj"),
    "attn.o": ("self_attn", "o_proj"),
    "mlp.u": ("mlp", "up_proj"),
    "mlp.g": ("mlp", "gate_proj"),
    "mlp.d": ("mlp", "down_proj"),
}
# What a matrix reads; those that read the same input are called with the same tensor.
INPUTS = {name: name for _, name in PLACES.values()} | {"k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "up_proj"}


class Encoder(nn.Module):
    """The input states of a group and its metric."""

    def __init__(self, inputs, rank, kernel, pivots):
        super().__init__()
        self.inputs, self.rank, self.kernel = inputs, rank, kernel["name"]
        self.input_states = nn.Parameter(torch.zeros(inputs - (rank if pivots else 0), rank))
        if pivots:
            self.register_buffer("order", torch.zeros(inputs, dtype=torch.long))
        if self.kernel == "riemannian":
            self.log_diagonal = nn.Parameter(torch.zeros(rank))
            if columns := min(kernel.get("metric_rank", 0), rank):
                self.factor = nn.Parameter(torch.zeros(rank, columns))
        if self.kernel == "lifted":
            self.gain = nn.Parameter(torch.zeros(()))
            self.lift = nn.Parameter(torch.zeros(rank, kernel["lift"]), requires_grad=kernel.get("learned", False))
        self.has_pivots = bool(pivots)
        self._last = (None, None, 0)

    def forward(self, x, readers):
        """The signal; kept until all readers, which are called with the same tensor in turn, have it."""
        last, signal, left = self._last
        if last is not x:
            signal, left = self.encode(x), readers
        self._last = (x, signal, left - 1) if left > 1 else (None, None, 0)
        return signal

    def encode(self, x):
        """The signal, computed."""
        if x.shape[-1] < self.inputs:
            x = pad(x, (0, self.inputs - x.shape[-1]))
        if self.has_pivots:
            own, others = x.index_select(-1, self.order).split([self.rank, self.inputs - self.rank], dim=-1)
            return own + others @ self.input_states
        if self.kernel == "lifted":
            signal = x @ torch.tanh(self.input_states.float() @ self.lift.float()).to(x.dtype)
            return signal * (self.gain * (self.inputs * self.lift.shape[1]) ** -0.5)
        signal = x @ self.input_states
        if self.kernel == "riemannian":
            stretched = signal * self.log_diagonal.clamp(-40, 40).exp()
            if hasattr(self, "factor"):
                stretched = stretched + (signal @ self.factor) @ self.factor.T
            return stretched
        return signal


class LiftedRead(nn.Module):
    """What a member of a lifted group reads from the signal."""

    def __init__(self, rank, outputs, bias, encoder):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, rank))
        self.amplitude = nn.Parameter(torch.zeros(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self._encoder = (encoder,)  # no child: it belongs to one member

    def forward(self, signal):
        """The member's outputs."""
        features = torch.tanh(self.weight.float() @ self._encoder[0].lift.float())
        return linear(signal, (features * self.amplitude.float()[:, None]).to(signal.dtype), self.bias)


class GroupedLinear(nn.Module):
    """A weight matrix that is a member of a group; the group's first member has the encoder."""

    def __init__(self, encoder, member, kernel, owner, readers):
        super().__init__()
        if owner:
            self.encoder = encoder
        self._encoder, self.readers = (encoder,), readers
        outputs, bias = member["shape"][0], member["bias"]
        if kernel["name"] == "lifted":
            self.read = LiftedRead(encoder.rank, outputs, bias, encoder)
        else:
            self.read = nn.Linear(encoder.rank, outputs, bias=bias)

    def forward(self, x):
        """The member's outputs."""
        return self.read(self._encoder[0](x, self.readers))


class Joined(nn.Module):
    """The parts of a fused matrix, each by itself: their outputs one after the other, or by turns a head of each."""

    def __init__(self, names, head_dim=None):
        super().__init__()
        self.names, self.head_dim = names, head_dim

    @property
    def weight(self):
        """Nothing: for architectures that initialise their layers' matrices by name."""
        return torch.empty(0)

    def forward(self, x):
        """The outputs of all parts."""
        outputs = [getattr(self, name)(x) for name in self.names]
        if self.head_dim is not None and len(outputs) > 1:
            return torch.stack([y.unflatten(-1, (-1, self.head_dim)) for y in outputs], dim=-2).flatten(-3)
        return torch.cat(outputs, dim=-1)


class NgcForCausalLM(BaseModel):
    """The architecture's causal language model; grouped matrices are products of factors."""

    config_class = NgcConfig

    def __init__(self, config):
        super().__init__(config)
        if not hasattr(self, "lm_head"):
            raise ImportError("this model needs a later transformers, in which the head of its architecture is lm_head")
        self._places = PLACES | {role: tuple(at.split(".")) for role, at in config.ngc.get("places", {}).items()}
        self._layers = self.get_submodule(config.ngc.get("layers", "model.layers"))
        self._fused, head_dim = {}, config.ngc.get("by_head")
        for whole, parts in config.ngc.get("fused", {}).items():
            names = [part.rpartition(".")[2] for part in parts]
            self._fused |= dict.fromkeys(names, whole.rpartition(".")[2])
            for layer in self._layers:
                parent, name = whole.split(".")
                setattr(getattr(layer, parent), name, Joined(names, head_dim))
        for block in config.ngc["dense"]:
            d_out, d_in = block["shape"]
            parent, name = self._place(block["name"])
            if not hasattr(parent, name) or getattr(parent, name).weight.shape != (d_out, d_in):
                setattr(parent, name, nn.Linear(d_in, d_out, bias=block["bias"]))
        for group in config.ngc["groups"]:
            members, kernel = group["members"], group["kernel"]
            inputs = max(member["shape"][1] for member in members)
            encoder = Encoder(inputs, group["rank"], kernel, group["pivots"])
            places = [self._place(member["name"]) for member in members]
            for number, (member, (parent, name)) in enumerate(zip(members, places, strict=True)):
                read = INPUTS.get(name, name)
                readers = sum(read == INPUTS.get(other, other) and parent is at for at, other in places)
                setattr(parent, name, GroupedLinear(encoder, member, kernel, number == 0, readers))

    def _place(self, block):
        _, layer, module, role = block.split(".")
        part, name = self._places[f"{module}.{role}"]
        parent = getattr(self._layers[int(layer)], part)
        return getattr(parent, self._fused[name]) if name in self._fused else parent, name
