from pathlib import Path

from deploy.remote.coordinator import make_prompts
from distrl.config import make_config
from distrl.tasks import load_task, prompt_index


def test_prompts_that_the_driver_leaves_out_are_never_drawn_and_the_order_is_that_of_the_rest(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(f'{{"prompt": "{n}", "answer": ""}}\n' for n in range(30)))
    config = make_config({"model": {"path": tmp_path}, "data": {"source": "jsonl", "path": str(lines)}})
    task = load_task(config.data)
    left_out = frozenset({task.train[0].prompt_id, task.train[7].prompt_id, task.heldout[0].prompt_id})
    prompts = make_prompts(config, left_out)
    rest = task.without(left_out)
    epochs = [prompts.draw(i).prompt_id for i in range(3 * len(rest.train))]
    assert left_out.isdisjoint(epochs)
    assert epochs == [rest.train[prompt_index(0, i, len(rest.train))].prompt_id for i in range(len(epochs))]
    assert prompts.heldout == rest.heldout == task.heldout[1:]
