"""From the rows of a file to a task: one path for every kind of file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distrl.errors import DataError
from distrl.tasks.config import DataConfig
from distrl.tasks.problem import Message, Problem, Task, content_hash

_FRACTION = 0.1

Row = Mapping[str, object]

Numbered = list[tuple[int, Problem]]
"""Problems with the numbers of their rows, from 1."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one file, or of one split of a dataset."""

    setting: str
    """Dotted name of the config key that the file came from, for messages."""
    name: str
    """The file as messages name it."""
    unit: str
    """What a row is called: `line` or `row`."""
    rows: Iterator[tuple[int, Row]]
    """With their numbers, from 1; read when they are asked for."""
    as_text: str
    """Remedy for a value that is not a text."""


def make_task(train_rows: Rows, heldout_rows: Rows | None, config: DataConfig) -> Task:
    """The problems of the rows, with those of `heldout_rows` or a fraction of `train_rows` held out.

    A fraction is chosen by a hash of each prompt, so that adding rows never moves a prompt to the other split, and
    rows with one prompt share a split. Repeated rows are kept in training and taken once in the held-out problems.

    Raises:
        DataError: a row is broken, a file is empty, the splits share a prompt, one is empty, or one is smaller than
            asked for.
    """
    train = _problems(train_rows, config)
    if heldout_rows is not None:
        heldout = _problems(heldout_rows, config)
        _check_disjoint(train, heldout, train_rows, heldout_rows)
    else:
        train, heldout = _split(train, config)
    return Task(
        _first("data.train_size", [p for _, p in train], config.train_size),
        _first("data.heldout_size", _distinct(heldout), config.heldout_size),
        "exact",
    )


def distinct_problems(rows: Rows, config: DataConfig) -> tuple[Problem, ...]:
    """The distinct problems of one file, in its order; errors as for `make_task`."""
    return tuple(_distinct(_problems(rows, config)))


def _distinct(problems: Numbered) -> list[Problem]:
    return list({problem.prompt_id: problem for _, problem in problems}.values())


def short(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _problems(rows: Rows, config: DataConfig) -> Numbered:
    problems = [(n, _problem(f"{rows.setting} {rows.name} {rows.unit} {n}", row, rows, config)) for n, row in rows.rows]
    if not problems:
        raise DataError(
            f"{rows.setting} must hold at least one problem, got {rows.name}, which is empty; check the path"
        )
    return problems


def _problem(where: str, row: Row, rows: Rows, config: DataConfig) -> Problem:
    prompt_key, answer_key = config.prompt_key or "prompt", _answer_key(config)
    for setting, key in (("data.prompt_key", prompt_key), ("data.answer_key", answer_key)):
        if key not in row and key != "":
            raise DataError(f"{where} must have the key {key!r}, got the keys {names(row)}; set {setting}")
    answer = row[answer_key] if answer_key else ""
    if not isinstance(answer, str):
        raise DataError(f"{where} must have a string as {answer_key!r}, got {short(answer)}; {rows.as_text}")
    prompt = _prompt(where, row[prompt_key], prompt_key, rows, config)
    return Problem.of(prompt, answer, _metadata(where, row, config))


def names(row: Row) -> str:
    """Column names for a message."""
    return ", ".join(repr(key) for key in row) or "none"


def _answer_key(config: DataConfig) -> str:
    return "answer" if config.answer_key is None else config.answer_key


def metadata_keys(row: Row, config: DataConfig) -> list[str]:
    """The columns that travel as metadata: all but the prompt, and the answer's where it has a name of its own."""
    if config.columns is not None:
        return list(config.columns)
    own = {config.prompt_key or "prompt"} | ({"answer"} & {_answer_key(config)})
    return [key for key in row if key not in own]


def _metadata(where: str, row: Row, config: DataConfig) -> dict[str, object]:
    keys = metadata_keys(row, config)
    for key in keys:
        if key not in row:
            raise DataError(f"{where} must have the key {key!r}, got the keys {names(row)}; mend data.columns")
    return {key: row[key] for key in keys}


def _prompt(where: str, value: object, key: str, rows: Rows, config: DataConfig) -> str | list[Message]:
    if isinstance(value, list):
        return _conversation(where, value, key, config)
    if not isinstance(value, str):
        raise DataError(f"{where} must have a string as {key!r}, got {short(value)}; {rows.as_text}")
    if not value:
        raise DataError(f"{where} must have a prompt that is not empty, got ''; fix or remove the {rows.unit}")
    return value


def _conversation(where: str, value: Sequence[object], key: str, config: DataConfig) -> list[Message]:
    if config.chat_template == "none":
        raise DataError(
            f"{where} must have a string as {key!r} where data.chat_template is none, got the list {short(value)}; "
            "set data.chat_template to model"
        )
    messages = []
    for item in value:
        # Columns of structs have every key in every row, null where it was not given.
        given = {k: v for k, v in item.items() if v is not None} if isinstance(item, Mapping) else {}
        role, content = given.get("role"), given.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or len(given) != 2:
            raise DataError(
                f"{where} must have messages of 'role' and 'content', both strings, in {key!r}, got {short(item)}; "
                "tool calls and images are not supported"
            )
        messages.append(Message(role, content))
    if not messages or messages[-1].role == "assistant":
        last = short(value[-1]) if value else "no message"
        raise DataError(
            f"{where} must have a conversation in {key!r} that the model is to answer, got {last} at its end; end it "
            "with the user's message"
        )
    if config.system_prompt is not None and any(m.role == "system" for m in messages):
        raise DataError(
            f"{where} must have no system message where data.system_prompt is set, got {short(value[0])}; remove one "
            "of the two"
        )
    return messages


def _check_disjoint(train: Numbered, heldout: Numbered, of_train: Rows, of_heldout: Rows) -> None:
    numbers = {problem.prompt: number for number, problem in train}
    for number, problem in heldout:
        if problem.prompt in numbers:
            raise DataError(
                f"{of_heldout.setting} must share no prompt with {of_train.setting}, got {of_heldout.unit} {number} of "
                f"{of_heldout.name} equal to {of_train.unit} {numbers[problem.prompt]} of {of_train.name}; remove one "
                "of the two"
            )


def _split(problems: Numbered, config: DataConfig) -> tuple[Numbered, Numbered]:
    fraction = config.heldout_fraction or _FRACTION
    train, heldout = Numbered(), Numbered()
    for number, problem in problems:
        (heldout if content_hash(problem.prompt) < fraction * 2**64 else train).append((number, problem))
    if not train or not heldout:
        raise DataError(
            f"data.heldout_fraction must leave a problem in either split, got {fraction} which holds out "
            f"{len(heldout)} of {len(problems)}; set another fraction, or data.heldout_path"
        )
    return train, heldout


def _first(setting: str, problems: list[Problem], size: int | None) -> tuple[Problem, ...]:
    if size is not None and size > len(problems):
        raise DataError(
            f"{setting} must be at most the number of problems, got {size} but there are {len(problems)}; lower it, "
            "or leave it empty for all"
        )
    return tuple(problems[:size])
