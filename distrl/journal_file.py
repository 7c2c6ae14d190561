"""Reads journal files, of the format that this distrl writes."""

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distrl.errors import SchemaError
from distrl.schema import FORMAT
from distrl.storage import Folder, cause


def read_table(source: Any, where: object) -> pa.Table:
    """All rows of a journal file.

    Args:
        source: bytes, or an open file of pyarrow.
        where: its name, for messages.
    Raises:
        SchemaError: it is of another format; columns of the same name may mean something else there.
        pyarrow.ArrowInvalid: it is no Arrow file.
    """
    reader = pa.ipc.open_file(source)
    found = (reader.schema.metadata or {}).get(b"distrl.format", b"none").decode()
    if found != str(FORMAT):
        raise SchemaError(f"journal file {where}: format must be {FORMAT}, got {found}; use the distrl that wrote it")
    return reader.read_all()


def read_verified(folder: Folder, name: str, sha256: str) -> pa.Table:
    """All rows of a journal file that a ledger names.

    Raises:
        SchemaError: it is not there, has another hash than the ledger says, or is of another format.
    """
    path = folder / name
    try:
        data = folder.read(name)
    except OSError as error:
        raise SchemaError(f"journal file {path}: must be readable, the ledger names it: {cause(error)}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SchemaError(f"journal file {path}: must have sha256 {sha256}, got {found}; the file was damaged")
    return read_table(data, path)


def ticket_rows(table: pa.Table, ticket_id: int, redraw: int) -> pa.RecordBatch:
    """The rows of one draw of a ticket; none where the file has none."""
    own = pc.and_(pc.equal(table["ticket_id"], ticket_id), pc.equal(table["redraw"], redraw))
    batches = table.filter(own).combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
