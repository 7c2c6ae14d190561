"""Exit statuses of the `distrl` command, for scripts and schedulers."""

from distrl.errors import ConfigError, DataError, DistrlError, RefusedError

EXIT_OK = 0
"""Done."""
EXIT_FAILED = 1
"""Something that had begun failed, or distrl has a fault; what was finished before is kept."""
EXIT_REFUSED = 2
"""Nothing was started or written: the command line, the config or the data must be changed first."""
EXIT_INTERRUPTED = 130
"""Ended by Ctrl-C, 128 + SIGINT as shells have it."""


def exit_code(error: DistrlError) -> int:
    """The exit status of a command that ends with this error."""
    return EXIT_REFUSED if isinstance(error, ConfigError | DataError | RefusedError) else EXIT_FAILED
