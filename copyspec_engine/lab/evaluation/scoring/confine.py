"""Confines its own process for good, then runs the Python program on its standard input; started by sandbox.py.

Two mechanisms of the Linux kernel do it, and neither can be undone by the process that asked for it:

- Landlock decides about paths: the folders of the interpreter, its packages and the shared libraries may be read, the
  working folder may be read and written, nothing else may be opened.
- A seccomp filter decides about system calls: `CALLS` and `COMMANDS` are all there is. Among them is none that starts a
  process or a thread, runs another program, opens a socket, sends a signal, looks into another process, makes a folder
  or a link, changes the rights or times of a file (of which Landlock says nothing), or changes a limit.

Resource limits bound processor time, memory, the size of a file and the number of open files. Where any of this cannot
be had the program is not run. Only the standard library is used, since this file runs in a bare interpreter.

Not covered: wall-clock time, the total size of the working folder, the environment and the inherited files, which are
the parent's to bound (sandbox.py); hiding that a path exists or where a link leads, which Landlock leaves open.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import struct
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any, NoReturn

__all__ = ["CALLS", "COMMANDS", "CONFINED", "OUT_OF_MEMORY", "seccomp_filter"]

CONFINED = b"confined"
"""What the parent is told once every layer is in place; anything else is the reason why one is not."""
OUT_OF_MEMORY = 77
"""Exit status after a `MemoryError` that the program did not catch."""

_MAX_OPEN_FILES = 32

CALLS: dict[str, tuple[int | None, int | None]] = {
    # name: (number on x86_64, number on aarch64); None where the architecture does not have it
    # memory
    "brk": (12, 214),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    # open files and pipes of its own
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "fdatasync": (75, 83),
    "fstat": (5, 80),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "getdents64": (217, 61),
    "lseek": (8, 62),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "pselect6": (270, 72),
    "pwrite64": (18, 68),
    "read": (0, 63),
    "readv": (19, 65),
    "select": (23, None),
    "write": (1, 64),
    "writev": (20, 66),
    # paths; what they may open, write and remove is for Landlock to say
    "access": (21, None),
    "chdir": (80, 49),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getcwd": (79, 17),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "open": (2, None),
    "openat": (257, 56),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "stat": (4, None),
    "statx": (332, 291),
    "umask": (95, 166),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    # facts
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "sched_getaffinity": (204, 123),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "uname": (63, 160),
    # time, and signals that the process gets rather than sends
    "alarm": (37, None),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "getitimer": (36, 102),
    "gettimeofday": (96, 169),
    "nanosleep": (35, 101),
    "pause": (34, None),
    "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "setitimer": (38, 103),
    "sigaltstack": (131, 132),
    "time": (201, None),
    # its one thread, and its end
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "set_robust_list": (273, 99),
}

COMMANDS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    # name: (its numbers, the values that its second argument may have)
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: F_SETOWN would send signals to any process.
    "fcntl": ((72, 25), (0, 1, 2, 3, 4, 1030)),
    # FIONCLEX, FIOCLEX: tempfile sets them.
    "ioctl": ((16, 29), (0x5450, 0x5451)),
}

_NUMBER, _ARCHITECTURE, _SECOND_ARGUMENT = 0, 4, 24
"""Where seccomp has them, in bytes."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMNS = {"x86_64": 0, "aarch64": 1}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_CAPABILITY_VERSION_3 = 0x20080522

# Landlock's rights, as linux/landlock.h numbers them.
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
_LEAST_ABI = 3
"""Earlier ones let a file that may be read be emptied (`O_TRUNC`); this one came with Linux 6.2."""


def seccomp_filter(machine: str) -> bytes:
    """The filter as BPF instructions: whatever is not listed fails with ENOSYS, as if the kernel did not have it.

    So libraries fall back where they can, and the program gets an `OSError` where they cannot. System calls of another
    architecture, which have other numbers, kill the process.

    Raises:
        OSError: the architecture is not known.
    """
    if machine not in _COLUMNS:
        raise OSError(f"an x86_64 or aarch64 processor (this one is {machine})")
    column = _COLUMNS[machine]
    allow, deny, kill = _give(0x7FFF0000), _give(0x00050000 | 38), _give(0x80000000)
    program = [_load(_ARCHITECTURE), _skip_unless(_AUDIT_ARCH[machine], 1), _jump(1), kill, _load(_NUMBER)]
    for numbers in CALLS.values():
        if (number := numbers[column]) is not None:
            program += [_skip_unless(number, 1), allow]
    for pair, commands in COMMANDS.values():
        checks = [_load(_SECOND_ARGUMENT)]
        for command in commands:
            checks += [_skip_unless(command, 1), allow]
        program += [_skip_unless(pair[column], len(checks) + 1), *checks, deny]
    return b"".join([*program, deny])


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", 0x20, 0, 0, offset)


def _skip_unless(value: int, count: int) -> bytes:
    return struct.pack("=HBBI", 0x15, 0, count, value)


def _jump(count: int) -> bytes:
    return struct.pack("=HBBI", 0x05, 0, 0, count)


def _give(verdict: int) -> bytes:
    return struct.pack("=HBBI", 0x06, 0, 0, verdict)


