"""Models by name: what a name means, where its files are found, and how they get there.

May import: values, bundled. Nouns: `KnownModel`, `FoundModel`, `ModelFolder`, package, GGUF file.
Importing this package loads nothing heavy: torch and the hub's client are imported when they are needed.
"""

from copyspec_engine.models.find import FoundModel, ModelFolder, fetch_model, find_model, locate_model
from copyspec_engine.models.known import KNOWN, KnownModel
from copyspec_engine.models.listing import ListedModel, Removal, list_models, plan_removal

__all__ = [
    "KNOWN",
    "FoundModel",
    "KnownModel",
    "ListedModel",
    "ModelFolder",
    "Removal",
    "fetch_model",
    "find_model",
    "list_models",
    "locate_model",
    "plan_removal",
]
