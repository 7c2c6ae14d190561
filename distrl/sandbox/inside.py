"""What runs inside the sandbox; the standard library alone, because nothing else is there.

    inside.py LIMITS run PROGRAM              the program, with the standard streams
    inside.py LIMITS serve PROGRAM FD         calls of the program's functions, asked for over a socket
    inside.py LIMITS check TESTS FD           tests that make such calls; the verdict goes to the standard output

Program and tests are in two sandboxes with a socket between them. Over it go numbers, texts and containers of them,
never objects: whatever the program does in its process, all it can give is values, and the verdict is made where it is
not.
LIMITS is JSON: {"resources": {name: number}, "user": number or null}.
"""

import builtins
import json
import os
import resource
import socket
import struct
import sys
from types import CodeType
from typing import Any

MOST_BYTES = 1 << 26
"""Longest message on the socket."""


class ProtocolError(Exception):
    """The other side sent something that is no answer, or is gone."""


def confine(limits: Any) -> None:
    for name, value in limits["resources"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    user = limits["user"]
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


# Values ---------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A value as JSON that `decode` turns back; types that JSON lacks have a tag.

    Raises:
        TypeError: it holds something else than plain values.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"i": hex(value)}
    if isinstance(value, float):
        return {"f": float.hex(float(value))}
    if isinstance(value, complex):
        return {"c": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    if isinstance(value, dict):
        return {"d": [[encode(k), encode(v)] for k, v in dict.items(value)]}
    kinds: Any = (("l", list), ("t", tuple), ("s", set), ("z", frozenset))
    for tag, kind in kinds:
        if isinstance(value, kind):
            return {tag: [encode(v) for v in kind.__iter__(value)]}
    raise TypeError(f"a value of type {type(value).__name__} cannot leave the sandbox")


_READ: dict[str, Any] = {
    "i": lambda x: int(x, 16),
    "f": float.fromhex,
    "c": lambda x: complex(float.fromhex(x[0]), float.fromhex(x[1])),
    "b": bytes.fromhex,
    "d": lambda x: {decode(k): decode(v) for k, v in x},
    "l": lambda x: [decode(v) for v in x],
    "t": lambda x: tuple(decode(v) for v in x),
    "s": lambda x: {decode(v) for v in x},
    "z": lambda x: frozenset(decode(v) for v in x),
}


def decode(value: Any) -> Any:
    if isinstance(value, dict):
        ((tag, content),) = value.items()
        return _READ[tag](content)
    return value


class Line:
    """Messages over a socket: four bytes of length, then JSON."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def send(self, message: Any) -> None:
        content = json.dumps(message).encode()
        self._socket.sendall(struct.pack(">I", len(content)) + content)

    def receive(self) -> Any:
        (length,) = struct.unpack(">I", self._exactly(4))
        if length > MOST_BYTES:
            raise ProtocolError(f"a message of {length} bytes")
        try:
            return json.loads(self._exactly(length))
        except (ValueError, RecursionError) as error:
            raise ProtocolError("a message that is no JSON") from error

    def _exactly(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._socket.recv(min(length, 1 << 20))
            if not part:
                raise ProtocolError("the program ended")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


# The program's side ---------------------------------------------------------------------------------------------


def run(path: str) -> None:
    """The program as `python path` runs it."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": path, "__builtins__": builtins}
    exec(compile(_read(path), path, "exec"), namespace)


def serve(path: str, fd: int) -> None:
    line = Line(fd)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    namespace: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    source = _read(path)
    line.send("started")
    try:
        exec(compile(source, "program.py", "exec"), namespace)
    except BaseException as error:  # noqa: BLE001
        line.send({"loaded": _told(error)})
        return
    line.send({"loaded": None})
    while True:
        call = line.receive()
        try:
            if call["name"] not in namespace:
                raise NameError(f"name {call['name']!r} is not defined")
            value = encode(namespace[call["name"]](*decode(call["args"]), **decode(call["kwargs"])))
        except BaseException as error:  # noqa: BLE001
            line.send({"error": _told(error)})
        else:
            line.send({"value": value})


def _told(error: BaseException) -> list[str]:
    try:
        return [type(error).__name__, str(error)[:300]]
    except BaseException:  # noqa: BLE001
        return ["Exception", ""]


# The side of the tests ------------------------------------------------------------------------------------------


class Wrong(BaseException):
    """The program is wrong, whatever the tests would make of an exception."""


class Candidate:
    """A function of the program."""

    def __init__(self, line: Line, name: str) -> None:
        self._line = line
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self._line.send({"name": self._name, "args": encode(args), "kwargs": encode(kwargs)})
            answer = self._line.receive()
            if "value" in answer:
                return decode(answer["value"])
            kind, text = answer["error"]
            kind, text = str(kind), str(text)
        except (ProtocolError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Wrong(f"{self._name} gave no value: {error}") from None
        known = getattr(builtins, kind, None)
        if isinstance(known, type) and issubclass(known, Exception):
            try:
                raised = known(text)
            except TypeError:
                raised = RuntimeError(f"{kind}: {text}")
        else:
            raised = RuntimeError(f"{kind}: {text}")
        raise raised


class Names(dict[str, Any]):
    """Names of the tests; one that nobody defined is a function of the program."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def __missing__(self, name: str) -> Candidate:
        if hasattr(builtins, name):
            raise KeyError(name)
        return Candidate(self._line, name)


def check(path: str, fd: int) -> None:
    """Prints the verdict as JSON: whether the tests pass, and why not."""
    verdict = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    tests = json.loads(_read(path))
    context = compile(tests["context"], "context.py", "exec")
    code = compile(tests["test"], "tests.py", "exec")
    line = Line(fd)
    # Up to here nothing of the program has run: what goes wrong is no verdict.
    if line.receive() != "started":
        raise ProtocolError("the process of the program did not start")
    try:
        _check(context, code, tests["entry_point"], line)
        passed, reason = True, None
    except Wrong as error:
        passed, reason = False, str(error)
    except BaseException as error:  # noqa: BLE001
        passed, reason = False, ": ".join(part for part in _told(error) if part)
    with os.fdopen(verdict, "w") as out:
        json.dump({"passed": passed, "reason": reason}, out)


def _check(context: CodeType, code: CodeType, entry_point: str, line: Line) -> None:
    try:
        failure = line.receive()["loaded"]
    except (ProtocolError, OSError, KeyError, TypeError) as error:
        raise Wrong(f"the program could not be loaded: {error}") from None
    if failure is not None:
        raise Wrong("the program could not be loaded: " + ": ".join(map(str, failure)))
    scope: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    exec(context, scope)
    if entry_point:
        candidate = Candidate(line, entry_point)
        scope[entry_point] = candidate
        exec(code, scope)
        if "check" in scope:
            scope["check"](candidate)
    else:
        exec(code, scope, Names(line))


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def main(arguments: list[str]) -> None:
    limits, mode, path, *rest = arguments
    confine(json.loads(limits))
    if mode == "run":
        run(path)
    elif mode == "serve":
        serve(path, int(rest[0]))
    else:
        check(path, int(rest[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
