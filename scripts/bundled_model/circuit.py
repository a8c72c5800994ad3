"""Writes attention heads and gated neurons into the weights of a small Llama, one named wire at a time.

A *form* is a linear function of the residual stream: a row of `width + 1` numbers, the last one a constant. One large
constant coordinate dominates the RMS norm, so a normalised stream equals the stream and forms mean what they say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HEAD, HEADS, KV_HEADS, RATIO = 96, 8, 2, 4.0  # rotary pair k turns by RATIO**-k radians per token
FIRST_STATIC = 9  # rotary pairs from here on stay put over 8,192 tokens: room for content
CONSTANT = 1024.0
SLOPE, LINEAR = 20.0, 20.0  # gates: logistic units per step, and the offset at which silu is the identity

Form = Tensor


class Layout:
    """Names for the coordinates of the residual stream."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.used = 1  # coordinate 0 is the constant
        self.names: dict[str, slice] = {}

    def add(self, name: str, size: int) -> slice:
        """Reserve `size` coordinates."""
        wire = slice(self.used, self.used + size)
        self.used += size
        if self.used > self.width:
            raise ValueError(f"Got {self.used} coordinates but expected at most {self.width}")
        self.names[name] = wire
        return wire

    def get(self, name: str) -> Form:
        """Forms that read the wires of `name`: (size, width + 1)."""
        wire = self.names[name]
        forms = torch.zeros(wire.stop - wire.start, self.width + 1)
        forms[:, wire] = torch.eye(wire.stop - wire.start)
        return forms

    def one(self) -> Form:
        """The form that is always 1: (width + 1,)."""
        form = torch.zeros(self.width + 1)
        form[-1] = 1.0
        return form


