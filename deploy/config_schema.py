"""The config's JSON schema, with which an editor completes and checks a config while it is written."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from distrl.config import Config

FILE = "config.schema.json"


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never: pydantic's title is the key's name once more."""
        return False


def config_schema() -> dict[str, Any]:
    """The schema of a config file; every key has its description, rule and default."""
    # Imports torch, which a config to start from does not need.
    from distrl.objectives import recipe_names

    schema = Config.model_json_schema(schema_generator=_Untitled)
    for key in schema["properties"].values():
        if "$ref" in key:
            key.pop("default", None)  # every key of the section has its own, and this one has resolved paths
    # Known to the code only when a recipe is built.
    schema["$defs"]["ObjectiveConfig"]["properties"]["recipe"]["enum"] = list(recipe_names())
    return schema


def render() -> str:
    """The text of the file."""
    return json.dumps(config_schema(), indent=2) + "\n"


def schema_path() -> Path:
    """The file of this installation: in a wheel beside this module, in a checkout in docs/."""
    packaged = Path(__file__).with_name(FILE)
    return packaged if packaged.exists() else packaged.parents[1] / "docs" / FILE


def schema_reference(config: Path) -> str:
    """How a config in this place names the schema: relative inside a checkout, so that both move together."""
    schema = schema_path()
    root = schema.parents[1]
    if config.absolute().is_relative_to(root):
        return Path(os.path.relpath(schema, config.absolute().parent)).as_posix()
    return schema.as_posix()
