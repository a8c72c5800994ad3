"""Every example runs offline on the bundled model and does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
EXPECTED = {
    "engine_quickstart.py": ["checksum = yes", "port = 9000", "copied"],
    "langchain_agent.py": ["save_document(text)", "port = ", "the same without drafting"],
    "langchain_evaluator_optimizer.py": ["Printed in May.", "draft 3: 9", "the same without drafting"],
    "langchain_parallel_nodes.py": ["Local news", "the same without drafting"],
    "langchain_rag.py": ["port = 9000", "checksum = yes", "the same without drafting"],
    "langchain_summarization.py": ["the same without drafting", "an earlier prompt, not in this one"],
    "langchain_rewrite_chain.py": [
        "DRAFT, not yet approved\n# Weekly planning",
        "Next meeting: Thursday",
        "the same without drafting",
    ],
    "llama_index_chat.py": ["ladle,copper,21,C2,12.30,Ostrow", "tokens per forward pass"],
    "llama_index_agent.py": ["# Weekly planning", "times as fast as plain decoding, same text"],
    "llama_index_rag.py": ["# Conversations\n", "conversation", "same text"],
    "llama_index_rewrite.py": ["DRAFT, not yet approved\n# Weekly planning", "Thursday at seven", "same text"],
    "server_clients.py": ["tokens came from the prediction", "port = 9000", "checksum = yes", "LlamaIndex: "],
    "self_refine_loop.py": ["Local news\nThe ferry", "For forty years", "Reporting by our harbour correspondent."],
}


def test_every_example_is_run_here() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("[!_]*.py")) == sorted(EXPECTED)


@pytest.mark.filterwarnings("ignore:Skipping serialization of known unserializable key")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's workflows list pydantic's old names
@pytest.mark.enable_socket
@pytest.mark.usefixtures("fixed_pass_cost")
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_example_runs_and_shows_what_it_promises(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    shown = capsys.readouterr().out
    for text in EXPECTED[name]:
        assert text in shown
    for figure in re.findall(r"([\d.]+) tokens per forward pass", shown):
        assert float(figure) > 5
