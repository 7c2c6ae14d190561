from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_run
from deploy.explain import explain
from distrl.config import Config, make_config
from distrl.errors import ConfigError, DataError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.prompts import PromptEncoder, check_lengths
from distrl.tasks import DataConfig, Message, Problem, Task, load_task
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LENGTHS = [3, 9, 5, 9, 12]


def _tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.chat_template = template
    return tokenizer


def _task(lengths: list[int] = LENGTHS, heldout: int = 4) -> Task:
    # One character is one token.
    train = tuple(Problem.of(f"{i}" * n, "") for i, n in enumerate(lengths))
    return Task(train, (Problem.of("h" * heldout, ""),), "exact")


def _check(task: Task, max_prompt_tokens: int | None, max_new_tokens: int, context_length: int) -> Any:
    return check_lengths(
        task,
        PromptEncoder(_tokenizer()),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        context_length=context_length,
    )


def test_a_conversation_is_encoded_as_its_template_says_up_to_the_models_turn() -> None:
    tokenizer = _tokenizer()
    conversation = [Message("system", "Be brief."), Message("user", "Hi")]
    encoded = PromptEncoder(tokenizer).encode("", conversation)
    assert tokenizer.decode(encoded) == "<system>Be brief.<user>Hi<assistant>"


def test_a_text_is_encoded_as_it_stands() -> None:
    assert PromptEncoder(_tokenizer()).encode("3>") == tuple(_tokenizer().encode("3>"))


def test_special_tokens_are_added_to_texts_and_left_to_the_template_in_conversations() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = _tokenizer("<eos>{{ messages[0].content }}")
    tokenizer.split_special_tokens = False
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    encoder = PromptEncoder(tokenizer)
    assert encoder.encode("a") == encoder.encode("", [Message("user", "a")])
    lengths = encoder.lengths([Problem.of("a", ""), Problem.of([Message("user", "a")], "")])
    assert [n for _, n in lengths] == [2, 2]


def test_lengths_are_those_of_the_encoded_prompts() -> None:
    encoder = PromptEncoder(_tokenizer())
    problems = [Problem.of("x" * (i % 7 + 1), "") for i in range(2100)]
    problems[5] = Problem.of([Message("user", "Hi")], "")
    measured = {p.prompt_id: n for p, n in encoder.lengths(problems)}
    assert measured == {p.prompt_id: len(encoder.encode(p.prompt, p.messages)) for p in problems}


def test_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = _tokenizer(None)
    tokenizer.name_or_path = "models/mine"
    assert refusal(ConfigError, PromptEncoder(tokenizer).check_template) == (
        "data.chat_template model needs a tokenizer with a chat template, got model.path 'models/mine' without one; "
        "set data.chat_template to none, or put the template into its chat_template.jinja"
    )


def test_conversation_that_the_template_refuses_is_named() -> None:
    conversation = [Message("user", "Hi"), Message("tool", "3")]
    assert refusal(DataError, lambda: PromptEncoder(_tokenizer()).render(conversation)) == (
        "model.path: the chat template must accept every conversation, got one with the roles user, tool: no tools "
        "here; change the messages or the template"
    )


def test_prompt_that_the_tokenizer_cannot_encode_is_named() -> None:
    message = refusal(DataError, lambda: list(PromptEncoder(_tokenizer()).lengths([Problem.of("a\N{SNOWMAN}", "")])))
    assert message.startswith("model.path: the tokenizer must encode every prompt, got 'a\N{SNOWMAN}': ")
    assert message.endswith("; use a model whose tokenizer knows these characters")


def test_prompts_beyond_the_bound_are_left_out_and_nothing_else() -> None:
    task = _task()
    lengths = _check(task, 9, 5, 14)
    assert lengths.left_out == {task.train[4].prompt_id}
    assert lengths.longest == 9
    remaining = task.without(lengths.left_out)
    assert [len(remaining.train[i].prompt) for i in range(len(remaining.train))] == [3, 9, 5, 9]
    assert remaining.heldout == task.heldout


def test_prompt_and_response_that_exactly_fit_are_accepted() -> None:
    assert _check(_task(), None, 4, 16).left_out == frozenset()


def test_prompt_longer_than_the_context_is_refused_with_the_longest_and_a_remedy() -> None:
    assert refusal(ConfigError, lambda: _check(_task(), None, 8, 16)) == (
        "rollout.max_new_tokens: a prompt and its response must fit into the model's context of 16 tokens, got 3 of 6 "
        "prompts that do not, the longest of 12 tokens + 8; set data.max_prompt_tokens to 8 to leave them out, or "
        "lower rollout.max_new_tokens"
    )


def test_held_out_prompts_are_measured_too() -> None:
    message = refusal(ConfigError, lambda: _check(_task([3], heldout=12), None, 8, 16))
    assert "got 1 of 2 prompts that do not, the longest of 12 tokens + 8" in message


@pytest.mark.parametrize(("task", "which", "shortest"), [(_task([3]), "training", 3), (_task([1]), "held-out", 4)])
def test_bound_that_leaves_nothing_is_refused(task: Task, which: str, shortest: int) -> None:
    assert refusal(ConfigError, lambda: _check(task, 2, 8, 64)) == (
        f"data.max_prompt_tokens must leave a {which} problem, got 2 but the shortest prompt has {shortest} tokens; "
        "raise it"
    )


