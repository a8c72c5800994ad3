"""What generated programs try beyond computing and printing is refused; how they end is told; the parent stays well.

Every escape is also run without the sandbox, where it has to succeed: a program that fails for another reason would
prove nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from copyspec_engine import ConfigError
from copyspec_engine.lab.evaluation.scoring import confine, sandbox
from copyspec_engine.lab.evaluation.scoring.sandbox import Limits, check_sandbox, run_code

CAN_CONFINE = (
    sys.platform == "linux"
    and platform.machine() in ("x86_64", "aarch64")
    and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 3  # the version of Landlock
)
WHY_NOT = "generated programs run on Linux 6.2 or newer with Landlock, on x86_64 or aarch64"
confined = pytest.mark.skipif(not CAN_CONFINE, reason=WHY_NOT)

SECRET = "nobody's business"
ESCAPES = {
    "connect over TCP": "import socket; socket.create_connection(('127.0.0.1', {tcp}))",
    "send over UDP": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp}))",
    "connect to a local socket": "import socket; socket.socket(socket.AF_UNIX).connect({unix!r})",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "fork": "import os; os.fork() or os._exit(0); os.wait()",
    "fork by a system call": (
        "import ctypes, os, platform\n"
        "number = 56 if platform.machine() == 'x86_64' else 220\n"
        "clone = ctypes.CDLL(None, use_errno=True).syscall(number, 17, 0, 0, 0)\n"  # 17: SIGCHLD
        "if clone == 0: os._exit(0)\n"
        "if clone < 0: raise OSError(ctypes.get_errno(), 'clone')"
    ),
    "start a program": "import subprocess; subprocess.run(['true'], check=True)",
    "become a program": "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(\"escaped\")'])",
    "start a thread": "import threading; threading.Thread(target=print).start()",
    "read a file": "open({secret!r}).read()",
    "read a file through a link": "import os; os.symlink({secret!r}, 'link'); open('link').read()",
    "read a file by another name": "import os; os.link({secret!r}, {secret!r} + '2')",
    "read the users": "open('/etc/passwd').read()",
    "list a folder": "import os; os.listdir({folder!r})",
    "read the environment": "import os; open('/proc/%d/environ' % os.getppid(), 'rb').read()",
    "read its own maps": "open('/proc/self/maps').read()",
    "write a file": "open({secret!r}, 'w').write('x')",
    "write a new file": "open({secret!r} + '2', 'w').write('x')",
    "empty a file": "import os; os.truncate({secret!r}, 0)",
    "empty a file that it reads": "import os; os.open({secret!r}, os.O_RDONLY | os.O_TRUNC)",
    "remove a file": "import os; os.remove({secret!r})",
    "move a file": "import os; os.rename({secret!r}, {secret!r} + '2')",
    "move a file out": "import os; open('own', 'w').close(); os.rename('own', {secret!r} + '2')",
    "make a folder": "import os; os.mkdir({folder!r} + '/2')",
    "change rights": "import os; os.chmod({secret!r}, 0o777)",
    "change times": "import os; os.utime({secret!r}, (0, 0))",
    "change attributes": "import os; os.setxattr({secret!r}, 'user.x', b'x')",
    "signal the parent": "import os, signal; os.kill(os.getppid(), signal.SIGCONT)",
    "signal through a pipe": (
        "import fcntl, os, signal\n"
        "reader, writer = os.pipe()\n"
        "fcntl.fcntl(reader, fcntl.F_SETOWN, os.getppid())\n"
        "fcntl.fcntl(reader, 10, signal.SIGCONT)\n"  # F_SETSIG
        "fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)\n"
        "os.write(writer, b'x')"
    ),
    "change a limit": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))",
    "change its priority": "import os; os.nice(1)",
    "keep memory without an address": "import os; os.memfd_create('x')",
}
LIBRARY_FILE = (
    "import os\n"
    "for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):\n"
    "    try:\n"
    "        os.open(os.__file__, flags)\n"
    "    except PermissionError:\n"
    "        print('refused')"
)
"""The only files outside that may be read are not to be written. Not run without the sandbox: it would succeed."""


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[dict[str, object]]:
    """What programs look for: a file, a folder and servers of this process."""
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        # A path of its own: those of sockets must be short.
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"{short}/s")
            unix.listen()
            yield {
                "secret": str(secret),
                "folder": str(tmp_path),
                "tcp": tcp.getsockname()[1],
                "udp": udp.getsockname()[1],
                "unix": f"{short}/s",
            }


@confined
@pytest.mark.parametrize("escape", ESCAPES)
def test_an_escape_that_works_elsewhere_is_refused(escape: str, outside: dict[str, object], tmp_path: Path) -> None:
    program = ESCAPES[escape].format(**outside) + "\nprint('escaped')"
    before = (tmp_path / "secret.txt").stat()

    result = run_code(program)

    assert result.status == "error"
    assert result.stdout == ""
    assert any(f"{name}Error: " in result.stderr for name in ("OS", "Permission", "Runtime", "CrossDevice"))
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]
    assert (tmp_path / "secret.txt").stat() == before
    work = tmp_path / "work"
    work.mkdir()
    plain = [sys.executable, "-I", "-S", "-c", program]
    control = subprocess.run(plain, cwd=work, capture_output=True, text=True, check=False)
    assert "escaped" in control.stdout, control.stderr


@confined
def test_the_libraries_that_may_be_read_are_not_to_be_written() -> None:
    before = os.stat(os.__file__)
    assert run_code(LIBRARY_FILE).stdout == "refused\n" * 3
    assert os.stat(os.__file__).st_size == before.st_size


REFUSED = {
    # name: (number on x86_64, number on aarch64)
    "bpf": (321, 280),
    "capset": (126, 91),
    "chmod": (90, None),
    "chown": (92, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fchmodat": (268, 53),
    "fchownat": (260, 54),
    "fork": (57, None),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "linkat": (265, 37),
    "memfd_create": (319, 279),
    "mkdirat": (258, 34),
    "mount": (165, 40),
    "open_by_handle_at": (304, 265),
    "perf_event_open": (298, 241),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "rt_sigqueueinfo": (129, 138),
    "seccomp": (317, 277),
    "setns": (308, 268),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "setxattr": (188, 5),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "symlinkat": (266, 36),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "truncate": (76, 45),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "utimensat": (280, 88),
    "vfork": (58, None),
}


@confined
def test_system_calls_past_the_standard_library_are_refused() -> None:
    column = ("x86_64", "aarch64").index(platform.machine())
    numbers = {name: pair[column] for name, pair in REFUSED.items() if pair[column] is not None}
    program = (
        "import ctypes, errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers!r}.items():\n"
        "    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.ENOSYS:\n"
        "        print(name)\n"
        f"print('tried', libc.syscall({confine.CALLS['getpid'][column]}) > 0)"
    )
    result = run_code(program)
    assert (result.status, result.stdout) == ("ok", "tried True\n")


ALLOWED, FAILED, KILLED = 0x7FFF0000, 0x00050000 | 38, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(instructions: bytes, number: int, arch: int, argument: int = 0) -> int:
    """What a filter says about a call; `argument` is its second one. A reading of BPF apart from the kernel's."""
    data = struct.pack("=IIQ6Q", number, arch, 0, 0, argument, 0, 0, 0, 0)
    at, loaded = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", instructions, 8 * at)
        at += 1
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        elif code == 0x15:
            at += if_true if loaded == value else if_false
        elif code == 0x05:
            at += value
        else:
            assert code == 0x06
            return int(value)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_what_is_listed_and_no_more_on_each_architecture(machine: str) -> None:
    column = ("x86_64", "aarch64").index(machine)
    instructions = confine.seccomp_filter(machine)
    listed = {pair[column] for pair in confine.CALLS.values()} - {None}
    for number in range(600):
        expected = ALLOWED if number in listed else FAILED
        assert verdict(instructions, number, AUDIT[machine], 8) == expected, number  # 8: F_SETOWN
        assert verdict(instructions, number | 0x40000000, AUDIT[machine]) == FAILED  # the 32-bit numbers of x86_64
    assert not listed & {pair[column] for pair in REFUSED.values()}
    for pair, commands in ((72, 25), [0, 1, 2, 3, 4, 1030]), ((16, 29), [0x5450, 0x5451]):  # fcntl, ioctl
        tried = [*range(1100), *range(0x5400, 0x5500)]
        verdicts = [verdict(instructions, pair[column], AUDIT[machine], command) for command in tried]
        assert [command for command, given in zip(tried, verdicts, strict=True) if given == ALLOWED] == commands
        assert set(verdicts) == {ALLOWED, FAILED}
    assert verdict(instructions, 0, 0x40000003) == KILLED  # calls of a 32-bit x86 process
    assert len(instructions) // 8 <= 4096  # the kernel's limit


