"""Schemathesis: `python -m scripts.conformance.schemathesis_client URL MODEL [DOCUMENT]`.

It makes calls of the server's own OpenAPI document, and of OpenAI's where that is given; see `openai_document.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scripts.conformance.behaviours import KEY, Behaviours, Place, Result
from scripts.conformance.openai_document import cut_document

ROOT = Path(__file__).parents[2]
CASES = 40
"""Random ones of each operation; those made of each field's limits, and of sequences of calls, come besides."""
_NEVER = "positive_data_acceptance,allow_header_conformance"
"""What a document allows may still be refused, such as an id that is none; and ids may have slashes in them, so that a
path may belong to more operations than the document can say."""


def main() -> None:
    """Run the cases and print what came of them."""
    url, model, *paths = sys.argv[1:]
    Behaviours.tell("schemathesis", _results(Place(url, model), [Path(path) for path in paths]))


def _results(place: Place, paths: list[Path]) -> Iterator[Result]:
    root = place.url.removesuffix("/v1")
    asked = urllib.request.Request(f"{root}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked) as response:
        own = json.load(response)
    yield from _run("the server's own document", own, root, ["--exclude-checks", _NEVER])
    for path in paths:
        hooks = {"SCHEMATHESIS_HOOKS": "scripts.conformance.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
        hooks["CONFORMANCE_FIELDS"] = json.dumps(_fields(own, place.model))
        checks = ["--checks", "not_a_server_error,response_schema_conformance", "--mode", "positive"]
        yield from _run("OpenAI's document", cut_document(path, own, place.model), place.url, checks, hooks)


def _fields(own: dict[str, Any], model: str) -> dict[str, dict[str, Any]]:
    """What bodies may say, by paths: see `schemathesis_hooks.FIELDS`."""
    found = {}
    for path, methods in own["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if content:
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            properties = own["components"]["schemas"][name]["properties"]
            taken = {field for field, schema in properties.items() if schema.get("enum") != [None, False]}
            always = {"model": model, "input": "hi", "prompt": "hi"}
            found[path.removeprefix("/v1")] = {field: always.get(field) for field in taken}
    return found


def _run(
    title: str,
    document: dict[str, Any],
    url: str,
    checks: list[str],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Result]:
    """The cases of one document: a result with their number, and one for each kind of failure."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        schema, report = Path(folder, "schema.json"), Path(folder, "report.json")
        schema.write_text(json.dumps(document), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(schema), "--url", url, *checks]
        command += ["--header", f"Authorization: Bearer {KEY}", "--max-examples", str(CASES)]
        command += ["--generation-deterministic", "--continue-on-failure", "--no-color"]
        command += ["--report", "json", "--report-json-path", str(report)]
        ran = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        told = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
    seconds = time.perf_counter() - begin
    if told is None or ran.returncode not in (0, 1) or told["errors"]:
        yield Result(title, f"exit code {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}", seconds)
        return
    cases, operations = told["test_cases"]["generated"], told["operations"]["tested"]
    yield Result(f"{title}: {cases} cases of {operations} operations are answered", None, seconds)
    for failure in told["failures"]:
        places = ", ".join(failure["operations"])
        yield Result(f"{title}: {failure['title']}", f"{failure['count']} times, at {places}\n{ran.stdout}", 0.0)


if __name__ == "__main__":
    main()
