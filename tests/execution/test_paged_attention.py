"""Attention over scattered slots: the kernels, in Triton's interpreter or on a GPU, against float64."""

from __future__ import annotations

import importlib.util
import os
import random
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.packing import Bucket, Piece, pack, visibility_words
from copyspec_engine.execution.paged_attention import PagedRows, Scoring, attend, geometry, kernels, reference, write

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
NUM_SLOTS = 400


def tree(count: int, seed: int) -> DraftTree:
    rng = random.Random(seed)
    parents = [rng.randrange(-1, node) for node in range(count)]
    return DraftTree(tuple(range(count)), tuple(parents))


def pieces_of(*shapes: tuple[int, int, int], chain: bool = False) -> list[Piece]:
    """A piece for each (tokens before, pending, draft nodes), on scattered slots of its own."""
    slots = np.random.default_rng(0).permutation(NUM_SLOTS)
    pieces = []
    for seed, (base, pending, nodes) in enumerate(shapes):
        draft = DraftTree.chain(range(nodes)) if chain else tree(nodes, seed)
        count = base + pending + nodes
        pieces.append(Piece(slots[:count].astype(np.int64), base, [*range(pending + nodes)], draft, 1 + nodes))
        slots = slots[count:]
    return pieces


def rows_of(pieces: list[Piece], bucket: Bucket, device: str = DEVICE) -> PagedRows:
    packed = np.full(bucket.size(pieces) + 8, -7, dtype=np.int32)
    assert pack(pieces, bucket, NUM_SLOTS, packed) == len(packed) - 8
    assert (packed[-8:] == -7).all()
    flat = torch.from_numpy(packed).to(device)
    parts = {name: flat[at : at + int(np.prod(shape))].view(shape) for name, (at, shape) in bucket.fields.items()}
    parts["slots"] = flat[bucket.fields["slots"][0] :]
    return PagedRows(**{field.name: parts[field.name] for field in fields(PagedRows)})


