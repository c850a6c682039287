"""Downloads from a local hub server: complete, resumed after interruptions, and verified."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest
from child_processes import finish, wait
from cli_runner import assert_refused, run_cli
from hub_server import COMMIT, Hub, serve
from tiny_models import names_in, tiny_geometry, write_gguf, write_hf_folder

from numba_atomflow import home
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.errors import HubError, OptionError, SourceError
from numba_atomflow.sources import hub as hub_module
from numba_atomflow.sources import local_source, open_source
from numba_atomflow.sources.hub import HubModel, fetch
from numba_atomflow.sources.huggingface_text import TEXT_FILES

pytest.importorskip("huggingface_hub", reason="the hub's client fetches models: pip install '.[hub]'")

REPOSITORY = Path(__file__).parents[2]
REPO, WEIGHTS = "some-org/Tiny-Model.v1", "model.safetensors"
MODEL = HubModel(REPO)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(home.ENVIRONMENT_VARIABLE, str(tmp_path / "home"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def hub(source: Path) -> Iterator[Hub]:
    with serve(REPO, source) as hub:
        yield hub


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client's delay of a second before each of five retries, and with chunks smaller than its 10 MB."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)


def folder() -> Path:
    return home.downloads() / f"some-org--Tiny-Model.v1@{COMMIT[:12]}"


def refused(hub: Hub, *fragments: str, model: HubModel = MODEL) -> None:
    """The download fails with one sentence that has all fragments."""
    with pytest.raises(HubError) as caught:
        fetch(model, endpoint=hub.endpoint)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-0.6B", HubModel("Qwen/Qwen3-0.6B")),
        ("a/b.c_d-e", HubModel("a/b.c_d-e")),
        ("org/repo/model-Q8_0.gguf", HubModel("org/repo", "model-Q8_0.gguf")),
        ("org/repo/config.json", None),
        ("org/repo/deep/model.gguf", None),
        ("/org/repo", None),
        ("./repo", None),
        ("../repo", None),
        ("~/repo", None),
        ("org/../repo", None),
        ("org/..", None),
        ("repo", None),
        ("folder/model.gguf", None),
        ("folder/model.safetensors", None),
        ("org/re po", None),
        ("org/", None),
        ("org/" + "x" * 97, None),
    ],
)
def test_names_of_hub_models(text: str, expected: HubModel | None) -> None:
    assert HubModel.parse(text) == expected


def test_local_paths_take_precedence(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent.parent)
    name = f"{source.parent.name}/hf"
    assert HubModel.parse(name) is not None
    assert local_source(name) == Path(name)
    with pytest.raises(OptionError, match=f"--revision is for models of the hub .*, and {name} is not one"):
        local_source(name, "main")


# --- downloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_downloaded_once(tmp_path: Path, shards: int) -> None:
    write_hf_folder(tmp_path / "hf", shards=shards)
    for name in TEXT_FILES:  # all that is read of a folder is fetched
        if not (tmp_path / "hf" / name).exists():
            (tmp_path / "hf" / name).write_text("{}")
    steps: list[tuple[str, int, int]] = []
    with serve(REPO, tmp_path / "hf") as hub:
        hub.files |= {"README.md": b"hello", "pytorch_model.bin": b"pickled", "original/consolidated.safetensors": b"x"}
        got = fetch(MODEL, lambda *step: steps.append(step), hub.endpoint)
        requested = len(hub.requests)
        assert fetch(MODEL, endpoint=hub.endpoint) == got == folder()
        assert len(hub.requests) == requested  # nothing but the listing is asked for again
    assert names_in(got) == sorted([".lock", *names_in(tmp_path / "hf")])
    for path in (tmp_path / "hf").iterdir():
        assert (got / path.name).read_bytes() == path.read_bytes()
    assert all(0 <= done <= total for _, done, total in steps)
    assert {name for name, _, _ in steps} == set(names_in(tmp_path / "hf"))
    assert open_source(got).geometry == tiny_geometry()


def test_only_the_gguf_file_is_downloaded(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    with serve(REPO, {"tiny.gguf": data, "other.gguf": b"x", "README.md": b"x"}) as hub:
        got = fetch(HubModel(REPO, "tiny.gguf"), endpoint=hub.endpoint)
        assert [name for name, _ in hub.requests] == ["tiny.gguf"]
        assert got == folder() / "tiny.gguf"
        assert got.read_bytes() == data
        refused(hub, "has no file nine.gguf", model=HubModel(REPO, "nine.gguf"))
        refused(hub, f"holds GGUF files; name one of them: {REPO}/other.gguf")


def test_all_parts_of_a_split_gguf_are_downloaded(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_gguf(tmp_path / "parts" / "tiny.gguf", tensors_per_part=10)
    names = names_in(tmp_path / "parts")
    with serve(REPO, tmp_path / "parts") as hub:
        got = fetch(HubModel(REPO, names[1]), endpoint=hub.endpoint)
        assert sorted({name for name, _ in hub.requests}) == names
        assert open_source(got).path.name == names[0]
        del hub.files[names[2]]
        refused(hub, f"has no file {names[2]}", model=HubModel(REPO, names[0], "other"))


def test_convert_with_a_hub_name(hub: Hub, tmp_path: Path) -> None:
    arguments = ("convert", REPO, tmp_path / "out", "--revision", "main", "--json")
    done = run_cli(home.home(), *arguments, env={"HF_ENDPOINT": hub.endpoint})
    assert (done.code, done.err) == (0, "")
    with Checkpoint.open(Path(json.loads(done.out)["path"])) as checkpoint:
        assert json.loads(checkpoint.metadata["source"])["path"] == folder().name
        checkpoint.verify()


def test_convert_without_a_network(tmp_path: Path) -> None:
    done = run_cli(home.home(), "convert", REPO, tmp_path / "out", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert_refused(done, f"There is no folder or file {REPO} here, and the hub could not be reached")


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_a_lost_connection_is_resumed_at_once(hub: Hub, no_delays: None) -> None:
    hub.breaks[WEIGHTS] = 1_200_000  # of 3.1 MB
    got = fetch(MODEL, endpoint=hub.endpoint)
    starts = [start for name, start in hub.requests if name == WEIGHTS]
    assert starts == [0, 1_200_000, 2_400_000]
    assert (got / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_an_interrupted_download_is_resumed_by_the_next(hub: Hub, no_delays: None) -> None:
    def progress(name: str, done: int, _total: int) -> None:
        if name == WEIGHTS and done:
            hub.breaks[WEIGHTS] = 0  # from now on nothing arrives

    hub.breaks[WEIGHTS] = 100_000
    with pytest.raises(HubError, match=r"could not be reached .* resumes where it stopped"):
        fetch(MODEL, progress, hub.endpoint)
    assert WEIGHTS not in names_in(folder())
    there = (folder() / f"{WEIGHTS}.partial").stat().st_size
    assert there == 100_000
    hub.breaks.clear()
    hub.requests.clear()
    assert (fetch(MODEL, endpoint=hub.endpoint) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.requests == [(WEIGHTS, there)]  # the rest of it, and no other file again
    assert not (folder() / f"{WEIGHTS}.partial").exists()


SLOW = """
import sys, time
from numba_atomflow.sources.hub import HubModel, fetch

