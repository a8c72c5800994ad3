"""The public names are sorted, exist, are documented, and cost little to import."""

from __future__ import annotations

import subprocess
import sys

import copyspec_engine
import copyspec_engine.testing


def test_public_names_are_sorted_and_documented() -> None:
    assert copyspec_engine.__all__ == sorted(copyspec_engine.__all__)
    for name in copyspec_engine.__all__:
        found = getattr(copyspec_engine, name)
        aliases = ("CopySource", "DrafterConfig", "EndedBy", "FinishReason", "OnProgress")
        assert found.__doc__ or name in aliases, name  # these have no docstring of their own


def test_unknown_names_raise_as_usual() -> None:
    assert not hasattr(copyspec_engine, "NoSuchName")


def test_options_and_errors_import_without_torch_and_numba() -> None:
    code = "import sys, copyspec_engine as c; c.EngineConfig(); sys.exit(bool({'torch', 'numba'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