@dataclass(frozen=True)
class Case:
    shapes: tuple[tuple[int, int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    splits: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scaling: float | None = None
    static: bool = True


MIXED = ((37, 1, 9), (0, 5, 0), (61, 1, 0), (12, 3, 40))
CASES = {
    "one token": Case(((70, 1, 0),)),
    "one split": Case(MIXED, splits=1),
    "many splits": Case(MIXED, splits=8),
    "more splits than columns": Case(((2, 1, 0), (0, 1, 2)), splits=32),
    "window": Case(MIXED, window=7, splits=2),
    "wide window": Case(MIXED, window=45, splits=4),
    "softcap": Case(MIXED, softcap=1.5, splits=2),
    "sinks": Case(MIXED, sinks=True, splits=4),
    "sinks in one split": Case(MIXED, sinks=True, splits=1),
    "everything": Case(MIXED, sinks=True, softcap=3.0, window=20, scaling=0.7, splits=2),
    "seven heads a group": Case(MIXED, heads=14, kv_heads=2, key_dim=64, value_dim=64),
    "no groups": Case(MIXED, heads=3, kv_heads=3),
    "one KV head": Case(((20, 1, 3), (5, 1, 0)), heads=20, kv_heads=1),
    "head of 80": Case(((20, 1, 3), (5, 1, 0)), key_dim=80, value_dim=80),
    "head of 96": Case(((20, 1, 3), (5, 1, 0)), key_dim=96, value_dim=96),
    "head of 128": Case(((20, 1, 3), (5, 1, 0)), key_dim=128, value_dim=128),
    "head of 256": Case(((20, 1, 3), (5, 1, 0)), key_dim=256, value_dim=256),
    "values of another size": Case(((20, 1, 3), (5, 1, 0)), key_dim=24, value_dim=16),
    "made to measure": Case(MIXED, static=False),
    "bfloat16": Case(MIXED, dtype=torch.bfloat16, splits=2),
    "float16": Case(MIXED, dtype=torch.float16, sinks=True),
    "wide tree": Case(((9, 1, 130),), splits=2),
}


def tensors(case: Case, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).to(DEVICE)

    made = {
        # as a model gives them: heads and tokens swapped, not contiguous
        "query": random_tensor(tokens, case.heads, case.key_dim).transpose(0, 1),
        "key": random_tensor(tokens, case.kv_heads, case.key_dim).transpose(0, 1),
        "value": random_tensor(tokens, case.kv_heads, case.value_dim).transpose(0, 1),
        "keys": random_tensor(case.kv_heads, NUM_SLOTS + 1, case.key_dim),
        "values": random_tensor(case.kv_heads, NUM_SLOTS + 1, case.value_dim),
    }
    made["keys"][:, NUM_SLOTS] = made["values"][:, NUM_SLOTS] = torch.nan  # nobody reads the padding's slot
    return made


def check(case: Case) -> float:
    """Relative error of the kernels."""
    pieces = pieces_of(*case.shapes)
    size = sum(len(piece.ids) for piece in pieces)
    bucket = Bucket.around(pieces) if case.static else Bucket(len(pieces), size, size, is_static=False)
    rows, made = rows_of(pieces, bucket), tensors(case, bucket.tokens)
    keys, values = made["keys"].clone(), made["values"].clone()
    write(made["key"], made["value"], keys, values, rows.write)
    expected_keys = made["keys"].clone()
    expected_keys[:, rows.write.long()[:size]] = made["key"][:, :size]
    torch.testing.assert_close(keys[:, :NUM_SLOTS], expected_keys[:, :NUM_SLOTS], rtol=0, atol=0)
    sinks = torch.randn(case.heads, generator=torch.Generator().manual_seed(1)).to(DEVICE) if case.sinks else None
    scoring = Scoring(case.scaling, case.window, case.softcap, sinks)
    got = attend(made["query"], keys, values, rows, scoring, case.splits)
    wide = [tensor.double() for tensor in (made["query"], keys, values)]
    expected = reference(*wide, rows, scoring)
    assert got.shape == (bucket.tokens, case.heads, case.value_dim)
    assert (got[size:] == 0).all()
    return float((got.double() - expected).norm() / expected.norm())


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_what_float64_gives(name: str) -> None:
    assert kernels() is not None
    case = CASES[name]
    if case.dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 numbers")
    assert check(case) < {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case.dtype]


@needs_triton
def test_random_cases() -> None:
    rng = random.Random(7)
    for _ in range(30 if ON_GPU else 6):
        shapes = tuple(
            (rng.randrange(40), rng.randrange(1, 5), rng.choice((0, 1, 7, 20))) for _ in range(rng.randrange(1, 6))
        )
        kv_heads = rng.randrange(1, 3)
        case = Case(
            shapes,
            heads=kv_heads * rng.randrange(1, 6),
            kv_heads=kv_heads,
            splits=rng.choice((None, 1, 2, 16)),
            window=rng.choice((None, 1, 3, 17)),
            softcap=rng.choice((None, 2.0)),
            sinks=rng.random() < 0.5,
        )
        assert check(case) < 2e-6, case


# The reference itself, and what the kernels are told


@pytest.mark.parametrize("window", [None, 4])
def test_the_reference_is_plain_attention_row_by_row(window: int | None) -> None:
    pieces = pieces_of((11, 1, 6), (0, 4, 0))
    rows = rows_of(pieces, Bucket.around(pieces), "cpu")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((2, 16, 16), generator=generator).double()
    keys, values = torch.randn((2, 2, NUM_SLOTS + 1, 16), generator=generator).double()
    got = reference(query, keys, values, rows, Scoring(window=window))
    start = 0
    for piece in pieces:
        new = len(piece.ids)
        seen = torch.ones((new, piece.context), dtype=torch.bool)
        seen[:, piece.base :] = torch.from_numpy(piece.draft.visible(new - len(piece.draft)))
        positions = torch.cat((torch.arange(piece.base), torch.from_numpy(piece.positions()).long()))
        if window is not None:
            seen &= positions[piece.base :, None] - positions < window
        slots = torch.from_numpy(piece.slots)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, start : start + new], keys[:, slots], values[:, slots], attn_mask=seen
        )
        torch.testing.assert_close(got[start : start + new], expected.transpose(0, 1))
        start += new
    assert (got[start:] == 0).all()


