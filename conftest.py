"""Settings of every test run: no model hub, a cache of its own, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

# Set before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # workers that spin make tests crawl where cores are shared

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_test_writes_to_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["COPYSPEC_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run pytest --slow"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False")
        for item in marked:
            item.add_marker(skip)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-cases", type=int, default=320, help="random cases of drafting against plain decoding")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too, which take minutes")