class Layer:
    """One decoder layer under construction: counts its static key rows and its neurons."""

    def __init__(self, model: LlamaForCausalLM, index: int) -> None:
        self.block = model.model.layers[index]
        # Sharp heads need products beyond float16: half of the factor goes into the keys.
        self.key_scale = 128.0 if index else 1.0
        self.free = [sorted(self._static(), reverse=True) for _ in range(KV_HEADS)]
        self.neurons = 0
        self.values = [0] * KV_HEADS

    @staticmethod
    def _static() -> list[tuple[int, int]]:
        return [(pair, side) for pair in range(FIRST_STATIC, HEAD // 2) for side in (0, 1)]

    def _write(self, linear: torch.nn.Linear, row: int, form: Form) -> None:
        linear.weight[row] += form[:-1]
        linear.bias[row] += form[-1]

    def keys(self, group: int, forms: Form) -> list[int]:
        """Give each form a row of the group's key that position does not turn; returns the rows within a head."""
        rows = []
        for form in forms:
            pair, side = self.free[group].pop(0)
            row = pair + side * HEAD // 2
            self._write(self.block.self_attn.k_proj, group * HEAD + row, form * self.key_scale)
            rows.append(row)
        return rows

    def key_pair(self, group: int, pair: int, real: Form, imaginary: Form | None = None) -> None:
        """Set rotary pair `pair` of the group's key."""
        self._write(self.block.self_attn.k_proj, group * HEAD + pair, real * self.key_scale)
        if imaginary is not None:
            self._write(self.block.self_attn.k_proj, group * HEAD + pair + HEAD // 2, imaginary * self.key_scale)

    def query(self, head: int, rows: list[int], forms: Form) -> None:
        """Score keys by the dot product of `forms` with what the key rows hold."""
        for row, form in zip(rows, forms, strict=True):
            self._write(self.block.self_attn.q_proj, head * HEAD + row, form * (math.sqrt(HEAD) / self.key_scale))

    def query_pair(self, head: int, pair: int, turn: complex, form: Form) -> None:
        """Add Re(form * turn * exp(i w distance)) to the scores; the key pair holds 1."""
        scaled = form * (math.sqrt(HEAD) / self.key_scale)
        self._write(self.block.self_attn.q_proj, head * HEAD + pair, scaled * turn.real)
        self._write(self.block.self_attn.q_proj, head * HEAD + pair + HEAD // 2, scaled * turn.imag)

    def value(self, group: int, forms: Form) -> list[int]:
        """Let the heads of the group carry `forms`; returns the value rows within a head."""
        start = self.values[group]
        self.values[group] += len(forms)
        if self.values[group] > HEAD:
            raise ValueError(f"Got {self.values[group]} value rows but expected at most {HEAD}")
        rows = list(range(start, start + len(forms)))
        for row, form in zip(rows, forms, strict=True):
            self._write(self.block.self_attn.v_proj, group * HEAD + row, form)
        return rows

    def output(self, head: int, rows: list[int], target: slice, matrix: Tensor | None = None) -> None:
        """Write the carried rows (through `matrix`, target x rows) to the stream."""
        weight = torch.eye(len(rows)) if matrix is None else matrix
        for column, row in enumerate(rows):
            self.block.self_attn.o_proj.weight[target, head * HEAD + row] += weight[:, column]

    def neuron(self, gate: Form, up: Form, target: slice, vector: Tensor) -> None:
        """Add silu(gate) * up * vector to the stream."""
        mlp, n = self.block.mlp, self.neurons
        self.neurons += 1
        # Matrices are stored as float16, biases as float32: scale the threshold like the rounded weights.
        rounded, norm = gate[:-1].half().float(), gate[:-1].square().sum()
        ratio = (rounded @ gate[:-1]) / norm if norm > 0 else torch.tensor(1.0)
        self._write(mlp.gate_proj, n, torch.cat([rounded, gate[-1:] * ratio]))
        self._write(mlp.up_proj, n, up)
        mlp.down_proj.weight[target, n] += vector

    def when(self, score: Form, threshold: float, gap: float, target: slice, vector: Tensor, one: Form) -> None:
        """Add `vector` where score reaches threshold + gap, nothing where it is at most threshold - gap."""
        self.neuron((score - threshold * one) * (SLOPE / 2 / gap), one * (2 / SLOPE), target, vector)

    def copy_if(self, score: Form, forms: Form, target: slice, scale: float = 1.0) -> None:
        """Add `scale * forms` where the yes/no form `score` is 1/2, nothing where it is -1/2 or less."""
        for i, form in enumerate(forms):
            vector = torch.zeros(len(forms))
            vector[i] = scale
            self.neuron(score * SLOPE, form * (2 / SLOPE), target, vector)

    def product(
        self, a: Form, b: Form, target: slice, one: Form, *, conjugate: bool = True, unless: Form | None = None
    ) -> None:
        """Add the complex products a * conj(b) (or a * b); real parts first, then imaginary: (2 f, width + 1).

        Nothing is added where the yes/no form `unless` is 1.
        """
        half, sign = len(a) // 2, 1.0 if conjugate else -1.0
        offset = LINEAR * one if unless is None else LINEAR * one - 1000 * unless
        for f in range(half):
            real, imag = torch.zeros(2 * half), torch.zeros(2 * half)
            real[f], imag[f + half] = 1.0, 1.0
            parts = (
                (b[f], a[f], real),
                (b[f], a[f + half], imag),
                (b[f + half], a[f + half], sign * real),
                (b[f + half], a[f], -sign * imag),
            )
            for gate, up, vector in parts:
                self.neuron(gate + offset, up, target, vector)
            # Subtract what the offset of the gates adds.
            self.neuron(offset, a[f], target, -(real - sign * imag))
            self.neuron(offset, a[f + half], target, -(imag + sign * real))


def blank_model(vocabulary: int, width: int, layers: int, neurons: int, end_id: int, pad_id: int) -> LlamaForCausalLM:
    """An all-zero Llama whose norms are the identity for streams with the large constant."""
    theta = RATIO ** (HEAD // 2)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=end_id, pad_token_id=pad_id,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(CONSTANT / math.sqrt(width) if "norm" in name else 0.0)
    return model
