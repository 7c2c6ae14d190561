"""What `describe` says of each recipe is what the recipe is, and the page of recipes is up to date."""

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from distrl.errors import ConfigError
from distrl.objectives import build, compute, describe, options, recipe_names, required_columns
from distrl.objectives.roles import tensor
from tests.objectives.test_invariance import example

ROOT = Path(__file__).parents[2]
each_recipe = pytest.mark.parametrize("name", recipe_names())


def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_page", ROOT / "docs" / "recipes_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_has_every_recipe_with_class_and_status() -> None:
    found = describe.recipes()
    assert tuple(entry["name"] for entry in found) == recipe_names()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    lines = describe.table().splitlines()
    assert max(len(line) for line in lines) <= 118
    for entry in found:
        assert re.search(rf"(?m)^{entry['name']} +{entry['class']} +{entry['status']} ", describe.table())


@each_recipe
def test_a_recipe_is_described_in_full(name: str) -> None:
    found = describe.recipe(name)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for key in ("summary", "formula", "source", "class", "proves", "status", "credit"):
        assert found[key], key
    assert found["options"].keys() == options(name).keys()
    assert "generator" in found["roles"]
    shown = describe.text(name)
    assert max(len(line) for line in shown.splitlines()) <= 110
    for line in (found["formula"], found["source"]):
        assert " ".join(line.split()) in " ".join(shown.split())


@each_recipe
def test_the_columns_of_a_description_are_enough_to_compute_it(name: str) -> None:
    recipe = build(name)
    columns = {column["name"] for column in describe.recipe(name)["columns"]}
    assert columns == {tensor(x) for x in required_columns(recipe)}
    tensors = {key: x for key, x in example().items() if key in columns | {"mask"}}
    logps = tensors["logps"].clone().requires_grad_()
    compute(recipe, {**tensors, "logps": logps}).loss.backward()
    assert logps.grad is not None
    assert logps.grad.abs().max() > 0


def test_what_is_reconstructed_says_so_and_says_what() -> None:
    marked = {name for name in recipe_names() if build(name).status == "reconstruction"}
    assert marked == {"nash_mp"}
    for name in marked:
        assert "our reconstruction" in describe.recipe(name)["note"]
        assert "status        reconstruction" in describe.text(name)


def test_a_description_follows_the_options() -> None:
    plain, with_kl = describe.recipe("topr"), describe.recipe("topr", kl_coefficient=0.1)
    assert [column["name"] for column in with_kl["columns"]] == ["behavior_logps", "logps", "ref_logps", "rewards"]
    assert "ref_logps" not in json.dumps(plain)
    assert with_kl["terms"] == {
        "policy": "signed_truncate(1, 1, 0, 1) of sequence policy / behavior * score, per sequence_sum",
        "kl": "0.1 * truncate(0, 2) of token policy / behavior * k2 to reference, per sequence_sum",
    }
    assert with_kl["options"]["kl_coefficient"]["value"] == 0.1
    assert with_kl["options"]["kl_coefficient"]["default"] == 0.0
    prorl = describe.recipe("dapo", kl_coefficient=1e-4, reference="reset")
    assert prorl["upkeep"] == {
        "reference": "copy of the policy, renewed every 500 steps together with the optimizer's state"
    }
    assert describe.recipe("a_star_po")["sampler"] == "the policy itself"
    assert describe.recipe("a_star_po", importance="sequence")["sampler"] == "any, corrected by ratios"
    assert (
        describe.recipe("nash_md")["credit"] == "to_go[1](preference - 0.008 log(policy / reference)) - leave_one_out"
    )
    assert describe.recipe("ppo")["options"]["dual_clip"]["default"] == "inf"


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^objective.recipe must be the name of a recipe, got 'ppo2'"):
        describe.text("ppo2")


def test_the_page_and_its_pictures_are_up_to_date() -> None:
    for path, content in page().pages().items():
        assert path.read_text(encoding="utf-8") == content, f"run python docs/recipes_page.py to renew {path}"


@pytest.mark.parametrize(
    ("name", "ratio", "good", "bad"),
    [
        ("topr", 0.3, 1.0, 0.3),
        ("topr", 4.0, 1.0, 1.0),
        ("tis", 4.0, 2.0, 2.0),
        ("grpo", 1.3, 0.0, 1.3),
        ("grpo", 0.5, 0.5, 0.0),
        ("cispo", 7.0, 5.0, 5.0),
        ("icepop", 0.4, 0.0, 0.0),
        ("icepop", 4.9, 4.9, 4.9),
        ("gspo", 1.0006, 0.0, 1.0006),
        ("rpg", 12.0, 0.0, 0.0),
        ("rpg", 9.0, 0.0, 9.0),
        ("reinforce", 3.0, 1.0, 1.0),
        ("is", 3.0, 3.0, 3.0),
        ("decoupled_ppo", 1.1, 1.1, 1.1),
    ],
)
def test_the_measured_weight_is_that_of_the_comparison_table(name: str, ratio: float, good: float, bad: float) -> None:
    # Each method's own definition, for both signs of the credit; RPG without its divergence.
    recipe = build(name, kl_coefficient=0.0) if name == "rpg" else build(name)
    measure = page().weights
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64)
    assert float(measure(recipe, log_ratio, 1.0)) == pytest.approx(good, abs=1e-9)
    assert float(measure(recipe, log_ratio, -1.0)) == pytest.approx(bad, abs=1e-9)


def test_the_example_of_the_page_runs() -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    exec(compile(block.group(1), "recipes.md", "exec"), {})
