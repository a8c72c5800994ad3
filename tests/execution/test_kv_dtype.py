"""kv_dtype="bfloat16": half of the bytes, drafted as decoded; what cannot keep KV so is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from copyspec_engine import ConfigError, Engine, EngineConfig, UnsupportedModelError
from copyspec_engine.cli.info import for_a_report
from copyspec_engine.execution.loading import prepare
from copyspec_engine.execution.self_check import kv_dtype_of
from copyspec_engine.testing import ByteTokenizer
from copyspec_engine.values.errors import ModelLoadError
from tests.conftest import STEP_COST
from tests.execution.architectures import STATEFUL, build_model
from tests.loop.test_lossless import PROMPT, run, same_answer


def engine_of(name: str, **options: Any) -> Engine:
    config = EngineConfig(model=name, step_cost=STEP_COST, kv_cache_tokens=800, **options)
    return Engine(config, model=prepare(build_model(name), ByteTokenizer(), config))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_wide_passes_draft_what_they_decode_from_half_of_the_bytes(name: str, exact: bool) -> None:
    """Plain attention, with capped scores, and with sinks."""
    with engine_of(name) as engine:
        of_float32 = engine.info
    with engine_of(name, kv_dtype="bfloat16", exact=exact) as engine:
        info = engine.info
        options = {"max_tokens": 50, "ignore_eos": True}
        plain = run(engine, PROMPT, "none", **options)
        for session in ("first", "first", "second"):
            assert same_answer(plain, run(engine, PROMPT, "adaptive", session, **options))
        assert sum(engine.metrics().accepted_by_source.values()) > 0
    assert 2 * info.kv_bytes_per_token == of_float32.kv_bytes_per_token
    assert (of_float32.kv_dtype, info.kv_dtype) == ("", "bfloat16")
    assert (of_float32.is_lossless, info.is_lossless) == (True, exact)
    assert str(for_a_report(info)["answers"]).endswith("; KV in bfloat16 can give other tokens than in float32")


def test_a_model_that_computes_in_bfloat16_keeps_kv_so_anyway() -> None:
    config = EngineConfig(model="m", kv_dtype="bfloat16")
    assert kv_dtype_of(config, build_model("llama").to(torch.bfloat16)) is None
    assert kv_dtype_of(EngineConfig(model="m"), build_model("llama")) is None


def test_what_cannot_keep_it_so_is_refused() -> None:
    config = EngineConfig(model="m", kv_dtype="bfloat16")
    with pytest.raises(ModelLoadError, match=r"Got kv_dtype='bfloat16' but m computes in torch\.float16 on cpu"):
        kv_dtype_of(config, build_model("llama").to(torch.float16))
    with pytest.raises(ConfigError, match="kv_dtype='bfloat16' with dtype='float16'"):
        EngineConfig(model="m", kv_dtype="bfloat16", dtype="float16")
    name = next(iter(STATEFUL))
    with pytest.raises(UnsupportedModelError, match=r"Got kv_dtype='bfloat16' but .* keeps a state instead of KV"):
        engine_of(name, kv_dtype="bfloat16")
