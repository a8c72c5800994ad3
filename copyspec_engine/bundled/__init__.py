"""The small chat model that ships with the package; importing this module loads nothing heavy.

May import: nothing of ours. Nouns: the folder with its weights, tokenizer and chat template.
"""

from pathlib import Path

__all__ = ["bundled_model_path"]


def bundled_model_path() -> Path:
    """Return the folder with the weights, tokenizer and chat template of the bundled model."""
    return Path(__file__).resolve().parent / "model"
