"""Checks on a GPU: its tests and kernels, token equality with `generate`, speed, the demo on the bundled model.

Run by scripts/gpu_check.sh. With `--device cpu` the same code runs on a machine without a GPU, so that a test can hold
it to its word; the tests marked `gpu` are then left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "pydantic", "numpy", "numba", "rich", "typer", "pytest")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "mixtral")
DRAFTERS = ("none", "adaptive", "copyspec")
TURNS, NEW_TOKENS = 3, 48
PROMPT = tuple(b"the cat sat on the mat; the cat ate the rat; the dog sat on the log; " * 2)
CHATS = ROOT / "tests" / "data" / "chats.jsonl"
SHAPES = {"cuda": "llama-3.1-8b", "cpu": "bundled"}
ATTENTION = {
    "cuda": [(r, n, c) for r in (1, 16) for c in (256, 2048, 16384) for n in (1, 64, 256) if r * n <= 2048],
    "cpu": [(2, 3, 5)],
}
"""(rows, new tokens of each, tokens before)."""
FEEDBACK = tuple(b" again, but with the dog; ")
TEST_SECONDS = 150

Report = dict[str, Any]


def main() -> int:
    """Runs every check that fits the device and writes one JSON file; returns the exit code."""
    options = _options()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Error: {sys.executable} has no {', '.join(missing)}: install them, or set PYTHON=", file=sys.stderr)
        return 2
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("Error: no CUDA GPU here (torch.cuda.is_available() is False). Try --device cpu", file=sys.stderr)
        return 2
    options.out_dir.mkdir(parents=True, exist_ok=True)
    report: Report = {"device": options.device, **_environment(), "checks": {}}
    begun = time.perf_counter()
    for name, check in _checks(options).items():
        start = time.perf_counter()
        if start - begun > options.seconds:
            report["checks"][name] = {"ok": False, "error": f"left out: {options.seconds} seconds were over"}
            print(f"==> {name}: left out, no time", flush=True)
            continue
        print(f"==> {name}", flush=True)
        try:
            result = check()
        except Exception:
            # One check that breaks must not hide what the others found.
            result = {"ok": False, "error": traceback.format_exc()}
            print(result["error"], file=sys.stderr)
        report["checks"][name] = {**result, "seconds": round(time.perf_counter() - start, 2)}
        print(f"    {'ok' if result['ok'] else 'FAILED'}, {time.perf_counter() - start:.1f} s", flush=True)
        _write(report, options.out_dir)  # what is known so far, should the machine be taken away
    report["ok"] = all(result["ok"] for result in report["checks"].values())
    _write(report, options.out_dir)
    print(f"{'All checks passed' if report['ok'] else 'SOMETHING FAILED'}: {options.out_dir / 'gpu_check.json'}")
    return 0 if report["ok"] else 1


def _write(report: Report, out_dir: Path) -> None:
    (out_dir / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--skip-demo", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--shape", help="for speed; default: llama-3.1-8b, on a CPU the bundled model")
    parser.add_argument("--transcripts", type=Path, nargs="+", default=[CHATS], help="for speed")
    parser.add_argument("--tokenizer", default="bundled", help="of the transcripts")
    parser.add_argument("--max-tokens", type=int, default=200, help="of a conversation's recorded answers")
    parser.add_argument("--conversations", type=int, default=2, help="of each transcript, one after another")
    parser.add_argument("--concurrency", type=int, default=16, help="conversations at once")
    parser.add_argument("--curve-seconds", type=float, default=45.0, help="for T(rows, nodes, context)")
    parser.add_argument("--seconds", type=float, default=480.0, help="no check begins after that")
    return parser.parse_args()


def _checks(options: argparse.Namespace) -> dict[str, Callable[[], Report]]:
    """What must be right first, then what should be fast; the most telling first, should time run out."""
    on_gpu = options.device == "cuda"
    checks: dict[str, Callable[[], Report]] = {}
    if on_gpu:
        checks["kernels in float64's neighbourhood"] = partial(_tests, options.out_dir, "test_paged_attention.py")
        checks["tests marked gpu"] = partial(_tests, options.out_dir, "test_gpu.py", "-m", "gpu")
    checks |= {
        f"equal to generate in float32: {name}": partial(_equality, name, options.device)
        for name in options.architectures
    }
    if on_gpu:
        checks["equal to generate in float32, compiled: llama"] = partial(_equality, "llama", "cuda", compiled=True)
    if not options.skip_speed:
        checks |= _speed_checks(options)
    if not options.skip_demo:
        checks["demo in float32"] = partial(_demo, options.device, options.out_dir)
    return checks


def _speed_checks(options: argparse.Namespace) -> dict[str, Callable[[], Report]]:
    from copyspec_engine.lab.bench.command import EngineOptions
    from scripts import gpu_speed

    device, out_dir = options.device, options.out_dir
    shape = options.shape or SHAPES[device]
    steps = partial(gpu_speed.step_times, shape, device, out_dir, options.curve_seconds)
    engine_options = partial(
        EngineOptions,
        transcripts=tuple(options.transcripts),
        shape=shape,
        tokenizer=options.tokenizer,
        max_tokens=options.max_tokens,
        device=device,
        curve_s=0.0,  # measured above
    )
    alone = engine_options(conversations=options.conversations, peer=("ours", "ours-plain", "generate"), turns=2)
    together = engine_options(concurrency=options.concurrency, peer=("ours", "ours-plain"), turns=1)
    checks: dict[str, Callable[[], Report]] = {
        "attention alone": partial(gpu_speed.attention_times, device, ATTENTION[device]),
        "steps": partial(steps, compiled=True),
        "conversations, one after another": partial(gpu_speed.conversations, alone, out_dir / "engine_alone.json"),
        "conversations at once": partial(gpu_speed.conversations, together, out_dir / "engine_together.json"),
    }
    if device == "cuda":
        checks["steps without torch.compile"] = partial(steps, compiled=False)
    return checks


def _environment() -> Report:
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return {"gpu": gpu, "cuda": torch.version.cuda, "versions": versions, "threads": torch.get_num_threads()}


# Equality


def _equality(name: str, device: str, *, compiled: bool = False) -> Report:
    """Three turns in one session, for each drafter: the same tokens as `generate` with the whole prompt each time."""
    from tests.conftest import build_model

    reference = _on(build_model(name), device)
    differing, forward_passes = [], {}
    for drafter in DRAFTERS:
        passes = 0
        for turn, (got, expected, num_passes) in enumerate(_turns(name, device, drafter, reference, compiled), 1):
            passes += num_passes
            if got != expected:
                differing.append({"drafter": drafter, "turn": turn, "got": got, "expected": expected})
        forward_passes[drafter] = passes
    return {"ok": not differing, "forward_passes": forward_passes, "differing": differing}


def _turns(
    name: str,
    device: str,
    drafter: str,
    reference: Any,  # noqa: ANN401 - any decoder
    compiled: bool,
) -> Iterator[tuple[list[int], list[int], int]]:
    from copyspec_engine import Engine, EngineConfig, GenerationRequest, SamplingParams
    from copyspec_engine.execution.loading import prepare
    from copyspec_engine.testing import ByteTokenizer
    from tests.conftest import STEP_COST, build_model

    config = EngineConfig(
        model=f"tiny-{name}", device=device, step_cost=STEP_COST, max_prefill_tokens=37, compile_layers=compiled
    )
    loaded = prepare(_on(build_model(name), device), ByteTokenizer(), config)
    prompt = PROMPT
    with Engine(config, model=loaded) as engine:
        for _ in range(TURNS):
            request = GenerationRequest(
                prompt_token_ids=prompt,
                drafter=drafter,
                session_id="chat",
                sampling=SamplingParams(max_tokens=NEW_TOKENS),
            )
            output = engine.generate(request)
            yield list(output.token_ids), _generate(reference, prompt), output.draft_stats.num_forward_passes
            prompt = (*prompt, *output.token_ids, *FEEDBACK)


def _on(model: Any, device: str) -> Any:  # noqa: ANN401 - any decoder
    return model.to(device)


def _generate(model: Any, prompt: tuple[int, ...]) -> list[int]:  # noqa: ANN401 - any decoder
    import torch

    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


# Tests and demo


def _tests(out_dir: Path, name: str, *more: str) -> Report:
    """One file of tests without the project's settings, whose plugins may not be installed here."""
    words = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(ROOT), "--import-mode=importlib"]
    log = out_dir / f"{name.removesuffix('.py')}.txt"
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                [*words, *more, str(ROOT / "tests" / name)],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                timeout=TEST_SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return {"ok": code == 0, "exit_code": code, "last_line": lines[-1] if lines else ""}


def _demo(device: str, out_dir: Path) -> Report:
    """The main job on the bundled model with its peers, through the engine alone."""
    from rich.console import Console

    from copyspec_engine import EngineConfig
    from copyspec_engine.cli.demo.run import DemoOptions, run_demo

    path = out_dir / "demo_float32.json"
    config = EngineConfig(model="bundled", device=device, dtype="float32")
    code = run_demo(DemoOptions(config, framework="engine", compare=True, json_path=path), Console(width=100))
    return {"ok": code == 0, "exit_code": code, "figures": json.loads(path.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    sys.exit(main())
