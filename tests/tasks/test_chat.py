import json
from pathlib import Path
from typing import Any

import pytest

from distrl.errors import DataError
from distrl.tasks import DataConfig, Message, Problem, load_task

USER = {"role": "user", "content": "3 + 3?"}


def _load(path: Path, *prompts: Any, **values: Any) -> list[Problem]:
    path.write_text("".join(json.dumps({"prompt": p, "answer": "6"}) + "\n" for p in prompts))
    heldout = path.with_suffix(".heldout")
    heldout.write_text(json.dumps({"prompt": "held out", "answer": "1"}))
    config = {"source": "jsonl", "path": str(path), "heldout_path": str(heldout), "chat_template": "model", **values}
    task = load_task(DataConfig.model_validate(config))
    return [task.train[i] for i in range(len(task.train))]


def _refused(path: Path, prompt: Any, **values: Any) -> str:
    with pytest.raises(DataError) as error:
        _load(path, prompt, **values)
    return str(error.value).removeprefix(f"data.path {str(path)!r} line 1 must have ")


def test_a_text_is_the_users_message(tmp_path: Path) -> None:
    plain, conversation = _load(tmp_path / "a", "3 + 3?", [USER])
    assert plain == conversation == Problem.of([Message("user", "3 + 3?")], "6")
    assert json.loads(plain.prompt) == [USER]


def test_the_system_prompt_comes_first_and_is_part_of_the_problem(tmp_path: Path) -> None:
    (one,) = _load(tmp_path / "a", "3 + 3?", system_prompt="Be brief.")
    assert one.messages == (Message("system", "Be brief."), Message("user", "3 + 3?"))
    (other,) = _load(tmp_path / "a", "3 + 3?", system_prompt="Be long.")
    assert one.prompt_id != other.prompt_id


def test_the_system_prompt_moves_no_problem_to_the_other_split() -> None:
    def heldout(**values: Any) -> list[str]:
        config = {"source": "sort_digits", "heldout_size": 20, "chat_template": "model", **values}
        return [p.messages[-1].content for p in load_task(DataConfig.model_validate(config)).heldout]

    assert heldout() == heldout(system_prompt="Be brief.")


def test_problems_that_are_made_when_asked_for_stay_so() -> None:
    task = load_task(DataConfig(source="sort_digits", train_size=10**9, heldout_size=1, chat_template="model"))
    assert len(task.train) == 10**9
    assert task.train[10**9 - 1].messages[0].role == "user"


def test_null_keys_of_a_struct_column_are_not_there(tmp_path: Path) -> None:
    (problem,) = _load(tmp_path / "a", [{**USER, "tool_calls": None}])
    assert problem.messages == (Message("user", "3 + 3?"),)


def test_conversation_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    assert _refused(tmp_path / "a", [USER], chat_template="none") == (
        "a string as 'prompt' where data.chat_template is none, got the list [{'role': 'user', 'content': '3 + 3?'}]; "
        "set data.chat_template to model"
    )


@pytest.mark.parametrize(
    "message",
    ["3 + 3?", {"role": "user"}, {"role": "user", "content": ["3"]}, {**USER, "tool_calls": ["f"]}],
)
def test_message_of_another_form_is_refused(tmp_path: Path, message: Any) -> None:
    shown = repr(message) if len(repr(message)) <= 60 else f"{message!r:.57}..."
    assert _refused(tmp_path / "a", [message]) == (
        f"messages of 'role' and 'content', both strings, in 'prompt', got {shown}; tool calls and images are not "
        "supported"
    )


def test_conversation_that_needs_no_answer_is_refused(tmp_path: Path) -> None:
    answered = [USER, {"role": "assistant", "content": "6"}]
    rule = "a conversation in 'prompt' that the model is to answer, got "
    assert _refused(tmp_path / "a", answered) == (
        f"{rule}{{'role': 'assistant', 'content': '6'}} at its end; end it with the user's message"
    )
    assert _refused(tmp_path / "a", []) == f"{rule}no message at its end; end it with the user's message"


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be long."}, USER]
    assert _refused(tmp_path / "a", prompt, system_prompt="Be brief.") == (
        "no system message where data.system_prompt is set, got {'role': 'system', 'content': 'Be long.'}; remove one "
        "of the two"
    )
