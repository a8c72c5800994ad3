"""A draft model never shows in the tokens, only in the time; and what fails in it harms nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from copyspec_engine import (
    AdaptiveDrafter,
    ConfigError,
    CopySpecDrafter,
    DrafterConfig,
    DraftModel,
    DraftModelDrafter,
    DraftStats,
    Engine,
    EngineConfig,
    GenerationOutput,
    GenerationRequest,
    LoadProgress,
    ModelLoadError,
    SamplingParams,
    UnsupportedModelError,
)
from copyspec_engine.drafting.tree import DraftTree
from copyspec_engine.execution import loading
from copyspec_engine.execution.loading import ReadModel, load_model, prepare
from copyspec_engine.execution.packing import Piece
from copyspec_engine.testing import ByteTokenizer, loop_of
from copyspec_engine.values.config import DraftModelUse
from tests.conftest import STEP_COST, assert_all_slots_free, build_model
from tests.drafting.test_cost import watched_cost
from tests.loop.test_lossless import PROMPT, ids_of, run, same_answer, watch_drafts

USES: dict[DraftModelUse, DrafterConfig] = {
    "never": AdaptiveDrafter(draft_model_use="never"),
    "alone": DraftModelDrafter(),
    "after-copies": AdaptiveDrafter(draft_model_use="after-copies"),
    "in-tree": AdaptiveDrafter(),
}
"""What a draft model may be asked for, and the drafter that asks for it."""
CHEAP = ((1, 0.1), (64, 0.2))
"""What passes of the draft model cost, where a pass of the model costs 1."""
MakeDrafted = Callable[..., Engine]


def perturbed(noise: float) -> PreTrainedModel:
    """The model itself with noise on its weights: it agrees for the most part."""
    model = build_model("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture
def make_drafted() -> Iterator[MakeDrafted]:
    """make_drafted(small, **options) -> an engine over a tiny random model with a draft model."""
    engines: list[Engine] = []

    def make(small: PreTrainedModel | None = None, name: str = "llama", **options: Any) -> Engine:
        defaults = {"model": name, "draft_model": DraftModel("draft", step_cost=CHEAP), "step_cost": STEP_COST}
        config = EngineConfig(**{**defaults, **options})
        draft = ReadModel(small or build_model("llama"), ByteTokenizer())
        loaded = prepare(build_model(name), ByteTokenizer(), config, draft=draft)
        engines.append(Engine(config, model=loaded))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def assert_no_draft_rows_left(engine: Engine) -> None:
    """After every request is over, only rows that are kept for later calls use slots of the draft model."""
    combination = loop_of(engine).core.combination
    assert combination is not None
    draft = combination.draft_model
    users = np.zeros(draft.kv.pool.num_slots, dtype=np.int32)
    for row in draft.kv.cache.sequences:
        assert len(row.slots) == len(row.token_ids) == len(np.unique(row.slots))
        users[row.slots] += 1
    assert (users == draft.kv.pool.users).all()
    assert draft.num_rows == combination.num_requests == 0
    assert_all_slots_free(engine)


def by_source(output: GenerationOutput) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for copy in output.copies:
        sizes[copy.source] = sizes.get(copy.source, 0) + copy.stop - copy.start
    return sizes


def test_a_draft_model_has_a_cost_of_its_own(make_drafted: MakeDrafted) -> None:
    engine = make_drafted(perturbed(0.02), step_cost="measured", draft_model="draft")
    combination = loop_of(engine).core.combination
    assert combination is not None
    steps, passes = watched_cost(loop_of(engine).core.cost), watched_cost(combination.own_cost)
    plain = run(engine, PROMPT, "none", max_tokens=40)
    del steps[:]
    drafted = run(engine, PROMPT, "draft-model", max_tokens=40)
    assert same_answer(plain, drafted)
    assert len(passes) == combination.draft_model.num_passes > 10
    assert sum(width for width, _ in passes) == combination.draft_model.num_tokens_read
    assert sum(seconds for _, seconds in passes) == pytest.approx(combination.seconds)
    assert len(steps) == drafted.draft_stats.num_forward_passes - 1


@pytest.mark.parametrize("use", USES)
def test_a_conversation_keeps_the_kv_of_both_models(make_drafted: MakeDrafted, use: DraftModelUse) -> None:
    engine = make_drafted(perturbed(0.02), max_prefill_tokens=64)
    draft, read = loop_of(engine).model.draft, []
    assert draft is not None
    forward = draft.runner.forward

    def watched(pieces: Sequence[Piece]) -> torch.Tensor:
        read.append(sum(len(piece.ids) for piece in pieces))
        return forward(pieces)

    draft.runner.forward = watched  # type: ignore[method-assign]
    prompt = PROMPT
    for turn in range(3):
        del read[:]
        plain = run(engine, prompt, "none")
        drafted = run(engine, prompt, USES[use], "chat")
        assert same_answer(plain, drafted)
        assert max(read, default=0) <= 64
        if use == "alone":
            new = len(prompt) if turn == 0 else 15 + 48
            assert new <= sum(read) < new + 3 * 48
        prompt = (*prompt, *drafted.token_ids, *ids_of(" the cat sat on"))
    assert (not read) == (use == "never")
    engine.forget("chat")
    assert_no_draft_rows_left(engine)
    assert loop_of(engine).core.combination is not None
    assert len(loop_of(engine).core.combination.draft_model.kv.cache) == 0


def test_exact_mode_goes_on_working(make_drafted: MakeDrafted) -> None:
    engine = make_drafted(exact=True)
    for use in USES:
        for sampling in ({}, {"temperature": 0.05, "seed": 5}):
            plain = run(engine, PROMPT, "none", **sampling)
            drafted = run(engine, PROMPT, USES[use], **sampling)
            assert same_answer(plain, drafted)
            assert (by_source(drafted).get("draft_model", 0) > 0) == (use != "never")
    assert_no_draft_rows_left(engine)


# ---- who is asked --------------------------------------------------------------------------------------------------


def test_one_engine_decodes_in_five_ways(make_drafted: MakeDrafted) -> None:
    engine = make_drafted()
    used = {use: by_source(run(engine, PROMPT, drafter, max_tokens=100)) for use, drafter in USES.items()}
    assert "draft_model" not in used["never"]
    assert used["alone"].keys() == {"draft_model"}
    assert used["after-copies"].keys() > {"draft_model"}
    assert used["in-tree"].keys() >= {"draft_model"}, "one that never errs may be better than every copy"
    assert not by_source(run(engine, PROMPT, "none"))
    assert run(engine, PROMPT, "none").tokens_per_forward == 1


@pytest.mark.parametrize("drafter", [AdaptiveDrafter(draft_model_use="after-copies"), CopySpecDrafter()])
def test_the_reference_asks_for_a_fixed_number_where_nothing_is_copied(
    make_drafted: MakeDrafted, monkeypatch: pytest.MonkeyPatch, drafter: Any
) -> None:
    engine = make_drafted(draft_model=DraftModel("draft", max_tokens=4, step_cost=CHEAP))
    drafts = watch_drafts(engine, monkeypatch)
    run(engine, PROMPT, drafter, max_tokens=100, ignore_eos=True)
    asked = [draft for draft in drafts if len(draft) and draft.cost]
    kinds = {(tuple((draft.sources < -1000).tolist()), draft.is_chain) for draft in asked[:-1]}
    assert kinds == {((True,) * 4, True)}, "but for the last one, behind which the answer may end"
    assert any(len(draft) and not draft.cost for draft in drafts)


def test_a_tree_may_hold_branches_of_both(make_drafted: MakeDrafted, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_drafted(perturbed(0.03), draft_model=DraftModel("draft", step_cost=((1, 0.01), (64, 0.02))))
    drafts = watch_drafts(engine, monkeypatch)
    for seed in range(4):
        run(engine, PROMPT, "adaptive", "chat", max_tokens=100, temperature=0.05, seed=seed)
    both = [draft for draft in drafts if 0 < (draft.sources < -1000).sum() < len(draft)]
    assert len(both) > 5
    assert any(not draft.is_chain for draft in both)


def test_strong_copies_never_pay_for_the_draft_model(
    make_drafted: MakeDrafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_drafted(draft_model=DraftModel("draft", step_cost=((1, 0.3), (64, 0.5))))
    drafts = watch_drafts(engine, monkeypatch)
    output = run(engine, PROMPT, "adaptive", max_tokens=300, ignore_eos=True)
    assert by_source(output)["draft_model"] > 0
    strong = [draft for draft in drafts if _copied_mass(draft) > 0.9]
    assert len(strong) > 4
    assert not any(draft.cost for draft in strong)


def _copied_mass(draft: DraftTree) -> float:
    """How likely the copies in a draft hold the next token."""
    nodes = zip(draft.parents, draft.probabilities, draft.sources, strict=True)
    return float(sum(likely for parent, likely, source in nodes if parent < 0 and source > -1000))


def test_a_draft_model_that_is_not_worth_its_time_is_not_asked_and_keeps_nothing(make_drafted: MakeDrafted) -> None:
    engine = make_drafted(build_model("qwen2", 7), draft_model=DraftModel("draft", step_cost=((1, 0.5), (64, 0.8))))
    before = engine.metrics().draft_model_passes
    output = run(engine, PROMPT, "adaptive", max_tokens=300, ignore_eos=True)
    assert same_answer(output, run(engine, PROMPT, "none", max_tokens=300, ignore_eos=True))
    passes = engine.metrics().draft_model_passes - before
    assert passes < 40
    assert_no_draft_rows_left(engine)


def test_what_one_owner_teaches_of_a_draft_model_is_for_no_other(make_drafted: MakeDrafted) -> None:
    engine = make_drafted(perturbed(0.2))

    def stats(owner: str | None) -> DraftStats:
        return run(engine, PROMPT, "adaptive", options={"owner": owner}, max_tokens=80).draft_stats

    alone = stats("ann")
    assert stats("ann") != alone, "what was learnt decides"
    assert stats("bob") == stats(None) == alone


def test_the_first_token_never_waits_for_the_draft_model(make_drafted: MakeDrafted) -> None:
    engine = make_drafted()
    for use in USES:
        run(engine, PROMPT, USES[use], max_tokens=1)
    assert engine.metrics().draft_model_passes == 0


def test_a_long_prompt_is_read_in_pieces(make_drafted: MakeDrafted) -> None:
    """Past the first tokens of an answer, and never more in one pass than the engine allows."""
    engine = make_drafted(max_prefill_tokens=32)
    output = run(engine, PROMPT * 2, "draft-model")
    assert output.draft_stats.draft_lengths[:9] == (0,) * 9
    assert output.draft_stats.draft_lengths[12] == 5


def test_slots_that_run_out_only_cost_drafts(make_drafted: MakeDrafted) -> None:
    engine = make_drafted()
    combination = loop_of(engine).core.combination
    assert combination is not None
    pool = combination.draft_model.kv.pool
    taken = pool.allocate(pool.num_free - 20)
    plain = run(engine, PROMPT, "none")
    drafted = run(engine, PROMPT, "draft-model")
    assert same_answer(plain, drafted)
    assert drafted.draft_stats.num_draft_tokens == 0
    pool.release(taken)
    assert_no_draft_rows_left(engine)
    assert run(engine, PROMPT, "draft-model").draft_stats.num_draft_tokens > 0


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def crash_for(engine: Engine, monkeypatch: pytest.MonkeyPatch, culprits: set[str], after: int = 2) -> None:
    """Passes of the draft model fail once they have run `after` times and a culprit is in them."""
    draft = loop_of(engine).model.draft
    assert draft is not None
    forward, passes = draft.runner.forward, 0

    def crashing(pieces: Sequence[Piece]) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes > after and culprits & {piece.key for piece in pieces}:
            raise RuntimeError("no more memory")
        return forward(pieces)

    monkeypatch.setattr(draft.runner, "forward", crashing)


@pytest.mark.parametrize("use", ["alone", "after-copies", "in-tree"])
def test_a_crash_costs_a_request_its_draft_model_and_nobody_else(
    make_drafted: MakeDrafted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, use: DraftModelUse
) -> None:
    engine = make_drafted()
    plain = run(engine, PROMPT, "none", max_tokens=80, ignore_eos=True)
    crash_for(engine, monkeypatch, {"b"})
    sampling = SamplingParams(max_tokens=80, ignore_eos=True)
    with caplog.at_level(logging.WARNING):
        handles = [
            engine.stream(
                GenerationRequest(prompt_token_ids=PROMPT, drafter=USES[use], request_id=name, sampling=sampling)
            )
            for name in "abc"
        ]
        outputs = [handle.result() for handle in handles]
    assert all(same_answer(plain, output) for output in outputs)
    said = [record.getMessage() for record in caplog.records if "The draft model failed" in record.getMessage()]
    assert said == ["The draft model failed and request b goes on without it: RuntimeError: no more memory"]
    drafted = [by_source(output).get("draft_model", 0) for output in outputs]
    assert drafted[1] < min(drafted[0], drafted[2])
    assert engine.info.draft_model_error is None
    assert_no_draft_rows_left(engine)


def test_a_broken_draft_model_is_not_asked_any_more(
    make_drafted: MakeDrafted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_drafted()
    plain = run(engine, PROMPT, "none")
    crash_for(engine, monkeypatch, {f"r{i}" for i in range(9)}, after=0)
    for i in range(9):
        assert same_answer(plain, run(engine, PROMPT, "draft-model", options={"request_id": f"r{i}"}))
    assert engine.info.draft_model_error == "RuntimeError: no more memory"
    assert len([record for record in caplog.records if "goes on without it" in record.getMessage()]) == 3
    assert "it failed 3 times in a row" in caplog.text
    assert run(engine, PROMPT, "adaptive").draft_stats.num_accepted_tokens > 0
    assert_no_draft_rows_left(engine)


def test_a_token_that_the_draft_model_lacks_ends_its_part(
    make_drafted: MakeDrafted, caplog: pytest.LogCaptureFixture
) -> None:
    """Logits are often wider than the vocabulary, by another width in another size of the model."""
    small = build_model("llama")
    small.resize_token_embeddings(256, mean_resizing=False)
    engine = make_drafted(small)
    prompt = (*PROMPT, 256)
    plain = run(engine, prompt, "none")
    assert same_answer(plain, run(engine, prompt, "draft-model"))
    assert "the text holds a token id from 256 on, which the draft model lacks" in caplog.text
    assert run(engine, PROMPT, "draft-model").draft_stats.num_draft_tokens > 0
    assert_no_draft_rows_left(engine)


def test_a_request_cancelled_in_the_middle_leaves_nothing(make_drafted: MakeDrafted) -> None:
    engine = make_drafted()
    sampling = SamplingParams(max_tokens=300, ignore_eos=True)
    for use in ("alone", "after-copies", "in-tree"):
        for session in ("chat", None):
            request = GenerationRequest(
                prompt_token_ids=PROMPT,
                sampling=sampling,
                session_id=session,
                drafter=USES[use],
            )
            with engine.stream(request) as handle:
                for _ in range(4):
                    next(handle)
                engine.cancel(handle.request_id)
                assert handle.result().finish_reason == "cancelled"
            assert_no_draft_rows_left(engine)
    assert engine.metrics().draft_model_passes > 0


# ---- loading -------------------------------------------------------------------------------------------------------


def save(folder: Path, model: PreTrainedModel, alphabet: Sequence[str]) -> str:
    """A model folder with a tokenizer of bytes, which have the ids of their places in `alphabet`."""
    model.save_pretrained(folder)
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    return str(folder)


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def test_both_models_are_loaded_from_folders(tmp_path: Path) -> None:
    own = save(tmp_path / "own", build_model("llama"), BYTES)
    small = save(tmp_path / "small", build_model("llama", 3), BYTES)
    said: list[LoadProgress] = []
    config = EngineConfig(model=own, draft_model=DraftModel(small, step_cost=CHEAP), step_cost=STEP_COST)
    with Engine(config, on_progress=said.append) as engine:
        assert engine.info.draft_model == small
        assert engine.info.draft_model_step_cost == CHEAP
        assert f"reading the weights of {small}" in map(str, said)
        draft = loop_of(engine).model.draft
        assert draft is not None
        assert (draft.info.num_kv_slots, draft.info.device) == (engine.info.num_kv_slots, "cpu")
        plain = run(engine, PROMPT, "none")
        assert same_answer(plain, run(engine, PROMPT, "draft-model"))


def test_another_vocabulary_is_refused_by_its_tokens(tmp_path: Path) -> None:
    own = save(tmp_path / "own", build_model("llama"), BYTES)
    at = BYTES.index("A")
    swapped = save(tmp_path / "small", build_model("llama"), [*BYTES[:at], "B", "A", *BYTES[at + 2 :]])
    message = f"its vocabulary is not that of .*: id {at} is 'A' and 'B'; id {at + 1} is 'B' and 'A'. Take a smaller"
    with pytest.raises(ModelLoadError, match=message):
        load_model(EngineConfig(model=own, draft_model=swapped))
    shorter = save(tmp_path / "shorter", build_model("llama"), BYTES[:250])
    with pytest.raises(ModelLoadError, match=r"and missing; .* and missing; and 3 more\. Take a smaller"):
        load_model(EngineConfig(model=own, draft_model=shorter))


def test_a_draft_model_that_is_not_smaller_is_served_with_a_warning(
    make_drafted: MakeDrafted, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_drafted(build_model("mixtral"))
    assert "its drafts cost more than they can save" in caplog.text
    plain = run(engine, PROMPT, "none")
    assert same_answer(plain, run(engine, PROMPT, USES["after-copies"]))


def test_a_draft_model_has_a_device_of_its_own(tmp_path: Path) -> None:
    """Only the CPU is there in this test: a device that is missing is named, and the CPU can be asked for."""
    own = save(tmp_path / "own", build_model("llama"), BYTES)
    with pytest.raises(ModelLoadError, match="Got device='cuda:7' but this machine shows"):
        load_model(EngineConfig(model=own, draft_model=DraftModel(own, device="cuda:7")))
    config = EngineConfig(device="cuda:1")
    assert config.of_draft(DraftModel("small", device="cpu")).device == "cpu"
    assert config.of_draft(DraftModel("small")).device == "cuda:1"
    draft = DraftModel(own, device="cpu", step_cost=CHEAP)
    loaded = load_model(EngineConfig(model=own, draft_model=draft, step_cost=STEP_COST))
    assert loaded.draft is not None
    assert loaded.draft.info.device == "cpu"


def test_both_pools_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "memory_of", lambda _device: (4_000_000, 4_000_000))
    config = EngineConfig(model="m", draft_model=DraftModel("d", step_cost=CHEAP), step_cost=STEP_COST)
    alone = prepare(build_model("llama"), ByteTokenizer(), EngineConfig(model="m", step_cost=STEP_COST))
    pair = prepare(
        build_model("llama"), ByteTokenizer(), config, draft=ReadModel(build_model("llama"), ByteTokenizer())
    )
    assert pair.draft is not None
    assert alone.info.num_kv_slots * alone.info.kv_bytes_per_token <= 1_000_000
    assert pair.draft.info.num_kv_slots == pair.info.num_kv_slots == alone.info.num_kv_slots // 2


def test_a_draft_model_that_cannot_forget_is_refused(make_drafted: MakeDrafted) -> None:
    with pytest.raises(UnsupportedModelError, match="Got draft_model='draft' but it cannot draft: MambaForCausalLM"):
        make_drafted(build_model("mamba"))


def test_a_model_that_nothing_can_be_drafted_for_needs_no_draft_model(make_drafted: MakeDrafted) -> None:
    engine = make_drafted(build_model("llama"), name="mamba")
    assert engine.info.draft_model is None
    assert engine.info.drafting_error is not None
    assert run(engine, PROMPT, "adaptive").tokens_per_forward == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "draft-model"}, "Got drafter='draft-model' without a draft model: set draft_model"),
        ({"draft_model": {"max_tokens": 5}}, "Got no name for DraftModel"),
        ({"draft_model": {"name": "d", "device": "tpu"}}, "auto, all, cpu, cuda, cuda:N, mps, xpu or xpu:N"),
        ({"draft_model": "d", "step_cost": STEP_COST}, "expected both, in one unit, or neither"),
        ({"draft_model": DraftModel("d", step_cost=CHEAP)}, "expected both, in one unit, or neither"),
        ({"draft_model": {"name": "d", "max_tokens": 0}}, "greater than or equal to 1"),
        ({"drafter": {"name": "adaptive", "draft_model_use": "both"}}, "'in-tree', 'after-copies' or 'never'"),
        ({"drafter": {"name": "copyspec", "draft_model_use": "in-tree"}}, "'after-copies' or 'never'"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_a_drafter_without_its_draft_model_is_refused(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("llama")
    with pytest.raises(
        ConfigError, match=r"Got drafter='draft-model' but no draft model: set EngineConfig\(draft_model="
    ):
        run(engine, PROMPT, "draft-model")
    assert run(engine, PROMPT, USES["never"]).token_ids
