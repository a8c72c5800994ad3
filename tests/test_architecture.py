"""Imports point one way: L0 <- L1 <- L2 <- L3 <- L4, and torch stays out of the lower two."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "copyspec_engine"
LEVELS = {
    0: {
        "errors",
        "nesting",
        "option_names",
        "options",
        "grammar_options",
        "config",
        "metrics",
        "explanation",
        "outputs",
        "progress",
        "progress_bar",
    },
    1: {
        "admission",
        "bans",
        "calibration",
        "compiled",
        "copies",
        "recycled",
        "copy_index",
        "cost",
        "live_cost",
        "reports",
        "draft_chain",
        "draft_survival",
        "memory",
        "memory_file",
        "memory_view",
        "sequence",
        "sessions",
        "survival",
        "token_counts",
        "call_reader",
        "drafter",
        "exact_tokens",
        "generation_defaults",
        "grammar_letters",
        "grammar_patterns",
        "grammar_schema",
        "grammar_text",
        "grammar_values",
        "growth",
        "places",
        "ranking",
        "kv_pool",
        "packing",
        "prefix_cache",
        "scheduler",
        "verify",
        "handle",
    },
    2: {
        "gumbel",
        "sampler",
        "candidates",
        "processors",
        "logprobs",
        "grammar",
        "attention",
        "paged_attention",
        "paged_kernels",
        "cuda_runner",
        "accelerator",
        "checkpoint",
        "config_checks",
        "peft_adapter",
        "equivalence",
        "exact_passes",
        "float32_head",
        "ordered_attention",
        "ordered_experts",
        "packed_linear",
        "model_runner",
        "models",
        "stateful_runner",
        "chat_format",
        "chat_messages",
        "detokenizer",
        "chat_template",
        "template_sandbox",
        "tool_prompt",
        "model_facts",
        "provenance",
        "replies",
        "reply_template",
        "tokenizer",
        "vocabulary",
        "weight_counts",
        "draft_model",
        "combination",
        "bundled",
    },
    3: {"core", "loop", "preparation", "engine_info", "engine"},
    4: {"testing", "adapters", "conversations", "replay", "peers", "forced", "evaluation", "cli", "__main__"},
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}
MAY_IMPORT_TRANSFORMERS = {
    "attention",
    "bundled",
    "checkpoint",
    "cli/compare",
    "cuda_runner",
    "equivalence",
    "float32_head",
    "forced",
    "model_runner",
    "models",
    "ordered_experts",
    "peft_adapter",
    "reply_template",
    "stateful_runner",
    "tokenizer",
    "weight_counts",
}


def modules_imported(path: Path) -> set[str]:
    """Full dotted names of everything that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts() -> list[tuple[str, Path]]:
    """(module or subpackage, file) of the engine package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [(f.relative_to(PACKAGE).parts[0].removesuffix(".py"), f) for f in files if f != PACKAGE / "__init__.py"]


def test_every_module_has_a_level() -> None:
    assert {name for name, _ in parts()} == set(LEVEL_OF)


def test_imports_never_point_upwards() -> None:
    for name, path in parts():
        for imported in modules_imported(path):
            pieces = imported.split(".")
            if pieces[0] == "copyspec_engine" and len(pieces) > 1 and pieces[1] in LEVEL_OF:
                assert LEVEL_OF[pieces[1]] <= LEVEL_OF[name], f"{path.name} imports {imported}"


def test_the_lower_levels_know_neither_torch_nor_transformers() -> None:
    for name, path in parts():
        tops = {imported.split(".")[0] for imported in modules_imported(path)}
        if LEVEL_OF[name] <= 1:
            assert not tops & {"torch", "transformers", "tokenizers"}, path.name
        where = name if name != "cli" else f"cli/{path.stem}"
        if "transformers" in tops:
            assert where in MAY_IMPORT_TRANSFORMERS, path.name


def test_only_what_cuda_alone_has_asks_torch_cuda() -> None:
    asking = {
        path.relative_to(PACKAGE).as_posix() for _, path in parts() if "torch.cuda" in path.read_text(encoding="utf-8")
    }
    served = {name for name in asking if not name.startswith(("forced/", "bundled/", "cli/bench_"))}
    assert served <= {"cuda_runner.py", "paged_attention.py", "paged_kernels.py"}, "ask accelerator.py"


def test_outer_code_uses_public_names_only() -> None:
    import copyspec_engine

    outer = [PACKAGE / "cli", PACKAGE / "evaluation", ROOT / "integrations", ROOT / "examples"]
    public = {f"copyspec_engine.{name}" for name in copyspec_engine.__all__} | {"copyspec_engine"}
    for path in (file for folder in outer for file in sorted(folder.rglob("*.py")) if "tests" not in file.parts):
        inside = next((part for part in ("cli", "evaluation") if PACKAGE / part in path.parents), "")
        for imported in modules_imported(path):
            pieces = imported.split(".")
            if pieces[0] != "copyspec_engine" or pieces[1:2] == [inside]:
                continue
            assert imported in public or pieces[1] in (
                "adapters",
                "bundled",
                "calibration",
                "evaluation",
                "explanation",
                "forced",
                "models",
                "peers",
                "replay",
                "testing",
            ), f"{path} imports {imported}"


def test_the_integrations_do_not_import_each_other() -> None:
    for name, other in (("langchain", "llama_index.llms.copyspec"), ("llama_index", "langchain_copyspec")):
        for path in (ROOT / "integrations" / name).rglob("*.py"):
            assert not any(imported.startswith(other) for imported in modules_imported(path)), path
