"""What bounds a run's speed: tickets a second that each part of the system can do, from costs and sizes.

A figure of a part is what it could do if all others were infinitely fast; the run does at most the smallest. Costs that
this machine can tell are measured (`benchmarks.simulate`); those of GPUs follow from a card's published bandwidth and
arithmetic and two efficiencies, which are assumptions and stand here.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

HBM_BYTES_PER_S = 3.35e12
FLOPS = 989e12
"""Of one GPU: memory bandwidth and bf16 matrix products as published for an H100 SXM."""
BANDWIDTH_SHARE = 0.6
FLOPS_SHARE = 0.35
"""Assumed: what decoding reaches of the bandwidth, and training of the arithmetic."""
COPY_BYTES_PER_S = 10e9
"""Assumed: from a GPU into main memory that is not pinned."""
TRAIN_FLOPS_PER_PARAMETER = 8
"""Forward and backward pass (6) and one more forward pass."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured on one machine."""

    ticket_s: float
    """Processor time of coordinator and ledger per ticket."""
    publish_bytes_per_s: float
    """One process that hashes weights and cuts them into chunks."""
    journal_bytes_per_s: float
    """One process that joins, writes, hashes and syncs rollouts."""
    bytes_per_token: float
    """Of a response, all stages' columns together."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs, a model, and a recipe's sizes."""

    name: str
    gpus: int
    learner_gpus: int
    gpus_per_replica: int
    """Tensor parallel size of generation."""
    parameters: float
    kv_bytes_per_token: float
    """Of the cache, in bf16: 2 x layers x key-value heads x head size x 2 bytes."""
    slots: int
    """Responses that a replica decodes at the same time."""
    mean_tokens: float
    sigma: float
    """Of the logarithm of a response's length."""
    group: int
    tickets_per_step: int
    max_staleness: int
    publishers: int = 1
    """Processes that hash and send a part of the weights each."""
    journals: int = 1

    @property
    def replicas(self) -> int:
        return (self.gpus - self.learner_gpus) // self.gpus_per_replica

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def decode_step_s(self) -> float:
        """A token for every slot: weights and cache are read once."""
        cache = self.slots * self.mean_tokens / 2 * self.kv_bytes_per_token
        return (self.weight_bytes + cache) / (self.gpus_per_replica * HBM_BYTES_PER_S * BANDWIDTH_SHARE)

    @property
    def learn_s(self) -> float:
        """A step's arithmetic."""
        tokens = self.tickets_per_step * self.group * self.mean_tokens
        flops = tokens * TRAIN_FLOPS_PER_PARAMETER * self.parameters
        return flops / (self.learner_gpus * FLOPS * FLOPS_SHARE)

    @property
    def copy_s(self) -> float:
        """Of the weights, between two steps; what is published beside the next one."""
        return self.weight_bytes / (self.publishers * COPY_BYTES_PER_S)

    def publish_s(self, costs: Costs) -> float:
        """Of the copies, beside the next step."""
        return self.weight_bytes / (self.publishers * costs.publish_bytes_per_s)

    def journal_s(self, costs: Costs) -> float:
        """Of one ticket, in the process that writes it."""
        return self.group * self.mean_tokens * costs.bytes_per_token / costs.journal_bytes_per_s

    def longest_s(self) -> float:
        """Mean time until the last response of a group has ended: the largest of `group` lognormal lengths."""
        quantiles = (np.arange(4000) + 0.5) / 4000
        normal = np.vectorize(NormalDist().inv_cdf)(quantiles ** (1 / self.group))
        lengths = self.mean_tokens * np.exp(self.sigma * normal - self.sigma**2 / 2)
        return float(lengths.mean()) * self.decode_step_s


def bounds(cluster: Cluster, costs: Costs) -> dict[str, float]:
    """Tickets a second that each part can do."""
    step_s = cluster.learn_s + cluster.copy_s
    publication_s = cluster.copy_s + cluster.publish_s(costs)  # one at a time
    life_s = cluster.longest_s() + cluster.journal_s(costs) + step_s + cluster.publish_s(costs)
    return {
        "generation": cluster.replicas * cluster.slots / (cluster.group * cluster.mean_tokens * cluster.decode_step_s),
        "learning alone": cluster.tickets_per_step / cluster.learn_s,
        "learning": cluster.tickets_per_step / step_s,
        "publishing": cluster.tickets_per_step / publication_s,
        "coordinator": 1 / costs.ticket_s,
        "journal": cluster.journals / cluster.journal_s(costs),
        # A ticket is under way from its issue to the publication of its step, `max_staleness` + 1 batches may be at a
        # time, and while a batch fills, its tickets wait for half of that on average. Not for 0: those batches are
        # issued whole.
        "staleness": (cluster.max_staleness + 0.5) * cluster.tickets_per_step / life_s,
    }
