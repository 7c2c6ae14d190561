"""Publishes what a step has made, beside the training loop, which goes on with the next step meanwhile."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

Job = Callable[[], None]


class Publication:
    """At most one publication is under way, in a thread of its own: one worker's, the only one that publishes.

    Leaving the context waits for it, unless an exception does.

    Args:
        beside: whether there is a thread; otherwise `begin` returns when everything is published.
    """

    def __init__(self, beside: bool) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publication") if beside else None
        self._under_way: Future[None] | None = None

    def begin(self, jobs: Sequence[Job]) -> None:
        """Does these in turn, after what was begun before.

        Raises:
            Exception: what one of them raised, or a publication before this one.
        """
        self.wait()
        if self._thread is None:
            _do(jobs)
        else:
            self._under_way = self._thread.submit(_do, jobs)

    def check(self) -> None:
        """Raises what the publication under way has raised, if it has; for somebody who waits for something else."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is under way; raises as `begin`."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown(wait=False)


def _do(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job()
