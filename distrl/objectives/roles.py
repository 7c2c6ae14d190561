"""Who produces what a recipe reads."""

from distrl.objectives.batch import MODEL_TENSORS, SHAPES, tensor_name

PRODUCERS = {
    "policy": "learner",
    "logits": "learner",
    "values": "value head",
    "values_old": "value head",
    "behavior": "generator",
    "policy_versions": "generator",
    "group": "prompts",
    "rewards": "graders",
    "proximal": "proximal scorer",
    "reference": "reference scorer",
    "ref_logits": "reference scorer",
    "anchor": "anchor scorer",
    "v_star": "value cache",
    "preference": "judge",
    "pairs": "judge",
    "pair_preference": "judge",
}
"""By model or column, the part of a run that produces it."""


def producer(name: str) -> str:
    """The part of a run that produces a model or column: its own scorer for any other model."""
    return PRODUCERS.get(name, "graders" if name.startswith("rewards") else f"{name} scorer")


def tensor(name: str) -> str:
    """What a model or column is called among the tensors of `compute`."""
    if name == "policy":
        return "logps"
    if name in MODEL_TENSORS:
        return tensor_name(name)
    return name


def shape(name: str) -> str:
    """Its shape, for example [B, T]."""
    if name in SHAPES:
        return " or ".join(f"[{pattern}]" for pattern in SHAPES[name])
    return "[B] or [B, T]" if name.startswith("rewards") else "[B, T]"
