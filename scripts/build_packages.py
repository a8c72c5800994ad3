"""Builds copyspec's wheel and source archive, and the two packages that bring it with an extra, into an empty folder.

Run: python -m scripts.build_packages [FOLDER]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDS = {
    ROOT: ("build_sdist", "build_wheel"),
    ROOT / "integrations" / "langchain": ("build_wheel",),
    ROOT / "integrations" / "llama_index": ("build_wheel",),
}
"""What is built of each pyproject.toml."""


def build_all(folder: Path) -> list[Path]:
    """Build everything; what was in the folder is removed.

    Args:
        folder: made where it is not there.

    Returns:
        The wheels and the archive.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for project, hooks in BUILDS.items():
        for hook in hooks:  # hatchling builds the project that it stands in
            code = f"import sys; from hatchling.build import {hook}; {hook}(sys.argv[1])"
            subprocess.run([sys.executable, "-c", code, str(folder.resolve())], cwd=project, check=True)
    return sorted(folder.iterdir())


if __name__ == "__main__":
    for path in build_all(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.name}")
