"""Makes what examples/calculator.yaml trains: sums of three numbers, and a tiny model that seldom gets through them.

    python examples/calculator.py [FOLDER]

Writes FOLDER/sums.jsonl and FOLDER/model (FOLDER is `calculator` unless named). A prompt is `34+57+12=`. The model has
a calculator: it writes `[34+57]`, reads `91;`, writes `[91+12]`, reads `103;`, and answers `103`. It is warmed up on
such transcripts until it is right now and then; a run teaches it the rest:

    distrl train examples/calculator.yaml
"""

import json
import random
import sys
from pathlib import Path

from distrl.models import TinyArchitecture
from distrl.tasks import DataConfig
from distrl.warmup import WarmupPlan, cached_model

ALPHABET = "0123456789+=[];?"
CALL_ENDS = "]"
"""A message ends with this character or with the end of the sequence."""


SIZE = TinyArchitecture(hidden_size=96, layers=3, heads=4, intermediate_size=192)


def transcript(a: int, b: int, c: int) -> str:
    return f"[{a}+{b}]{a + b};[{a + b}+{c}]{a + b + c};{a + b + c}"


def make(folder: Path, *, problems: int = 4000, steps: int = 90, largest: int = 29) -> None:
    """Writes the files and the model."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    sums = dict.fromkeys(tuple(rng.randint(1, largest) for _ in range(3)) for _ in range(2 * problems))
    chosen = list(sums)[:problems]
    with (folder / "sums.jsonl").open("w") as task, (folder / "transcripts.jsonl").open("w") as warm:
        for a, b, c in chosen:
            task.write(json.dumps({"prompt": f"{a}+{b}+{c}=", "answer": str(a + b + c)}) + "\n")
            warm.write(json.dumps({"prompt": f"{a}+{b}+{c}=", "answer": transcript(a, b, c)}) + "\n")
    data = DataConfig(source="jsonl", path=str(folder / "transcripts.jsonl"))
    # The accuracy of a warm-up counts the calculator's words, too: it says little here.
    plan = WarmupPlan(target_accuracy=None, steps=steps)
    made = cached_model(folder / "cache", data, alphabet=ALPHABET, seed=0, architecture=SIZE, plan=plan)
    # Two tokens end a message, as in many chat models: engines take them from this file.
    end, call_ends = 1, 2 + ALPHABET.index(CALL_ENDS)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, call_ends], "pad_token_id": 0}))
    model = folder / "model"
    model.unlink(missing_ok=True)
    model.symlink_to(made.relative_to(folder))
    print(f"{model}: {(made / 'warmup.json').read_text()}", file=sys.stderr)


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "calculator"))
