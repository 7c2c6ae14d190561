from collections.abc import Iterator

import pytest

from tests.storage.server import KEYS, s3_server


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`storage.uri` of a real S3-compatible server; several tests share the bucket."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in KEYS.items():
            patched.setenv(name, value)
        with s3_server(tmp_path_factory.mktemp("s3") / "log") as uri:
            yield uri