LIMITED = {
    "a busy loop": ("while True: pass", Limits(cpu_s=1), "timeout"),
    "a sleeping program": ("import time; time.sleep(100)", Limits(wall_s=1), "timeout"),
    "a loop that ignores signals": (
        "import signal\nfor s in (1, 2, 15, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        Limits(cpu_s=1),
        "timeout",
    ),
    "a loop after closing its outputs": (
        "import os, time; os.close(1); os.close(2); time.sleep(100)",
        Limits(wall_s=1),
        "timeout",
    ),
    "a loop in compiled code": ("sum(range(10**12))", Limits(cpu_s=1), "timeout"),
    "one huge object": ("bytes(3 * 10**9)", Limits(), "memory"),
    "a growing list": ("kept = []\nwhile True: kept.append(bytes(10**6))", Limits(memory_bytes=2**28), "memory"),
    "a huge array": ("import numpy; numpy.empty(3 * 10**9, 'u1')", Limits(), "memory"),
    "many files": (
        "import time\nfor i in range(20): open(str(i), 'wb').write(bytes(10**5))\ntime.sleep(100)",
        Limits(file_bytes=10**6),
        "disk",
    ),
    "many empty files": (
        "import time\nfor i in range(2000): open(str(i), 'w').close()\ntime.sleep(100)",
        Limits(),
        "disk",
    ),
    "a deep recursion": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n  def __repr__(self): return repr(self)\nrepr(A())",
        Limits(),
        "error",
    ),
}


