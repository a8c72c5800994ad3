"""Compiled code is loaded before the first call and is never that of other sources; not keeping it only costs time."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import copyspec_engine
from copyspec_engine.compiled import sources

PACKAGE = Path(copyspec_engine.__file__).parent

NO_CALL_COMPILES = """
from numba.core.dispatcher import Dispatcher
from copyspec_engine import EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.drafting import cost
from copyspec_engine.drafting.kernels import branch_points, candidates, growth
from copyspec_engine.loop.warm_up import warm_up
from copyspec_engine.memory import acceptance, alternatives, index
from copyspec_engine.provenance import trail
from copyspec_engine.sampling import gumbel
from copyspec_engine.testing import scripted_engine

modules = acceptance, alternatives, branch_points, candidates, growth, gumbel, index, cost, trail
functions = {f for m in modules for f in vars(m).values() if isinstance(f, Dispatcher)}

def compiled():
    return {f.py_func.__name__: list(f.signatures) for f in functions}

warm_up()
before = compiled()
assert before["grow"] and before["walk"] and before["_highest"]
config = EngineConfig(model="scripted", max_prefill_tokens=4000, memory_tokens=4096, max_model_len=6000)
with scripted_engine(lambda prompt: prompt[-700:], config) as engine:
    for turn in range(6):
        text = f"{turn} some text to copy from, turn {turn}; " * 90
        engine.generate(GenerationRequest(prompt=text, session_id="a", prediction=text[:turn]))
        engine.generate(GenerationRequest(prompt=text, session_id="b", memory_pool="p", drafter="copyspec"))
        engine.generate(GenerationRequest(prompt=text, drafter="none"))
        for options in {}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}:
            sampling = SamplingParams(temperature=0.7, max_tokens=9, **options)
            engine.generate(GenerationRequest(prompt=text, sampling=sampling))
    engine.forget("b")
    assert engine.generate(GenerationRequest(prompt=text, session_id="a")).copied_share > 0.5
after = compiled()
assert after == before, {name: after[name] for name in after if after[name] != before[name]}
"""


def test_no_call_waits_for_a_compiler() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", NO_CALL_COMPILES], check=True, timeout=300)


NO_LOAD_COMPILES = """
from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams
from copyspec_engine.execution.lane_products import kernel
from copyspec_engine.execution.narrow_kernels import run_pass
from copyspec_engine.loop.warm_up import compile_ahead

compile_ahead()
kernels, told = kernel.cache_info(), []
with Engine(EngineConfig(model="bundled", device="cpu"), on_progress=told.append) as engine:
    assert engine.info.execution == "narrow"
    engine.generate(GenerationRequest(prompt="some text", sampling=SamplingParams(max_tokens=4)))
assert len(run_pass.signatures) == 1, run_pass.signatures
assert kernel.cache_info().hits > kernels.hits and kernel.cache_info().misses == kernels.misses
assert told and not any(progress.text.startswith("compiling") for progress in told), told
"""


def test_after_an_installation_no_load_waits_for_a_compiler() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", NO_LOAD_COMPILES], check=True, timeout=300)


def test_every_module_with_compiled_code_decides_whether_kept_code_is_used() -> None:
    with_code = set()
    for path in PACKAGE.rglob("*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        decorators = [decorator for function in functions for decorator in function.decorator_list]
        names = {ast.unparse(decorator).partition("(")[0] for decorator in decorators}
        if names & {"compiled", "inlined", "intrinsic_of"}:
            with_code.add(path)
    assert len(with_code) > 5
    assert set(sources()) == {*with_code, PACKAGE / "compiled.py"}


SMALL = """
from typing import NamedTuple
from compiled import compiled

class Pair{number}(NamedTuple):
    left: int
    right: int

Pair = Pair{number}  # types of earlier versions are gone

@compiled
def inner(pair):
    return pair.left + pair.right + {number}

"""
OUTER = """
from compiled import compiled
from memory.acceptance import Pair, inner

@compiled
def outer(x):
    return inner(Pair(x, 0))

print(outer(1), sum(outer.stats.cache_hits.values()))
"""


def run_small(folder: Path, number: int, **environment: str) -> list[str]:
    """Call a compiled function whose callee, in another module, adds `number`; what it gives and its cache hits."""
    (folder / "memory").mkdir(exist_ok=True)
    (folder / "memory/acceptance.py").write_text(SMALL.format(number=number), encoding="utf-8")
    (folder / "outer.py").write_text(OUTER, encoding="utf-8")
    shutil.copy(PACKAGE / "compiled.py", folder)
    done = subprocess.run(
        [sys.executable, str(folder / "outer.py")],
        env={**os.environ, "COPYSPEC_CACHE_DIR": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_kept_code_is_used_until_a_function_that_it_calls_changes(tmp_path: Path) -> None:
    """Numba by itself goes on using code that was compiled with an earlier version of another module."""
    assert run_small(tmp_path, 10) == ["11", "0"]
    assert run_small(tmp_path, 10) == ["11", "1"]
    assert run_small(tmp_path, 20) == ["21", "0"]
    assert run_small(tmp_path, 10) == ["11", "1"]
    assert not [path for path in tmp_path.rglob("__pycache__/*") if path.suffix in (".nbi", ".nbc")]


def test_code_that_cannot_be_kept_is_compiled_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # no folder can be made in it, not even by root
    for _ in range(2):
        assert run_small(tmp_path, 10, COPYSPEC_CACHE_DIR=str(tmp_path / "file" / "cache")) == ["11", "0"]


@pytest.mark.skipif(os.name == "nt", reason="who may write is told otherwise there")
@pytest.mark.parametrize("folder", ["cache", "cache/compiled"])
def test_code_that_others_could_have_written_is_not_run(tmp_path: Path, folder: str) -> None:
    assert run_small(tmp_path, 10) == ["11", "0"]
    (tmp_path / folder).chmod(0o777)
    assert run_small(tmp_path, 10) == ["11", "0"]
    (tmp_path / folder).chmod(0o700)
    assert run_small(tmp_path, 10) == ["11", "1"]


def test_code_of_other_versions_is_removed_when_it_was_not_used_for_long(tmp_path: Path) -> None:
    old, new = (tmp_path / "cache" / "compiled" / name for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert run_small(tmp_path, 10) == ["11", "0"]
    assert new.exists()
    assert not old.exists()