@pytest.mark.parametrize(("pending", "nodes"), [(1, 0), (40, 0), (1, 5), (3, 70), (33, 33)])
def test_words_say_what_the_matrix_of_visibility_says(pending: int, nodes: int) -> None:
    for draft in (tree(nodes, 3), DraftTree.chain(range(nodes))):
        words = visibility_words(draft, pending + nodes, 4)
        bits = np.unpackbits(words.astype("<i4").view(np.uint8), axis=1, bitorder="little")
        assert bits.shape == (pending + nodes, 128)
        assert not bits[:, pending + nodes :].any()
        seen = draft.visible(pending)
        assert (bits[:, : pending + nodes].astype(bool) == seen).all()


def test_a_pass_is_packed_field_by_field() -> None:
    pieces = [
        Piece(np.array([9, 4, 7]), 1, [50, 51], DraftTree(), 0),
        Piece(np.array([3, 5, 1, 0, 8]), 2, [60, 61, 62], DraftTree((61, 62), (-1, -1)), 3),
    ]
    bucket = Bucket.around(pieces)
    assert (bucket.rows, bucket.tokens, bucket.logits, bucket.is_static) == (4, 8, 8, True)
    rows = rows_of(pieces, bucket, "cpu")
    assert rows.write.tolist() == [4, 7, 1, 0, 8] + [NUM_SLOTS] * 3
    assert rows.positions.tolist() == [1, 2, 2, 3, 3, 0, 0, 0]
    assert rows.start.tolist() == [0, 2, 5, 0, 0]
    assert rows.num_new.tolist() == [2, 3, 3, 0, 0]
    assert rows.context.tolist() == [3, 5, 0, 0, 0]
    assert rows.slot_start.tolist() == [0, 3, 0, 0, 0]
    assert rows.slots[:8].tolist() == [9, 4, 7, 3, 5, 1, 0, 8]
    assert rows.visible[:5, 0].tolist() == [0b1, 0b11, 0b1, 0b11, 0b101]
    packed = np.zeros(bucket.size(pieces), dtype=np.int32)
    pack(pieces, bucket, NUM_SLOTS, packed)
    at, _ = bucket.fields["wanted"]
    assert packed[at : at + 8].tolist() == [2, 3, 4, 0, 0, 0, 0, 0]
    assert packed[:8].tolist() == [50, 51, 60, 61, 62, 0, 0, 0]


def test_buckets_are_few_and_never_too_small() -> None:
    assert Bucket.around(pieces_of((5, 1, 64), chain=True)) == Bucket(1, 80, 80)
    assert Bucket.around(pieces_of((5, 1, 63), chain=True)) == Bucket(1, 64, 64)
    long = Piece(np.arange(3000), 0, [0] * 500, DraftTree(), 0)
    assert Bucket.around([long]) == Bucket(1, 512, 0)
    assert Bucket.around([replace(long, num_logits=1)] * 2) == Bucket(4, 1024, 64)
    assert Bucket.around([replace(long, ids=[0] * 2049, num_logits=1)]) == Bucket(1, 2049, 1, is_static=False)
    for rows in range(1, 40):
        pieces = [replace(long, ids=[0] * 13, num_logits=13)] * rows
        bucket = Bucket.around(pieces)
        assert bucket.rows >= rows
        assert bucket.logits == bucket.tokens >= 13 * rows
        assert bucket.tokens <= 2 * 13 * rows
        assert all(at % 16 == 0 for at, _ in bucket.fields.values())


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_every_token_has_a_tile_and_every_tile_fits(dim: int, itemsize: int) -> None:
    for heads, kv_heads in ((32, 8), (14, 2), (8, 8), (71, 1)):
        for tokens, rows in ((1, 2), (16, 17), (512, 17), (1024, 2)):
            cut = geometry(tokens, rows, heads, kv_heads, dim, itemsize, 132)
            assert cut.block_m >= 16
            assert cut.block_n >= 16
            assert cut.tokens * heads // kv_heads <= cut.block_m <= 128
            assert cut.splits & (cut.splits - 1) == 0
            widths = [tokens - rows + 1, *[1] * (rows - 1)] if tokens >= rows else [tokens]
            assert sum(-(-width // cut.tokens) for width in widths) <= cut.tiles
