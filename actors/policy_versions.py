"""The policy versions of a run as the coordinator sees them: the tree, and which one is in use."""

from collections.abc import Iterable, Mapping

from distrl.ledger import Ledger
from distrl.staleness import Version, most_stale, way


class PolicyVersions:
    """Version numbers come from the ledger and are never used twice.

    Attributes:
        published: the version that generation is to sample from. After the learner was rolled back it is the one of the
            checkpoint, until that is published again.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.has_past = bool(ledger.versions())
        """Whether an earlier process of the coordinator has begun this run."""
        if not self.has_past:
            ledger.allocate_version(None, 0)
        self._tree = ledger.versions()
        self.published = self._tree[ledger.last_published()]

    def allocate(self, step: int) -> int:
        """A number for the weights after `step` steps that the learner made from the published ones."""
        parent = self.published.version
        version = self._ledger.allocate_version(parent, step)
        self._tree[version] = Version(version, parent, step)
        return version

    def trained(self, step: int, staleness_by_ticket: Mapping[int, int | None]) -> int:
        """The learner did a step on the published weights; the number of the version that it made."""
        parent = self.published.version
        version = self._ledger.mark_trained(step, staleness_by_ticket, parent)
        self._tree.setdefault(version, Version(version, parent, step))
        return version

    def publish(self, version: int, manifest_sha256: str) -> None:
        self._ledger.mark_published(version, manifest_sha256)
        self.published = self._tree[version]

    def go_back(self, version: int) -> None:
        """Ages count from this version from now on; what was published after it is on a branch that was left."""
        self.published = self._tree[version]

    def age(self, sampled_by: Iterable[int]) -> int:
        """Staleness of what these versions sampled when the published weights are trained on it."""
        return most_stale(self._tree, sampled_by, self.published.version)

    def abandoned(self, sampled_by: Iterable[int]) -> bool:
        """Whether one of these versions has weights that no way to the published ones goes through."""
        return any(way(self._tree, version, self.published.version)[0] for version in sampled_by)

    def step_of(self, *sampled_by: int) -> int:
        """The step of the weights that something counts as sampled by, on the branch of the published ones.

        That is the step of the oldest version; for weights of a branch that was left, as many steps before the
        published ones as lie between them along the tree of versions.
        """
        return self.published.step - self.age(sampled_by)
