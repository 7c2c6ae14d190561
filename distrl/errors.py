"""Exceptions of distrl. Each takes one message, so that it survives pickling between Ray processes.

DistrlError
├── ConfigError (ValueError)       a setting is missing, unknown, out of range or contradicts another
├── DataError (ValueError)         a prompt file, model directory or dataset cannot be used
├── SchemaError (ValueError)       a record batch breaks a rule of its stage's schema
├── LedgerError (RuntimeError)     a move that the ledger does not allow, or its file cannot be used
│   └── FencedError                another process has taken the ledger over
├── StageError (RuntimeError)      a generation, grading, reference or journal call failed
├── PolicyError (RuntimeError)     published weights are missing, damaged or of the wrong shape
│   ├── LostWeightsError           the policy store does not have them (any more)
│   └── DamagedWeightsError        their bytes are not those that were published
├── DeadlineError (TimeoutError)   something was waited for longer than its configured deadline
└── RunError (RuntimeError)        a run directory or a running system is not in the state that was asked for
"""


class DistrlError(Exception):
    """Base class of every error that distrl raises on purpose."""


class ConfigError(DistrlError, ValueError):
    """A setting is missing, unknown, out of range or contradicts another."""


class DataError(DistrlError, ValueError):
    """A prompt file, model directory or dataset cannot be used."""


class SchemaError(DistrlError, ValueError):
    """A record batch breaks a rule of its stage's schema."""


class LedgerError(DistrlError, RuntimeError):
    """A ticket transition that the state machine does not allow, or a ledger file that cannot be used."""


class FencedError(LedgerError):
    """Another process has taken the ledger over; the one that meets this must end."""


class StageError(DistrlError, RuntimeError):
    """A generation, grading, reference or journal call failed."""


class PolicyError(DistrlError, RuntimeError):
    """Published weights are missing, damaged or of the wrong shape."""


class LostWeightsError(PolicyError):
    """The policy store does not have published weights (any more); the learner may publish them again."""


class DamagedWeightsError(PolicyError):
    """The bytes of published weights are not those that were published; the learner may publish them again."""


class DeadlineError(DistrlError, TimeoutError):
    """Something was waited for longer than its configured deadline."""


class RunError(DistrlError, RuntimeError):
    """A run directory or a running system is not in the state that was asked for."""


class RefusedError(RunError):
    """A command names what is not there or would overwrite something; nothing was changed."""
