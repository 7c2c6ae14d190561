"""A judge behind an OpenAI-compatible endpoint: vLLM's server, or any other."""

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrl.errors import ConfigError, StageError
from distrl.graders.preference import WinRate

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

PROMPT = """\
Which of two responses to a request is better? Judge what they say, not how long they are or which comes first.

Request:
{prompt}

Response A:
{first}

Response B:
{second}

End with [[A]], [[B]], or [[tie]]."""

_VERDICT = re.compile(r"\[\[(A|B|tie)\]\]")
_PROBABILITY = {"A": 1.0, "B": 0.0, "tie": 0.5}
_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Statuses after which another attempt may succeed."""


class EndpointJudge(WinRate):
    """Win rates by an `Endpoint`, whose arguments it has; `opponents` and `parallel` as for `WinRate`."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        prompt: str = PROMPT,
        opponents: int = 1,
        parallel: int = 4,
        timeout_s: float = 30.0,
        attempts: int = 3,
        max_tokens: int = 512,
    ) -> None:
        super().__init__(Endpoint(url, model, key, prompt, timeout_s, attempts, max_tokens), opponents, parallel)


class Endpoint:
    """Asks a chat model which of two responses is better.

    Args:
        url: base of the endpoint, such as http://localhost:8000/v1.
        model: its name there.
        key: where the key is: `env:NAME` or `file:PATH`; empty sends none. The key itself is refused.
        prompt: what is asked, with `{prompt}`, `{first}` and `{second}`; the answer must hold [[A]], [[B]] or [[tie]].
        timeout_s: of one request.
        attempts: requests that may fail with a status that says to come again, or without an answer.
        max_tokens: of the judge's answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        prompt: str = PROMPT,
        timeout_s: float = 30.0,
        attempts: int = 3,
        max_tokens: int = 512,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"options.url of the grader judge must begin with http:// or https://, got {url!r}")
        for name in ("{prompt}", "{first}", "{second}"):
            if name not in prompt:
                raise ConfigError(f"options.prompt of the grader judge must hold {name}; add it")
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model
        self._headers = {"Content-Type": "application/json", **_authorization(key)}
        self._prompt = prompt
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._max_tokens = max_tokens
        self.version = hashlib.sha256(f"{url} {model} {prompt} {max_tokens}".encode()).hexdigest()[:12]
        self.prompt_version = hashlib.sha256(f"{prompt} {max_tokens}".encode()).hexdigest()[:12]

    def prefer(self, problem: "Problem", first: str, second: str) -> float:
        asked = self._prompt
        # One pass: a response that holds {second} must not be filled in.
        values = {"prompt": problem.prompt, "first": first, "second": second}
        asked = re.sub(r"\{(prompt|first|second)\}", lambda match: values[match[1]], asked)
        answer = self._ask(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": asked}],
                "temperature": 0,
                "max_tokens": self._max_tokens,
            }
        )
        verdicts = _VERDICT.findall(answer)
        if not verdicts:
            raise StageError(
                f"judge {self._model}: its answer must hold [[A]], [[B]] or [[tie]], got {answer[-100:]!r}"
            )
        return _PROBABILITY[verdicts[-1]]

    def _ask(self, request: Mapping[str, Any]) -> str:
        """
        Raises:
            StageError: the endpoint refused, or all attempts failed.
        """
        body = json.dumps(request).encode()
        cause = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(min(8.0, 0.25 * 2**attempt))
            try:
                call = urllib.request.Request(self._url, body, self._headers, method="POST")
                with urllib.request.urlopen(call, timeout=self._timeout_s) as reply:
                    return _content(reply.read())
            except urllib.error.HTTPError as error:
                cause = f"status {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code not in _AGAIN:
                    raise StageError(f"judge {self._model} at {self._url}: {cause}") from error
            except (OSError, ValueError) as error:  # no connection, too late, or no JSON
                cause = f"{type(error).__name__}: {error}"
        raise StageError(f"judge {self._model} at {self._url}: {self._attempts} attempts failed, the last with {cause}")


def _content(body: bytes) -> str:
    answer = json.loads(body)
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an answer without choices[0].message.content: {str(answer)[:200]}") from error


def _authorization(key: str) -> dict[str, str]:
    if not key:
        return {}
    kind, colon, place = key.partition(":")
    if not colon or kind not in ("env", "file"):
        raise ConfigError(
            "options.key of the grader judge must say where the key is, as env:NAME or file:PATH, got something else; "
            "the key itself does not belong into a config"
        )
    try:
        secret = os.environ[place] if kind == "env" else Path(place).read_text().strip()
    except (KeyError, OSError) as error:
        raise ConfigError(
            f"options.key of the grader judge must name a key that is there, got {key!r}, which is not; set it"
        ) from error
    return {"Authorization": f"Bearer {secret}"}
