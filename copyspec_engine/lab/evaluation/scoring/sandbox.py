"""Runs Python programs that a model wrote, each in a process of its own that can do nothing but compute and print.

A program may use one thread of one process, read the standard library and the installed packages (NumPy among them),
and read and write files in its own temporary folder, which has no subfolders. It has no network (so no asyncio, which
needs sockets), starts no process, sends no signal, sees no other file and no environment variable of this process. What
it asks for beyond that fails with an `OSError` in the program. The sandbox needs Linux 6.2 or newer with Landlock, on
x86_64 or aarch64, and no rights of root; where the kernel lacks a layer of it, no program is run.

Not covered: how the process confines itself (confine.py), what the programs mean (metrics.py).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from copyspec_engine import ConfigError
from copyspec_engine.lab.evaluation.scoring import confine

__all__ = ["CodeResult", "Limits", "Status", "check_sandbox", "run_code"]

Status = Literal["ok", "error", "timeout", "memory", "disk"]

_BOOTSTRAP = Path(confine.__file__).read_text(encoding="utf-8")
_POLL_S = 0.05
_CHUNK_BYTES = 64 * 1024
_MAX_FILES = 1000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Several programs run at once have these each."""

    cpu_s: int = 10
    """Processor seconds; 1 or more."""
    wall_s: float = 20.0
    """Seconds from start to end, those of starting the interpreter (about 0.1) included; more than 0."""
    memory_bytes: int = 2 * 1024**3
    """Address space; 128 MiB or more. NumPy takes about 150 MiB of it."""
    file_bytes: int = 8 * 1024**2
    """The temporary folder, all files together; 0 or more. No single file grows beyond it. The total is looked at
    every 50 ms, so a program may exceed it for that long before it is ended, and without the files (at most 32) that
    it removed but still holds open."""
    output_bytes: int = 64 * 1024
    """What is kept of each of stdout and stderr: their ends, the rest is thrown away; 1 or more."""

    def __post_init__(self) -> None:
        for name, least in (("cpu_s", 1), ("memory_bytes", 128 * 1024**2), ("file_bytes", 0), ("output_bytes", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"Got {name}={value!r} but expected a whole number >= {least}")
        if not self.wall_s > 0:
            raise ConfigError(f"Got wall_s={self.wall_s!r} but expected a number > 0")


@dataclass(frozen=True, slots=True)
class CodeResult:
    """How a program ended."""

    status: Status
    """With "ok" it ended with exit status 0; with "error" by an exception, another exit status or a crash; with
    "timeout" since `cpu_s` or `wall_s` were over; with "memory" by a `MemoryError`, or since the kernel had no more;
    with "disk" since its folder held too much, or more than 1000 files (one file too large is an `OSError` in it)."""
    stdout: str
    """What it printed, at most the last `Limits.output_bytes` of it."""
    stderr: str
    """Likewise; ends with the traceback after an exception."""
    seconds: float
    """From start to end."""


_DEFAULT_LIMITS = Limits()


def check_sandbox() -> None:
    """Make sure that programs can be run here and are confined, before a long run begins. Takes about 0.1 s.

    Raises:
        ConfigError: they cannot; says what is missing.
    """
    result = run_code(_PROBE)
    if result.stdout != "refused\nrefused\n":
        found = " ".join((result.stdout or result.stderr).split())
        raise _unavailable(f"a kernel that enforces Landlock and seccomp (a probe ended with {found!r})")


_PROBE = """
import os, socket
for escape, argument in ((os.listdir, "/"), (socket.socket, socket.AF_INET)):
    try:
        escape(argument)
    except OSError:
        print("refused")
"""


def run_code(source: str, limits: Limits = _DEFAULT_LIMITS) -> CodeResult:
    """Run a Python program in the sandbox and wait for its end; any thread may call it, many at once.

    It runs as a script (`__name__ == "__main__"`), with the interpreter that runs this process, an empty standard
    input, UTF-8 everywhere and fixed string hashes, so that the same program prints the same.

    Raises:
        ConfigError: it cannot be confined on this machine, and was not run.
    """
    if sys.platform != "linux":
        raise _unavailable(f"Linux (this is {sys.platform})")
    reader, writer = os.pipe()
    with (
        os.fdopen(reader, "rb") as report,
        os.fdopen(writer, "wb") as reporting_end,
        tempfile.TemporaryDirectory(prefix="copyspec-") as folder,
        tempfile.TemporaryFile() as program,
    ):
        program.write(source.encode("utf-8", "surrogatepass"))
        program.seek(0)
        with _start(folder, program, writer, limits) as process:
            reporting_end.close()  # the process has its own
            try:
                result = _Watch(process, Path(folder), limits).result()
            finally:
                process.kill()  # it has no children: nothing else is to be ended
        answer = report.read()
    if answer != confine.CONFINED and result.status != "timeout":
        reason = answer.decode(errors="replace") or f"an interpreter that starts (it said {result.stderr[-500:]!r})"
        raise _unavailable(reason)
    return result


def _unavailable(missing: str) -> ConfigError:
    return ConfigError(f"Cannot run generated code safely without {missing}: leave out --execute-code")


def _start(folder: str, program: IO[bytes], report: int, limits: Limits) -> subprocess.Popen[bytes]:
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    spec = {**asdict(limits), "folder": folder, "packages": packages, "parent": os.getpid(), "report": report}
    environment = {
        "HOME": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "TMPDIR": folder,
    }
    return subprocess.Popen(
        [sys.executable, "-s", "-S", "-B", "-c", _BOOTSTRAP, json.dumps(spec)],
        stdin=program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment,
        pass_fds=[report],
        start_new_session=True,  # Ctrl-C is for this process to handle
    )


class _Watch:
    """Reads what one process prints until it ends, and ends it when it goes too far."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, limits: Limits) -> None:
        self._process = process
        self._folder = folder
        self._limits = limits
        self._begin = time.monotonic()

    def result(self) -> CodeResult:
        stdout, stderr = bytearray(), bytearray()
        exceeded: Status | None = None
        with selectors.DefaultSelector() as selector:
            for pipe, kept in ((self._process.stdout, stdout), (self._process.stderr, stderr)):
                assert pipe is not None
                selector.register(pipe, selectors.EVENT_READ, kept)
            while selector.get_map() or self._runs():
                for key, _ in selector.select(_POLL_S) if selector.get_map() else ():
                    if chunk := os.read(key.fd, _CHUNK_BYTES):
                        key.data.extend(chunk)
                        del key.data[: -self._limits.output_bytes]
                    else:
                        selector.unregister(key.fileobj)
                if exceeded is None and (exceeded := self._exceeded()):
                    self._process.kill()
        status = exceeded or self._status()
        return CodeResult(status, _text(stdout), _text(stderr), time.monotonic() - self._begin)

    def _runs(self) -> bool:
        """After its outputs are closed: waits a little for the end."""
        try:
            self._process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _exceeded(self) -> Status | None:
        if time.monotonic() - self._begin > self._limits.wall_s:
            return "timeout"
        total = 0
        with os.scandir(self._folder) as entries:
            for count, entry in enumerate(entries, 1):
                try:
                    total += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:  # removed since
                    continue
                if total > self._limits.file_bytes or count > _MAX_FILES:
                    return "disk"
        return None

    def _status(self) -> Status:
        code = self._process.returncode
        if code == 0:
            return "ok"
        killed = code == -signal.SIGKILL
        # One thread cannot use more processor time than has passed; before that, the kernel needed the memory.
        if code == -signal.SIGXCPU or (killed and time.monotonic() - self._begin >= self._limits.cpu_s):
            return "timeout"
        return "memory" if killed or code == confine.OUT_OF_MEMORY else "error"


def _text(output: bytearray) -> str:
    return output.decode("utf-8", "replace")
