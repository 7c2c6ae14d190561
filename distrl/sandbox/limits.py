"""What a program in the sandbox may use."""

from pydantic import BaseModel, ConfigDict, Field


class SandboxConfig(BaseModel):
    """The sandbox that programs of the model run in, for graders and tools that run code."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    timeout_s: float = Field(10.0, gt=0)
    """Seconds that a program may take, by the clock on the wall."""
    cpu_s: int = Field(10, ge=1)
    """Seconds of CPU that each of its processes may use."""
    memory_bytes: int = Field(1 << 30, ge=1 << 26)
    """Address space of each of its processes."""
    scratch_bytes: int = Field(1 << 26, ge=1 << 16)
    """Size of its scratch folder, which is in memory, and of any file."""
    output_bytes: int = Field(1 << 20, ge=1)
    """What it may write to its standard output and error together; beyond it the program is ended."""
    processes: int = Field(16, ge=1)
    """Processes and threads that it may have at a time."""
    allow_unsandboxed: bool = False
    """Run programs without a sandbox where there is none, with the rights of the grading actor: only for programs that
    you trust. `--allow-unsandboxed` sets it."""
