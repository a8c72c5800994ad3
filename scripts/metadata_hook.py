"""Fills in what the packages' metadata share, while hatchling builds them; the root's pyproject.toml has it once.

The page of a package index lies elsewhere than the repository, so links in a README become absolute. The packages
`langchain-copyspec` and `llama-index-llms-copyspec` hold no file: each brings copyspec with an extra, under the name
that users of its framework look for.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.core import load_toml
from hatchling.metadata.plugin.interface import MetadataHookInterface

__all__ = ["MetadataHook"]

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("version", "license", "requires-python", "authors", "classifiers", "urls")
_LINK = re.compile(r"(?P<before>\]\(|(?P<picture>src|srcset)=\")(?![a-z]+:|#)(?P<target>[^)\"#]+)")
_PICTURES = (".svg", ".png")


class MetadataHook(MetadataHookInterface):
    """Metadata of the package whose pyproject.toml names this file; `extra` there is the extra that it stands for."""

    def update(self, metadata: dict[str, Any]) -> None:
        project = load_toml(str(ROOT / "pyproject.toml"))["project"]
        extra = self.config.get("extra")
        if extra is not None:
            metadata |= {name: project[name] for name in SHARED}
            metadata["dependencies"] = [f"copyspec[{extra}]=={project['version']}"]
        readme = Path(self.root, "README.md")
        text = absolute(readme.read_text(encoding="utf-8"), readme, project["urls"]["Source"], project["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, path: Path, source: str, version: str) -> str:
    """A README whose links lead to the repository, as it is at the version's tag.

    Args:
        text: Markdown.
        path: the file that it is from, within the repository.
        source: the repository's address on GitHub.
        version: as in the project's metadata.
    """

    def written(link: re.Match[str]) -> str:
        target = os.path.relpath(path.parent / link["target"], ROOT).replace(os.sep, "/")
        kind = "raw" if target.endswith(_PICTURES) else "tree" if (ROOT / target).is_dir() else "blob"
        return f"{link['before']}{source}/{kind}/v{version}/{target}"

    return _LINK.sub(written, text)
