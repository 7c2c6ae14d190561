"""Publishes a version by offering it: actors get its bytes from the learner's machine, the store gets them later."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from distrl.messages import Manifest, Offer

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """See `actors.transfer.sender.TransferSource`."""

    offer: Offer

    def put(self, manifest: Manifest, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]": ...

    def close(self) -> None: ...


class Publishes(Protocol):
    """See `deploy.publisher.Publisher`."""

    def publish(self, manifest: Manifest, tensors: "Mapping[str, Tensor]", *, whole: bool = False) -> int: ...

    def offer(self, manifest: Manifest, offer: Offer) -> None: ...


class OfferingPublisher:
    """Makes a version available as soon as the store has its manifest; the bytes follow while the learner trains.

    The store still gets all of them: they serve actors that start late, that could not receive, and those that are left
    when the learner is gone.
    """

    def __init__(self, publisher: Publishes, source: Source) -> None:
        self._publisher = publisher
        self._source = source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._upload: Future[int] | None = None

    def publish(self, manifest: Manifest, tensors: "Mapping[str, Tensor]", *, again: bool = False) -> None:
        """Returns when actors can have the version; the one before is whole in the store then.

        Args:
            again: the store has lost or damaged it: all bytes go there before this returns.
        Raises:
            DeadlineError, RunError, PolicyError: this version could not be offered, or the one before not be sent.
        """
        self.finish()
        if again:
            self._publisher.publish(manifest, tensors, whole=True)
            return
        copies = self._source.put(manifest, tensors)
        self._publisher.offer(manifest, self._source.offer)
        self._upload = self._thread.submit(self._publisher.publish, manifest, copies)

    def finish(self) -> None:
        """Returns when the store has everything that was published.

        Raises:
            DeadlineError, RunError, PolicyError: it could not be sent.
        """
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def close(self) -> None:
        """Nothing is offered any more."""
        self._source.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
