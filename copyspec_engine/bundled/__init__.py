"""The small chat model that ships with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled_model_path"]


def bundled_model_path() -> Path:
    """Folder with the weights, tokenizer and chat template of the bundled model."""
    return Path(__file__).parent / "model"
