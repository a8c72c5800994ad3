"""Decoders whose passes of a few tokens can run as one compiled function on narrow weights (narrow_kernels.py).

What a decoder computes is found by its modules: the parts that Llama, Mistral, Qwen, Gemma 3, Phi-3 and their like
have in common, each with or without biases, norms of queries and keys, norms behind attention and MLP, and windows.
Whatever has a weight that is not one of these parts does not match. That the parts are put together as they are here is
what the check of the model's own logits decides when it is loaded (self_check.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the name everyone knows
from torch import nn

from copyspec_engine.execution import lane_attention, lane_products, lanes
from copyspec_engine.execution import narrow_kernels as k
from copyspec_engine.execution.attention import KVStore
from copyspec_engine.execution.narrow_weights import NarrowWeight
from copyspec_engine.execution.packing import Piece, wanted_tokens
from copyspec_engine.execution.paged_attention import Scoring
from copyspec_engine.execution.threads import team

__all__ = ["MOST_TOKENS", "NarrowDecoder", "NarrowPasses", "UnmatchedError", "match_decoder"]

MOST_TOKENS = 32
"""Of a pass; wider ones are faster when weights are read once for many tokens at a time."""
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that do not change with the length of the text."""
_ROWS = (1, 1, 2, 4, 4, *(-(-count // k.PANEL) * k.PANEL for count in range(5, MOST_TOKENS + 1)))
"""For so many tokens: the rows that kernels know."""

IntArray = npt.NDArray[np.int64]


class UnmatchedError(Exception):
    """Why a decoder's passes cannot run so."""


@dataclass(frozen=True, slots=True)
class NarrowDecoder:
    """A decoder's weights and shapes as narrow_kernels.py reads them.

    Args:
        layers: but for the addresses of keys and values, shape (layers, LAYER_COLUMNS).
        model: but for the number of slots and their type, shape (MODEL_COLUMNS,).
        numbers: epsilon and scaling.
        vocabulary: size.
        widest: most inputs of a linear layer.
        embed: the model's own, token ids to hidden states.
        rotary: gives cos and sin.
        kinds: of rotary embeddings, as `rotary` calls them; (None,): there is one.
        weights: of its linear layers.
        kept: the arrays that addresses point to.
    """

    layers: IntArray
    model: IntArray
    numbers: npt.NDArray[np.float32]
    vocabulary: int
    widest: int
    embed: nn.Module
    rotary: nn.Module
    kinds: tuple[str | None, ...]
    weights: tuple[NarrowWeight, ...]
    kept: tuple[object, ...]

    @torch.inference_mode()
    def angles(self, count: int) -> npt.NDArray[np.float32]:
        """Cos and sin of the first `count` positions, shape (kinds, 2, count, dim)."""
        positions, like = torch.arange(count)[None], torch.zeros((1, 1, 1))
        found = [self.rotary(like, positions, *([] if kind is None else [kind])) for kind in self.kinds]
        return np.ascontiguousarray(torch.stack([torch.stack(pair)[:, 0] for pair in found]).float().numpy())


def match_decoder(model: Any, weights: Mapping[str, NarrowWeight], scorings: Mapping[int, Scoring]) -> NarrowDecoder:
    """Find the parts of a decoder.

    Args:
        model: a transformers decoder on a CPU, in float32.
        weights: narrow ones by the names of their linear layers; others are read as float32.
        scorings: what each layer asks of attention.

    Raises:
        UnmatchedError: it has other parts.
    """
    return _Matcher(model, weights, scorings).match()


class _Matcher:
    """Fills in the tables of one model."""

    def __init__(self, model: Any, weights: Mapping[str, NarrowWeight], scorings: Mapping[int, Scoring]) -> None:
        self._model, self._weights, self._scorings = model, weights, scorings
        self._names = {id(module): name for name, module in model.named_modules()}
        self._seen: set[int] = set()
        self._kept: list[object] = []
        self._used: dict[int, NarrowWeight] = {}
        self._widest = 0
        self._epsilons: set[float] = set()
        self._scalings: set[float] = set()

    def match(self) -> NarrowDecoder:
        try:
            return self._match()
        except AttributeError as error:
            raise UnmatchedError(f"{type(self._model).__name__} is built of other parts: {error}") from error

    def _match(self) -> NarrowDecoder:
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:  # small logits would pass the check of them
            raise UnmatchedError(f"it caps its logits at {cap}")
        decoder: Any = self._model.get_decoder()
        rotary, layers = decoder.rotary_emb, list(decoder.layers)
        kinds = self._rotary_kinds(rotary, layers)
        table = np.zeros((len(layers), k.LAYER_COLUMNS), np.int64)
        shapes = [self._layer(table[i], layer, self._scorings[i], kinds) for i, layer in enumerate(layers)]
        if len(set(shapes)) != 1:
            raise UnmatchedError("its layers are of several shapes")
        heads, kv_heads, head_dim, inner, activation = shapes[0]
        head = self._model.get_output_embeddings()
        row = np.zeros(k.MODEL_COLUMNS, np.int64)
        hidden, vocabulary = self._linear(row, k.HEAD, self._parts(head))
        row[k.LAST_NORM] = self._norm(decoder.norm, hidden)
        angles = rotary(torch.zeros((1, 1, 1)), torch.zeros((1, 1), dtype=torch.long), *_first(kinds))[0]
        row[: k.LAST_NORM] = hidden, inner, heads, kv_heads, head_dim, angles.shape[-1], 0, 0, activation
        embed = self._model.get_input_embeddings()
        self._seen.update(id(parameter) for parameter in embed.parameters())
        self._refuse_others()
        if len(self._epsilons) != 1 or len(self._scalings) != 1:
            raise UnmatchedError("its layers have several epsilons or scalings")
        numbers = np.array([*self._epsilons, *self._scalings], np.float32)
        weights = tuple(self._used.values())
        return NarrowDecoder(
            table, row, numbers, vocabulary, self._widest, embed, rotary, kinds, weights, tuple(self._kept)
        )

    def _layer(
        self,
        row: IntArray,
        layer: Any,
        scoring: Scoring,
        kinds: tuple[str | None, ...],
    ) -> tuple[int, int, int, int, int]:
        """Fill in one layer's row; its heads, KV heads, size of a head, inner size and activation."""
        if scoring.softcap is not None or scoring.sinks is not None:
            raise UnmatchedError("its attention has capped scores or sinks")
        attention, mlp, head_dim = layer.self_attn, layer.mlp, int(layer.self_attn.head_dim)
        query, key, value = self._projections(attention)
        hidden, queries = self._linear(row, k.QUERY, query)
        keys, values = (self._linear(row, first, part)[1] for first, part in ((k.KEY, key), (k.VALUE, value)))
        self._linear(row, k.OUTPUT, self._parts(attention.o_proj))
        gate, up = self._gates(mlp)
        inner = self._linear(row, k.GATE, gate)[1]
        self._linear(row, k.UP, up)
        self._linear(row, k.DOWN, self._parts(mlp.down_proj))
        if keys != values or queries % keys or keys % head_dim:
            raise UnmatchedError(f"its heads are uneven: {queries} of queries, {keys} of keys, {values} of values")
        row[k.BEFORE_ATTENTION] = self._norm(layer.input_layernorm, hidden)
        if hasattr(layer, "pre_feedforward_layernorm"):
            row[k.AFTER_ATTENTION] = self._norm(layer.post_attention_layernorm, hidden)
            row[k.BEFORE_MLP] = self._norm(layer.pre_feedforward_layernorm, hidden)
            row[k.AFTER_MLP] = self._norm(layer.post_feedforward_layernorm, hidden)
        else:
            row[k.BEFORE_MLP] = self._norm(layer.post_attention_layernorm, hidden)
        if getattr(attention, "q_norm", None) is not None:
            row[k.QUERY_NORM] = self._norm(attention.q_norm, head_dim)
            row[k.KEY_NORM] = self._norm(attention.k_norm, head_dim)
        self._scalings.add(scoring.factor(head_dim))
        row[k.WINDOW] = scoring.window or 0
        row[k.ROTARY] = -1
        if getattr(attention, "use_rope", True):
            row[k.ROTARY] = 0 if kinds == (None,) else kinds.index(attention.layer_type)
        return queries // head_dim, keys // head_dim, head_dim, inner, _activation(mlp)

    def _rotary_kinds(self, rotary: Any, layers: Sequence[Any]) -> tuple[str | None, ...]:
        kinds: tuple[str | None, ...] = (None,)
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            kinds = tuple(sorted({layer.self_attn.layer_type for layer in layers}))
        types = rotary.rope_type
        used = {types} if isinstance(types, str) else {types[kind] for kind in kinds}
        if not used <= set(_STATIC_ROTARY):
            raise UnmatchedError(f"its rotary embeddings ({', '.join(sorted(used))}) change with the text's length")
        return kinds

    # ---- linear layers -----------------------------------------------------------------------------------------------

    def _projections(self, attention: Any) -> list[_Part]:
        if not hasattr(attention, "qkv_proj"):
            return [self._parts(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
        whole = self._parts(attention.qkv_proj)
        queries = attention.o_proj.in_features
        keys = (whole.num_rows - queries) // 2
        return [whole.rows(0, queries), whole.rows(queries, keys), whole.rows(queries + keys, keys)]

    def _gates(self, mlp: Any) -> list[_Part]:
        if not hasattr(mlp, "gate_up_proj"):
            return [self._parts(mlp.gate_proj), self._parts(mlp.up_proj)]
        whole = self._parts(mlp.gate_up_proj)
        inner = whole.num_rows // 2
        return [whole.rows(0, inner), whole.rows(inner, inner)]

    def _parts(self, module: Any) -> _Part:
        """A linear layer as a whole."""
        name = self._names[id(module)]
        weight = self._weights.get(name)
        if type(module) is not nn.Linear and weight is None:
            raise UnmatchedError(f"{name} is a {type(module).__name__}")
        if weight is None and type(module.weight.data) is not torch.Tensor:
            raise UnmatchedError(f"{name} has its weight as {type(module.weight.data).__name__}")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnmatchedError(f"{name} has hooks")
        self._seen.update(id(parameter) for parameter in module.parameters())
        bias = None if module.bias is None else self._address(module.bias)
        return _Part(weight or _as_stored(module.weight), bias or 0, 0, module.out_features)

    def _linear(self, row: IntArray, first: int, part: _Part) -> tuple[int, int]:
        """Fill in a linear layer; its inputs and outputs."""
        weight = part.weight
        blocks = slice(part.first // lanes.LANES, -(-(part.first + part.num_rows) // lanes.LANES))
        if part.first % lanes.LANES:
            raise UnmatchedError("a fused layer's parts do not begin at a block of weights")
        arrays = [
            _filled(array[blocks]) if array is not None else None
            for array in (weight.codes, weight.scales, weight.least)
        ]
        self._kept.append(arrays)
        self._used[id(weight)] = weight
        codes, scales, least = arrays
        assert codes is not None
        per_unit = lane_products.UNIT // lanes.LANES
        row[first : first + lane_products.LINEAR_COLUMNS] = (
            lane_products.kernel(_kind(weight)),
            codes.ctypes.data,
            0 if scales is None else scales.ctypes.data,
            0 if least is None else least.ctypes.data,
            part.bias + 4 * part.first if part.bias else 0,
            weight.in_features,
            part.num_rows,
            codes[0].nbytes * per_unit,
            0 if scales is None else scales[0].nbytes * per_unit,
        )
        self._widest = max(self._widest, weight.in_features)
        return weight.in_features, part.num_rows

    # ---- norms -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _norm(self, module: Any, size: int) -> int:
        """The address of what a root mean square norm multiplies by: its weight, or one more than that."""
        epsilon = float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
        if module.weight.numel() != size:
            raise UnmatchedError(f"{self._names[id(module)]} spans {module.weight.numel()} numbers instead of {size}")
        x = torch.linspace(-1, 2, size)[None, None]
        normed = x * torch.rsqrt(x.pow(2).mean() + epsilon)
        for weight in (module.weight, 1 + module.weight):
            if torch.allclose(module(x), normed * weight, rtol=1e-5, atol=1e-6):
                self._epsilons.add(epsilon)
                self._seen.add(id(module.weight))
                return self._address(weight)
        raise UnmatchedError(f"{self._names[id(module)]} is another kind of norm")

    def _address(self, values: torch.Tensor) -> int:
        array = np.ascontiguousarray(values.detach().float().numpy())
        self._kept.append(array)
        return array.ctypes.data

    def _refuse_others(self) -> None:
        """A weight that was not met belongs to a part that is not known here."""
        other = next((n for n, parameter in self._model.named_parameters() if id(parameter) not in self._seen), None)
        if other is not None:
            raise UnmatchedError(f"it has {other}, which is not known here")


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a linear layer.

    Args:
        weight: of the whole layer.
        bias: its address; 0: none.
        first: of the rows.
        num_rows: how many.
    """

    weight: NarrowWeight
    bias: int
    first: int
    num_rows: int

    def rows(self, first: int, count: int) -> _Part:
        return _Part(self.weight, self.bias, first, count)


def _as_stored(weight: torch.Tensor) -> NarrowWeight:
    """Blocks of float32 for what has no narrower form."""
    values = weight.detach().to_dense() if weight.layout != torch.strided else weight.detach()
    padded = F.pad(values.float(), (0, 0, 0, -len(values) % lanes.LANES))
    codes = np.ascontiguousarray(torch.unflatten(padded, 0, (-1, lanes.LANES)).transpose(1, 2).numpy())
    return NarrowWeight("float32", len(values), values.shape[1], codes, None, None, 0)


def _filled(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Blocks up to a whole unit, the last ones zeros."""
    missing = -len(array) % (lane_products.UNIT // lanes.LANES)
    if not missing:
        return array
    return np.concatenate((array, np.zeros((missing, *array.shape[1:]), array.dtype)))


def _kind(weight: NarrowWeight) -> int:
    """What the kernels call it."""
    if weight.scales is None:
        return {"float32": lanes.FLOAT32, "bfloat16": lanes.BFLOAT16, "float16": lanes.FLOAT16}[weight.kind]
    kind = lanes.FOUR_BITS
    if weight.kind == "8-bit":
        kind = lanes.EIGHT_BITS if weight.least is None else lanes.EIGHT_BITS_LEAST
        if weight.group == 16:
            kind = lanes.EIGHT_BITS_BY_16
    return kind + (lanes.WIDE_SCALES if weight.scales.dtype == np.float32 else 0)


@torch.inference_mode()
def _activation(mlp: Any) -> int:
    """Which one it is, by what it gives."""
    x = torch.linspace(-8, 8, 65)
    act: Any = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    got = act(x)
    for number, known in ((k.SILU, F.silu(x)), (k.GELU_TANH, F.gelu(x, approximate="tanh"))):
        if torch.allclose(got, known, rtol=1e-5, atol=1e-6):
            return number
    raise UnmatchedError(f"its activation is {act}")


def _first(kinds: tuple[str | None, ...]) -> list[str]:
    return [] if kinds[0] is None else [kinds[0]]


class NarrowPasses:
    """Passes of up to `MOST_TOKENS` tokens over the KV of one pool.

    Args:
        decoder: weights and shapes.
        store: the pool's tensors; those of layers that are not there yet are made.
    """

    def __init__(self, decoder: NarrowDecoder, store: KVStore) -> None:
        self._decoder = decoder
        self._layers, self._model = decoder.layers.copy(), decoder.model.copy()
        self._model[k.KV_SLOTS] = store.num_slots + 1
        like = torch.empty((int(self._model[k.KV_HEADS]), 0, int(self._model[k.HEAD_DIM])))
        for number, row in enumerate(self._layers):
            keys, values = store.layer(number, like, like)
            row[k.KEYS], row[k.VALUES] = keys.data_ptr(), values.data_ptr()
            self._model[k.KV_STORED] = lanes.BFLOAT16 if keys.dtype == torch.bfloat16 else lanes.FLOAT32
        self._store = store  # holds what these addresses point to
        self._set_up_shared()
        self._own: dict[tuple[int, int], k.Own] = {}
        self._angles = decoder.angles(1)
        k.compile_pass()

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Read all pieces; the logits that they want, in order, shape (sum of num_logits, vocabulary)."""
        tokens, slots = _describe(pieces)
        wanted = np.array(list(wanted_tokens(pieces)), np.int64)
        rows, rows_wanted = _ROWS[len(tokens)], _ROWS[len(wanted)]
        embedded = np.zeros((rows, int(self._model[k.HIDDEN])), np.float32)
        ids = torch.tensor([[token for piece in pieces for token in piece.ids]])
        embedded[: len(tokens)] = self._decoder.embed(ids)[0].numpy()
        self._reach(int(tokens[:, k.POSITION].max()) + 1)
        chunks = -(-int((tokens[:, k.NUM_SHARED] + tokens[:, k.NUM_OWN]).max()) // lane_attention.CHUNK)
        logits = np.empty((len(wanted), self._decoder.vocabulary), np.float32)
        shared = k.Shared(
            counters=self._counters, embedded=embedded, logits=logits, **self._between_threads(rows, chunks)
        )
        threads = team(torch.get_num_threads())
        self._counters[1:] = 0  # nobody looks at these any more, see `Team.run`
        for number in range(threads.num_threads):
            self._of_thread(number, rows)

        work = k.Work(
            layers=self._layers,
            model=self._model,
            numbers=self._decoder.numbers,
            tokens=tokens,
            slots=slots,
            angles=self._angles,
            wanted=wanted,
            rows=rows,
            rows_wanted=rows_wanted,
            num_threads=threads.num_threads,
            arrivals=int(self._counters[0]),
        )
        try:
            threads.run(lambda number: k.run_pass(work, shared, self._own[number, rows]))
        except BaseException:  # the others wait for this thread, which was interrupted
            shared.counters[0] = k.ALL_ARRIVED
            self._set_up_shared()  # they come to their end in what was theirs
            raise
        return torch.from_numpy(logits)

    def _set_up_shared(self) -> None:
        """Make what threads hand to each other anew."""
        self._counters = np.zeros(k.FIRST_REGION + k.REGIONS * len(self._layers) + 1, np.int64)
        self._shared: dict[tuple[int, int], dict[str, npt.NDArray[np.float32]]] = {}

    def _reach(self, positions: int) -> None:
        """Have the angles of so many positions."""
        if positions > self._angles.shape[2]:
            self._angles = self._decoder.angles(max(positions, 2 * self._angles.shape[2]))

    def _between_threads(self, rows: int, chunks: int) -> dict[str, npt.NDArray[np.float32]]:
        """Room for what threads hand to each other; kept from pass to pass."""
        chunks = 1 << (chunks - 1).bit_length()
        found = self._shared.get((rows, chunks))
        if found is None:
            heads, kv_heads, dim = (int(self._model[i]) for i in (k.HEADS, k.KV_HEADS, k.HEAD_DIM))
            hidden, inner = int(self._model[k.HIDDEN]), int(self._model[k.INNER])
            found = {
                "queries": np.zeros((rows, heads * dim), np.float32),
                "keys": np.zeros((rows, kv_heads * dim), np.float32),
                "values": np.zeros((rows, kv_heads * dim), np.float32),
                "partial": np.zeros((rows, heads, chunks, 2 + dim), np.float32),
                "attended": np.zeros(heads * dim * rows, np.float32),
                "inner": np.zeros(inner * rows, np.float32),
                "branch": np.zeros((rows, hidden), np.float32),
            }
            self._shared = {key: kept for key, kept in self._shared.items() if key[0] != rows} | {(rows, chunks): found}
        return found

    def _of_thread(self, number: int, rows: int) -> k.Own:
        """Room for what one thread alone uses; kept from pass to pass."""
        if (number, rows) not in self._own:
            widest = self._decoder.widest
            self._own[number, rows] = k.Own(
                hidden=np.zeros((rows, int(self._model[k.HIDDEN])), np.float32),
                x=np.zeros(widest * rows, np.float32),
                sums=np.zeros(widest // k.GROUP * rows, np.float32),
                unit=np.zeros((rows, lane_products.UNIT), np.float32),
                other_unit=np.zeros((rows, lane_products.UNIT), np.float32),
                scores=np.zeros((lane_attention.ROWS_AT_ONCE, lane_attention.CHUNK), np.float32),
                seen=np.zeros(lane_attention.SEEN_COLUMNS, np.int64),
            )
        return self._own[number, rows]


def _describe(pieces: Sequence[Piece]) -> tuple[IntArray, IntArray]:
    """Where each token's keys are: shape (tokens, TOKEN_COLUMNS), and the slots of all."""
    rows: list[tuple[int, ...]] = []
    parts: list[IntArray] = []
    first = 0
    for piece in pieces:
        slots = np.ascontiguousarray(piece.slots[: piece.context], np.int64)
        parts.append(slots)
        chain = len(piece.ids) - len(piece.draft) if not piece.draft.is_chain else len(piece.ids)
        for i in range(chain):
            context = piece.base + i + 1
            whole = context // lane_attention.CHUNK * lane_attention.CHUNK
            rows.append((first, whole, first + whole, context - whole, slots[context - 1], context - 1))
        start, before = first + len(slots), piece.base + chain
        whole = before // lane_attention.CHUNK * lane_attention.CHUNK
        paths: list[list[int]] = []
        for node in range(len(piece.ids) - chain):
            parent = piece.draft.parents[node]
            paths.append([*(paths[parent] if parent >= 0 else []), node])
            own = np.concatenate((slots[whole:before], slots[[before + i for i in paths[node]]]))
            parts.append(own)
            rows.append((first, whole, start, len(own), slots[before + node], before + len(paths[node]) - 1))
            start += len(own)
        first = start
    return np.array(rows, np.int64), parts[0] if len(parts) == 1 else np.concatenate(parts)