class _Kernel:
    """The C library's way into the kernel, with errors as `OSError`."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def prctl(self, what: str, option: int, value: int, pointer: Any = None) -> None:  # noqa: ANN401 - any struct
        zero = ctypes.c_ulong(0)
        self._checked(what, self._libc.prctl(option, ctypes.c_ulong(value), pointer, zero, zero))

    def call(self, what: str, number: int, *arguments: Any) -> int:  # noqa: ANN401 - numbers and structs
        return self._checked(what, self._libc.syscall(ctypes.c_long(number), *arguments))

    def drop_capabilities(self) -> None:
        header, none = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
        self._checked("dropping capabilities", self._libc.capset(header, none))

    def _checked(self, what: str, result: int) -> int:
        if result < 0:
            raise OSError(f"{what} ({os.strerror(ctypes.get_errno())})")
        return result


def _limit_resources(spec: dict[str, Any]) -> None:
    import resource  # not on Windows, where this file is imported for its constants

    for name, soft, hard in (
        ("CPU", spec["cpu_s"], spec["cpu_s"] + 1),  # a program that ignores SIGXCPU is killed
        ("AS", spec["memory_bytes"], spec["memory_bytes"]),
        ("FSIZE", spec["file_bytes"], spec["file_bytes"]),
        ("NOFILE", _MAX_OPEN_FILES, _MAX_OPEN_FILES),
        ("NPROC", 0, 0),
        ("CORE", 0, 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(kind)[1]
        if allowed != resource.RLIM_INFINITY and allowed < hard:
            raise OSError(f"a hard RLIMIT_{name} of {hard} or more (it is {allowed})")
        resource.setrlimit(kind, (soft, hard))


def _restrict_paths(kernel: _Kernel, readable: list[str], folder: str) -> None:
    what = "Landlock of Linux 6.2 or newer"
    abi = kernel.call(what, _LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < _LEAST_ABI:
        raise OSError(f"{what} (this kernel has its version {abi}, not {_LEAST_ABI})")
    files = (1 << (16 if abi >= 5 else 15)) - 1
    network, scopes = 3 if abi >= 4 else 0, 3 if abi >= 6 else 0
    handled = struct.pack("=QQQ", files, network, scopes)
    rules = kernel.call(what, _LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(24), ctypes.c_uint32(0))
    for path in readable:
        _allow(kernel, rules, path, _READ_FILE | _READ_DIR)
    _allow(kernel, rules, "/dev/null", _READ_FILE | _WRITE_FILE)
    _allow(kernel, rules, folder, _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE)
    kernel.call(what, _LANDLOCK_RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def _allow(kernel: _Kernel, rules: int, path: str, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # nothing there, nothing to allow: distributions differ
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights, beneath)
        what, kind, flags = f"Landlock for {path}", ctypes.c_int(1), ctypes.c_uint32(0)
        kernel.call(what, _LANDLOCK_ADD_RULE, ctypes.c_int(rules), kind, rule, flags)
        os.close(beneath)


def _libraries(packages: list[str]) -> Iterator[str]:
    """Files and folders that imports read."""
    yield from packages
    yield os.path.dirname(os.__file__)
    for prefix in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix, "/", "/usr")):
        yield from (os.path.join(prefix, "lib"), os.path.join(prefix, "lib64"))
    yield "/etc/ld.so.cache"


def _confine(spec: dict[str, Any]) -> None:
    """Give up everything that the program is not to have.

    Raises:
        OSError: the kernel refuses a layer; its text names what is missing.
    """
    filter_program = seccomp_filter(platform.machine())
    kernel = _Kernel()
    kernel.prctl("a signal at the parent's end", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != spec["parent"]:
        os._exit(1)  # it ended before it was asked for
    _limit_resources(spec)
    kernel.prctl("no new privileges", _PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl("no core dumps", _PR_SET_DUMPABLE, 0)
    kernel.drop_capabilities()
    _restrict_paths(kernel, list(_libraries(spec["packages"])), spec["folder"])
    instructions = ctypes.create_string_buffer(filter_program, len(filter_program))
    described = struct.pack("@HP", len(filter_program) // 8, ctypes.addressof(instructions))
    kernel.prctl("seccomp filters", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described)


def _run(source: str) -> NoReturn:
    """Run the program as a script would be, and end with its exit status."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["program.py"]
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        os.write(2, b"MemoryError\n")  # a traceback would need memory
        os._exit(OUT_OF_MEMORY)
    except SystemExit:
        raise
    except BaseException as error:
        frames = error.__traceback__
        traceback.print_exception(type(error), error, frames.tb_next if frames else None)  # without this function
        sys.exit(1)
    sys.exit(0)


def main() -> NoReturn:
    """Read the program, confine this process, tell the parent, run the program.

    The one argument is JSON: the limits of `sandbox.Limits`, "folder" to work in, "packages" (folders to import from),
    "parent" (its process id) and "report" (an open file to tell it on).
    """
    spec = json.loads(sys.argv[1])
    with open(0, "rb", closefd=False) as stdin:
        source = stdin.read().decode("utf-8", "surrogatepass")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.path += spec["packages"]
    try:
        _confine(spec)
    except OSError as error:
        os.write(spec["report"], str(error).encode())
        os._exit(1)
    os.write(spec["report"], CONFINED)
    os.close(spec["report"])
    _run(source)


if __name__ == "__main__":
    main()