@confined
@pytest.mark.parametrize("program", LIMITED)
def test_a_program_that_takes_too_much_is_ended(program: str) -> None:
    source, limits, status = LIMITED[program]
    result = run_code(source, limits)
    assert result.status == status


@confined
def test_one_file_grows_no_further_than_the_limit() -> None:
    result = run_code("open('big', 'wb').write(bytes(10**6))", Limits(file_bytes=10**5))
    assert result.status == "error"
    assert "File too large" in result.stderr


@confined
def test_of_endless_output_the_end_is_kept() -> None:
    program = "import os\nwhile True: os.write(1, b'o' * 9999); os.write(2, b'e' * 9999)"
    result = run_code(program, Limits(cpu_s=1, output_bytes=1000))
    assert (result.status, result.stdout, result.stderr) == ("timeout", "o" * 1000, "e" * 1000)
    assert run_code("print('x' * 10**6, 42)", Limits(output_bytes=10)).stdout == "xxxxxx 42\n"


@confined
@pytest.mark.parametrize(
    ("program", "status", "stdout", "stderr"),
    [
        ("print(6 * 7)", "ok", "42\n", ""),
        ("print('é€', '\\ud800'.encode('utf-8', 'surrogatepass'))", "ok", "é€ b'\\xed\\xa0\\x80'\n", ""),
        ("if __name__ == '__main__': print('main')", "ok", "main\n", ""),
        ("import sys; print(1); sys.exit()", "ok", "1\n", ""),
        ("import sys; print(1); sys.exit(3)", "error", "1\n", ""),
        ("import os; os._exit(0)", "ok", "", ""),
        ("print(1); 1 / 0", "error", "1\n", "ZeroDivisionError: division by zero\n"),
        ("def f(:", "error", "", "SyntaxError: invalid syntax\n"),
        ("raise KeyboardInterrupt", "error", "", "KeyboardInterrupt\n"),
        ("input()", "error", "", "EOFError: EOF when reading a line\n"),
        ("def f(x: int): pass\nprint(f.__annotations__)", "ok", "{'x': <class 'int'>}\n", ""),
        ("import os; os.abort()", "error", "", ""),
        ("import numpy; print(numpy.eye(200).dot(numpy.eye(200)).sum())", "ok", "200.0\n", ""),
        ("open('a', 'w').write('b'); import os; os.rename('a', 'c'); print(os.listdir())", "ok", "['c']\n", ""),
        ("import tempfile; f = tempfile.TemporaryFile(); print(f.write(b'abc'))", "ok", "3\n", ""),
        ("import sys; print(sys.argv, sys.stdin.isatty())", "ok", "['program.py'] False\n", ""),
        ("", "ok", "", ""),
        ("# coding: latin-1\nprint('é')", "ok", "é\n", ""),
        ("print(1)\0", "error", "", "source code string cannot contain null bytes\n"),
        ("print('\ud800')", "error", "", "surrogates not allowed\n"),
    ],
)
def test_the_end_of_a_program_is_told(program: str, status: str, stdout: str, stderr: str) -> None:
    result = run_code(program)
    assert (result.status, result.stdout) == (status, stdout)
    assert result.stderr.endswith(stderr)
    assert "confine" not in result.stderr
    assert result.seconds > 0


