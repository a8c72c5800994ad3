"""A whole forward pass of a few tokens as one compiled function, which several threads run side by side.

Decoding reads every weight for a few tokens, so it takes as long as reading them does, and as the several hundred small
operations in between do. Here weights are read as they are stored (lane_products.py), keys and values where they lie
(lane_attention.py), and nothing is called in between. Each thread runs `run_pass` from beginning to end, takes what is
to be computed next from a counter, and waits for the others wherever something is needed that they may still be
computing.

A token's bits depend on its own path alone: not on what else is in the pass, nor on how many threads there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from copyspec_engine.compiled import compile_for, compiled, inlined
from copyspec_engine.execution.lane_attention import (
    CHUNK,
    ROWS_AT_ONCE,
    SEEN_COUNT,
    SEEN_DIM,
    SEEN_KEYS,
    SEEN_SLOTS,
    SEEN_STORED,
    SEEN_VALUES,
    score,
    weighted_sum,
)
from copyspec_engine.execution.lane_products import (
    BIAS,
    KERNEL,
    LINEAR_COLUMNS,
    MOST_ROWS,
    NUM_INPUTS,
    NUM_OUTPUTS,
    UNIT,
    multiply,
)
from copyspec_engine.execution.lanes import (
    BFLOAT16,
    WIDTH,
    add_and_fetch,
    dot,
    fetch,
    greatest,
    number_at,
    put_bfloat16,
    put_number,
    sleep,
    total,
)

__all__ = ["CHUNK", "GROUP", "Own", "Shared", "Work", "compile_pass", "run_pass"]

PANEL = MOST_ROWS
"""Rows that are multiplied at a time; more of them stand in panels, one behind the other."""
GROUP = 32
"""Inputs that share a least value."""
_PATIENCE = 100_000
"""Looks at the counter before a waiting thread sleeps: some 30 microseconds, longer than others are at their last piece
of work. Beyond that one of them has lost its core to another process, and gets this one only once it is idle: a thread
that looked on, or yielded, would keep it."""
_NAP = np.uint32(20)
"""Microseconds that it sleeps before it looks again."""

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Columns of a decoder layer: addresses of its norms' weights and of its keys and values, and its linear layers.
BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP, QUERY_NORM, KEY_NORM, KEYS, VALUES, WINDOW, ROTARY = range(10)
QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(10, 10 + 7 * LINEAR_COLUMNS, LINEAR_COLUMNS)
LAYER_COLUMNS = 10 + 7 * LINEAR_COLUMNS

# Columns of the model.
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, KV_SLOTS, KV_STORED, ACTIVATION, LAST_NORM, HEAD = range(11)
MODEL_COLUMNS = HEAD + LINEAR_COLUMNS
SILU, GELU_TANH = range(2)
EPSILON, SCALING = range(2)

# Columns of a token: slots that it shares with others of its sequence, a multiple of CHUNK of them, and then its own.
SHARED_START, NUM_SHARED, OWN_START, NUM_OWN, WRITE, POSITION = range(6)
TOKEN_COLUMNS = 6

ALL_ARRIVED = 1 << 62
"""Arrivals behind which no thread waits for another any more."""
REGIONS = 7
"""Counters that a layer needs."""
FIRST_REGION = 8
"""Counter of the first region: in another line of the cache than the one that all threads wait at."""


class Work(NamedTuple):
    """What a pass reads."""

    layers: IntArray
    """(layers, LAYER_COLUMNS)."""
    model: IntArray
    """(MODEL_COLUMNS,)."""
    numbers: FloatArray
    """EPSILON and SCALING."""
    tokens: IntArray
    """(tokens, TOKEN_COLUMNS)."""
    slots: IntArray
    """Of all that tokens point to."""
    angles: FloatArray
    """(kinds of rotary embeddings, cos and sin, positions, ROTARY_DIM)."""
    wanted: IntArray
    """Tokens whose logits are wanted, in order."""
    rows: int
    """1, 2, 4 or a multiple of PANEL: at least as many as tokens."""
    rows_wanted: int
    """The same for `wanted`."""
    num_threads: int
    """That call `run_pass`."""
    arrivals: int
    """Of threads at points where all wait for each other, before this pass."""


class Shared(NamedTuple):
    """What the threads of a pass hand to each other.

    Where it says "across", the rows of an input lie side by side, up to PANEL of them.
    """

    counters: IntArray
    """Of threads that have come to a point where all wait, then of what is taken in each region."""
    embedded: FloatArray
    """(rows, HIDDEN)."""
    queries: FloatArray
    """(rows, HEADS * HEAD_DIM)."""
    keys: FloatArray
    """(rows, KV_HEADS * HEAD_DIM)."""
    values: FloatArray
    """(rows, KV_HEADS * HEAD_DIM)."""
    partial: FloatArray
    """(rows, HEADS, chunks, 2 + HEAD_DIM): the greatest score of a chunk, the sum of powers, the sum of values."""
    attended: FloatArray
    """Across, (HEADS * HEAD_DIM * rows,)."""
    inner: FloatArray
    """Across, (INNER * rows,)."""
    branch: FloatArray
    """(rows, HIDDEN): what attention or MLP adds."""
    logits: FloatArray
    """(wanted, vocabulary)."""


class Own(NamedTuple):
    """What one thread alone reads and writes."""

    hidden: FloatArray
    """(rows, HIDDEN)."""
    x: FloatArray
    """Across: the inputs of a linear layer."""
    sums: FloatArray
    """Across, (inputs / 32 * rows,)."""
    unit: FloatArray
    """(rows, UNIT)."""
    other_unit: FloatArray
    """(rows, UNIT)."""
    scores: FloatArray
    """(ROWS_AT_ONCE, CHUNK)."""
    seen: IntArray
    """(SEEN_COLUMNS,): what queries see at the moment."""


def compile_pass() -> None:
    """Have `run_pass` ready: else the threads of the first pass would all wait for a compiler."""
    flat, rows = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    counts, table = np.zeros(0, np.int64), np.zeros((0, 0), np.int64)
    work = Work(
        layers=table,
        model=counts,
        numbers=flat,
        tokens=table,
        slots=counts,
        angles=np.zeros((0, 0, 0, 0), np.float32),
        wanted=counts,
        rows=1,
        rows_wanted=1,
        num_threads=1,
        arrivals=0,
    )
    shared = Shared(
        counters=counts,
        embedded=rows,
        queries=rows,
        keys=rows,
        values=rows,
        partial=np.zeros((0, 0, 0, 0), np.float32),
        attended=flat,
        inner=flat,
        branch=rows,
        logits=rows,
    )
    own = Own(hidden=rows, x=flat, sums=flat, unit=rows, other_unit=rows, scores=rows, seen=counts)
    compile_for(run_pass, work, shared, own)


@compiled
def run_pass(work: Work, shared: Shared, own: Own) -> None:
    """Read tokens through all layers and the head; each of `num_threads` threads calls this."""
    model, numbers, tokens, rows, num_threads = work.model, work.numbers, work.tokens, work.rows, work.num_threads
    hidden, x, counters = own.hidden, own.x, shared.counters
    size, across = model[HIDDEN], model[HEADS] * model[HEAD_DIM]
    num_chunks = 1
    for token in range(tokens.shape[0]):
        num_chunks = max(num_chunks, -(-(tokens[token, NUM_SHARED] + tokens[token, NUM_OWN]) // CHUNK))
    for row in range(rows):
        for i in range(size):
            hidden[row, i] = shared.embedded[row, i]
    arrivals, region = work.arrivals, 0
    for number in range(work.layers.shape[0]):
        layer = work.layers[number]
        for row in range(rows):
            _norm(hidden, row, size, layer[BEFORE_ATTENTION], numbers[EPSILON], x, _first(row, size, rows))
        _sum_groups(x, size, rows, own.sums)
        _project(layer, rows, region, shared, own)
        arrivals = _meet(counters, arrivals, num_threads)
        _rotate(layer, work, region + 1, shared)
        arrivals = _meet(counters, arrivals, num_threads)
        _attend(layer, work, num_chunks, region + 2, shared, own)
        arrivals = _meet(counters, arrivals, num_threads)
        _combine(work, region + 3, shared)
        arrivals = _meet(counters, arrivals, num_threads)
        _sum_groups(shared.attended, across, rows, own.sums)
        _add(layer, OUTPUT, shared.attended, rows, region + 4, shared.branch, shared, own)
        arrivals = _meet(counters, arrivals, num_threads)
        _take_branch(shared.branch, hidden, layer[AFTER_ATTENTION], numbers[EPSILON], rows, size)
        for row in range(rows):
            _norm(hidden, row, size, layer[BEFORE_MLP], numbers[EPSILON], x, _first(row, size, rows))
        _sum_groups(x, size, rows, own.sums)
        _gate(layer, model[ACTIVATION], rows, region + 5, shared, own)
        arrivals = _meet(counters, arrivals, num_threads)
        _sum_groups(shared.inner, model[INNER], rows, own.sums)
        _add(layer, DOWN, shared.inner, rows, region + 6, shared.branch, shared, own)
        arrivals = _meet(counters, arrivals, num_threads)
        _take_branch(shared.branch, hidden, layer[AFTER_MLP], numbers[EPSILON], rows, size)
        region += REGIONS
    for i in range(size * work.rows_wanted):
        x[i] = 0
    for i in range(work.wanted.shape[0]):
        _norm(hidden, work.wanted[i], size, model[LAST_NORM], numbers[EPSILON], x, _first(i, size, work.rows_wanted))
    if work.wanted.shape[0]:
        _sum_groups(x, size, work.rows_wanted, own.sums)
        _add(model, HEAD, x, work.rows_wanted, region, shared.logits, shared, own)
    _meet(counters, arrivals, num_threads)


# ---- threads ---------------------------------------------------------------------------------------------------------


@compiled
def _meet(counters: IntArray, arrivals: int, num_threads: int) -> int:
    """Wait until all threads have come here; `arrivals` is how many had come anywhere before, and then by now."""
    address = counters.ctypes.data
    arrivals += num_threads
    add_and_fetch(address, 1)
    looks = 0
    while fetch(address) < arrivals:
        looks += 1
        if looks > _PATIENCE:
            sleep(_NAP)
    return arrivals


@compiled
def _take(counters: IntArray, region: int) -> int:
    """The number of what is to be computed next in a region."""
    return add_and_fetch(counters.ctypes.data + 8 * (FIRST_REGION + region), 1)


# ---- linear layers ---------------------------------------------------------------------------------------------------


@compiled
def _num_units(table: IntArray, linear: int) -> int:
    units: int = -(-table[linear + NUM_OUTPUTS] // UNIT)
    return units


@compiled
def _multiply_unit(
    table: IntArray, linear: int, number: int, x: FloatArray, sums: FloatArray, rows: int, out: FloatArray
) -> None:
    """Products of all rows with one unit of a linear layer, with its bias, into `out` (rows, UNIT)."""
    address, width, inputs = table.ctypes.data + 8 * linear, min(rows, PANEL), table[linear + NUM_INPUTS]
    for panel in range(rows // width):
        multiply(
            table[linear + KERNEL],
            width,
            x.ctypes.data + 4 * panel * width * inputs,
            sums.ctypes.data + 4 * panel * width * (inputs // GROUP),
            address,
            number,
            out.ctypes.data + 4 * panel * width * UNIT,
        )
    bias = table[linear + BIAS]
    if bias:
        for i in range(min(UNIT, table[linear + NUM_OUTPUTS] - number * UNIT)):
            added = number_at(bias + 4 * (number * UNIT + i))
            for row in range(rows):
                out[row, i] += added


@compiled
def _add(
    table: IntArray,
    linear: int,
    x: FloatArray,
    rows: int,
    region: int,
    out: FloatArray,
    shared: Shared,
    own: Own,
) -> None:
    """A linear layer of `x` (across) into `out` (rows, outputs)."""
    units, outputs, used, unit = _num_units(table, linear), table[linear + NUM_OUTPUTS], out.shape[0], own.unit
    number = _take(shared.counters, region)
    while number < units:
        _multiply_unit(table, linear, number, x, own.sums, rows, unit)
        begin = number * UNIT
        for row in range(min(used, rows)):
            for i in range(min(UNIT, outputs - begin)):
                out[row, begin + i] = unit[row, i]
        number = _take(shared.counters, region)


@compiled
def _project(layer: IntArray, rows: int, region: int, shared: Shared, own: Own) -> None:
    """Queries, keys and values."""
    of_queries = _num_units(layer, QUERY)
    of_keys = of_queries + _num_units(layer, KEY)
    total, unit = of_keys + _num_units(layer, VALUE), own.unit
    number = _take(shared.counters, region)
    while number < total:
        if number < of_queries:
            linear, out, first = QUERY, shared.queries, number
        elif number < of_keys:
            linear, out, first = KEY, shared.keys, number - of_queries
        else:
            linear, out, first = VALUE, shared.values, number - of_keys
        _multiply_unit(layer, linear, first, own.x, own.sums, rows, unit)
        begin = first * UNIT
        for row in range(rows):
            for i in range(min(UNIT, layer[linear + NUM_OUTPUTS] - begin)):
                out[row, begin + i] = unit[row, i]
        number = _take(shared.counters, region)


@compiled
def _gate(layer: IntArray, activation: int, rows: int, region: int, shared: Shared, own: Own) -> None:
    """The inner states of the MLP: the activation of the gate times what goes up."""
    units, outputs, gate, up, inner = (
        _num_units(layer, GATE),
        layer[GATE + NUM_OUTPUTS],
        own.unit,
        own.other_unit,
        shared.inner,
    )
    number = _take(shared.counters, region)
    while number < units:
        _multiply_unit(layer, GATE, number, own.x, own.sums, rows, gate)
        _multiply_unit(layer, UP, number, own.x, own.sums, rows, up)
        begin = number * UNIT
        for row in range(rows):
            if activation == SILU:
                for i in range(UNIT):
                    value = gate[row, i]
                    gate[row, i] = value / (np.float32(1) + _exp(-value)) * up[row, i]
            else:
                for i in range(UNIT):
                    gate[row, i] = _gelu_tanh(gate[row, i]) * up[row, i]
            first, step = _first(row, outputs, rows)
            for i in range(min(UNIT, outputs - begin)):
                inner[first + (begin + i) * step] = gate[row, i]
        number = _take(shared.counters, region)


@compiled
def _sum_groups(x: FloatArray, inputs: int, rows: int, sums: FloatArray) -> None:
    """The sums of the inputs of each group; both across."""
    width, groups = min(rows, PANEL), inputs // GROUP
    for panel in range(rows // width):
        for group in range(groups):
            first = (panel * groups + group) * width
            for row in range(width):
                sums[first + row] = 0
            for i in range(GROUP):
                for row in range(width):
                    sums[first + row] += x[(panel * inputs + group * GROUP + i) * width + row]


@inlined
def _first(row: int, inputs: int, rows: int) -> tuple[int, int]:
    """Where a row's first input is across, and how far it is to its next one."""
    width = min(rows, PANEL)
    return (row // width * inputs * width + row % width, width)


# ---- norms and activations -------------------------------------------------------------------------------------------


@compiled
def _norm(
    hidden: FloatArray, row: int, size: int, weight: int, epsilon: float, out: FloatArray, place: tuple[int, int]
) -> None:
    """The root mean square norm of a row, written across (see `_first`)."""
    address = hidden.ctypes.data + 4 * row * hidden.shape[1]
    factor = np.float32(1) / np.sqrt(dot(address, address, size) / np.float32(size) + epsilon)
    first, step = place
    for i in range(size):
        out[first + i * step] = hidden[row, i] * factor * number_at(weight + 4 * i)


@compiled
def _take_branch(branch: FloatArray, hidden: FloatArray, weight: int, epsilon: float, rows: int, size: int) -> None:
    """Add what attention or MLP gave, after a norm of its own if the model has one there."""
    for row in range(rows):
        if weight:
            address = branch.ctypes.data + 4 * row * branch.shape[1]
            factor = np.float32(1) / np.sqrt(dot(address, address, size) / np.float32(size) + epsilon)
            for i in range(size):
                hidden[row, i] += branch[row, i] * factor * number_at(weight + 4 * i)
        else:
            for i in range(size):
                hidden[row, i] += branch[row, i]


@inlined
def _exp(x: float) -> float:
    """E to the power of `x`, to about 2 units in the last place; a loop over it becomes vector code."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1)
    result: float = series * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return result


@inlined
def _gelu_tanh(x: float) -> float:
    """X / 2 * (1 + tanh(y)) is x / (1 + exp(-2 y))."""
    y = np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)
    result: float = x / (np.float32(1) + _exp(np.float32(-2) * y))
    return result


# ---- attention -------------------------------------------------------------------------------------------------------


@compiled
def _rotate(layer: IntArray, work: Work, region: int, shared: Shared) -> None:
    """Norm and rotate queries and keys, and write keys and values to their slots."""
    model, numbers, tokens, rotary = work.model, work.numbers, work.tokens, work.angles
    heads, dim, kinds = model[HEADS], model[HEAD_DIM], model[HEADS] + model[KV_HEADS]
    number = _take(shared.counters, region)
    while number < tokens.shape[0] * kinds:
        token, head = number // kinds, number % kinds
        if head < heads:
            state, norm = shared.queries.ctypes.data + 4 * dim * (token * heads + head), layer[QUERY_NORM]
        else:
            state = shared.keys.ctypes.data + 4 * dim * (token * model[KV_HEADS] + head - heads)
            norm = layer[KEY_NORM]
        if norm:
            factor = np.float32(1) / np.sqrt(dot(state, state, dim) / np.float32(dim) + numbers[EPSILON])
            for i in range(dim):
                put_number(state + 4 * i, number_at(state + 4 * i) * factor * number_at(norm + 4 * i))
        if layer[ROTARY] >= 0:
            turned, positions = model[ROTARY_DIM], rotary.shape[2]
            cos = rotary.ctypes.data + 4 * turned * (2 * layer[ROTARY] * positions + tokens[token, POSITION])
            _rotate_head(state, cos, cos + 4 * turned * positions, turned)
        if head >= heads:
            place = _number_bytes(model) * dim * ((head - heads) * model[KV_SLOTS] + tokens[token, WRITE])
            value = shared.values.ctypes.data + 4 * dim * (token * model[KV_HEADS] + head - heads)
            _keep(state, layer[KEYS] + place, dim, model[KV_STORED])
            _keep(value, layer[VALUES] + place, dim, model[KV_STORED])
        number = _take(shared.counters, region)


@inlined
def _number_bytes(model: IntArray) -> int:
    """Of keys and values in the pool."""
    return 2 if model[KV_STORED] == BFLOAT16 else 4


@compiled
def _keep(state: int, place: int, dim: int, stored: int) -> None:
    """Write a key or a value to its slot; both are addresses."""
    if stored == BFLOAT16:
        for i in range(dim):
            put_bfloat16(place + 2 * i, number_at(state + 4 * i))
    else:
        for i in range(dim):
            put_number(place + 4 * i, number_at(state + 4 * i))


@compiled
def _rotate_head(state: int, cos: int, sin: int, dim: int) -> None:
    """The first `dim` numbers of a head, the first half of them against the second; all are addresses."""
    half = dim // 2
    for i in range(half):
        low, high = 4 * i, 4 * (half + i)
        first, second = number_at(state + low), number_at(state + high)
        put_number(state + low, first * number_at(cos + low) - second * number_at(sin + low))
        put_number(state + high, second * number_at(cos + high) + first * number_at(sin + high))


@compiled
def _attend(layer: IntArray, work: Work, num_chunks: int, region: int, shared: Shared, own: Own) -> None:
    """For each chunk of positions: what the queries find there, as yet unscaled."""
    model, tokens, slots, scores, seen = work.model, work.tokens, work.slots, own.scores, own.seen
    kv_heads, dim, group = model[KV_HEADS], model[HEAD_DIM], model[HEADS] // model[KV_HEADS]
    number = _take(shared.counters, region)
    while number < num_chunks * kv_heads:
        chunk, kv_head = number // kv_heads, number % kv_heads
        offset = _number_bytes(model) * dim * kv_head * model[KV_SLOTS]
        seen[SEEN_KEYS], seen[SEEN_VALUES] = layer[KEYS] + offset, layer[VALUES] + offset
        seen[SEEN_DIM], seen[SEEN_STORED] = dim, model[KV_STORED]
        for token in range(tokens.shape[0]):
            context = tokens[token, NUM_SHARED] + tokens[token, NUM_OWN]
            begin = chunk * CHUNK
            if begin >= context:
                continue
            start = tokens[token, SHARED_START] + begin
            if begin >= tokens[token, NUM_SHARED]:
                start = tokens[token, OWN_START] + begin - tokens[token, NUM_SHARED]
            skipped = max(context - layer[WINDOW] - begin, 0) if layer[WINDOW] else 0
            count = min(CHUNK, context - begin)
            for head in range(kv_head * group, (kv_head + 1) * group, ROWS_AT_ONCE):
                rows = min(ROWS_AT_ONCE, (kv_head + 1) * group - head)
                if skipped >= count:
                    _find_nothing(shared.partial, token, head, rows, chunk)
                    continue
                query = shared.queries.ctypes.data + 4 * (token * shared.queries.shape[1] + head * dim)
                seen[SEEN_SLOTS] = slots.ctypes.data + 8 * (start + skipped)
                seen[SEEN_COUNT] = count - skipped
                ahead = 1 if token == 0 and head == kv_head * group else 0
                score(seen.ctypes.data, rows, query, scores.ctypes.data, ahead)
                for row in range(rows):
                    part = _part(shared.partial, token, head + row, chunk)
                    _weigh(scores, row, count - skipped, work.numbers[SCALING], part)
                part = _part(shared.partial, token, head, chunk)
                next_head = 4 * shared.partial.shape[2] * shared.partial.shape[3]
                weighted_sum(seen.ctypes.data, rows, scores.ctypes.data, part + 8, next_head)
        number = _take(shared.counters, region)


@compiled
def _find_nothing(partial: FloatArray, token: int, head: int, rows: int, chunk: int) -> None:
    """A chunk is out of the sight of some heads."""
    for row in range(rows):
        part = _part(partial, token, head + row, chunk)
        put_number(part, np.float32(-np.inf))
        for i in range(1, partial.shape[3]):
            put_number(part + 4 * i, np.float32(0))


@compiled
def _weigh(scores: FloatArray, row: int, count: int, scaling: float, part: int) -> None:
    """Powers of a head's scores, of which the greatest and the sum go into its part."""
    address, vectors = scores.ctypes.data + 4 * row * CHUNK, -(-count // WIDTH)
    top = greatest(address, vectors)
    for i in range(vectors * WIDTH):
        scores[row, i] = _exp((scores[row, i] - top) * scaling)
    for i in range(count, vectors * WIDTH):
        scores[row, i] = 0
    put_number(part, top * scaling)
    put_number(part + 4, total(address, vectors))


@compiled
def _combine(work: Work, region: int, shared: Shared) -> None:
    """Put the chunks of each head together, written across."""
    model, tokens, rows = work.model, work.tokens, work.rows
    heads, dim, attended = model[HEADS], model[HEAD_DIM], shared.attended
    number = _take(shared.counters, region)
    while number < tokens.shape[0] * heads:
        token, head = number // heads, number % heads
        context = tokens[token, NUM_SHARED] + tokens[token, NUM_OWN]
        chunks = -(-context // CHUNK)
        greatest = np.float32(-np.inf)
        for chunk in range(chunks):
            greatest = max(greatest, number_at(_part(shared.partial, token, head, chunk)))
        total = np.float32(0)
        for chunk in range(chunks):
            part = _part(shared.partial, token, head, chunk)
            factor = _exp(number_at(part) - greatest)
            total += factor * number_at(part + 4)
            put_number(part, factor)
        first, step = _first(token, heads * dim, rows)
        for i in range(dim):
            found = np.float32(0)
            for chunk in range(chunks):
                part = _part(shared.partial, token, head, chunk)
                found += number_at(part) * number_at(part + 8 + 4 * i)
            attended[first + (head * dim + i) * step] = found / total
        number = _take(shared.counters, region)


@inlined
def _part(partial: FloatArray, token: int, head: int, chunk: int) -> int:
    """The address of what one head found in one chunk."""
    address: int = partial.ctypes.data + 4 * partial.shape[3] * (
        (token * partial.shape[1] + head) * partial.shape[2] + chunk
    )
    return address
