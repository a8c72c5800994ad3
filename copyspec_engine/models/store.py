"""Copyspec's cache: models that it has fetched or converted, each a folder that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from copyspec_engine.models.known import KnownModel
from copyspec_engine.values.errors import ModelLoadError
from copyspec_engine.values.folders import models_folder
from copyspec_engine.values.progress import LoadPhase, LoadProgress, OnProgress

__all__ = [
    "clear_models",
    "clear_unfinished",
    "converted_folders",
    "gguf_folder",
    "kept_file",
    "kept_models",
    "place",
    "putting",
    "ready",
    "size",
    "unfinished",
    "write_whole",
]

_UNFINISHED, _LOCK = ".part", ".lock"


def gguf_folder() -> Path:
    """Where the folders are that were made from GGUF files (see gguf.py)."""
    return models_folder() / "gguf"


def kept_file(known: KnownModel) -> Path | None:
    """The GGUF file of a model that was fetched; None where it is not there, or has another size than it should."""
    file = models_folder() / known.name / known.package.file_name
    return file if file.is_file() and file.stat().st_size == known.package.file_bytes else None


def ready(root: Path) -> None:
    """See to it that a folder of the cache is there and can be written, before anything long is begun.

    Raises:
        ModelLoadError: it is not.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise _unwritable(root, error) from error


@contextlib.contextmanager
def putting(
    name: str, root: Path, on_progress: OnProgress | None = None, *, phase: LoadPhase = "download"
) -> Iterator[Path]:
    """An empty folder to fill; what is complete in it takes its `place` before the block ends.

    One process at a time fills it; others wait here. A folder that was left by a process that died is removed.

    Args:
        name: what others wait for who put the same.
        root: where the folder is made.
        on_progress: told of the waiting.
        phase: what is done, of loading.

    Raises:
        ModelLoadError: the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    ready(root)
    try:
        lock = FileLock(root / f".{name}{_LOCK}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_progress is not None:
                on_progress(LoadProgress(phase, f"waiting for another process that makes {name}"))
            lock.acquire()
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        for left in root.glob(f".{name}.*{_UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=_UNFINISHED, dir=root) as filled:
            yield Path(filled)
    except OSError as error:
        raise _unwritable(root, error) from error
    finally:
        lock.release()


def place(filled: Path, target: Path) -> None:
    """Give a folder that is complete its name, in place of one that was damaged."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(filled, target)


def write_whole(path: Path, text: str) -> None:
    """Write a small file, whole or not at all: a temporary one takes its name when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def converted_folders(sha256: str = "") -> list[Path]:
    """Whole folders made from GGUF files (see `gguf`), by name; with a hash those of that file only."""
    found = gguf_folder().glob(f"[!.]*-{sha256[:16] or '*'}-*")  # with a dot while they are being written
    return sorted(folder for folder in found if folder.is_dir())


def size(*paths: Path) -> int:
    """Bytes of files, and of all that is in folders."""
    files = (file for path in paths for file in (path, *path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def kept_models() -> list[Path]:
    """All that is whole in the folder of models."""
    found = [path for root in _roots() for path in root.glob("[!.]*") if path != gguf_folder()]
    return sorted(found)


def clear_models() -> None:
    """Remove all models that were fetched or converted."""
    for path in kept_models():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def unfinished() -> list[Path]:
    """Folders that a download or a conversion fills just now, or that were left by one that was ended."""
    return sorted(path for root in _roots() for path in root.glob(f".*{_UNFINISHED}"))


def clear_unfinished() -> list[str]:
    """Remove what was left by downloads and conversions; what is filled just now stays, and its names are returned."""
    from filelock import FileLock, Timeout

    busy = []
    for root in _roots():
        for path in root.glob(f".*{_LOCK}"):
            name = path.name[1 : -len(_LOCK)]
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                busy.append(name)
                continue
            try:
                for left in root.glob(f".{name}.*{_UNFINISHED}"):
                    shutil.rmtree(left)
                path.unlink(missing_ok=True)
            finally:
                lock.release()
    return sorted(busy)


def _roots() -> list[Path]:
    return [root for root in (models_folder(), gguf_folder()) if root.is_dir()]


def _unwritable(root: Path, error: OSError) -> ModelLoadError:
    return ModelLoadError(
        f"Models are kept in {root}, where this went wrong: {error}. Free some space there, or set COPYSPEC_CACHE_DIR "
        "to a folder that can be written"
    )
