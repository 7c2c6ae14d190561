"""Folders on any file system that pyarrow knows: what a run must not lose lies in one, see `storage.uri`."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

from distrl.errors import ConfigError

CHUNK_BYTES = 8 << 20


class Folder:
    """A folder; what it holds is complete or absent, also while somebody writes to it.

    On a local disk files are written aside, synced and renamed; an object store shows an object when it is whole.

    Args:
        place: a path, or what `pyarrow.fs.FileSystem.from_uri` takes, such as `s3://bucket/prefix?region=eu-west-1`.
    """

    def __init__(self, place: Path | str) -> None:
        self._place = str(place)
        parts = urlsplit(self._place)
        self._scheme = parts.scheme
        path: Path | str
        if self._scheme in ("", "file"):
            self._fs, path = fs.LocalFileSystem(), Path(parts.path).absolute()
        elif self._scheme == "s3":
            self._fs, path = _s3(parts)
        else:
            self._fs, path = fs.FileSystem.from_uri(self._place)
        self._path = PurePosixPath(path)
        self.local: Path | None = Path(path) if self._scheme in ("", "file") else None
        """The folder itself, where it is on a local disk or one that is mounted."""

    def __getstate__(self) -> str:
        return f"{self._place}\n{self._path}"

    def __setstate__(self, state: str) -> None:
        place, _, path = state.partition("\n")
        self.__init__(place)  # type: ignore[misc]
        self._move(path)

    def _move(self, path: str | PurePosixPath) -> "Folder":
        self._path = PurePosixPath(path)
        if self.local is not None:
            self.local = Path(self._path)
        return self

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self._place)._move(self._path / name)

    def __str__(self) -> str:
        return str(self.local) if self.local is not None else f"{self._scheme}://{self._path}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """What pyarrow and Ray take instead of an address."""
        return self._fs, str(self._path)

    def _at(self, name: str) -> str:
        return str(self._path / name)

    # Files --------------------------------------------------------------------------------------------------------

    def write(self, name: str, data: "bytes | memoryview | pa.Buffer") -> None:
        """Makes a file; it is safe, its name included, when this returns.

        Raises:
            OSError: it could not be written; no file of the name is there, or the one that was there before.
        """
        if self.local is not None:
            write_local(self.local / name, data)
            return
        # A single write before the stream is closed: an object store gets one request, or parts that it joins.
        with self._fs.open_output_stream(self._at(name), compression=None, buffer_size=None) as stream:
            stream.write(data)

    def write_file(self, name: str, source: Path) -> None:
        """Copies a local file here; errors as for `write`."""
        if self.local is not None:
            self.write(name, source.read_bytes())
            return
        stream = self._fs.open_output_stream(self._at(name), compression=None)
        with source.open("rb") as file, stream:
            while chunk := file.read(CHUNK_BYTES):
                stream.write(chunk)

    def read(self, name: str) -> "bytes":
        """
        Raises:
            OSError: it is not there, or cannot be read.
        """
        if self.local is not None:
            return (self.local / name).read_bytes()
        with self._fs.open_input_stream(self._at(name), compression=None) as stream:
            data: bytes = stream.read()
        return data

    def open(self, name: str) -> pa.NativeFile:
        """To read parts of it; errors as for `read`."""
        if self.local is not None:
            return pa.memory_map(str(self.local / name))
        return pa.BufferReader(self.read(name))

    def delete(self, name: str) -> None:
        """
        Raises:
            OSError: it is not there, or cannot be deleted.
        """
        self._fs.delete_file(self._at(name))

    # Listing ------------------------------------------------------------------------------------------------------

    def files(self, *, recursive: bool = False) -> dict[str, int]:
        """Sizes in bytes by name, sorted; none where there is no such folder.

        Raises:
            OSError: it cannot be listed.
        """
        infos = self._infos(recursive=recursive)
        return dict(sorted((name, info.size) for name, info in infos if info.type == fs.FileType.File))

    def folders(self) -> list[str]:
        """Names of the folders in it; errors as for `files`."""
        return sorted(name for name, info in self._infos(recursive=False) if info.type == fs.FileType.Directory)

    def _infos(self, *, recursive: bool) -> Iterator[tuple[str, fs.FileInfo]]:
        selector = fs.FileSelector(str(self._path), allow_not_found=True, recursive=recursive)
        for info in self._fs.get_file_info(selector):
            yield PurePosixPath(info.path).relative_to(self._path).as_posix(), info

    def exists(self) -> bool:
        """Whether it is there; an object store has no empty folders."""
        return bool(self._fs.get_file_info(str(self._path)).type == fs.FileType.Directory)

    # Whole folders ------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Makes the folder where that means something: an object store has folders that hold something alone."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)

    def delete_folder(self) -> None:
        """Deletes it with all that it holds.

        Raises:
            OSError: it is not there, or cannot be deleted.
        """
        if self.local is not None:
            shutil.rmtree(self.local)
            return
        self._fs.delete_dir(str(self._path))

    def download(self, directory: Path) -> None:
        """Copies everything that it holds into a new local directory.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        names = self.files(recursive=True)
        if not names:
            raise FileNotFoundError(2, "No such file or directory", str(self))
        for name in names:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open_input_stream(self._at(name), compression=None) as stream, target.open("wb") as file:
                while chunk := stream.read(CHUNK_BYTES):
                    file.write(chunk)

    def sha256(self) -> str:
        """Hash over the names, with their folders, and the bytes of all files; see `combined`.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        digests = {}
        for name in self.files(recursive=True):
            with self._fs.open_input_stream(self._at(name), compression=None) as stream:
                digests[name] = _digest(stream)
        if not digests:
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return combined(digests)


def _s3(parts: SplitResult) -> tuple[fs.FileSystem, str]:
    """Not `from_uri`: only here a file becomes one request, if it is small, instead of three."""
    options = dict(parse_qsl(parts.query))
    if unknown := options.keys() - {"region", "scheme", "endpoint_override"}:
        raise ValueError(f"options are region, scheme and endpoint_override, not {', '.join(sorted(unknown))}")
    return fs.S3FileSystem(allow_delayed_open=True, **options), parts.netloc + parts.path


def _digest(stream: pa.NativeFile) -> bytes:
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.digest()


def file_digest(path: Path) -> bytes:
    """sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def combined(digests: "dict[str, bytes]") -> str:
    """One hash of many files, from the sha256 of each by its name."""
    digest = hashlib.sha256()
    for name in sorted(digests, key=PurePosixPath):
        digest.update(name.encode() + b"\0" + digests[name])
    return digest.hexdigest()


def write_local(path: Path, data: "bytes | memoryview | pa.Buffer") -> None:
    """Writes a file that is complete or absent, and safe on disk, name included, when this returns."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(memoryview(data))
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync(path.parent)  # the new name must survive a crash too


def sync(path: Path) -> None:
    """Makes a file or a directory's names safe on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cause(error: OSError) -> str:
    """What the file system said, in one line."""
    return error.strerror or " ".join(str(error).split())


def check_uri(uri: str) -> str:
    """
    Raises:
        ConfigError: it is no address that pyarrow knows, or has credentials in it.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise ConfigError(
            "storage.uri must not hold credentials, which would be written to config.yaml; give them by the file "
            "system's own means, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    try:
        folder = Folder(uri)
    except (OSError, ValueError, NotImplementedError, pa.ArrowException) as error:
        raise ConfigError(
            f"storage.uri must be a path or an address of a file system that pyarrow has, such as s3://bucket/folder, "
            f"got {uri!r}: {' '.join(str(error).split())}"
        ) from error
    return str(folder.local) if folder.local is not None else uri
