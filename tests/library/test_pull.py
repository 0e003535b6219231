"""A pull fetches what is needed, checks all of it, and continues wherever it was ended; no lie gets through."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from argosy.checkpoint.hub import Source
from argosy.checkpoint.pooling import declared_pooling
from argosy.cli.commands import pull as cli_pull
from argosy.cli.main import main
from argosy.errors import CheckpointError, DiskFull, FetchFailed, UsageError
from argosy.forecast.planning import plan_remote, summarise
from argosy.library import kept, pull
from argosy.library.places import find_models
from argosy.library.pull import Moment, ask_hub, fetch, look_up
from argosy.model.encoders.reading import EncoderFiles, find_encoders
from argosy.model.families import open_model
from argosy.open.models import locate_model, open_files
from tests.cli.terminal import on_terminal
from tests.helpers.command import COMMAND
from tests.helpers.hub_server import REPOSITORY, REVISION, Served, directory_files, served, true_listing
from tests.library.caches import GGUF, REFERENCE

SMALL = REFERENCE / "mixtral_head_dim_tied_sharded"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NEEDED = {"config.json", "model.safetensors.index.json", "tokenizer_config.json", "LICENSE", *SHARDS}
OTHERS = {
    "README.md": (b"words", 5),
    "pytorch_model.bin": (b"x" * 100, 100),
    "original/config.json": (b"{}", 2),
}


def files() -> dict[str, tuple[bytes, int]]:
    small = directory_files(SMALL)
    beside = {"tokenizer_config.json": (b"{}", 2), "LICENSE": (b"do what you like", 16)}
    return {name: small[name] for name in small if not name.startswith("ref")} | beside | OTHERS


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(files()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(autouse=True)
def fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "_MOST_FAILURES", 1)


def in_cache(hub: Path) -> dict[str, bytes]:
    """The files of the snapshot by name."""
    snapshot = hub / "models--owner--model" / "snapshots" / REVISION
    return {
        str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()
    }


def test_what_is_needed_is_fetched_into_the_cache_that_the_hubs_own_client_reads(
    server: Served, hub: Path
) -> None:
    path = fetch(look_up(REPOSITORY))
    assert in_cache(hub) == {name: server.files[name][0] for name in NEEDED}
    assert path == locate_model("model") == locate_model(REPOSITORY)
    assert open_model(path).dense_bytes == open_model(SMALL).dense_bytes
    theirs = huggingface_hub.snapshot_download(
        REPOSITORY, cache_dir=hub, local_files_only=True, allow_patterns=list(NEEDED)
    )
    assert Path(theirs) == path
    (repository,) = huggingface_hub.scan_cache_dir(hub).repos
    assert (repository.repo_id, repository.size_on_disk) == (REPOSITORY, look_up(REPOSITORY).nbytes)
    assert kept.read().pulled[REPOSITORY].revision == REVISION
    sent = server.bytes_sent
    assert fetch(look_up(REPOSITORY)) == path
    assert server.bytes_sent - sent < 10_000  # the list of files alone


def test_the_modules_of_an_embedding_model_are_fetched_with_it(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    texts = {
        "modules.json": json.dumps(listed),
        "1_Pooling/config.json": json.dumps({"pooling_mode_lasttoken": True}),
        "onnx/a/config.json": "{}",
    }
    modules = {name: (text.encode(), len(text)) for name, text in texts.items()}
    with served(files() | modules) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        path = fetch(look_up(REPOSITORY))
    assert not (path / "onnx").exists()
    assert declared_pooling(open_model(path)) == "last"


def test_one_quantisation_and_its_tower_are_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = directory_files(GGUF)
    content = {
        "Q4_K_M/m-Q4_K_M.gguf": gguf["model.gguf"],
        "m-BF16.gguf": gguf["model.gguf"],
        "m-F16.gguf": gguf["model.gguf"],
        "mmproj-F32.gguf": (b"not this one", 12),
        "mmproj-F16.gguf": gguf["mmproj-model.gguf"],
    }
    with served(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        download = look_up(f"{REPOSITORY}:Q4_K_M")
        assert download.name == f"{REPOSITORY}:Q4_K_M"
        path = fetch(download)
        assert set(in_cache(hub)) == {"Q4_K_M/m-Q4_K_M.gguf", "mmproj-F16.gguf"}
        assert locate_model("model:Q4_K_M") == path
        assert isinstance(find_encoders(open_files(path))["picture"], EncoderFiles)
        assert look_up(f"{REPOSITORY}:f16").files[0].name == "m-F16.gguf"  # and not BF16
        with pytest.raises(UsageError, match="has 3 models"):
            look_up(REPOSITORY)


def test_two_files_of_one_format_keep_the_names_under_which_they_were_pulled(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = directory_files(GGUF)["model.gguf"]
    content = {f"{name}/M-{name}.gguf": model for name in ("IQ2_KL", "smol-IQ2_KL", "Q8_0")}
    smol, plain = f"{REPOSITORY}:M-smol-IQ2_KL", f"{REPOSITORY}:M-IQ2_KL"
    with served(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        page = f"{server.url}/{REPOSITORY}/blob/main/IQ2_KL/M-IQ2_KL.gguf"
        for text in (page, f"{REPOSITORY}:IQ2_KL/M-IQ2_KL.gguf"):
            assert look_up(text).files[0].name == "IQ2_KL/M-IQ2_KL.gguf"
        assert [offer.format for offer in ask_hub(REPOSITORY).offers()] == [
            "M-IQ2_KL",
            "M-smol-IQ2_KL",
            "Q8_0",
        ]
        for asked, name in (("smol-IQ2_KL", smol), ("IQ2_KL", plain), ("Q8_0", f"{REPOSITORY}:Q8_0")):
            download = look_up(f"{REPOSITORY}:{asked}")
            assert download.name == name
            path = fetch(download)
            assert {model.name for model in find_models().models} == set(kept.read().pulled)
            for written in (name, f"{REPOSITORY}:{asked}", f"model:{asked}", f"{REPOSITORY}:{path.name}"):
                assert locate_model(written) == path


class Killed(BaseException):
    """No handler for errors catches it, as none catches a kill."""


def killed_after(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the process end when it has written so many bytes."""
    left = num_bytes

    def append(descriptor: int, data: bytes) -> None:
        nonlocal left
        os.write(descriptor, data[:left])
        if len(data) > left:
            raise Killed
        left -= len(data)

    monkeypatch.setattr(pull, "append", append)


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.full)])
def test_a_pull_that_is_killed_at_any_of_50_bytes_continues_from_there(
    step: int, server: Served, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = pull.append
    monkeypatch.setattr(pull, "_NUM_AT_ONCE", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the kernel does not die here
    total = look_up(REPOSITORY).nbytes
    for number in range(0, 50, step):
        cache = tmp_path / f"cache-{number}"
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        offset = number * total // 50 + number % 7
        killed_after(monkeypatch, offset)
        with pytest.raises(Killed):
            fetch(look_up(REPOSITORY))
        assert in_cache(cache) == {}  # nothing that looks whole
        again = look_up(REPOSITORY)
        assert again.here_bytes == offset
        monkeypatch.setattr(pull, "append", append)
        server.ranges.clear()
        fetch(again)
        assert sum(last + 1 - first for _, first, last in server.ranges) == total - offset
        assert in_cache(cache) == {name: server.files[name][0] for name in NEEDED}


def test_a_command_that_is_killed_with_signal_9_continues(server: Served, hub: Path) -> None:
    server.holds[SHARDS[0]] = 50_000
    command = [COMMAND, "pull", REPOSITORY, "--yes", "--memory", "2GiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        blobs = hub / "models--owner--model" / "blobs"
        wait_until(lambda: 50_000 in sizes_in(blobs), process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    server.is_held.set()
    server.holds.clear()
    server.ranges.clear()
    fetch(look_up(REPOSITORY))
    assert (SHARDS[0], 50_000, server.files[SHARDS[0]][1] - 1) in server.ranges
    assert in_cache(hub) == {name: server.files[name][0] for name in NEEDED}


def test_a_pull_that_is_interrupted_says_in_one_line_how_far_it_came_and_how_to_resume(
    server: Served, hub: Path
) -> None:
    server.holds = {SHARDS[0]: 50_000, SHARDS[1]: 40_000}
    whole = needed_sizes()
    done = sum(whole.values()) - sum(whole[name] - server.holds[name] for name in SHARDS)
    command = [COMMAND, "pull", REPOSITORY, "--yes", "--memory", "2GiB"]
    with on_terminal(command) as terminal:
        blobs = hub / "models--owner--model" / "blobs"
        wait_until(lambda: sum(sizes_in(blobs)) == done, terminal.process)
        terminal.process.send_signal(signal.SIGINT)
        terminal.until(
            f"Stopped at {done / 1e3:.0f} of {sum(whole.values()) / 1e3:.0f} kB. "
            "Run the same command to resume.\r\n".encode()
        )
        assert terminal.process.wait(30) == 130
        assert terminal.shown == b""
    server.is_held.set()


def needed_sizes() -> dict[str, int]:
    return {name: size for name, (_, size) in files().items() if name in NEEDED}


def sizes_in(folder: Path) -> list[int]:
    """Sizes of the files in a folder to which another program writes."""
    found = []
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # it was renamed meanwhile
            found.append(path.stat().st_size)
    return found


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    until = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < until
        assert process is None or process.poll() is None, process.stderr
        time.sleep(0.01)


def test_a_connection_that_is_cut_is_opened_again(server: Served, hub: Path) -> None:
    server.cuts[SHARDS[1]] = 40_000
    fetch(look_up(REPOSITORY))
    assert [first for name, first, _ in server.ranges if name == SHARDS[1]] == [0, 40_000]
    assert in_cache(hub) == {name: server.files[name][0] for name in NEEDED}


def test_a_server_without_ranges_is_read_again_from_the_beginning(
    server: Served, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cuts[SHARDS[1]] = 40_000
    server.answers_ranges = False
    fetch(look_up(REPOSITORY))
    assert in_cache(hub) == {name: server.files[name][0] for name in NEEDED}


def test_a_connection_that_fails_again_and_again_is_given_up_and_what_came_is_kept(
    server: Served, hub: Path
) -> None:
    server.lies[SHARDS[0]] = {"status": "503"}
    with pytest.raises(FetchFailed, match="answers 503"):
        fetch(look_up(REPOSITORY))
    server.lies.clear()
    fetch(look_up(REPOSITORY))
    assert set(in_cache(hub)) == NEEDED


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_file_that_is_corrupted_is_refused_and_not_kept(server: Served, hub: Path, name: str) -> None:
    true = server.files[name][0]
    server.sent_instead[name] = true[:-2] + bytes([true[-2] ^ 1]) + true[-1:]
    with pytest.raises(CheckpointError, match=f"{name} does not match the hub.s list: its digest is"):
        fetch(look_up(REPOSITORY))
    blob = next(blob for blob in look_up(REPOSITORY).blobs if blob.name == name)
    assert not blob.path.exists()
    assert not blob.partial.exists()
    assert in_cache(hub) == {}


def test_a_damaged_beginning_is_fetched_once_more(server: Served, hub: Path) -> None:
    blob = next(blob for blob in look_up(REPOSITORY).blobs if blob.name == SHARDS[0])
    blob.partial.parent.mkdir(parents=True)
    blob.partial.write_bytes(bytes(1000))
    fetch(look_up(REPOSITORY))
    assert [first for name, first, _ in server.ranges if name == SHARDS[0]] == [1000, 0]
    assert blob.path.read_bytes() == server.files[SHARDS[0]][0]


def lying(server: Served, name: str, **lies: Any) -> None:
    server.listing = true_listing(server)
    entry = next(entry for entry in server.listing["siblings"] if entry["rfilename"] == name)
    entry.update(lies)
    for key in [key for key, value in entry.items() if value is None]:
        del entry[key]


@pytest.mark.parametrize("nbytes", [1, 91_895, 91_897])
def test_a_size_that_lies_is_refused(server: Served, hub: Path, nbytes: int) -> None:
    lying(server, SHARDS[0], size=nbytes)
    with pytest.raises(
        CheckpointError, match=r"is 91896 bytes long, and its list of files says|were requested"
    ):
        fetch(look_up(REPOSITORY))
    assert in_cache(hub) == {}


@pytest.mark.parametrize(
    "lies",
    [
        {"size": None},
        {"size": -1},
        {"size": "1"},
        {"size": 1 << 60},
        {"lfs": None, "blobId": None},
        {"lfs": {"sha256": "x"}, "blobId": "../x"},
    ],
)
def test_a_file_without_a_size_or_a_digest_is_refused(server: Served, lies: dict[str, Any]) -> None:
    lying(server, SHARDS[0], **lies)
    with pytest.raises(CheckpointError, match="lacks the size or digest of model-00001"):
        look_up(REPOSITORY)


def test_a_size_that_no_drive_has_is_refused_before_a_byte_is_fetched(server: Served) -> None:
    lying(server, SHARDS[0], size=1 << 50)
    with pytest.raises(DiskFull, match=r"needs 1125900 GB more"):
        fetch(look_up(REPOSITORY))
    assert server.ranges == []


def test_a_pull_that_continues_needs_room_for_the_missing_bytes_alone(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.lies[SHARDS[-1]] = {"status": "503"}
    with pytest.raises(FetchFailed, match="answers 503"):
        fetch(look_up(REPOSITORY))
    server.lies.clear()
    download = look_up(REPOSITORY)
    assert download.here_bytes > 0
    room = download.nbytes - download.here_bytes + pull._RESERVE_BYTES
    monkeypatch.setattr(pull.resources, "free_disk_bytes", lambda _: room - 1)
    with pytest.raises(DiskFull, match="more, and"):
        fetch(download)
    monkeypatch.setattr(pull.resources, "free_disk_bytes", lambda _: room)
    assert fetch(download).is_dir()


def test_a_drive_that_fills_during_a_fetch_is_reported_and_the_same_command_continues(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(pull, "append", refuse)
        with pytest.raises(DiskFull, match=f"no room for {REPOSITORY} in ") as caught:
            fetch(look_up(REPOSITORY))
    assert "it continues" in str(caught.value.hint)
    assert fetch(look_up(REPOSITORY)).is_dir()


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x", "/etc/x", "a//b", ".", "a/./b", "..\\x", "a/"]
)
def test_a_name_that_leads_outside_is_refused(server: Served, hub: Path, name: str) -> None:
    server.listing = true_listing(server)
    server.listing["siblings"].append({"rfilename": name, "size": 1, "blobId": "a" * 40})
    with pytest.raises(CheckpointError, match="which leads outside the repository"):
        look_up(REPOSITORY)
    assert not hub.exists()


def test_weights_come_from_another_host_only_over_https_and_a_list_never(
    server: Served, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download = look_up(REPOSITORY)
    server.redirect_to = "http://example.org/weights"
    with pytest.raises(FetchFailed, match="only https is opened"):
        fetch(download)
    with served(files()) as storage:
        server.redirect_to = f"{storage.url}/storage/{SHARDS[0]}"  # for both shards
        with pytest.raises(CheckpointError):
            fetch(download)
        assert storage.tokens
        assert {token for _, token in storage.tokens} == {None}
    assert {token for _, token in server.tokens} == {"Bearer hf_secret"}
    with served(files()) as other:
        server.listing_from = other.url
        with pytest.raises(CheckpointError, match="its list of files comes from another host"):
            look_up(REPOSITORY)
        assert {token for _, token in other.tokens} == {None}
    assert in_cache(hub) == {}


def test_a_model_of_another_hub_and_what_is_no_model_are_refused(server: Served) -> None:
    with pytest.raises(UsageError, match="is on another hub") as refusal:
        look_up("https://hub.example/owner/model")
    assert "HF_ENDPOINT=https://hub.example argosy pull owner/model" in str(refusal.value)
    for text in ("model", "./owner/model", f"{server.url}/storage/model.gguf", "demo"):
        with pytest.raises(UsageError, match="models on the hub are named OWNER/NAME, found '"):
            look_up(text)
    assert look_up(f"{server.url}/{REPOSITORY}").name == REPOSITORY


@pytest.mark.parametrize("value", ["1", "on", "True", "YES"])
def test_offline_nothing_is_asked(server: Served, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    download = look_up(REPOSITORY)
    fetch(download)
    server.tokens.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    for ask in (lambda: look_up(REPOSITORY), lambda: plan_remote(Source(server.url, REPOSITORY))):
        with pytest.raises(FetchFailed, match="HF_HUB_OFFLINE is set"):
            ask()
    assert locate_model(REPOSITORY) == download.path
    assert server.tokens == []


def test_the_plan_comes_before_the_first_byte_of_weights_and_is_that_of_the_files(
    server: Served, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", REPOSITORY]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "error: cannot ask for confirmation: stdin is not a terminal\n"
        "hint: `--yes` downloads 183 kB and accepts the licence\n"
    )
    for shard in SHARDS:
        header = 8 + int.from_bytes(server.files[shard][0][:8], "little")
        assert max(last for name, _, last in server.ranges if name == shard) == header - 1
    assert not hub.exists()
    lines = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert lines["fits"].startswith("yes, with every expert in memory; ")
    assert lines["licence"] == f"apache-2.0, see {server.url}/{REPOSITORY}"
    assert lines["size"] == "183 kB in 6 files"
    assert "at 100 Mbit/s" in lines["time"]
    assert lines["drive"].endswith(str(hub))
    planned = plan_remote(look_up(REPOSITORY).source)[1]
    path = fetch(look_up(REPOSITORY))
    found = summarise(path)
    # Tensors of remote shards are listed as one file, where records begin at other offsets: two pages of one read.
    assert planned.smallest_bytes == pytest.approx(found.smallest_bytes, abs=16384)
    assert planned.resident_bytes == pytest.approx(found.resident_bytes, abs=16384)


def test_a_model_that_is_not_run_is_refused_before_its_weights(
    server: Served, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(server.files["config.json"][0]) | {"model_type": "gpt2"}
    server.files["config.json"] = (data := json.dumps(config).encode(), len(data))
    assert main(["pull", REPOSITORY, "--yes"]) == 4
    assert "gpt2" in capsys.readouterr().err
    assert not hub.exists()


def test_several_pulls_link_a_snapshot_at_the_same_moment(server: Served, hub: Path) -> None:
    download = look_up(REPOSITORY)
    fetch(download)
    failures: list[BaseException] = []

    def link() -> None:
        try:
            for _ in range(25):
                pull._link(download)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=link) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    folder = hub / "models--owner--model"
    assert (folder / "refs/main").read_text() == REVISION
    assert [path.name for path in (folder / "refs").iterdir()] == ["main"]


@pytest.mark.parametrize(
    "place",
    [
        ".locks",
        ".locks/models--owner--model",
        "models--owner--model",
        "models--owner--model/blobs",
        "models--owner--model/refs",
        "models--owner--model/snapshots",
        f"models--owner--model/snapshots/{REVISION}",
    ],
)
def test_a_link_where_a_directory_belongs_is_refused(
    server: Served, hub: Path, tmp_path: Path, place: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (hub / place).parent.mkdir(parents=True)
    (hub / place).symlink_to(victim)
    with pytest.raises(UsageError, match=f"{place} cannot be written: it is a symbolic link"):
        fetch(look_up(REPOSITORY))
    assert not list(victim.iterdir())


def test_a_link_in_the_place_of_a_file_leads_nowhere(server: Served, hub: Path, tmp_path: Path) -> None:
    """A link that is replaced goes; one that would be opened is refused."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    folder = hub / "models--owner--model"
    download = look_up(REPOSITORY)
    for place in (f"snapshots/{REVISION}/LICENSE", "refs/main", f"blobs/{download.blobs[0].digest}"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(victim)
    fetch(download)
    assert victim.read_bytes() == b"keep"
    assert in_cache(hub) == {name: server.files[name][0] for name in NEEDED}
    download.blobs[0].path.unlink()
    download.blobs[0].partial.symlink_to(victim)
    with pytest.raises(
        UsageError, match=f"{download.blobs[0].digest}.incomplete cannot be written: it is a symb"
    ):
        fetch(download)
    assert victim.read_bytes() == b"keep"


def test_two_pulls_at_once_share_the_work_and_the_second_says_so(
    server: Served, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = look_up(REPOSITORY)
    server.holds[SHARDS[0]] = 50_000
    moments: list[list[Moment]] = [[], []]
    paths: list[Path] = []
    pulls = [
        threading.Thread(target=lambda mine=mine: paths.append(fetch(download, mine.append)))
        for mine in moments
    ]
    pulls[0].start()
    wait_until(lambda: (SHARDS[0], 0, 91_895) in server.ranges)
    pulls[1].start()
    wait_until(lambda: any(moment.waits_for == (SHARDS[0],) for moment in moments[1]))
    server.is_held.set()
    for one in pulls:
        one.join(30)
    assert paths == [download.path] * 2
    assert sorted(name for name, *_ in server.ranges) == sorted(NEEDED)  # each file once
    assert moments[1][-1] == Moment(download.nbytes, download.nbytes)
    assert in_cache(hub) == {name: server.files[name][0] for name in NEEDED}


def test_a_lock_that_its_holder_removed_is_not_taken_for_one(server: Served, hub: Path) -> None:
    """Some clients remove their lock files."""
    download = look_up(REPOSITORY)
    fetching = pull._Fetching(download, lambda moment: None)
    blob = download.blobs[0]
    with fetching._locked(Path("lock"), blob) as first:
        assert first
        (hub / "lock").unlink()
        with fetching._locked(Path("lock"), blob) as second:
            assert second  # on a new file


def test_a_cache_that_cannot_be_written_is_named(server: Served, hub: Path) -> None:
    hub.parent.mkdir()
    hub.write_text("no directory")
    with pytest.raises(UsageError, match=r"hub.* cannot be written: Not a directory"):
        fetch(look_up(REPOSITORY))


def test_a_model_that_is_nowhere_is_named(server: Served) -> None:
    with pytest.raises(CheckpointError, match="the hub has no model owner/none"):
        look_up("owner/none")


def test_without_a_terminal_progress_is_a_line_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = {100.0: 1, 105.0: 2, 110.0: 3, 111.0: 4, 120.0: 5}  # GB by time
    clock = iter(moments)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with cli_pull._watch(10**9) as watch:
        for gigabytes in list(moments.values())[1:]:
            watch(Moment(gigabytes * 10**9, 9 * 10**9, ("model.safetensors",)))
    monkeypatch.undo()
    assert capsys.readouterr().err.splitlines() == [
        "waiting for another program that is fetching model.safetensors",
        "3.0 GB of 9.0 GB, 200.0 MB/s, 30 s left",
        "5.0 GB of 9.0 GB, 200.0 MB/s, 20 s left",
    ]


def test_progress_is_told_and_ends_with_everything(server: Served) -> None:
    moments: list[Moment] = []
    download = look_up(REPOSITORY)
    fetch(download, moments.append)
    assert moments[-1] == Moment(download.nbytes, download.nbytes)


def test_the_command_says_what_is_wrong_in_a_sentence(
    server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    server.listing = {"sha": REVISION, "siblings": [{"rfilename": "../x"}]}
    assert main(["pull", REPOSITORY, "--yes"]) == CheckpointError.exit_code
    assert capsys.readouterr().err.startswith("error: owner/model: its list of files has '../x'")


# ── revisions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tagged(server: Served) -> Served:
    """The tag v1.0 and the branch refs/pr/1 have another licence."""
    for number, name in enumerate(("v1.0", "refs/pr/1"), start=1):
        content = {**files(), "LICENSE": (f"of {name}".encode(), 3 + len(name))}
        server.branches[name] = Served(content, revision=str(number) * 40)
    return server


def licence(path: Path) -> str:
    return (path / "LICENSE").read_text()


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "1" * 40])
def test_a_revision_is_fetched_and_kept_beside_main(tagged: Served, hub: Path, revision: str) -> None:
    main_path = fetch(look_up(REPOSITORY))
    path = fetch(look_up(REPOSITORY, revision))
    expected = "of refs/pr/1" if revision == "refs/pr/1" else "of v1.0"
    assert (licence(path), licence(main_path)) == (expected, "do what you like")
    folder = hub / "models--owner--model"
    assert (folder / "refs/main").read_text() == REVISION  # for the programs that share the cache
    if len(revision) < 40:
        assert (folder / "refs" / revision).read_text() == path.name
    theirs = huggingface_hub.snapshot_download(
        REPOSITORY, revision=revision, cache_dir=hub, local_files_only=True, allow_patterns=list(NEEDED)
    )
    assert Path(theirs) == path
    # The name means what was pulled last.
    assert locate_model(REPOSITORY) == path
    assert kept.read().pulled[REPOSITORY].asked == revision
    for again in (None, "main"):
        fetch(look_up(REPOSITORY, again))
        assert locate_model(REPOSITORY) == main_path


def test_a_revision_is_told_before_a_fetch_and_in_the_list(
    tagged: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", REPOSITORY, "--revision", "v1.0", "--yes"]) == 0
    assert f"model     {REPOSITORY}, revision v1.0, {'1' * 12}\n" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert "hub at v1.0" in capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert (row["name"], row["revision"]) == (REPOSITORY, "v1.0")


def test_a_removed_revision_leaves_the_others(tagged: Served, hub: Path) -> None:
    main_path = fetch(look_up(REPOSITORY))
    fetch(look_up(REPOSITORY, "v1.0"))
    assert main(["rm", REPOSITORY]) == 0
    assert [path.name for path in (hub / "models--owner--model/refs").iterdir()] == ["main"]
    assert locate_model(REPOSITORY) == main_path
    assert set(in_cache(hub)) == NEEDED
    assert main(["rm", REPOSITORY, "--yes"]) == 0
    assert not (hub / "models--owner--model").exists()


def test_a_pull_of_a_revision_that_has_not_ended_changes_no_model(tagged: Served) -> None:
    main_path = fetch(look_up(REPOSITORY))
    download = look_up(REPOSITORY, "v1.0")
    del tagged.branches["v1.0"].files["LICENSE"]
    with pytest.raises(Exception, match=r".*"):
        fetch(download)
    assert locate_model(REPOSITORY) == main_path


@pytest.mark.parametrize(
    "revision", ["", "../main", "a/../b", "a//b", "-x", ".x", "a b", "a\n", "x" * 129, "a/", "é"]
)
def test_what_can_be_no_revision_is_refused(
    server: Served, revision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", REPOSITORY, f"--revision={revision}", "--yes"]) == 2
    assert "cannot be a revision" in capsys.readouterr().err
    assert server.tokens == []


def test_a_revision_that_is_nowhere_and_a_commit_that_the_hub_replaces_are_refused(tagged: Served) -> None:
    with pytest.raises(CheckpointError, match=f"the hub has no model {REPOSITORY} at revision v9"):
        look_up(REPOSITORY, "v9")
    tagged.listing = true_listing(tagged)
    with pytest.raises(CheckpointError, match="but 1111111111111111111111111111111111111111 was requested"):
        look_up(REPOSITORY, "1" * 40)


def test_a_licence_is_kept_with_the_time_of_its_acceptance(
    server: Served, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known() -> tuple[str, int]:
        pulled = kept.read().pulled[REPOSITORY]
        return pulled.licence, pulled.accepted_at

    monkeypatch.setattr(cli_pull.time, "time", lambda: 1_760_000_000.5)
    assert main(["pull", REPOSITORY, "--yes"]) == 0
    assert known() == ("apache-2.0", 1_760_000_000)
    monkeypatch.setattr(cli_pull.time, "time", lambda: 1_770_000_000.5)
    assert main(["pull", REPOSITORY, "--yes"]) == 0  # all of it is here, and nothing is asked
    assert known() == ("apache-2.0", 1_760_000_000)
    server.listing = true_listing(server) | {"cardData": {"license": "other", "license_name": "house rules"}}
    fetch(look_up(REPOSITORY))
    assert known() == ("house rules", 0)  # nobody agreed to that one
    shutil.rmtree(hub)
    fetch(look_up(REPOSITORY), accepted_at=5)
    assert known() == ("house rules", 5)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "mit"}, "mit"),
        ({"license": ["mit", "apache-2.0"]}, "mit, apache-2.0"),
        ({"license": ["a", 7, {"b": "c"}]}, "a"),
        ({"license": ["x" * 60] * 500}, f"{'x' * 60}, xx"),
        ({"license": "x" * 100_000}, "x" * 64),
        ({"license": "a\x1b[31m\nb"}, "a\\x1b[31m\\nb"),
        ({"license": "other", "license_name": 7}, "other"),
        ({"license": None}, ""),
        ({"license": {"a": "b"}}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_a_licence_from_a_hub_is_short_and_on_one_line(
    server: Served, hub: Path, card: Any, licence: str
) -> None:
    server.listing = true_listing(server) | {"cardData": card}
    assert look_up(REPOSITORY).licence == licence


@pytest.mark.parametrize(
    ("key", "value"),
    [("licence", 7), ("licence", None), ("accepted_at", "1"), ("accepted_at", -1), ("accepted_at", 1 << 40),
     ("accepted_at", True)],
)  # fmt: skip
def test_a_record_with_another_kind_of_licence_or_time_is_damaged(
    server: Served, hub: Path, key: str, value: Any
) -> None:
    with kept.changing() as known:
        known.pulled["a/b"] = kept.Pulled("a/b", "b" * 40, 8, ("d" * 64,), licence="mit", accepted_at=3)
    assert kept.read().pulled["a/b"].accepted_at == 3
    raw = json.loads(kept.path().read_text())
    raw["pulled"]["a/b"][key] = value
    kept.path().write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="has a malformed record of a pulled model"):
        kept.read()


def test_a_record_with_a_revision_that_is_a_path_is_damaged(tagged: Served) -> None:
    fetch(look_up(REPOSITORY, "v1.0"))
    kept.path().write_text(kept.path().read_text().replace('"v1.0"', '"../../x"'))
    with pytest.raises(UsageError, match="has a malformed record of a pulled model"):
        kept.read()
