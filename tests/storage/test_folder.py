"""A folder on a disk and in object storage behave alike; what is in it is whole."""

import pickle
import socket
from pathlib import Path

import pytest
from pyarrow import fs

from distrl.config import make_config
from distrl.errors import ConfigError
from distrl.storage import CHUNK_BYTES, Folder, cause
from learners.checkpoint import checkpoint_sha256
from tests.builders import refusal
from tests.storage.server import needs_server


@pytest.fixture(params=["disk", pytest.param("s3", marks=needs_server)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    place = tmp_path if request.param == "disk" else request.getfixturevalue("address")
    return Folder(place) / request.node.name.replace("[", "-").replace("]", "")


def test_what_is_written_is_read_listed_and_deleted(folder: Folder) -> None:
    assert folder.files() == {}
    assert not folder.exists()
    folder.make()
    folder.write("b", b"22")
    folder.write("a", b"1")
    folder.write("a", b"333")  # replaces it
    assert (folder.read("a"), folder.files(), folder.exists()) == (b"333", {"a": 3, "b": 2}, True)
    assert folder.open("b").read() == b"22"
    again: Folder = pickle.loads(pickle.dumps(folder / "."))
    assert again.read("b") == b"22"
    folder.delete("a")
    assert folder.files() == {"b": 2}
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    folder.delete_folder()
    assert folder.files() == {}


def test_a_directory_is_sent_and_fetched_with_the_hash_of_a_checkpoint(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "training").mkdir(parents=True)
    (source / "training" / ".metadata").write_bytes(b"m")
    (source / "model").write_bytes(bytes(range(256)) * (CHUNK_BYTES // 256) + b"more than one chunk")
    (folder.local or tmp_path / "x").joinpath("training").mkdir(parents=True)
    for name in ("training/.metadata", "model"):
        folder.write_file(name, source / name)
    folder.download(tmp_path / "copy")
    assert (tmp_path / "copy" / "model").read_bytes() == (source / "model").read_bytes()
    assert folder.sha256() == checkpoint_sha256(source) == checkpoint_sha256(tmp_path / "copy")
    assert folder.folders() == ["training"]
    with pytest.raises(FileNotFoundError):
        (folder / "none").sha256()


@needs_server
def test_a_small_file_is_one_request(address: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Folder(address) / "one-request"
    folder.write("file", b"x" * 1000)
    (log,) = tmp_path_factory.getbasetemp().glob("s3[0-9]*/log")
    requests = [line.split('"')[1] for line in log.read_text().splitlines() if "one-request/file" in line]
    assert [r.split()[0] for r in requests] == ["PUT"]


def test_storage_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        port = closed.getsockname()[1]
        folder = Folder(f"s3://bucket/runs?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}")
        with pytest.raises(OSError, match="NETWORK_CONNECTION") as error:
            folder.write("a", b"1")
    assert "\n" not in cause(error.value)


def test_an_address_is_checked_and_holds_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model": {"path": "/m"}, "data": {"source": "sort_digits"}}

    def refused(uri: str) -> str:
        return refusal(ConfigError, lambda: make_config({**values, "storage": {"uri": uri}}))

    assert refused("s3://key:secret@bucket/runs") == (
        "storage.uri must not hold credentials, which would be written to config.yaml; give them by the file system's "
        "own means, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )
    assert refused("s3://bucket/runs?acl=all") == (
        "storage.uri must be a path or an address of a file system that pyarrow has, such as s3://bucket/folder, got "
        "'s3://bucket/runs?acl=all': options are region, scheme and endpoint_override, not acl"
    )
    assert refused("ftp://host/runs").startswith("storage.uri must be a path or an address of a file system")
    monkeypatch.chdir(tmp_path)
    for given in ("kept", f"file://{tmp_path}/kept"):
        assert make_config({**values, "storage": {"uri": given}}).storage.uri == str(tmp_path / "kept")
    assert isinstance(Folder(tmp_path).filesystem[0], fs.LocalFileSystem)
