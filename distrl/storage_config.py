"""The section `storage` of a config; apart from `distrl.storage`, which imports pyarrow."""

from pydantic import BaseModel, ConfigDict, field_validator


class StorageConfig(BaseModel):
    """Where a run keeps what it must not lose."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    uri: str | None = None
    """Folder for journals, checkpoints and copies of the ledger, with one folder for each run: a path, or an address of
    a file system that pyarrow has, such as `s3://bucket/runs?region=eu-west-1`; empty keeps them in the run's
    directory. Every machine of the run must see it."""

    @field_validator("uri")
    @classmethod
    def _known(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        from distrl.storage import check_uri

        return check_uri(uri)