def progress(name, done, total):
    if name == "model.safetensors" and done:
        print("some of it is there", flush=True)
        time.sleep(60)

fetch(HubModel(sys.argv[1]), progress, sys.argv[2])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_download_of_a_terminated_process_is_resumed_by_the_next(tmp_path: Path, how: signal.Signals) -> None:
    data = os.urandom(25_000_000)  # the client writes pieces of 10 MB
    files = {"config.json": b"{}", WEIGHTS: data}
    with serve(REPO, files) as hub:
        command = [sys.executable, "-c", SLOW, REPO, hub.endpoint]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"some of it is there\n"
            process.send_signal(how)
            finish(process)
        there = (folder() / f"{WEIGHTS}.partial").stat().st_size
        assert there > 1_000_000
        hub.requests.clear()
        assert (fetch(MODEL, endpoint=hub.endpoint) / WEIGHTS).read_bytes() == data
        assert hub.requests == [(WEIGHTS, there)]


def test_a_partial_file_that_is_too_long(hub: Hub) -> None:
    folder().mkdir(parents=True)
    (folder() / f"{WEIGHTS}.partial").write_bytes(hub.files[WEIGHTS] + b"x")
    assert (fetch(MODEL, endpoint=hub.endpoint) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_of_two_processes_the_second_waits(tmp_path: Path) -> None:
    files = {"config.json": b"{}", WEIGHTS: os.urandom(2_000_000)}
    code = "import sys; from numba_atomflow.sources.hub import *; fetch(HubModel(sys.argv[1]), None, sys.argv[2])"
    with serve(REPO, files) as hub:
        command = [sys.executable, "-c", code, REPO, hub.endpoint]
        both = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
        assert [wait(process) for process in both] == [0, 0]
        assert sorted(name for name, _ in hub.requests) == sorted(files)  # each file came once
    assert (folder() / WEIGHTS).read_bytes() == files[WEIGHTS]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_corrupted_file_is_removed(hub: Hub, name: str) -> None:
    hub.damaged.add(name)
    refused(hub, f"{name} of {REPO} was corrupted in transit", "run the command again")
    assert not [path for path in folder().iterdir() if path.name.startswith(name)]
    hub.damaged.clear()
    assert (fetch(MODEL, endpoint=hub.endpoint) / name).read_bytes() == hub.files[name]


def test_damage_of_a_partial_file_is_detected(hub: Hub) -> None:
    folder().mkdir(parents=True)
    (folder() / f"{WEIGHTS}.partial").write_bytes(b"\0" * 1000)
    refused(hub, f"{WEIGHTS} of {REPO} was corrupted in transit")


def test_a_missing_shard(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", shards=2)
    with serve(REPO, tmp_path / "hf") as hub:
        del hub.files["model-00002-of-00002.safetensors"]
        refused(hub, "has no file model-00002-of-00002.safetensors")
        hub.files["model.safetensors.index.json"] = b"{"
        (folder() / "model.safetensors.index.json").unlink()
        with pytest.raises(SourceError, match=r"index\.json is not valid JSON"):
            fetch(MODEL, endpoint=hub.endpoint)


def test_a_vocabulary_in_another_format_is_refused_before_the_download_of_weights(hub: Hub) -> None:
    hub.files["spiece.model"] = hub.files.pop("tokenizer.json")
    refused(hub, "holds its tokenizer as spiece.model, but no tokenizer.json")
    assert WEIGHTS not in [name for name, _ in hub.requests]


@pytest.mark.parametrize("beside", [True, False])
def test_the_files_before_tokenizer_json_are_downloaded_only_without_it(hub: Hub, beside: bool) -> None:
    hub.files["vocab.json"] = hub.files["merges.txt"] = b"x"
    if not beside:
        del hub.files["tokenizer.json"]
    fetch(MODEL, endpoint=hub.endpoint)
    assert ({"vocab.json", "merges.txt"} <= {name for name, _ in hub.requests}) is not beside


@pytest.mark.parametrize("files", [{"README.md": b"x"}, {"config.json": b"{}", "pytorch_model.bin": b"x"}])
def test_a_model_without_safetensors(files: dict[str, bytes]) -> None:
    with serve(REPO, files) as hub:
        refused(hub, f"{REPO} on the hub holds no config.json with safetensors weights")


@pytest.mark.parametrize(
    ("status", "code", "fragment"),
    [
        (401, "RepoNotFound", "no such model on the hub that you may see"),
        (403, "GatedRepo", "requires that you accept its terms"),
        (404, "RevisionNotFound", "has no revision 'v9'"),
        (500, "", "the hub answered 500"),
    ],
)
def test_error_responses(hub: Hub, no_delays: None, status: int, code: str, fragment: str) -> None:
    hub.refusal = (status, code)
    refused(hub, REPO, fragment, model=HubModel(REPO, revision="v9"))


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, no_delays: None) -> None:
    with pytest.raises(HubError, match=f"no folder or file {REPO} here, and the hub could not be reached") as caught:
        fetch(MODEL, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(hub, "could not be reached", "offline")


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    found = util.find_spec
    monkeypatch.setattr(hub_module, "find_spec", lambda name: None if name == "huggingface_hub" else found(name))
    with pytest.raises(HubError, match=r"no folder or file some-org/.* here; .* pip install 'numba-atomflow\[hub\]'"):
        fetch(MODEL)


def test_free_space_is_checked_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    refused(hub, "MB are free; make room", str(folder()))


def test_a_read_only_home(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    refused(hub, "could not be kept in", "NUMBA_ATOMFLOW_HOME")
