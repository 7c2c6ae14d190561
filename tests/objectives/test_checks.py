"""Every option is used or refused, with a message that names the reason."""

import pickle
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distrl.errors import ConfigError, SchemaError
from distrl.objectives import Batch, build, check, compute, options, prepare, recipe_names, required_columns
from distrl.objectives.build import parse
from tests.objectives.tabular import random

BASE: dict[str, object] = {"source": "a test", "status": "paper", "proves": "potential", "credit": {}}


def refused(document: Mapping[str, object]) -> str:
    with pytest.raises(ConfigError) as error:
        parse("mine", {**BASE, **document}, {})
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    return str(error.value)


def term(**fields: object) -> dict[str, object]:
    return {"name": "policy", "loss": "score", **fields}


def ratio(**fields: object) -> dict[str, object]:
    return {"ratio": {"shape": {"truncate": {"low": 0.0, "high": 2.0}}, "level": "token", **fields}}


@pytest.mark.parametrize(
    ("name", "chosen", "text"),
    [
        (
            "topr",
            {"kl_estimator": "k3"},
            "topr.kl_estimator is not read with the other options as they are, got 'k3'; leave it out, "
            "or turn on what reads it (k2 is the reverse KL, k3 the forward KL)",
        ),
        (
            "topr",
            {"positives": 0.1},
            "topr.positives is not read with the other options as they are, got 0.1; leave it out, "
            "or turn on what reads it (effective proportion of positives, with baseline_kind: positives)",
        ),
        (
            "dapo",
            {"reference": "reset"},
            "dapo.reference is not read with the other options as they are, got 'reset'; leave it out, "
            "or turn on what reads it (reset renews the reference and the optimizer's state)",
        ),
        (
            "ppo",
            {"normalize": "none", "kl_controller": "adaptive"},
            "ppo.kl_controller is not read with the other options as they are, got 'adaptive'; leave it out, "
            "or turn on what reads it (adaptive steers the KL per token to kl_target)",
        ),
        (
            "nash_mp",
            {"snapshot_every": 5.0},
            "nash_mp.snapshot_every is not read with the other options as they are, got 5.0; leave it out, "
            "or turn on what reads it (optimizer steps per half step; ours)",
        ),
    ],
)
def test_an_option_that_nothing_reads_is_refused(name: str, chosen: dict[str, float | str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, **chosen)
    assert str(error.value) == text


@pytest.mark.parametrize("name", recipe_names())
def test_defaults_may_be_spelled_out(name: str) -> None:
    chosen = {option: rule.default for option, rule in options(name).items()}
    assert build(name, **chosen) == build(name)


@pytest.mark.parametrize("name", recipe_names())
def test_every_option_changes_the_recipe_where_it_is_read(name: str) -> None:
    # Somewhere among the choices of the other options, each option makes a difference.
    for option in options(name):
        contexts: list[dict[str, float | str]] = [{}, {"kl_coefficient": 0.5}, {"overlong_max_length": 9000.0}]
        contexts += [{o: c} for o, r in options(name).items() for c in r.choices]
        contexts += [{**context, "kl_coefficient": 0.5} for context in contexts]
        contexts += [{"kl_coefficient": 0.5, "normalize": "none", "kl_controller": "adaptive"}]
        assert any(matters(name, context, option) for context in contexts), option


def matters(name: str, context: dict[str, float | str], option: str) -> bool:
    declared = options(name)
    if option in context or not context.keys() <= declared.keys():
        return False
    default = declared[option].default
    numbers = [] if isinstance(default, str) else [2 * default + 1, 0.7 * default, 9000.0, 3.0]
    for value in (*declared[option].choices, *numbers):
        try:
            one, other = build(name, **context, **{option: value}), build(name, **context)
        except ConfigError:
            continue
        if replace(one, options={}) != replace(other, options={}):
            return True
    return False


def test_a_ratio_that_is_corrected_twice_is_refused() -> None:
    twice = [ratio(), ratio(of={"proximal": 1.0})]
    assert refused({"terms": [term(weights=twice)]}) == (
        "mine.terms.policy corrects its importance ratio twice, its weights multiply to "
        "policy^1 behavior^-2 proximal^1; "
        "a ratio of policy over behavior is the whole correction: leave one weight out, "
        "or take the ratios policy over proximal and proximal over behavior"
    )
    parse("mine", {**BASE, "terms": [term(weights=[ratio(over={"proximal": 1.0}), ratio(of={"proximal": 1.0})])]}, {})


def test_a_kl_inside_a_standardized_credit_is_refused_unless_it_is_said() -> None:
    credit = {"rewards": ["stored", {"penalty": {"coefficient": {"fixed": {"value": 0.1}}}}], "scale": "group_std"}
    text = (
        "mine.credit has a KL in the reward and a scale, which would divide the KL's coefficient by the "
        "standard deviation of the returns; put the KL into the loss, use scale: one, "
        "or say scale_includes_kl: true (the metric effective_kl_coefficient has what is left of it)"
    )
    assert refused({"credit": credit, "terms": [term()]}) == text
    parse("mine", {**BASE, "credit": {**credit, "scale_includes_kl": True}, "terms": [term()]}, {})
    with pytest.raises(ConfigError) as error:
        build("ppo", kl_coefficient=0.1)
    assert str(error.value) == text.replace("mine", "ppo")


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (
            {"terms": [term(loss={"divergence": {"estimator": "k2", "anchor": {"policy": 1.0}}})]},
            "mine.terms.policy measures the policy against {'policy': 1.0}, itself; "
            "its gradient is zero in expectation, so that it regularizes nothing: name another model",
        ),
        (
            {
                "credit": {
                    "rewards": [{"penalty": {"coefficient": {"fixed": {"value": 0.1}}, "over": {"policy": 1.0}}}]
                },
                "terms": [term()],
            },
            "mine.credit has a penalty over {'policy': 1.0}, the policy itself; "
            "its gradient is zero in expectation, so that it regularizes nothing: name another model",
        ),
        (
            {"terms": [term(loss={"divergence": {"estimator": "k1"}})]},
            "mine.terms[0].loss.divergence.estimator must be one row by name, got 'k1': "
            "differentiated as a loss it has zero gradient in expectation and regularizes nothing; "
            "use k2, whose gradient is that of the reverse KL, or a recipe with the KL in the reward",
        ),
        (
            {"credit": {"returns": "now", "baseline": "group_mean"}, "terms": [term()]},
            "mine.credit compares whole responses of a group, but its return is that of single tokens; "
            "use the return whole or to_go, or a baseline per token (constant, value, batch_mean)",
        ),
        (
            {"terms": [term(loss={"ipo": {"tau": 1.0}})]},
            "mine.credit has rewards, but losses of pairs read no credit; write credit: {rewards: []}",
        ),
        (
            {"credit": {"rewards": []}, "terms": [term(loss={"ipo": {"tau": 1.0}}, weights=[ratio()])]},
            "mine.terms.policy.weights is given, but a loss of pairs is the plain mean over pairs of the policy's own; "
            "leave it out",
        ),
        (
            {"terms": [term(loss={"regression": {"beta": 1.0}}, per="sequence_mean")]},
            "mine.terms.policy.per must be sequence_sum, got sequence_mean; "
            "the loss is that of a whole response, and anything else would divide it by the response's length",
        ),
        (
            {"terms": [term(loss={"regression": {"beta": 1.0}}, per="sequence_sum", weights=[ratio()])]},
            "mine.terms.policy weighs the loss of a whole response with a ratio of single tokens; use level: sequence",
        ),
    ],
)
def test_a_composition_that_would_not_do_what_it_says_is_refused(document: dict[str, object], text: str) -> None:
    assert refused(document) == text


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "nash_mp", "tis"])
def test_groups_of_one_are_refused_wherever_responses_are_compared(name: str) -> None:
    check(build(name), group_size=2)
    with pytest.raises(ConfigError) as error:
        check(build(name), group_size=1)
    assert str(error.value) == (
        f"{name} needs a group size >= 2, got 1; "
        "a response alone in its group is its own mean and has credit 0: sample more responses per prompt"
    )
    check(build("reinforce_pp"), group_size=1)


