"""Token ids that the model does not have: refused by name where they come in, and nothing of them fails others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from copyspec_engine import (
    ConfigError,
    Engine,
    EngineConfig,
    GenerationRequest,
    RequestFailedError,
    SamplingParams,
    UnsupportedModelError,
)
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.checkpoint import refuse_unreadable_tokens
from copyspec_engine.execution.packing import Piece
from copyspec_engine.testing import ScriptedRunner, loop_of, scripted_engine
from tests.conftest import STEP_COST, assert_all_slots_free
from tests.execution.architectures import build_model
from tests.execution.test_runner import write_tokenizer

EXTRA = "<image_soft_token>"
ASK = {"prompt": "one two three one two", "sampling": SamplingParams(max_tokens=24, ignore_eos=True)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model whose tokenizer holds a token more than its embedding."""
    folder = tmp_path_factory.mktemp("model")
    model = build_model("llama")
    write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        folder, chat_template="{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    for number in range(model.config.vocab_size - len(tokenizer)):
        tokenizer.add_tokens(f"<unused{number}>")
    tokenizer.add_tokens(EXTRA)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    with Engine(EngineConfig(model=str(folder), max_model_len=256, step_cost=STEP_COST)) as loaded:
        yield loaded
        assert_all_slots_free(loaded)


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("prompt", {"prompt": f"one {EXTRA} two"}),
        ("messages", {"messages": [{"role": "user", "content": f"one {EXTRA} two"}]}),
        ("prediction", {**ASK, "prediction": f"one {EXTRA} two"}),
    ],
)
def test_a_text_that_gives_a_token_which_the_model_lacks_is_refused_by_name(
    engine: Engine, where: str, options: dict[str, Any]
) -> None:
    alone = engine.generate(GenerationRequest(**ASK))
    limit = loop_of(engine).model.runner.vocab_size - 1
    with pytest.raises(ConfigError, match=rf"Got {where} with '{EXTRA}' \(token {limit + 1}\) but .* end at {limit}"):
        engine.generate(GenerationRequest(session_id="a", memory_pool="team", **options))
    for session in ("a", "b"):
        later = engine.generate(GenerationRequest(session_id=session, memory_pool="team", **ASK))
        assert later.token_ids == alone.token_ids


@pytest.mark.parametrize("token", [-1, 2**31, 2**70])
@pytest.mark.parametrize("where", ["prompt_token_ids", "stop_token_ids", "logit_bias"])
def test_ids_that_no_model_has_are_refused_by_name(engine: Engine, where: str, token: int) -> None:
    options: dict[str, Any] = {"prompt_token_ids": [1, token]} if where == "prompt_token_ids" else dict(ASK)
    if where == "stop_token_ids":
        options["sampling"] = SamplingParams(stop_token_ids=(token,))
    elif where == "logit_bias" and token < 0:
        return  # refused by the option itself
    elif where == "logit_bias":
        options["sampling"] = SamplingParams(logit_bias=((token, 1.0),))
    with pytest.raises(ConfigError, match=f"Got {where} with {token} but expected ids from 0 to"):
        engine.generate(GenerationRequest(**options))


def test_a_saved_text_with_ids_that_the_model_lacks_is_left_out(tmp_path: Path) -> None:
    path = str(tmp_path / "memory.db")
    config = EngineConfig(model="scripted", memory_path=path)
    with scripted_engine(["one answer", "another"], config) as engine:
        for prompt in ("a plain prompt", "an extra prompt"):
            engine.generate(GenerationRequest(prompt=prompt, session_id="s"))
    with scripted_engine([], config) as engine:
        loop_of(engine).core.conversations.store._vocab_size = ord("x")  # as a smaller model would
        assert [text.text for text in engine.memory("s").texts()] == ["a plain prompt"]
    with scripted_engine([], config) as engine:
        assert [text.text for text in engine.memory("s").texts()] == ["a plain prompt"]


def test_a_draft_holds_no_token_that_the_model_lacks() -> None:
    tree = DraftTree((5, 9, 6, 7, 8), (-1, 0, 0, 1, 2))
    assert tree.below(10) is tree
    assert (tree.below(9).tokens, tree.below(9).parents) == ((5, 6, 8), (-1, 0, 1))
    assert len(tree.below(5)) == 0


def test_a_model_that_could_write_what_it_cannot_read_is_refused() -> None:
    model = build_model("llama")
    size = model.config.vocab_size
    refuse_unreadable_tokens("tiny", model)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, size + 8, bias=False)
    with pytest.raises(
        UnsupportedModelError, match=f"tiny has logits for {size + 8} tokens but an embedding of {size}"
    ):
        refuse_unreadable_tokens("tiny", model)


@pytest.mark.parametrize("drafter", ["adaptive", "copyspec", "none"])
@pytest.mark.parametrize("pool", [None, "team"])
def test_a_call_that_failed_leaves_nothing_behind(tmp_path: Path, drafter: str, pool: str | None) -> None:
    class Picky(ScriptedRunner):
        def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
            if any(ord("!") in (*piece.text[-4:], *piece.draft.tokens) for piece in pieces):
                raise IndexError("index out of range in self")
            return super().forward(pieces)

    def reply(prompt: str) -> str:
        return "all is well" + ("!" if "bad" in prompt else "")

    path = str(tmp_path / "memory.db")
    config = EngineConfig(model="scripted", memory_path=path, drafter=drafter)
    with scripted_engine(reply, config) as engine:
        loop_of(engine).model.runner = Picky(reply)
        options: dict[str, Any] = {"session_id": "s", "memory_pool": pool}
        good = engine.generate(GenerationRequest(prompt="a good one", **options))
        with pytest.raises(RequestFailedError, match="IndexError"):
            engine.generate(GenerationRequest(prompt="a bad one", prediction="all is well! so be it", **options))
        assert engine.generate(GenerationRequest(prompt="a good one", **options)).text == good.text
        held = (
            loop_of(engine).core.conversations.store.peek_pool("team").index
            if pool
            else loop_of(engine).core.conversations.store.peek("s").index
        )
        stored = [engine.decode(held.tokens_of(span).tolist()) for span in held.spans]
        assert stored
        assert not any("bad" in text or "!" in text for text in stored)
        assert_all_slots_free(engine)
    assert np.array([*b"bad"], "<i4").tobytes() not in Path(path).read_bytes()