@confined
def test_a_traceback_names_the_programs_own_lines_only() -> None:
    stderr = run_code("def f():\n    1 / 0\nf()").stderr.splitlines()
    assert [line.strip() for line in stderr if "File" in line] == [
        'File "program.py", line 3, in <module>',
        'File "program.py", line 2, in f',
    ]


@confined
def test_nothing_of_the_parent_is_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COPYSPEC_SECRET", SECRET)
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    with (tmp_path / "open.txt").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        result = run_code(
            "import os, sys\n"
            "opened = []\n"
            "for i in range(1000):\n"
            "    try: os.fstat(i)\n"
            "    except OSError: continue\n"
            "    opened.append(i)\n"
            "print(opened, sys.stdin.read() == '', os.getcwd() == os.environ['HOME'])\n"
            "print(*sorted(os.environ))"
        )
    assert result.stdout.splitlines() == [
        "[0, 1, 2] True True",
        "HOME LANG OMP_NUM_THREADS OPENBLAS_NUM_THREADS PYTHONHASHSEED PYTHONUTF8 TMPDIR",
    ]


@confined
def test_the_same_program_prints_the_same() -> None:
    assert len({run_code("print(hash('a'), list({'a', 'b', 'c', 'd'}))").stdout for _ in range(3)}) == 1


@confined
def test_programs_run_side_by_side_and_leave_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import os, time; open('{}', 'w').close(); time.sleep(0.2); print(os.listdir())\nos.listdir('..')"
    descriptors = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run_code, [program.format(i) for i in range(8)]))
    assert [result.stdout for result in results] == [f"['{i}']\n" for i in range(8)]
    assert all("PermissionError" in result.stderr for result in results)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@confined