def test_columns_that_nobody_produces_are_refused_with_who_would() -> None:
    produced = frozenset({"policy", "behavior", "rewards", "group", "reference"})
    for name in ("topr", "reinforce", "is", "tis", "icepop", "grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "rpg"):
        check(build(name), produced=produced)
    wanted = {
        "a_star_po": "v_star (from the value cache)",
        "ppo": "values (from the value head)",
        "decoupled_ppo": "proximal (from the proximal scorer)",
        "nash_mp": "anchor (from the anchor scorer), preference (from the judge)",
        "online_ipo": "pair_preference (from the judge), pairs (from the judge)",
    }
    for name, missing in wanted.items():
        with pytest.raises(ConfigError) as error:
            check(build(name), produced=produced)
        assert str(error.value) == (
            f"{name} reads {missing}, which this run does not produce; "
            "turn on what produces it, or the option off that reads it (kl_coefficient: 0 for the reference)"
        )


def tensors() -> dict[str, Tensor]:
    return {
        "mask": torch.ones(4, 3).bool(),
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "group": torch.tensor([0, 0, 1, 1]),
        "pairs": torch.tensor([[0, 1], [2, 3], [3, 2]]),
        "pair_preference": torch.tensor([0.2, 0.5, 0.5]),
        "v_star": torch.zeros(4),
        "preference": torch.zeros(4),
        "policy_versions": torch.zeros(4, 3).long(),
        "logits": torch.zeros(4, 3, 5),
        "ref_logits": torch.zeros(4, 3, 5),
        "values": torch.zeros(4, 3),
        **{f"{model}_logps": torch.zeros(4, 3) for model in ("behavior", "proximal", "ref", "anchor")},
        "logps": torch.zeros(4, 3),
    }


MISSING = {
    "a_star_po": {"v_star": "v_star ([B])", "ref_logps": "ref_logps ([B, T])"},
    "nash_mp": {"preference": "preference ([B])", "anchor_logps": "anchor_logps ([B, T])"},
    "online_ipo": {"pairs": "pairs ([N, 2] int)", "pair_preference": "pair_preference ([N])"},
    "ppo": {"values": "values ([B, T])"},
    "decoupled_ppo": {"proximal_logps": "proximal_logps ([B, T])"},
}


@pytest.mark.parametrize(("name", "missing"), [(name, tensor) for name in MISSING for tensor in MISSING[name]])
def test_a_missing_tensor_is_named_with_its_shape_and_the_recipe(name: str, missing: str) -> None:
    present = {key: value for key, value in tensors().items() if key != missing}
    with pytest.raises(SchemaError) as error:
        compute(name, present)
    assert str(error.value) == (
        f"{name} needs the tensor {MISSING[name][missing]}, got {', '.join(sorted(present))}; "
        "required_columns(recipe) lists what a recipe reads"
    )


def test_the_loglinear_proximal_policy_needs_versions_instead_of_a_scorer() -> None:
    recipe = build("decoupled_ppo", proximal="loglinear")
    assert required_columns(recipe) == {"policy", "behavior", "group", "rewards", "policy_versions"}
    present = {k: v for k, v in tensors().items() if k not in ("proximal_logps", "policy_versions")}
    with pytest.raises(SchemaError, match=r"^decoupled_ppo needs the tensor policy_versions \(\[B, T\] int\), got"):
        compute(recipe, present)


@pytest.mark.parametrize(
    ("name", "tensor", "wanted", "kind"),
    [
        ("v_star", torch.zeros(4, 3), "[4]", "float32 [4, 3]"),
        ("preference", torch.zeros(3), "[4]", "float32 [3]"),
        ("values", torch.zeros(4), "[4, 3]", "float32 [4]"),
        ("policy_versions", torch.zeros(4), "[4, 3]", "float32 [4]"),
        ("logits", torch.zeros(4, 3), "[4, 3, V]", "float32 [4, 3]"),
        ("ref_logits", torch.zeros(4, 2, 5), "[4, 3, V]", "float32 [4, 2, 5]"),
        ("pairs", torch.zeros(3, 3).long(), "[3, 2]", "int64 [3, 3]"),
        ("pair_preference", torch.zeros(2), "[3]", "float32 [2]"),
        ("teacher_logps", torch.zeros(4), "[4, 3]", "float32 [4]"),
    ],
)
def test_a_misshapen_tensor_is_named_whoever_reads_it(name: str, tensor: Tensor, wanted: str, kind: str) -> None:
    with pytest.raises(SchemaError) as error:
        compute("topr", {**tensors(), name: tensor})
    assert str(error.value) == (
        f"topr needs the tensor {name} of shape {wanted}, got {kind}; "
        "the mask has shape [4, 3], and every tensor has its rows in the same order"
    )


@pytest.mark.parametrize("pairs", [torch.tensor([[0, 4]]), torch.tensor([[-1, 0]]), torch.tensor([[0.0, 1.0]])])
def test_pairs_that_are_no_rows_are_refused(pairs: Tensor) -> None:
    kind = str(pairs.dtype).removeprefix("torch.")
    with pytest.raises(SchemaError) as error:
        compute("online_ipo", {**tensors(), "pairs": pairs, "pair_preference": torch.zeros(1)})
    assert str(error.value) == (
        f"online_ipo needs the tensor pairs as row numbers from 0 to 3, got {kind} [1, 2] with others; "
        "pass the rows of the two responses of each pair"
    )


def test_a_pair_that_a_micro_batch_would_part_is_refused() -> None:
    batch = Batch.from_tensors(tensors(), recipe="online_ipo")
    plan = prepare(build("online_ipo"), batch)
    text = (
        "rows would part the pair [2, 3], of which one response is outside; "
        "put both responses of a pair into one micro-batch (whole groups do)"
    )
    for take in (batch.rows, plan.rows):
        with pytest.raises(SchemaError) as error:
            take(torch.tensor([0, 1, 3]))
        assert str(error.value) == text


def test_any_model_may_be_named() -> None:
    # A recipe of one's own that distills from a teacher: credit log teacher - log policy of the same token.
    document = {
        "source": "a test",
        "status": "reconstruction",
        "proves": "policy",
        "credit": {
            "rewards": [{"penalty": {"coefficient": {"fixed": {"value": 1.0}}, "over": {"teacher": 1.0}}}],
            "returns": "now",
        },
        "terms": [term()],
    }
    recipe = parse("distill", document, {})
    assert required_columns(recipe) == {"policy", "teacher"}
    with pytest.raises(SchemaError, match=r"^distill needs the tensor teacher_logps"):
        compute(recipe, tensors())
    logps = random(4, 3, seed=1).requires_grad_()
    teacher = random(4, 3, seed=2)
    fresh = {name: x for name, x in tensors().items() if name != "proximal_logps"}
    output = compute(recipe, {**fresh, "logps": logps, "teacher_logps": teacher})
    (slope,) = torch.autograd.grad(output.loss, logps)
    torch.testing.assert_close(slope, (logps.detach() - teacher) / 12)
