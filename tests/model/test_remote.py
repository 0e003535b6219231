"""The headers of a remote model tell what its files on disk would, from a few megabytes, and no lie gets through."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from typing import Any

import pytest

from argosy.checkpoint import hub
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.geometry import dense_shapes, expert_shapes
from argosy.checkpoint.gguf import metadata_only, read_gguf
from argosy.checkpoint.hub import Source
from argosy.errors import ArgosyError, CheckpointError, FetchFailed, UsageError
from argosy.model import remote
from argosy.model.families import FAMILIES, open_model
from argosy.model.remote import GgufModel, RemoteHeaders, fetch_headers, gguf_models
from tests.checkpoint.raw_gguf import RawGguf, entry, tensor
from tests.families.published import PUBLISHED
from tests.families.test_mistral_layouts import write_own_files
from tests.helpers.hub_server import REPOSITORY, Served, directory_files, served

REFERENCE = Path(__file__).parents[1] / "models" / "reference"
SEEING = Path(__file__).parents[1] / "models" / "reference_seeing"
SMALL = "mixtral_head_dim_tied_sharded"


def fetched(server: Served, part: str = "") -> tuple[ModelFiles, RemoteHeaders]:
    with fetch_headers(Source(server.url, REPOSITORY, part)) as headers:
        return open_model(headers.path), headers


def sizes(files: ModelFiles) -> tuple[object, ...]:
    return (
        files.config,
        {name: (ref.nbytes, ref.format, ref.rows, ref.cols) for name, ref in files.dense.items()},
        {key: (record.nbytes, record.formats) for key, record in files.experts.items()},
        set(files.others),
    )


@pytest.mark.parametrize(
    "name", [SMALL, "deepseek_v3_multi_token_prediction", "gpt_oss_plain", "kimi_k25_deepseek_text_sharded"]
)
def test_headers_of_safetensors_are_those_of_the_files(name: str) -> None:
    with served(directory_files(REFERENCE / name)) as server:
        found, headers = fetched(server)
    assert sizes(found) == sizes(open_model(REFERENCE / name))
    weights = [path.stat().st_size for path in (REFERENCE / name).glob("model*.safetensors")]
    assert headers.file_bytes == sum(weights)
    assert headers.num_read == headers.num_shards == len(weights)


def test_headers_of_mistrals_own_files_are_those_of_the_files(tmp_path: Path) -> None:
    write_own_files(tmp_path)
    local = open_model(tmp_path)
    with served(directory_files(tmp_path)) as server:
        found, headers = fetched(server)
    assert sizes(found) == sizes(local)
    assert headers.file_bytes == (tmp_path / "consolidated.safetensors").stat().st_size


def test_headers_of_a_gguf_are_those_of_the_file() -> None:
    directory = SEEING / "qwen3_vl_moe" / "gguf"
    local = open_model(directory / "model.gguf")
    with served(directory_files(directory)) as server:
        for part in ("", "MODEL"):
            found, headers = fetched(server, part)
            assert sizes(found)[:3] == sizes(local)[:3]
            assert headers.file_bytes == (directory / "model.gguf").stat().st_size
        with pytest.raises(CheckpointError, match="file with 'q9' in its name") as refused:
            fetched(server, "q9")
        assert f"`argosy pull {REPOSITORY} --formats`" in str(refused.value)
        with fetch_headers(Source(f"{server.url}/storage/model.gguf")) as one:
            assert sizes(open_model(one.path))[:3] == sizes(local)[:3]


def test_a_gguf_header_is_read_piece_by_piece_until_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_GGUF_BYTES", 700)
    directory = SEEING / "qwen3_vl_moe" / "gguf"
    with served(directory_files(directory)) as server:
        found, headers = fetched(server)
    assert sizes(found)[:3] == sizes(open_model(directory / "model.gguf"))[:3]
    assert 700 < headers.bytes_read < headers.file_bytes
    assert len([path for path, _ in server.tokens if path.endswith("model.gguf")]) > 4


def test_parts_of_a_split_gguf_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_GGUF_BYTES", 64)
    monkeypatch.setattr(remote, "_FIRST_PART_BYTES", 32)

    def part(number: int, name: str) -> tuple[bytes, int]:
        keys = [("split.no", 2, number), ("split.count", 2, 2), ("split.tensors.count", 5, 2)]
        data = RawGguf([entry(*key) for key in keys], [tensor(name, [4, 2], 0, 0)], bytes(32)).to_bytes()
        return data, len(data)

    files = {f"Q/m-0000{number + 1}-of-00002.gguf": part(number, name) for number, name in enumerate("ab")}
    with served(files) as server:
        with fetch_headers(Source(server.url, REPOSITORY)) as headers:
            assert set(read_gguf(headers.path).tensors) == {"a", "b"}
            assert headers.num_shards == 2
        with fetch_headers(Source(f"{server.url}/storage/Q/m-00001-of-00002.gguf")) as headers:
            assert set(read_gguf(headers.path).tensors) == {"a", "b"}
        del server.files["Q/m-00002-of-00002.gguf"]
        with pytest.raises(CheckpointError, match="1 of the 2 parts"):
            fetched(server)


def test_a_cut_header_followed_by_zeros_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    whole = RawGguf()
    path = whole.write(tmp_path / "m.gguf")
    expected, metadata, content = read_gguf(path), metadata_only(path), path.read_bytes()
    for cut in range(len(whole.header())):
        path.write_bytes(content[:cut] + bytes(len(content) - cut))
        try:
            found = read_gguf(path)
        except CheckpointError:
            continue
        assert (found.tensors, metadata_only(path)) == (expected.tensors, metadata)


def test_one_of_several_gguf_files_must_be_named() -> None:
    content = directory_files(SEEING / "qwen3_vl_moe" / "gguf")["model.gguf"]
    with served({"m-Q4_K_M.gguf": content, "Q8_0/m-Q8_0.gguf": content}) as server:
        with pytest.raises(UsageError, match="files: m-Q8_0, m-Q4_K_M"):
            fetched(server)
        assert fetched(server, "q8_0")[1].num_shards == 1


# Names as publishers give them, and the file or folder that other programs choose for a part of one.
UNSLOTH = ("UD-IQ2_M/M-UD-IQ2_M-00001-of-00002.gguf", "UD-IQ2_M/M-UD-IQ2_M-00002-of-00002.gguf",
           "UD-IQ1_S/M-UD-IQ1_S-00001-of-00001.gguf", "UD-Q2_K_XL/M-UD-Q2_K_XL.gguf", "M-Q2_K.gguf", "M-Q2_K_L.gguf",
           "M-UD-TQ1_0.gguf", "mmproj-F16.gguf", "imatrix_unsloth.gguf")  # fmt: skip
BARTOWSKI = ("owner_M-IQ2_M/owner_M-IQ2_M-00001-of-00002.gguf", "owner_M-IQ2_M/owner_M-IQ2_M-00002-of-00002.gguf",
             "owner_M-IQ2_XXS.gguf", "owner_M-IQ2_XS.gguf", "owner_M-imatrix.gguf")  # fmt: skip
MRADERMACHER = ("M.i1-IQ2_M.gguf", "M.i1-IQ1_S.gguf", "M.i1-Q2_K_S.gguf", "M.i1-Q2_K.gguf", "M.imatrix.gguf")


@pytest.mark.parametrize(
    ("names", "part", "stem"),
    [
        (UNSLOTH, "UD-IQ2_M", "UD-IQ2_M/M-UD-IQ2_M"),
        (UNSLOTH, "ud-iq2_m", "UD-IQ2_M/M-UD-IQ2_M"),
        (UNSLOTH, "IQ2_M", "UD-IQ2_M/M-UD-IQ2_M"),
        (UNSLOTH, "M-UD-IQ2_M-00002-of-00002.gguf", "UD-IQ2_M/M-UD-IQ2_M"),
        (UNSLOTH, "IQ1_S", "UD-IQ1_S/M-UD-IQ1_S"),
        (UNSLOTH, "Q2_K", "M-Q2_K"),
        (UNSLOTH, "Q2_K_XL", "UD-Q2_K_XL/M-UD-Q2_K_XL"),
        (UNSLOTH, "TQ1_0", "M-UD-TQ1_0"),
        (BARTOWSKI, "IQ2_M", "owner_M-IQ2_M/owner_M-IQ2_M"),
        (BARTOWSKI, "iq2_xs", "owner_M-IQ2_XS"),
        (BARTOWSKI, "owner_M-IQ2_XXS.gguf", "owner_M-IQ2_XXS"),
        (MRADERMACHER, "IQ2_M", "M.i1-IQ2_M"),
        (MRADERMACHER, "i1-IQ1_S", "M.i1-IQ1_S"),
        (MRADERMACHER, "Q2_K", "M.i1-Q2_K"),
    ],
)
def test_a_part_of_a_name_chooses_the_file_that_other_programs_choose(
    names: tuple[str, ...], part: str, stem: str
) -> None:
    (model,) = gguf_models(names, part)
    assert model.stem == stem
    assert len(model.parts) == model.num_parts


def test_a_plain_format_is_not_taken_for_the_publishers_own() -> None:
    folders = ("IQ2_KL/M-IQ2_KL.gguf", "smol-IQ2_KL/M-smol-IQ2_KL.gguf")
    assert [model.stem for model in gguf_models(folders, "iq2_kl")] == ["IQ2_KL/M-IQ2_KL"]
    names = ("M-IQ2_M.gguf", "UD-IQ2_M/M-UD-IQ2_M.gguf", "M-UD-IQ2_M_L.gguf")
    assert [model.stem for model in gguf_models(names, "IQ2_M")] == ["M-IQ2_M"]
    assert [model.stem for model in gguf_models(names, "UD-IQ2_M")] == ["UD-IQ2_M/M-UD-IQ2_M"]
    assert len(gguf_models(names, "IQ2")) == 3


@pytest.mark.parametrize(
    "name",
    [
        "imatrix_unsloth.gguf",
        "M.imatrix.gguf",
        "M-imatrix.gguf",
        "sub/imatrix.gguf",
        "mmproj-F16.gguf",
        "M.gguf.part1of2",
    ],
)
def test_a_measurement_or_a_tower_is_no_model(name: str) -> None:
    assert gguf_models([name, "M-IQ2_M-imatrix.gguf"]) == [
        GgufModel("M-IQ2_M-imatrix", ("M-IQ2_M-imatrix.gguf",))
    ]


def large_files(name: str, num_layers: int, num_shards: int) -> dict[str, tuple[bytes, int]]:
    """The first layers of a released model as shards of one file each layer or so: headers alone."""
    raw = {**next(model.config for model in PUBLISHED if model.name == name), "num_hidden_layers": num_layers}
    family = FAMILIES[raw["model_type"]]
    config, layout = family.parse_config(raw), family.LAYOUTS[0]

    def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
        for canonical, shape in dense_shapes(config):
            yield layout.dense_name(canonical), shape
            if canonical.endswith(".router"):
                layer = int(canonical.split(".")[1])
                for expert in range(config.num_experts):
                    yield from zip(
                        layout.names_of_expert(layer, expert), expert_shapes(config, layer), strict=True
                    )

    listed = list(tensors())
    per_shard = -(-len(listed) // num_shards)
    files = {"config.json": encoded(raw)}
    index = {}
    for number in range(num_shards):
        shard, entries, end = f"model-{number + 1:05}-of-{num_shards:06}.safetensors", {}, 0
        for name_in_shard, shape in listed[number * per_shard : (number + 1) * per_shard]:
            nbytes = 2 * prod(shape)
            offsets = [end, end + nbytes]
            entries[name_in_shard] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
            index[name_in_shard] = shard
            end += nbytes
        text = json.dumps(entries).encode()
        files[shard] = len(text).to_bytes(8, "little") + text, 8 + len(text) + end
    files["model.safetensors.index.json"] = encoded({"weight_map": index})
    return files


def encoded(value: Any) -> tuple[bytes, int]:
    data = json.dumps(value).encode()
    return data, len(data)


@pytest.mark.parametrize(
    ("name", "num_layers", "num_shards", "part"),
    [
        ("GLM-4.6", 23, 40, 0.25),
        pytest.param("GLM-4.6", 92, 150, 1.0, marks=pytest.mark.full),
        pytest.param("DeepSeek-V3", 61, 163, 1.0, marks=pytest.mark.full),
        pytest.param("Kimi-K2", 61, 200, 1.0, marks=pytest.mark.full),
    ],
)
def test_less_than_8_mb_are_read_of_more_than_600_gb(
    name: str, num_layers: int, num_shards: int, part: float
) -> None:
    """Or as small a part of some layers."""
    files = large_files(name, num_layers, num_shards)
    with served(files) as server:
        found, headers = fetched(server)
        assert server.bytes_sent < part * 8_000_000
    weights = sum(size for shard, (_, size) in files.items() if shard.endswith(".safetensors"))
    assert headers.file_bytes == weights > part * 600e9
    assert 20 < headers.num_read <= headers.num_shards == num_shards
    assert (name == "Kimi-K2") == (headers.num_read < num_shards)  # its headers have 10 MB
    assert found.dense_bytes + found.expert_bytes == pytest.approx(weights, rel=0.001)
    assert len(found.experts) == len(found.config.moe_layers) * found.config.num_experts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-30B-A3B", Source("https://huggingface.co", "Qwen/Qwen3-30B-A3B")),
        ("a/b-GGUF:Q4_K_M", Source("https://huggingface.co", "a/b-GGUF", "Q4_K_M")),
        ("hf.co/a/b-GGUF:UD-IQ2_M", Source("https://huggingface.co", "a/b-GGUF", "UD-IQ2_M")),
        ("huggingface.co/a/b", Source("https://huggingface.co", "a/b")),
        ("hf.co/b", Source("https://huggingface.co", "hf.co/b")),
        ("https://hub.example/a/b", Source("https://hub.example", "a/b")),
        ("https://example.org/x/y.gguf", Source("https://example.org/x/y.gguf")),
        ("http://127.0.0.1:8000/a/b", Source("http://127.0.0.1:8000", "a/b")),
        ("a/b-GGUF:Q8_0/m-Q8_0.gguf", Source("https://huggingface.co", "a/b-GGUF", "Q8_0/m-Q8_0.gguf")),
        ("a/b-GGUF:../m.gguf", None),
        *(
            (
                f"https://huggingface.co/a/b-GGUF/{page}/main/Q8_0/m.gguf",
                Source("https://huggingface.co", "a/b-GGUF", "Q8_0/m.gguf"),
            )
            for page in ("blob", "resolve")
        ),
        (
            "https://huggingface.co/a/b-GGUF/tree/main/Q8_0",
            Source("https://huggingface.co", "a/b-GGUF", "Q8_0"),
        ),
        (
            "https://hub.example/a/b/resolve/main/m.gguf",
            Source("https://hub.example/a/b/resolve/main/m.gguf"),
        ),
        ("./a/b", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("model.gguf", None),
    ],
)
def test_a_source_is_a_name_or_an_address(text: str, expected: Source | None) -> None:
    assert Source.find(text, {}) == expected


def test_another_hub_is_used_if_the_environment_names_it() -> None:
    assert Source.find("a/b", {"HF_ENDPOINT": "https://mirror.example/"}) == Source(
        "https://mirror.example", "a/b"
    )
    with pytest.raises(UsageError, match="HF_ENDPOINT must begin with https"):
        Source.find("a/b", {"HF_ENDPOINT": "http://mirror.example"})


@pytest.mark.parametrize(
    "text",
    [
        "http://example.org/a/b",
        "http://192.168.0.1/a/b",
        "https://user:secret@example.org/a/b",
        "https://example.org/a/b?token=secret",
        "https://example.org/a",
        "https://example.org/a/b/c",
        "https://example.org/a b/c",
        "https://[::1/a/b",
        "https://example.org/\u00e4/b",
        "https://",
    ],
)
def test_other_addresses_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Source.find(text, {})
    assert "secret" not in str(refusal.value)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files = directory_files(REFERENCE / SMALL)
    with served(files) as storage, served(files, token="hf_secret") as server:
        server.redirect_to = f"{storage.url}/storage/model-00001-of-00002.safetensors"
        with pytest.raises(CheckpointError):
            fetched(server)  # both shards come from one file
        assert {token for _, token in server.tokens} == {"Bearer hf_secret"}
        assert {token for _, token in storage.tokens} == {None}
    with served(files, token="other") as server, pytest.raises(FetchFailed, match="not public") as refusal:
        fetched(server)
    assert "hf_secret" not in str(refusal.value) + str(refusal.value.facts)


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("lies", "problem"),
    [
        ({"Content-Range": "bytes 8-15/100"}, "were requested"),
        ({"Content-Range": "bytes 0-7/9999999999999999999999"}, "no Content-Range"),
        ({"Content-Range": "bytes 0-7/1125899906842625"}, "were requested"),
        ({"Content-Range": "nonsense"}, "no Content-Range"),
        ({"Content-Length": "99999999999"}, "were requested"),
        ({"Content-Length": "-1"}, "without its length"),
        ({"Content-Length": "8, 9"}, "without its length"),
        ({"status": "500"}, "answers 500"),
        ({"status": "429"}, "too many requests"),
        ({"status": "404"}, "answers 404"),
        ({"status": "204"}, "status 204"),
    ],
)
def test_an_answer_that_contradicts_itself_is_refused(lies: dict[str, str], problem: str) -> None:
    with (
        served(directory_files(REFERENCE / SMALL), lies={SHARD: lies}) as server,
        pytest.raises((CheckpointError, FetchFailed), match=problem),
    ):
        fetched(server)
    assert server.bytes_sent < 1_000_000


def changed(name: str, data: bytes, size: int | None = None) -> dict[str, tuple[bytes, int]]:
    return directory_files(REFERENCE / SMALL) | {name: (data, len(data) if size is None else size)}


HUGE = (10**12).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (changed(SHARD, HUGE, 10**13), "claims a header of 1000000000000 bytes"),
        (changed(SHARD, b"abc"), "claims a header"),
        (changed(SHARD, (50_000_000).to_bytes(8, "little") + b"{", 10**12), "larger than the"),
        (changed(SHARD, (2).to_bytes(8, "little") + b"{}", 10**9), "tensors end at byte 10"),
        (changed(SHARD, (2).to_bytes(8, "little") + b"[]"), "does not start with"),
        (changed("config.json", b"{}" + b" " * (2 << 20)), "bytes long; at most"),
        (changed("config.json", b'{"model_type": "gpt2"}'), "model_type 'gpt2'"),
        (changed("model.safetensors.index.json", b'{"weight_map": {"a": "b"}}'), "says that b holds a"),
        (changed("model.safetensors.index.json", b"[]"), "expected an object"),
        (
            {name: data for name, data in changed("x", b"").items() if name != SHARD},
            "no whole set of safetensors",
        ),
        ({"README.md": (b"", 0)}, "holds no model"),
        ({"model.gguf": (b"GGUF", 10**12)}, "version"),
        (
            {"model.gguf": (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, 10**12)},
            "claims|at most|tensors",
        ),
    ],
)
def test_a_hostile_header_is_refused(files: dict[str, tuple[bytes, int]], problem: str) -> None:
    with served(files) as server, pytest.raises(ArgosyError, match=problem):
        fetched(server)
    assert server.bytes_sent < 40_000_000


@pytest.mark.parametrize(
    "listing",
    [
        [],
        {},
        {"sha": "main", "siblings": []},
        {"sha": "a" * 40},
        {"sha": "a" * 40, "siblings": [{}] * 10_001},
    ],
)
def test_a_malformed_list_of_files_is_refused(listing: object) -> None:
    with served({}, listing=listing) as server, pytest.raises(CheckpointError, match="list of files"):
        fetched(server)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("../../etc/model.gguf", "leads outside"), ("model.gguf?x", "holds no model"), (7, "holds no model")],
)
def test_names_that_lead_elsewhere_are_no_files(name: object, problem: str) -> None:
    listing = {"sha": "a" * 40, "siblings": [{"rfilename": name}, None]}
    with served({}, listing=listing) as server, pytest.raises(CheckpointError, match=problem):
        fetched(server)


@pytest.mark.parametrize("target", ["http://example.org/x", "file:///etc/passwd", "ftp://example.org/x"])
def test_a_redirect_leads_to_https_or_is_refused(target: str) -> None:
    with (
        served(directory_files(REFERENCE / SMALL), redirect_to=target) as server,
        pytest.raises(FetchFailed, match=r"only https is opened|answers 302"),
    ):
        fetched(server)


def test_a_server_that_sends_nothing_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_REQUEST_S", 0.3)
    lies = {SHARD: {"Content-Length": "8", "Content-Range": "bytes 0-7/1000", "stall": "1"}}
    with (
        served(directory_files(REFERENCE / SMALL), lies=lies) as server,
        pytest.raises(FetchFailed, match=r"no answer within|too slowly"),
    ):
        fetched(server)


def test_a_server_that_sends_byte_by_byte_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read to its end, the list would be refused because it is not JSON."""
    monkeypatch.setattr(hub, "_REQUEST_S", 0.3)
    has_left = threading.Event()

    class Dribbling(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            for _ in range(100):
                has_left.wait(0.05)
                self.wfile.write(b" ")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """The client leaves on purpose."""

    with Quiet(("127.0.0.1", 0), Dribbling) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        asked = hub.Hub(Source(f"http://127.0.0.1:{server.server_port}", REPOSITORY), most_bytes=1 << 20)
        try:
            with pytest.raises(FetchFailed, match=r"no answer within|too slowly"):
                asked.list_files()
        finally:
            has_left.set()
            server.shutdown()


def test_redirects_end() -> None:
    with served(directory_files(REFERENCE / SMALL)) as server:
        server.redirect_to = f"{server.url}/{REPOSITORY}/resolve/{'a' * 40}/{SHARD}"
        with pytest.raises(FetchFailed, match="302"):
            fetched(server)


def test_a_server_without_ranges_is_read_no_further_than_needed() -> None:
    with (
        served(directory_files(REFERENCE / SMALL), answers_ranges=False) as server,
        pytest.raises(FetchFailed, match="does not answer range requests"),
    ):
        fetched(server)


def test_nothing_is_left_behind() -> None:
    with served(directory_files(REFERENCE / SMALL)) as server:
        _, headers = fetched(server)
    assert not headers.path.exists()


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(FetchFailed, match=r"cannot reach 127.0.0.1:9 \(connection refused\)"),
        fetch_headers(Source("http://127.0.0.1:9", REPOSITORY)),
    ):
        pass
