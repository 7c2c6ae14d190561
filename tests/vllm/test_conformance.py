"""vLLM keeps the promises that every engine keeps: the tests of tests/engines/test_conformance.py with it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from distrl.sampling import Engine
from distrl.weights import policy_tensors
from tests.engines.test_conformance import (
    test_a_closed_engine_refuses_everything_and_may_be_closed_again,
    test_a_request_that_breaks_a_rule_fails_alone,
    test_a_request_with_fewer_responses_gets_the_first_of_the_same,
    test_an_engine_tells_its_sizes_and_begins_at_version_0,
    test_every_sample_keeps_the_interfaces_promises,
    test_loaded_weights_give_their_version_to_every_later_token,
    test_older_weights_are_refused_and_the_newer_ones_stay,
    test_the_stream_and_the_weights_alone_decide_the_responses,
    test_versions_never_decrease_while_weights_arrive,
    test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay,
)

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs these tests")

if TYPE_CHECKING:
    from tests.vllm.shared import SharedVllm

__all__ = [
    "test_a_closed_engine_refuses_everything_and_may_be_closed_again",
    "test_a_request_that_breaks_a_rule_fails_alone",
    "test_a_request_with_fewer_responses_gets_the_first_of_the_same",
    "test_an_engine_tells_its_sizes_and_begins_at_version_0",
    "test_every_sample_keeps_the_interfaces_promises",
    "test_loaded_weights_give_their_version_to_every_later_token",
    "test_older_weights_are_refused_and_the_newer_ones_stay",
    "test_the_stream_and_the_weights_alone_decide_the_responses",
    "test_versions_never_decrease_while_weights_arrive",
    "test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay",
]


@pytest.fixture(params=["keep", "recompute"])
def make(request: pytest.FixtureRequest, shared: "SharedVllm") -> Callable[[], Engine]:
    return lambda: shared.engine(request.param)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    from tests.vllm.shared import model

    return policy_tensors(model(seed=9))


@pytest.fixture
def tolerance() -> float:
    return 1e-5  # sums are taken in another order when more rows are computed together
