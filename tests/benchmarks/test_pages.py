"""The pages of the studies say what the numbers beside them say."""

import json
from types import ModuleType

import pytest

from benchmarks import a_star_po_page, intransitive_page, off_policy_page


def rendered(page: ModuleType) -> str:
    stored = json.loads(page.NUMBERS.read_text())
    if page is a_star_po_page:
        return a_star_po_page.render(stored["phases"], stored["compared"])
    if page is intransitive_page:
        return intransitive_page.render(stored, every=10)
    return off_policy_page.render(stored)


@pytest.mark.parametrize("page", [a_star_po_page, intransitive_page, off_policy_page], ids=lambda page: page.PAGE.stem)
def test_a_page_is_that_of_its_numbers(page: ModuleType) -> None:
    assert page.PAGE.read_text() == rendered(page)


def test_the_ratios_of_a_star_po_are_those_of_its_phases() -> None:
    stored = json.loads(a_star_po_page.NUMBERS.read_text())
    seconds = {
        phase: sorted(line["cpu_s"] for line in stored["phases"] if line["phase"] == phase)
        for phase in a_star_po_page.LABELS
    }
    assert all(len(of) == 3 for of in seconds.values())
    middle = {phase: of[1] for phase, of in seconds.items()}
    assert stored["compared"]["stage_2_over_grpo_cpu_s"] == pytest.approx(middle["a_star_po"] / middle["grpo"])
    both = (middle["a_star_po"] + middle["stage 1"]) / middle["grpo"]
    assert stored["compared"]["both_stages_over_grpo_cpu_s"] == pytest.approx(both)
