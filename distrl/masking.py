"""Keeps secrets out of files: a value that looks like one is written as `***`.

A key is taken for a secret by its words: `hf_token`, `apiKey`, `db-password`; `max_tokens` and `eos_token` are not. In
URLs the credentials before the host and secret query parameters are masked, the rest stays readable.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"

_SECRETS = frozenset(
    ("token", "password", "passwd", "passphrase", "secret", "apikey", "credential", "credentials", "authorization")
)
_KEYS = frozenset(("api", "access", "private", "secret", "signing", "encryption", "auth"))
"""What makes the word `key` behind it a secret."""
_PLAIN_TOKENS = frozenset(("bos", "cls", "end", "eos", "mask", "pad", "sep", "special", "start", "stop", "unk"))
"""What makes the word `token` behind it a part of a vocabulary."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_USER = re.compile(r"(?<=://)[^/?#\s@]+(?:@[^/?#\s@]*)*(?=@)")
"""The credentials of a URL: what stands between the scheme and the last @ before the path."""
_PARAMETER = re.compile(r"(?<=[?&])([^=&#\s]+)=([^&#\s]+)")


def is_secret(key: str) -> bool:
    """Whether the value of a key with this name is a secret."""
    words = [word.lower() for word in _WORD.findall(key)]
    match words:
        case [*_, kind, "token"]:
            return kind not in _PLAIN_TOKENS
        case [*_, kind, "key"]:
            return kind in _KEYS
        case [*_, last]:
            return last in _SECRETS
    return False


def mask(value: Any) -> Any:
    """A copy of nested mappings and lists with the secrets masked and nothing else changed.

    Empty values of secret keys stay: that none was given is worth reading.
    """
    match value:
        case Mapping():
            return {k: MASK if is_secret(str(k)) and v not in (None, "") else mask(v) for k, v in value.items()}
        case list() | tuple():
            return [mask(item) for item in value]
        case str():
            return _PARAMETER.sub(_mask_parameter, _USER.sub(MASK, value)) if "://" in value else value
        case _:
            return value


def masked_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the values that `mask` has masked."""
    match value:
        case Mapping():
            for key, item in value.items():
                yield from masked_keys(item, f"{prefix}.{key}" if prefix else str(key))
        case list() | tuple():
            for index, item in enumerate(value):
                yield from masked_keys(item, f"{prefix}.{index}")
        case str() if value == MASK or ("://" in value and (f"://{MASK}@" in value or f"={MASK}" in value)):
            yield prefix


def _mask_parameter(found: re.Match[str]) -> str:
    return f"{found[1]}={MASK}" if is_secret(found[1]) else found[0]
