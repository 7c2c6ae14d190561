"""A placement that can never be scheduled is refused with the shortfall."""

import pytest

from distrl.errors import ConfigError
from distrl.placement import Claim, Node, check_fits, check_shares
from tests.builders import refusal

FOUR = [Claim(f"generation-{i}", 2.0) for i in range(2)] + [Claim("learner-0", 1.0), Claim("reference-0", 1.0)]


@pytest.mark.parametrize("nodes", [[6.0], [4.0, 2.0], [2.0, 2.0, 2.0], [8.0, 8.0]])
def test_what_fits_is_accepted(nodes: list[float]) -> None:
    check_fits(FOUR, [Node(f"n{i}", gpus) for i, gpus in enumerate(nodes)])


def test_processes_without_gpus_fit_anywhere() -> None:
    check_fits([Claim("learner-0", 0.0)], [])


def test_too_few_gpus_are_counted() -> None:
    assert refusal(ConfigError, lambda: check_fits(FOUR, [Node("a", 3.0), Node("b", 1.0)])) == (
        "placement: the run needs 6 GPUs (generation 2 x 2, learner 1, reference 1), the cluster has 4, 2 too few; "
        "lower the number of actors, share a GPU with placement.mode=shared or turns, or add nodes"
    )


def test_a_process_larger_than_every_node_is_named() -> None:
    assert refusal(ConfigError, lambda: check_fits([Claim("generation-0", 4.0)], [Node("a", 2.0)] * 2)) == (
        "placement: generation-0 needs 4 GPUs on one node, the largest node has 2, 2 too few; "
        "lower generation.tensor_parallel_size"
    )


def test_enough_gpus_in_the_wrong_places_are_refused_with_what_is_left() -> None:
    claims = [Claim(f"generation-{i}", 2.0) for i in range(2)]
    assert refusal(ConfigError, lambda: check_fits(claims, [Node("a", 3.0), Node("b", 1.0)])) == (
        "placement: generation-1 needs 2 GPUs on one node; with the other processes placed, the nodes have left: "
        "a 1, b 1; lower generation.tensor_parallel_size or add a node"
    )


def test_large_claims_are_placed_before_small_ones_that_would_be_in_their_way() -> None:
    # In the order given, the small one would take half of the only node that the large one fits into.
    check_fits([Claim("learner-0", 1.0), Claim("generation-0", 2.0)], [Node("a", 2.0), Node("b", 1.0)])


def test_large_claims_find_every_place_that_there_is_whatever_the_order_of_the_nodes() -> None:
    # Each node holds as many as fit into it alone: 2 + 1 + 1 of two GPUs each, and the small ones what is left.
    claims = [Claim(f"generation-{i}", 2.0) for i in range(4)] + [Claim(f"learner-{i}", 1.0) for i in range(2)]
    for sizes in ([5.0, 3.0, 2.0], [2.0, 3.0, 5.0], [3.0, 5.0, 2.0]):
        check_fits(claims, [Node(f"n{i}", gpus) for i, gpus in enumerate(sizes)])


def test_shares_of_one_gpu_add_up_to_at_most_one() -> None:
    check_shares([Claim("generation-0", 0.5), Claim("learner-0", 0.5)])
    three = [Claim("generation-0", 0.4), Claim("generation-1", 0.4), Claim("learner-0", 0.5)]
    assert refusal(ConfigError, lambda: check_shares(three)) == (
        "placement: the shares of the one GPU must add up to at most 1, got 1.3 (generation 2 x 0.4, learner 0.5), "
        "0.3 too much; lower a share or the number of actors"
    )