def test_a_program_ends_with_the_process_that_asked_for_it() -> None:
    driver = (
        "import os, threading, time\n"
        "from pathlib import Path\n"
        "from copyspec_engine.lab.evaluation.scoring.sandbox import Limits, run_code\n"
        "limits = Limits(wall_s=100)\n"
        "threading.Thread(target=run_code, args=('import time; time.sleep(100)', limits), daemon=True).start()\n"
        "facts = child = ''\n"
        "while 'Seccomp:\\t2' not in facts:\n"  # until it is confined
        "    time.sleep(0.01)\n"
        "    child = ''.join(p.read_text() for p in Path('/proc/self/task').glob('*/children')).strip()\n"
        "    facts = Path('/proc', child, 'status').read_text() if child else ''\n"
        "print(child, flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        parent.kill()
    for _ in range(1000):
        if not child.exists() or (child / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the program still runs")


@confined
def test_the_check_passes_where_programs_are_confined() -> None:
    check_sandbox()


LAYERS = {
    "Landlock": ("_LANDLOCK_RESTRICT_SELF = 444, 445, 446", "_LANDLOCK_RESTRICT_SELF = 9999, 445, 446"),
    "version 0": ("_LEAST_ABI = 3", "_LEAST_ABI = 10**6"),
    "seccomp filters (Invalid argument)": (
        "_PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38",
        "_PR_SET_NO_NEW_PRIVS = 1, 4, 9999, 38",
    ),
    "no new privileges (Invalid argument)": ("22, 38", "22, 9999"),
    "dropping capabilities (Invalid argument)": ("0x20080522", "0x12345678"),
    "an x86_64 or aarch64 processor": ("_COLUMNS = {", "_COLUMNS = {} and {"),
    "an interpreter that starts": ("def main()", "def main(nothing)"),
}


@confined
@pytest.mark.parametrize("missing", LAYERS)
def test_no_program_runs_where_a_layer_is_missing(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old, new = LAYERS[missing]
    assert old in sandbox._BOOTSTRAP
    monkeypatch.setattr(sandbox, "_BOOTSTRAP", sandbox._BOOTSTRAP.replace(old, new))
    said = missing if missing != "version 0" else "this kernel has its version"
    with pytest.raises(ConfigError) as error:
        check_sandbox()
    assert said in str(error.value)
    assert str(error.value).startswith("Cannot run generated code safely without ")
    assert str(error.value).endswith(": leave out --execute-code")


@confined
@pytest.mark.parametrize(
    "layer",
    [
        '_restrict_paths(kernel, list(_libraries(spec["packages"])), spec["folder"])',
        'kernel.prctl("seccomp filters", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described)',
    ],
)
def test_the_check_finds_a_layer_that_does_not_hold(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that accepts the calls without enforcing them."""
    assert layer in sandbox._BOOTSTRAP
    monkeypatch.setattr(sandbox, "_BOOTSTRAP", sandbox._BOOTSTRAP.replace(layer, "pass"))
    with pytest.raises(ConfigError, match="enforces Landlock and seccomp"):
        check_sandbox()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_no_program_runs_on_other_systems(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(ConfigError, match=rf"without Linux \(this is {system}\): leave out --execute-code"):
        run_code("print(1)")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"cpu_s": 0}, "Got cpu_s=0 but expected a whole number >= 1"),
        ({"cpu_s": 1.5}, "Got cpu_s=1.5 but expected a whole number >= 1"),
        ({"wall_s": 0}, "Got wall_s=0 but expected a number > 0"),
        ({"wall_s": float("nan")}, "Got wall_s=nan but expected a number > 0"),
        ({"memory_bytes": 1000}, "Got memory_bytes=1000 but expected a whole number >= 134217728"),
        ({"file_bytes": -1}, "Got file_bytes=-1 but expected a whole number >= 0"),
        ({"output_bytes": 0}, "Got output_bytes=0 but expected a whole number >= 1"),
    ],
)
def test_limits_that_cannot_work_are_named(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Limits(**limits)  # type: ignore[arg-type]
    assert str(error.value) == message


@confined
def test_the_least_limits_still_run_a_program() -> None:
    result = run_code("print(1)", Limits(cpu_s=1, memory_bytes=128 * 1024**2, file_bytes=0))
    assert (result.status, result.stdout) == ("ok", "1\n")
    assert run_code("open('a', 'w').close()", Limits(file_bytes=0)).status == "ok"
    assert "File too large" in run_code("open('a', 'wb', buffering=0).write(b'b')", Limits(file_bytes=0)).stderr
