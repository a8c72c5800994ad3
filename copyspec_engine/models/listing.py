"""The models on this machine: what each takes, where it is from, and how it is removed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.models.hub import cached_snapshot, missing_files
from copyspec_engine.models.known import KNOWN, KnownModel
from copyspec_engine.models.package import installed_file
from copyspec_engine.models.store import converted_folders, kept_file, size
from copyspec_engine.values.config import BUNDLED_MODEL
from copyspec_engine.values.errors import ModelLoadError
from copyspec_engine.values.folders import models_folder

__all__ = ["ListedModel", "Removal", "list_models", "plan_removal"]


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model that is on this machine or can be fetched by a short name."""

    name: str
    """What to give as the model."""
    source: str
    """"copyspec" (comes with it), "hub" (the hub's cache), "package" (an installed one), "fetched" (by copyspec),
    "converted" (from a GGUF file, by copyspec), or "none": not on this machine."""
    num_bytes: int
    """What it takes on disk; of one that is not here, what is fetched."""
    licence: str | None
    """As its publisher names it; None: not known."""
    path: str | None
    missing: tuple[str, ...] = ()
    """Files that a download has not brought yet; empty for one that is whole."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What would be removed."""

    what: str
    """In words."""
    num_bytes: int
    """What is free then."""
    run: Callable[[], None]


def list_models() -> list[ListedModel]:
    """All models that are here, the short names that are not, and nothing that is no decoder."""
    bundled = bundled_model_path()
    first = ListedModel(BUNDLED_MODEL, "copyspec", size(bundled), "MIT", str(bundled))
    return [first, *(_known(known) for known in KNOWN.values()), *_converted(), *_of_hub()]


def plan_removal(name: str) -> Removal:
    """What `copyspec models rm` does for a name; nothing is removed yet.

    Raises:
        ModelLoadError: there is no such model, or it is not ours to remove; the error says how it is removed.
    """
    if name == BUNDLED_MODEL:
        raise ModelLoadError(f"Got {name!r}, which is a part of copyspec: `pip uninstall copyspec` removes both")
    folders = _own_folders(name)
    if folders:
        what = f"{name} in {models_folder()}" + (", with its converted weights" if len(folders) > 1 else "")
        return Removal(what, size(*folders), partial(_remove_folders, folders))
    repo = KNOWN[name].repo if name in KNOWN else "/".join(name.split("/")[:2])
    for cached in _hub_models():
        if cached.repo_id == repo:
            return Removal(f"{repo} in the hub's cache", cached.size_on_disk, partial(_remove_from_hub, repo))
    if name in KNOWN and installed_file(KNOWN[name].package) is not None:
        package = KNOWN[name].package.name
        raise ModelLoadError(f"Got {name!r}, which is in an installed package: `pip uninstall {package}` removes it")
    begun = _begun_by(name)
    if begun is not None:
        return Removal(f"{begun.name} in {models_folder()}", size(begun), partial(_remove_folders, [begun]))
    if Path(name).expanduser().exists():
        raise ModelLoadError(f"Got {name!r}, a file or folder of yours: delete it yourself")
    raise ModelLoadError(f"Got {name!r} but no model here is called so: `copyspec models` lists them")


def _known(known: KnownModel) -> ListedModel:
    folder = cached_snapshot(known.repo)
    if folder is not None:
        return ListedModel(known.name, "hub", size(folder), known.licence, str(folder))
    for source, file in (("package", installed_file(known.package)), ("fetched", kept_file(known))):
        if file is not None:
            return ListedModel(known.name, source, file.stat().st_size, known.licence, str(file))
    return ListedModel(known.name, "none", known.package.wheel_bytes, known.licence, None)


def _converted() -> Iterator[ListedModel]:
    for folder in converted_folders():
        yield ListedModel(folder.name, "converted", size(folder), None, str(folder))


def _of_hub() -> Iterator[ListedModel]:
    """Decoders and GGUF files in the hub's cache."""
    for cached in sorted(_hub_models(), key=lambda found: str(found.repo_id).lower()):
        revision = max(cached.revisions, key=lambda one: ("main" in one.refs, one.last_modified))
        folder = Path(revision.snapshot_path)
        for file in sorted(folder.rglob("*.gguf")):
            name = f"{cached.repo_id}/{file.relative_to(folder).as_posix()}"
            yield ListedModel(name, "hub", file.stat().st_size, _licence(folder), str(file))
        if _is_decoder(folder):
            missing = tuple(missing_files(folder))
            yield ListedModel(cached.repo_id, "hub", cached.size_on_disk, _licence(folder), str(folder), missing)


def _hub_models() -> list[Any]:
    """The models in the hub's cache, as its client describes them."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return [cached for cached in found if cached.repo_type == "model" and cached.revisions]


def _is_decoder(folder: Path) -> bool:
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ()
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _licence(folder: Path) -> str | None:
    """What the front matter of a model card says."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    _, _, front = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    found = re.search(r"^license:[ \t]*(\S+)", front.partition("\n---")[0], flags=re.MULTILINE)
    return found[1] if found else None


def _own_folders(name: str) -> list[Path]:
    """What copyspec's cache holds of a model: its own folder, and what was converted from its file."""
    if name in KNOWN:
        own = models_folder() / name
        made = converted_folders(KNOWN[name].package.file_sha256)
        return [folder for folder in (own, *made) if folder.is_dir()]
    return [folder for folder in converted_folders() if folder.name == name]


def _begun_by(name: str) -> Path | None:
    """The converted folder whose name begins so, where nothing is called so in full.

    Raises:
        ModelLoadError: several do.
    """
    begun = [folder for folder in converted_folders() if name and folder.name.startswith(name)]
    if len(begun) > 1:
        names = ", ".join(folder.name for folder in begun)
        raise ModelLoadError(f"Got {name!r} but it begins several names: {names}. Give more of one")
    return begun[0] if begun else None


def _remove_folders(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _remove_from_hub(repo: str) -> None:
    from huggingface_hub import constants, scan_cache_dir

    scan = scan_cache_dir(constants.HF_HUB_CACHE)
    # Of this repository alone: a copy of it under another name may have commits in common.
    found = frozenset(cached for cached in scan.repos if cached.repo_id == repo and cached.repo_type == "model")
    hashes = {revision.commit_hash for cached in found for revision in cached.revisions}
    replace(scan, repos=found).delete_revisions(*hashes).execute()
