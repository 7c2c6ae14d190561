"""Reads journal files, of the format that this distrl writes."""

from typing import Any

import pyarrow as pa

from distrl.errors import SchemaError
from distrl.schema import FORMAT


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
