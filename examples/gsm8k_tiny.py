"""Makes what examples/gsm8k_tiny.yaml trains: a BPE tokenizer from the file's own text, and a tiny model.

python examples/gsm8k_tiny.py PATH/TO/train.jsonl [DIRECTORY]

The model is warmed up for some supervised steps on final answers ("#### 72"), until it answers in that form and is
right now and then: reinforcement learning needs some reward to begin with. Held-out questions are not looked at.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from distrl.config import Config, load_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.prompts import PromptEncoder, check_lengths
from distrl.tasks import Problem, Task, load_task
from distrl.warmup import WarmupPlan, WarmupReport, warm_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG = Path(__file__).with_suffix(".yaml")
VOCABULARY = 2048
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(task: Task) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of the training questions and answers, with a chat template; digits stay single."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    backend.decoder = decoders.ByteLevel()
    roles = ["<system>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = [task.train[i] for i in range(len(task.train))]
    backend.train_from_iterator((text for p in problems for text in (p.messages[-1].content, p.answer)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=roles,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def final_answers(task: Task) -> Task:
    """The task with the last line of each worked solution as its answer."""

    def last_line(problem: Problem) -> Problem:
        return Problem.of(problem.messages, f"####{problem.answer.rpartition('####')[2]}")

    changed = task.map(last_line)
    return Task(changed.train, changed.heldout, "math_verify")


def make_model(config: Config, directory: Path, *, steps: int = 80) -> WarmupReport:
    """Writes tokenizer and warmed-up model to a directory.

    Args:
        config: examples/gsm8k_tiny.yaml, with the path of the file.
        steps: of the warm-up, about half a second each.
    """
    task = load_task(config.data)
    tokenizer = make_tokenizer(task)
    lengths = check_lengths(
        task,
        PromptEncoder(tokenizer),
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
        context_length=CONTEXT,
    )
    short = final_answers(task.without(lengths.left_out))
    with TemporaryDirectory() as temporary:
        make_tiny_model(Path(temporary), tokenizer, seed=0, architecture=TinyArchitecture(context_length=CONTEXT))
        plan = WarmupPlan(steps=steps, target_accuracy=None)
        return warm_up(Path(temporary), directory, short, plan)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    config = load_config(CONFIG, [f"data.path={sys.argv[1]}"])
    directory = Path(sys.argv[2]) if len(sys.argv) == 3 else config.model.path
    report = make_model(config, directory)
    print(
        f"{directory}: {report.steps} supervised steps in {report.wall_s:.0f} s, loss {report.loss:.2f}, sampled "
        f"accuracy {report.sampled_accuracy:.3f}\n"
        f"distrl train examples/gsm8k_tiny.yaml data.path={sys.argv[1]} model.path={directory}"
    )


if __name__ == "__main__":
    main()
