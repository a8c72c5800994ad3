"""The hub's cache and what is fetched into it, through the hub's own client.

Nothing is asked of the network to find a model: what is in the cache is used as it is, until it is fetched again.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from copyspec_engine.models.known import DEFAULT_FILES
from copyspec_engine.values.errors import ModelLoadError
from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = ["NotReachedError", "cached_file", "cached_snapshot", "fetch_file", "fetch_snapshot", "missing_files"]

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
_NOT_NEEDED = ("*/*.safetensors", "consolidated*.safetensors")
"""Weights that transformers does not read: those of other programs, and second copies."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
_CONFIGS = ("config.json", "adapter_config.json")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")


class NotReachedError(ModelLoadError):
    """The hub did not answer."""


def cached_snapshot(repo: str) -> Path | None:
    """The folder of a repository in the hub's cache; None where it is not there, or not whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo, local_files_only=True, allow_patterns=list(DEFAULT_FILES), ignore_patterns=list(_NOT_NEEDED)
        )
    except (LocalEntryNotFoundError, HFValidationError):  # an incomplete snapshot is a kind of the first
        return None
    folder = Path(found)
    missing = missing_files(folder)
    if missing:
        logger.info("%s in the hub's cache is not whole: %s is missing", repo, missing[0])
        return None
    return folder


def missing_files(folder: Path) -> list[str]:
    """What a folder in transformers' form lacks of configuration and weights, by file name; empty if it is whole."""
    if not any((folder / name).is_file() for name in _CONFIGS):
        return ["config.json"]
    for name in _INDEXES:
        if (folder / name).is_file():
            shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(shard for shard in shards if not (folder / shard).is_file())
    weights = [file.name for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file()]
    if not weights:
        return ["model.safetensors"]
    return [_INDEXES[0]] if all(_SHARD.search(name) for name in weights) else []


def cached_file(repo: str, file: str) -> Path | None:
    """A single file of a repository in the hub's cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None


def fetch_snapshot(repo: str, on_progress: OnProgress | None = None) -> Path:
    """Fetch what is needed of a repository into the hub's cache, or what is not there yet of its newest state.

    Args:
        repo: name on the hub.
        on_progress: told of the bytes, in threads of the hub's client.

    Returns:
        The folder.

    Raises:
        ModelLoadError: the hub is not reached, has no such repository, or nothing in it that can be loaded.
    """
    from huggingface_hub import snapshot_download

    def fetch(**options: Any) -> Any:  # noqa: ANN401 - a path, or a plan
        return _asked(
            repo,
            lambda: snapshot_download(
                repo, allow_patterns=list(DEFAULT_FILES), ignore_patterns=list(_NOT_NEEDED), **options
            ),
        )

    _refuse_without_weights(repo, _files_of(repo))
    plan = fetch(dry_run=True)
    total = sum(file.file_size for file in plan if file.will_download)
    text = f"fetching {repo}"
    if on_progress is None and total:
        logger.warning("Fetching %s, %.0f MB, into the hub's cache: this happens once", repo, total / 1e6)
    folder = Path(fetch(tqdm_class=_bar(text, total, on_progress)))
    missing = missing_files(folder)
    if missing:
        raise ModelLoadError(f"Got model={repo!r} but its repository on the hub has no {missing[0]}")
    return folder


def fetch_file(repo: str, file: str, on_progress: OnProgress | None = None) -> Path:
    """Fetch one file of a repository into the hub's cache.

    Raises:
        ModelLoadError: the hub is not reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    bar = _bar(f"fetching {repo}/{file}", None, on_progress)
    return Path(_asked(repo, lambda: hf_hub_download(repo, file, tqdm_class=bar)))


def _files_of(repo: str) -> list[str]:
    """Names of all files; one question without retries, so that a missing network is known soon."""
    from huggingface_hub import HfApi

    info = _asked(repo, lambda: HfApi().model_info(repo, timeout=_ANSWER_S))
    return [file.rfilename for file in info.siblings or ()]


def _refuse_without_weights(repo: str, files: Iterable[str]) -> None:
    """Turn away a repository with nothing in it that is fetched.

    Raises:
        ModelLoadError: it has pickles only, GGUF files only, or no weights.
    """
    names = sorted(files)
    if any(name.endswith(".safetensors") for name in names):
        return
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        some = ", ".join(gguf[:8]) + (" ..." if len(gguf) > 8 else "")
        raise ModelLoadError(
            f"Got model={repo!r}, a repository of GGUF files, each of them a whole model: run `copyspec pull "
            f"{repo}/{gguf[0]}`, or another of {some}"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise ModelLoadError(
            f"Got model={repo!r} but its weights are pickles ({pickles[0]}), which can run code when they are read: "
            "they are not fetched. Use a repository with .safetensors files, or fetch and convert it yourself and give "
            "the folder"
        )
    raise ModelLoadError(f"Got model={repo!r} but its repository on the hub holds no weights (.safetensors)")


def _asked(repo: str, ask: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the hub's client gives
    """Ask the hub.

    Raises:
        ModelLoadError: it has no such thing.
        NotReachedError: it does not answer.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return ask()
    except OfflineModeIsEnabled as error:
        raise NotReachedError("the hub is not asked, since HF_HUB_OFFLINE is set") from error
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{repo} is not given to everybody: accept its terms on its page on the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"The hub has no repository {repo!r}, or not for you: check the name; if it is private, run `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ModelLoadError(f"Got {repo!r} but expected a name on the hub, owner/name: {error}") from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise NotReachedError(f"the hub does not answer ({_first_line(error)})") from error
        raise ModelLoadError(f"{repo} on the hub has no such file: {_first_line(error)}") from error
    except Exception as error:  # of the HTTP library, which differs between versions of the client
        raise NotReachedError(f"the hub does not answer ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _bar(text: str, total: int | None, on_progress: OnProgress | None) -> Any:  # noqa: ANN401 - a class
    """A bar for the hub's client that shows nothing itself; None, the client's own, where nobody is to be told."""
    if on_progress is None:
        return None
    from tqdm.std import tqdm

    tell, most = on_progress, 0

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
            options |= {"file": io.StringIO(), "disable": False}
            options.pop("name", None)
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> Any:  # noqa: ANN401
            nonlocal most
            shown = super().update(n)
            if self.unit == "B":
                most = max(most, int(self.n))
                known = total or (int(self.total) if self.total else None)
                done = most if known is None else min(most, known)
                tell(LoadProgress("download", text, done=done, total=known, unit="B"))
            return shown

    return Reporting
