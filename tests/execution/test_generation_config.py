"""A checkpoint's generation_config.json: its settings are those of a call that does not say otherwise."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from copyspec_engine import ConfigError, Engine, EngineConfig, GenerationOutput, GenerationRequest, SamplingParams
from copyspec_engine.cli.options import engine_config
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution.generation_defaults import GenerationDefaults, read_defaults
from copyspec_engine.execution.loading import prepare
from copyspec_engine.sampling.processors import Bans, ban
from copyspec_engine.testing import ByteTokenizer
from tests.conftest import STEP_COST, assert_all_slots_free
from tests.execution.architectures import END, build_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 1, 4, 1, 5, 9, 2]
NUM_TOKENS = 40

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    """make({"top_p": 0.5}, **config) -> an engine over a tiny model whose checkpoint has these settings."""
    engines: list[Engine] = []

    def build(settings: dict[str, Any], **options: Any) -> Engine:
        model = build_model("llama")
        model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=0, **settings)
        config = EngineConfig(model="tiny", step_cost=STEP_COST, **options)
        engines.append(Engine(config, model=prepare(model, ByteTokenizer(), config)))
        return engines[-1]

    yield build
    for engine in engines:
        assert_all_slots_free(engine)
        engine.close()


def ask(engine: Engine, drafter: str = "none", prediction: str | None = None, **sampling: Any) -> GenerationOutput:
    return engine.generate(
        GenerationRequest(
            prompt_token_ids=PROMPT,
            drafter=drafter,  # type: ignore[arg-type]
            prediction=prediction,
            sampling=SamplingParams(**{"max_tokens": NUM_TOKENS, **sampling}),
        )
    )


def generated(settings: dict[str, Any]) -> list[int]:
    """What `generate` of transformers writes with these settings."""
    model = build_model("llama")
    config = GenerationConfig(eos_token_id=END, pad_token_id=0, **{"max_new_tokens": NUM_TOKENS, **settings})
    ids = torch.tensor([PROMPT])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(PROMPT) :].tolist()


FREE = generated({})
"""What the model writes when nothing is banned."""

SETTINGS: dict[str, dict[str, Any]] = {
    "suppress_tokens": {"suppress_tokens": FREE[:3]},
    "begin_suppress_tokens": {"begin_suppress_tokens": FREE[:1]},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "bad_words_ids": {"bad_words_ids": [FREE[1:3], FREE[4:8], [FREE[10]], [END]]},
    "bad words that end in each other": {"bad_words_ids": [FREE[2:4], FREE[1:4], [*PROMPT[-2:], FREE[0]]]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size of one": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 30, "suppress_tokens": [t for t in range(258) if t not in (END, 1, 2)]},
    "min_length": {"min_length": len(PROMPT) + 20, "suppress_tokens": [t for t in range(258) if t not in (END, 1, 2)]},
    "max_new_tokens": {"max_new_tokens": 7},
    "max_length": {"max_length": len(PROMPT) + 9, "max_new_tokens": None},
    "temperature of a greedy checkpoint": {"do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 3},
    "all at once": {
        "repetition_penalty": 1.2,
        "suppress_tokens": FREE[:1],
        "begin_suppress_tokens": FREE[1:3],
        "bad_words_ids": [FREE[3:5]],
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 12,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_call_that_says_nothing_writes_what_generate_writes_drafted_or_not(make: MakeEngine, name: str) -> None:
    settings = SETTINGS[name]
    expected = generated(settings)
    engine = make(settings)
    given = {} if "max_length" in settings or "max_new_tokens" in settings else {"max_tokens": NUM_TOKENS}
    sampling = SamplingParams(**given)
    for drafter in ("none", "adaptive", "copyspec"):
        for prediction in (None, bytes(token for token in expected if token < 128).decode()):
            request = GenerationRequest(
                prompt_token_ids=PROMPT,
                drafter=drafter,  # type: ignore[arg-type]
                prediction=prediction,
                sampling=sampling,
            )
            assert list(engine.generate(request).token_ids) == expected, (drafter, prediction)


def test_a_checkpoint_that_samples_makes_calls_sample(make: MakeEngine) -> None:
    settings = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    given = {key: value for key, value in settings.items() if key != "do_sample"}
    engine, plain = make(settings), make(settings, generation_config="ignore")
    assert engine.info.sampling_defaults == given
    assert plain.info.sampling_defaults == {}
    for seed in range(3):
        expected = ask(plain, seed=seed, **given).token_ids
        assert ask(engine, seed=seed).token_ids == expected != ask(plain, seed=seed).token_ids
        assert ask(engine, "adaptive", seed=seed).token_ids == expected
    assert list(ask(plain).token_ids) == FREE == list(ask(engine, temperature=0.0).token_ids)


def test_do_sample_without_a_temperature_is_a_temperature_of_one(make: MakeEngine) -> None:
    assert make({"do_sample": True}).info.sampling_defaults == {"temperature": 1.0}
    assert make({"temperature": 0.6}).info.sampling_defaults == {}


def test_what_a_call_says_goes_first(make: MakeEngine) -> None:
    engine = make({"suppress_tokens": FREE[:2], "repetition_penalty": 1.4, "min_new_tokens": 5, "max_new_tokens": 9})
    own = {"suppress_tokens": (), "repetition_penalty": 1.0, "min_tokens": 0, "max_tokens": NUM_TOKENS}
    assert list(ask(engine, **own).token_ids) == FREE
    assert len(ask(engine, max_tokens=3).token_ids) == 3, "the checkpoint's minimum gives way"
    assert len(ask(engine, min_tokens=12, max_tokens=14).token_ids) in (12, 13, 14)
    request = GenerationRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(min_tokens=20))
    assert len(engine.generate(request).token_ids) == 20, "the checkpoint's maximum gives way"


def test_the_checkpoints_lengths_never_make_a_prompt_too_long(make: MakeEngine) -> None:
    engine = make({"max_new_tokens": 4000}, max_model_len=64)
    request = GenerationRequest(prompt_token_ids=PROMPT)
    assert engine.generate(request).usage.total_tokens <= 64


def test_stop_strings_end_an_answer(make: MakeEngine) -> None:
    text = bytes(FREE[5:7]).decode("latin-1")
    engine = make({"stop_strings": [text]})
    assert engine.info.sampling_defaults == {"stop": (text,)}


def test_what_is_not_done_is_named(make: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    engine = make({"num_beams": 4, "forced_eos_token_id": END, "top_k": -3, "typical_p": 0.4})
    assert engine.info.sampling_defaults_not_done == (
        "num_beams=4",
        "typical_p=0.4",
        f"forced_eos_token_id={END}",
        "top_k=-3",
    )
    for part in ("tiny: its generation_config.json sets num_beams=4", "top_k=-3", 'generation_config="ignore"'):
        assert part in caplog.text
    caplog.clear()
    assert make({"num_beams": 4}, generation_config="ignore").info.sampling_defaults_not_done == ()
    assert "num_beams" not in caplog.text


def test_values_of_no_sense_are_named_and_not_used() -> None:
    config = GenerationConfig()
    odd = {"suppress_tokens": 5, "bad_words_ids": [1], "stop_strings": 3, "min_length": "a", "max_length": -4}
    for key, value in odd.items():
        setattr(config, key, value)
    found = read_defaults(config, "tiny", 258)
    assert found.options == {}
    assert set(found.not_done) == {f"{key}={value!r}" for key, value in odd.items()}


def test_settings_that_change_nothing_are_no_settings() -> None:
    assert read_defaults(None, "tiny", 258) == GenerationDefaults()
    neutral = GenerationConfig(num_beams=1, typical_p=1.0, top_k=0, guidance_scale=1.0, suppress_tokens=[999, -1])
    found = read_defaults(neutral, "tiny", 258)
    assert (found.options, found.not_done) == ({"suppress_tokens": ()}, ())


@pytest.mark.parametrize("drafter", ["none", "adaptive"])
def test_bad_words_may_be_texts(make: MakeEngine, drafter: str) -> None:
    engine = make({})
    words = [text for text in (bytes(FREE[i : i + 2]).decode("ascii", "ignore") for i in range(20)) if len(text) == 2]
    assert words
    output = ask(engine, drafter, bad_words=words[:3])
    assert output.token_ids != tuple(FREE)
    assert not any(word in output.text for word in words[:3])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"suppress_tokens": [258]}, "Got suppress_tokens with 258 but expected ids from 0 to 257"),
        ({"begin_suppress_tokens": [999]}, "Got begin_suppress_tokens with 999"),
        ({"bad_words": [[1, 300]]}, "Got bad_words with 300"),
        ({"suppress_tokens": range(258)}, "ban 258 tokens, all that the model has"),
        ({"bad_words": [""]}, "none of them empty"),
        ({"bad_words": [[]]}, "none of them empty"),
        ({"min_tokens": 5, "max_tokens": 4}, "Got min_tokens=5 but expected max_tokens=4 at most"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
    ],
)
def test_bans_that_cannot_work_are_named(make: MakeEngine, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ask(make({}), **options)


@pytest.mark.parametrize("seed", range(30))
def test_what_is_banned_at_a_node_is_what_is_banned_behind_its_text(seed: int) -> None:
    rng = random.Random(seed)
    params = SamplingParams(
        suppress_tokens=[5], begin_suppress_tokens=[6], min_tokens=8, no_repeat_ngram_size=rng.randrange(4)
    )
    words = {tuple(rng.choices(range(4), k=rng.randint(1, 4))) for _ in range(4)}
    text, prompt = rng.choices(range(4), k=rng.randint(3, 20)), rng.randint(1, 3)
    parents = [rng.randint(-1, node - 1) for node in range(12)]
    draft = DraftTree(tuple(rng.choices(range(4), k=12)), tuple(parents))

    def banned(token_ids: list[int], tree: DraftTree) -> list[set[int]]:
        found = Bans(params, words, {7}, prompt).at(token_ids, tree)
        places = zip(found.rows.tolist(), found.tokens.tolist(), strict=True)
        rows = [set(found.everywhere.tolist()) for _ in range(1 + len(tree))]
        for row, token in places:
            rows[row].add(token)
        return rows

    in_tree = banned(text, draft)
    for node in range(len(draft)):
        path, at = [], node
        while at >= 0:
            path.append(draft.tokens[at])
            at = draft.parents[at]
        assert in_tree[node + 1] == banned([*text, *reversed(path)], DraftTree())[0]


def test_bans_give_way_to_a_grammar_that_leaves_nothing_else() -> None:
    bans = Bans(SamplingParams(suppress_tokens=[0, 1]), (), (), 0)
    scores = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
    bound = scores.clone()
    ban(bound, bans.at([2], DraftTree((2,), (-1,))), is_bound=True)
    assert bound.argmax(-1).tolist() == [1, 2]
    ban(scores, bans.at([2], DraftTree((2,), (-1,))), is_bound=False)
    assert scores[0].isinf().all()


def test_what_commands_measure_is_plain_greedy_decoding() -> None:
    assert engine_config("some/model", "cpu", "float32").generation_config == "ignore"
    assert engine_config("some/model", "cpu", "float32", generation_config="auto").generation_config == "auto"
