"""Settings of every test run: no model hub, a cache of its own, and tests skipped where what they need is not there.

Tests marked `real_model` share one engine over SmolLM2-135M-Instruct, and run first, so that only one process loads it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys

# Set before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test fetches the default model, or finds it in the caches of whoever runs the tests.
os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
os.environ["HF_HUB_CACHE"] = os.path.join(os.path.dirname(__file__), ".no_such_folder")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # workers that spin make tests crawl where cores are shared

import shutil
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from copyspec_engine import Engine, GenerationOutput, StreamChunk
    from copyspec_engine.engine.thread import Sink
    from copyspec_engine.loop.request import Request

SMOLLM2 = "smollm2"


@pytest.fixture(scope="session", autouse=True)
def _no_test_writes_to_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from copyspec_engine.models import KNOWN
    from copyspec_engine.models.store import converted_folders
    from copyspec_engine.values.folders import cache_dir, compiled_folder, models_folder

    cache, users = tmp_path_factory.mktemp("cache"), cache_dir()
    compiled_folder().mkdir(parents=True, exist_ok=True)
    converted = converted_folders(KNOWN[SMOLLM2].package.file_sha256)
    for folder in (compiled_folder(), models_folder() / SMOLLM2, *converted):
        if folder.is_dir():
            place = cache / folder.relative_to(users)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(folder, target_is_directory=True)
    os.environ["COPYSPEC_CACHE_DIR"] = str(cache)
    yield
    shutil.rmtree(cache / "models", ignore_errors=True)  # links, and the converted weights of 540 MB


@pytest.fixture(scope="module", autouse=True)
def _shared_engines_end_with_their_module() -> Iterator[None]:
    """Tests of a module share engines by their configs; kept for all later modules they would fill the memory."""
    yield
    if "copyspec_engine.engine.engine" in sys.modules:
        from copyspec_engine.testing import close_shared_engines

        close_shared_engines(keep=lambda config: config.model == SMOLLM2)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: some tests wait, for processes and for threads."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def smollm2() -> Engine:
    """SmolLM2-135M-Instruct; for tests marked `real_model`."""
    from copyspec_engine import EngineConfig, shared_engine

    step_cost = ((1, 1.0), (8, 1.3), (64, 3.0))  # fixed: drafts must not depend on how busy the test machine is
    return shared_engine(
        EngineConfig(
            model=SMOLLM2, device="cpu", generation_config="ignore", step_cost=step_cost, kv_cache_tokens=16_384
        )
    )


@pytest.fixture(scope="module")
def fixed_pass_cost() -> Iterator[None]:
    """Models that are loaded take no measured cost of a pass: their drafts must not depend on how busy a machine is."""
    from copyspec_engine.execution import calibration

    cost = calibration.PassCost(((1, 1.0), (8, 1.1), (64, 1.6)), narrow_tokens=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "kept_or_measured", lambda *_: cost)
        yield


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """make_engine(replies, **options) -> a scripted engine; closed after the test."""
    from copyspec_engine import EngineConfig
    from copyspec_engine.testing import scripted_engine

    engines: list[Engine] = []

    def make(replies: list[str] | Callable[[str], str], **config: object) -> Engine:
        engines.append(scripted_engine(replies, EngineConfig(**{"model": "scripted", **config})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def echo(make_engine: Callable[..., Engine]) -> Engine:
    """Answers with the last user message, upper-cased."""
    return make_engine(lambda prompt: prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].upper())


@pytest.fixture
def slow(make_engine: Callable[..., Engine]) -> Engine:
    """Would take many seconds to answer."""
    return make_engine(lambda prompt: "word " * 1500, drafter="none")


@pytest.fixture
def stopped_early() -> Callable[[Engine], Awaitable[bool]]:
    """Whether an engine is idle within two seconds and has not written an answer of `slow` to its end."""

    from copyspec_engine.testing import held_by, loop_of

    async def stopped_early(engine: Engine) -> bool:
        await asyncio.to_thread(engine.forget, "nobody")  # answered once all that was asked for before is carried out
        for _ in range(200):
            if not any(held_by(engine)):
                return bool(loop_of(engine).model.runner.num_forward_passes < 7000)
            await asyncio.sleep(0.01)
        return False

    return stopped_early


Scenario = Callable[[str], Any]
Compare = Callable[[Scenario], tuple[Any, "list[GenerationOutput]"]]


@pytest.fixture
def same_when_drafted(monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Runs a scenario with drafter="none", then with "adaptive": each call of a model must write the same tokens.

    Gives what the scenario with drafts gives, and the outputs of its calls in the order in which they ended.
    """
    from copyspec_engine.engine.thread import LoopThread

    outputs: list[GenerationOutput] = []
    enqueue = LoopThread.enqueue

    def recorded(loop: LoopThread, sequence: Request, sink: Sink) -> None:
        def take(item: StreamChunk | Exception) -> None:
            if not isinstance(item, Exception) and item.output is not None:
                outputs.append(item.output)
            sink(item)

        enqueue(loop, sequence, take)

    def compare(scenario: Scenario) -> tuple[Any, list[GenerationOutput]]:
        monkeypatch.setattr(LoopThread, "enqueue", recorded)
        scenario("none")
        plain = outputs.copy()
        outputs.clear()
        result = scenario("adaptive")
        assert plain
        assert [output.draft_stats.num_draft_tokens for output in plain] == [0] * len(plain)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
        return result, outputs

    return compare


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        _skip(items, "slow", lambda: "takes minutes; run pytest --slow")
    _skip(items, "gpu", _why_no_gpu)
    _skip(items, "real_model", _why_no_real_model)
    items.sort(key=lambda item: item.get_closest_marker("real_model") is None)


def _skip(items: list[pytest.Item], marker: str, why: Callable[[], str | None]) -> None:
    """Skip the tests with a marker where there is a reason; nobody asks for one where no test has the marker."""
    marked = [item for item in items if item.get_closest_marker(marker)]
    reason = why() if marked else None
    for item in marked if reason is not None else ():
        item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU; torch.cuda.is_available() is False"


def _why_no_real_model() -> str | None:
    from copyspec_engine.models import find_model
    from copyspec_engine.models.gguf_file import is_gguf

    found = find_model(SMOLLM2)
    if found is None:
        return f"{SMOLLM2} is not on this machine: `copyspec pull {SMOLLM2}`"
    if is_gguf(str(found.path)) and importlib.util.find_spec("gguf") is None:
        return f"{SMOLLM2} is a GGUF file here, and the extra gguf is not installed"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-cases", type=int, default=320, help="random cases of drafting against plain decoding")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too, which take minutes")
