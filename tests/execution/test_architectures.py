"""Any decoder of transformers: what is served writes the tokens of `generate`, and what would not is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from copyspec_engine import Engine, EngineConfig, UnsupportedModelError
from copyspec_engine.execution.attention import KVRow
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.runner import ModelRunner
from copyspec_engine.testing import ByteTokenizer, loop_of
from tests.conftest import STEP_COST, assert_all_slots_free
from tests.execution.architectures import MORE, REFUSED, build_model
from tests.loop.test_lossless import PROMPT, OracleTrees, generate, ids_of, run

MakeEngine = Callable[..., Engine]
NUM_TOKENS = 20

# The last transformers for Python 3.10 scripts a function of gpt_bigcode as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", sorted(MORE))
def test_tokens_equal_generate_with_and_without_drafts_over_turns(make_engine: MakeEngine, name: str) -> None:
    engine = make_engine(name, max_prefill_tokens=37)
    policy, prompt = loop_of(engine).core.policy, PROMPT
    for turn in range(2):
        expected = generate(name, prompt, NUM_TOKENS)
        assert len(set(expected)) > 1, "a model that repeats itself proves nothing"
        for drafter in ("none", "adaptive", "trees"):
            loop_of(engine).core.policy = OracleTrees(tuple(expected), turn) if drafter == "trees" else policy  # type: ignore[assignment]
            options = {"drafter": "adaptive" if drafter == "trees" else drafter, "session": drafter}
            got = run(engine, prompt, max_tokens=NUM_TOKENS, **options)  # type: ignore[arg-type]
            assert list(got.token_ids) == expected, drafter
            assert (got.usage.cached_tokens > 0) == (turn > 0)
        assert got.tokens_per_forward > 1.3
        prompt = (*prompt, *expected, *ids_of(" the cat sat on"))
    assert isinstance(loop_of(engine).model.runner, ModelRunner)
    assert engine.info.drafting_error is None
    assert_all_slots_free(engine)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_be_wrong_is_refused(name: str) -> None:
    config = EngineConfig(model=f"tiny-{name}", step_cost=STEP_COST)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name][1]):
        prepare(build_model(name), ByteTokenizer(), config)


@pytest.mark.parametrize("name", ["phimoe", "qwen2_moe"])
def test_a_window_that_only_the_mask_knows_is_kept(
    make_engine: MakeEngine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past regression: their attention is not told of the window, and a few tokens at load do not reach beyond it."""
    expected = generate(name, PROMPT, NUM_TOKENS)
    engine = make_engine(name)
    assert list(run(engine, PROMPT, "none", max_tokens=NUM_TOKENS).token_ids) == expected
    mask = KVRow.mask
    monkeypatch.setattr(KVRow, "mask", lambda row, _window, dtype: mask(row, None, dtype))
    assert list(run(engine, PROMPT, "none", max_tokens=NUM_TOKENS).token_ids) != expected


def test_chunks_are_refused_wherever_a_model_asks_for_them() -> None:
    model = build_model("llama4_text")
    model.config.layer_types = ["full_attention"] * 2  # so that only the masks speak of chunks
    with pytest.raises(UnsupportedModelError, match="attention in chunks"):
        prepare(model, ByteTokenizer(), EngineConfig(model="m", step_cost=STEP_COST))