def test_responses_that_fill_the_context_are_refused() -> None:
    assert refusal(ConfigError, lambda: _check(_task(), None, 16, 16)) == (
        "rollout.max_new_tokens must leave room for a prompt in the model's context of 16 tokens, got 16; lower it"
    )


def test_problems_that_are_made_when_asked_for_are_measured_at_the_beginning_only() -> None:
    task = load_task(DataConfig(source="sort_digits", train_size=10**9, heldout_size=1))
    assert _check(task, None, 5, 14).longest == 9
    assert refusal(ConfigError, lambda: _check(task, None, 6, 14)) == (
        "rollout.max_new_tokens: a prompt and its response must fit into the model's context of 14 tokens, got 1001 of "
        "1001 prompts that do not, the longest of 9 tokens + 6; lower rollout.max_new_tokens"
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    size = TinyArchitecture(hidden_size=8, layers=1, heads=2, intermediate_size=8, context_length=80)
    make_tiny_model(tmp_path / "model", _tokenizer(), seed=0, architecture=size)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(f'{{"prompt": "{"x" * n}", "answer": "1"}}\n' for n in range(1, 41)))
    return make_config(
        {
            "model": {"path": tmp_path / "model"},
            "data": {"source": "jsonl", "path": str(lines), "heldout_fraction": 0.3},
            "evaluation": {"problems": 1},
        }
    )


def _with(config: Config, *overrides: str) -> Config:
    return make_config(config.model_dump(), overrides)


def test_a_run_is_planned_without_the_prompts_that_are_too_long(config: Config) -> None:
    assert refusal(ConfigError, lambda: check_run(config)).startswith("rollout.max_new_tokens: a prompt and ")
    bounded = _with(config, "data.max_prompt_tokens=16")
    plan = check_run(bounded)
    # Prompts have 1 to 40 tokens.
    assert plan.train_problems + plan.heldout_problems == plan.longest_prompt == 16
    assert len(plan.left_out) == 24
    assert explain(bounded, plan)[1] == (
        f"data      jsonl: {plan.train_problems} training and {plan.heldout_problems} held-out problems; 24 prompts "
        "longer than 16 tokens are left out"
    )
    # The coordinator gets the ids and comes to the same problems, in the same order, without a tokenizer.
    task = load_task(bounded.data).without(plan.left_out)
    assert (len(task.train), len(task.heldout)) == (plan.train_problems, plan.heldout_problems)
    assert all(len(task.train[i].prompt) <= 16 for i in range(len(task.train)))


def test_the_chat_template_counts_as_part_of_the_prompt(config: Config) -> None:
    bounded = _with(config, "data.chat_template=model", "data.max_prompt_tokens=30", "rollout.max_new_tokens=40")
    assert check_run(bounded).longest_prompt == 30
    # "<user>" and "<assistant>" have 17 characters.
    assert check_run(bounded).train_problems + check_run(bounded).heldout_problems == 30 - 17


def test_a_run_with_a_chat_template_needs_one(config: Config) -> None:
    (config.model.path / "chat_template.jinja").unlink()
    assert refusal(ConfigError, lambda: check_run(_with(config, "data.chat_template=model"))) == (
        f"data.chat_template model needs a tokenizer with a chat template, got model.path '{config.model.path}' "
        "without one; set data.chat_template to none, or put the template into its chat_template.jinja"
    )


def test_a_model_without_weights_is_refused_before_the_run(config: Config) -> None:
    (config.model.path / "model.safetensors").unlink()
    assert refusal(DataError, lambda: check_run(config)) == (
        f"model.path must hold weights (*.safetensors or pytorch_model*.bin), got '{config.model.path}' without any; "
        "export or download the model again"
    )


def test_a_model_without_a_context_is_refused(config: Config) -> None:
    path = config.model.path / "config.json"
    path.write_text('{"model_type": "bloom"}')
    assert refusal(DataError, lambda: check_run(config)) == (
        "model.path must have a config with max_position_embeddings, the model's context in tokens, got "
        f"'{config.model.path}' with None; add it to config.json"
    )


def test_measuring_prompts_imports_no_torch_where_there_is_no_tokenizer() -> None:
    import subprocess
    import sys

    code = "import sys, distrl.prompts; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A message of the model ends with the end of sequence, and something of the template's follows."""


@pytest.mark.parametrize("role", ["user", "tool"])
def test_an_observation_continues_a_conversation_as_the_template_would(role: str) -> None:
    tokenizer = _tokenizer(TURNS)
    tokenizer.split_special_tokens = False
    encoder = PromptEncoder(tokenizer)
    conversation = [Message("user", "2 * 21?")]
    message = (*tokenizer.encode("Let me see.", add_special_tokens=False), tokenizer.eos_token_id)
    carried = (*encoder.encode("", conversation), *message, *encoder.observation("42", role, chat=True))
    whole = encoder.encode("", [*conversation, Message("assistant", "Let me see."), Message(role, "42")])
    assert carried == whole


def test_an_observation_of_a_text_is_the_text_alone() -> None:
    encoder = PromptEncoder(_tokenizer())
    assert encoder.observation("42", "user", chat=False) == tuple(_tokenizer().encode("42", add_special_tokens=False))


def test_a_template_that_does_not_end_messages_with_the_end_of_sequence_is_refused() -> None:
    encoder = PromptEncoder(_tokenizer())
    assert refusal(DataError, lambda: encoder.observation("42", "user", chat=True)) == (
        "model.path: the chat template must go on after a message of the model with its end of sequence '<eos>', got "
        "''; use a template that keeps earlier messages as they are"
    )
