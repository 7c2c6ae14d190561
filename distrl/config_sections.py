"""The sections of a run's config, each with its keys, their ranges and what they mean; see `distrl.config`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from distrl.graders.config import GraderConfig, check_names
from distrl.sampling import UpdateMode

AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
"""A relative path counts from the current directory, once: processes of a run have others."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunConfig(Section):
    """Where a run keeps what it makes."""

    dir: AbsolutePath = Field(Path("runs"), validate_default=True)
    """Folder that holds run directories; on a local disk, because the ledger is SQLite."""
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of prompt order and sampling noise."""
    threads_per_process: int = Field(1, ge=1)
    """CPU threads that torch may use in each generation, reference and learner process."""


class ModelConfig(Section):
    """The model that is trained."""

    path: AbsolutePath
    """Directory of a Hugging Face causal language model with its tokenizer."""


class RewardConfig(Section):
    """How a response is graded."""

    grader: str | None = None
    """The only grader: `exact`, `numeric`, `math_verify`, `reasoning_gym`, `regex`, `json_schema`, `format`, `length`,
    `overlong`, `unit_tests`, or `module:function` (docs/grading.md has the forms); empty takes the data source's."""
    graders: dict[str, GraderConfig] = {}
    """Several graders by name, combined by weights, or one with limits and options of its own; empty is `grader`."""

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "RewardConfig":
        check_names(self.graders, self.grader)
        return self


class RolloutConfig(Section):
    """What is sampled for each ticket."""

    group_size: int = Field(16, ge=1)
    """Responses per prompt."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens after which a response is cut."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits, in sampling and in the learner alike; tokens are never cut off by top-p or top-k, because
    the learner's distribution is not cut off either and importance ratios would be wrong."""


class GenerationConfig(Section):
    """The actors that sample."""

    engine: Literal["transformers", "vllm", "fake"] = "transformers"
    """`transformers`: decode loop over a local model; `vllm`: vLLM, which must be installed; `fake`: deterministic and
    instant, for tests of the system."""
    update_mode: UpdateMode = "keep"
    """What new weights do to sequences in flight. `keep`: their keys and values stay, which is faster; `recompute`:
    they are computed again, so that every token's log-probability is that of the version it names."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Processes that share one actor's model, each on a GPU of its own; only `vllm` has more than 1."""
    engine_args: Mapping[str, Any] = {}
    """Further engine arguments of vLLM, such as `max_model_len`; unknown ones are refused, and all by other engines."""
    transport: Literal["store", "nccl", "ipc"] = "store"
    """The way of new weights to generation actors. `store`: Ray's object store; `nccl` and `ipc`: from GPU to GPU by
    vLLM's transfer engines, NCCL between GPUs and CUDA IPC on a shared one; what does not come that way comes from the
    store."""
    actors: int = Field(1, ge=1)
    """Generation actors."""
    evaluation_actors: int = Field(0, ge=0)
    """Generation actors more, for held-out problems alone: an evaluation then neither waits for rollouts nor holds them
    up; 0 evaluates with those that sample for training."""
    reference_actors: int = Field(0, ge=0)
    """Generation actors more that sample from the reference model, where the objective needs that; 0 samples from it
    with those that sample for training."""
    opponent_actors: int = Field(0, ge=0)
    """Generation actors more that sample from opponents, where the objective needs that; 0 as above."""
    slots: int = Field(256, ge=1)
    """Responses that one actor samples at the same time, for each model that it samples from."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds a ticket may take to be sampled before the call counts as failed."""


class PlacementConfig(Section):
    """Which processes get GPUs, and how they share one."""

    mode: Literal["cpu", "separate", "shared", "turns"] = "cpu"
    """`cpu`: none gets one. `separate`: each has its own, a generation actor as many as it has parallel processes.
    `shared`: side by side on one GPU, each with a share of its memory. `turns`: on one GPU; generation gives its memory
    back while the learner trains, and a learner with `train.device` `cuda` while generation samples."""
    generation_share: float = Field(0.5, gt=0, le=1)
    """Share of the GPU's memory that one generation actor may take, where a GPU is shared."""
    learner_share: float = Field(0.4, gt=0, le=1)
    """Share of the GPU's memory that the learner may take in mode `shared`, where `train.device` is `cuda`."""
    groups: bool = False
    """Whether generation, grading with environments, and reference actors each take one of Ray's resources
    `distrl_generation`, `distrl_grading` and `distrl_reference`, and so go to the nodes that have them, as the pods of
    `distrl k8s render` do. Learners take `distrl_learner` anyway."""


class GradingConfig(Section):
    """The actors that grade."""

    actors: int = Field(1, ge=1)
    """Grading actors."""
    concurrency: int = Field(8, ge=1)
    """Tickets that one actor grades at the same time."""
    tickets_per_call: int = Field(4, ge=1)
    """Most tickets that one call grades."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds a call may take before it counts as failed."""

    alert_tickets: int = Field(64, ge=2)
    """Tickets that are compared with as many before them; a sudden shift of reward, pass rate, length or a component is
    an event of the kind `alert` in the run's metrics."""
    alert_sigmas: float = Field(8.0, ge=0)
    """Standard errors from which on a shift is sudden; 0 raises no alerts."""


class ReferenceConfig(Section):
    """The actors that score rollouts under the reference model; started only when the objective needs them."""

    path: AbsolutePath | None = None
    """Directory of the reference model; empty takes `model.path`."""
    actors: int = Field(1, ge=1)
    """Reference actors."""
    tickets_per_call: int = Field(4, ge=1)
    """Most tickets that one call scores."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds a call may take before it counts as failed."""


class ObjectiveConfig(Section):
    """What the learner minimizes."""

    recipe: str = "topr"
    """Name of a recipe."""
    options: Mapping[str, float | int | str | bool] = {}
    """Options of that recipe; one that it does not know is refused."""


class ValuesConfig(Section):
    """Optimal values of the training prompts, which A*-PO reads; `distrl vstar` estimates them once."""

    path: AbsolutePath | None = None
    """Parquet file of the values: what `distrl vstar` writes, and what a recipe that reads v_star trains with."""
    responses: int = Field(8, ge=1)
    """Responses of the reference model per training prompt."""
    mode: Literal["soft", "mean", "max"] = "soft"
    """`soft`: beta log mean exp(reward / beta); `mean` and `max` are its limits for large and small `beta`."""
    beta: float = Field(0.5, gt=0, allow_inf_nan=False)
    """Temperature of `soft`, in units of the reward."""
    drop_unsolved: bool = False
    """Trains on the prompts alone that a response of the reference solved."""


class PreferenceConfig(Section):
    """How responses are compared, for objectives that read preferences."""

    function: str | None = None
    """`reward_difference`, a judge (`preference_model`, `judge`, `served_judge`), or `module:function` of the form
    (first, second, answer, metadata) -> P(first beats second)."""
    options: dict[str, Any] = {}
    """Arguments of the judge or of the function."""
    parallel: int = Field(4, ge=1)
    """Pairs of a ticket that a judge is asked for at the same time."""
    symmetrize: bool = False
    """Takes the mean of both positions, for a function that prefers one; else one that is not antisymmetric is an
    error. Judges are always asked in both."""
    scale: float = Field(1.0, gt=0)
    """`reward_difference`: P = 1 / (1 + exp(-(reward - opponent's reward) / scale))."""
    opponents: int = Field(1, ge=1)
    """Opponents that each response meets, of the `rollout.group_size` that a ticket has; the mean is taken."""


class LoraConfig(Section):
    """Low-rank adapters (peft): only they are trained."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains all parameters."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' product is multiplied with alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one; empty takes all but the output layer."""
    publish: Literal["merged", "adapter"] = "merged"
    """What a version of the policy is: `merged`, its weights with the adapters added, or `adapter`, the adapters alone,
    which each generation actor adds to frozen weights that it keeps. Checkpoints have them merged either way."""


class TrainConfig(Section):
    """The learner."""

    workers: int = Field(1, ge=1)
    """Processes that train together, each with a part of every batch."""
    max_workers: int | None = Field(None, ge=1)
    """Elastic learner: as many workers as the cluster's nodes have room for, from `train.workers` to this many, also
    when nodes come and go during the run; empty keeps `train.workers`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the model and the optimizer's state; `fsdp`: each holds a part of them (FSDP2)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where workers train: `cpu` with gloo, or `cuda` with NCCL and a GPU for each."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products; parameters, the optimizer's state and sums of gradients stay in float32."""
    activation_checkpointing: bool = False
    """Computes blocks again in the backward pass instead of keeping what is inside them."""
    layout: Literal["bucketed", "packed"] = "bucketed"
    """`bucketed`: sequences of similar length side by side; `packed`: one after the other in one row, not seeing each
    other."""

    steps: int = Field(100, ge=1)
    """Optimizer steps of the run."""
    tickets_per_step: int = Field(32, ge=1)
    """Tickets of one batch; the batch holds this many times `rollout.group_size` rollouts."""
    max_staleness: int = Field(2, ge=0)
    """Most optimizer steps between the oldest version in a rollout and the learner; 0 is synchronous training."""
    on_stale: Literal["wait", "redraw", "keep"] = "wait"
    """`wait`: a step waits for a ticket that would become too old; `redraw`: it is aborted and drawn again with the
    next seed, at most `limits.redraws` times; `keep`: it is trained whenever it comes."""
    abandoned_rollouts: Literal["train", "drop"] = "train"
    """What becomes of rollouts of weights that were left when the learner went back to a checkpoint. `train`: they are
    trained within `train.max_staleness` as off-policy data, and counted; `drop`: their tickets are sampled again."""
    learning_rate: float = Field(1e-4, gt=0)
    """AdamW's learning rate after the warm-up."""
    lr_schedule: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "constant_with_warmup"
    """How the learning rate moves over the run's steps; the names are those of `transformers.get_scheduler`."""
    lr_schedule_options: Mapping[str, float | str] = {}
    """Options of that schedule, such as `min_lr_rate` of `cosine_with_min_lr`."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's moment decay rates, each in [0, 1)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient's global norm is clipped to this."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most tokens of one forward and backward pass of a worker, padding included; larger batches accumulate gradients,
    and a single response with its prompt must fit."""
    logp_check_rollouts: int = Field(8, ge=0)
    """Rollouts of a step whose recorded log-probabilities are computed again under the version that they name; keeps a
    second copy of the weights while `max_staleness` is not 0. 0 checks none."""
    logp_mismatch_bound: float = Field(0.1, gt=0)
    """Largest mean difference (nats) between recorded and recomputed log-probabilities of one generation actor; beyond
    it training stops."""
    checkpoint_every_steps: int = Field(20, ge=1)
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept, beside the one with the best held-out accuracy at its step."""


class EvaluationConfig(Section):
    """Held-out problems, sampled with the rollouts' temperature by the generation actors."""

    problems: int = Field(1024, ge=1)
    """Held-out problems before and after training, one response each."""
    every_steps: int = Field(10, ge=0)
    """Steps between the shorter evaluations during training; 0 is none."""
    problems_during: int = Field(256, ge=1)
    """Held-out problems of those; all of them where `problems` is less."""


class MetricsConfig(Section):
    """Where the numbers of a run go, beside metrics.jsonl, Parquet and TensorBoard in its directory."""

    host: str = "127.0.0.1"
    """Address at which the driver serves Prometheus metrics, without a password; 0.0.0.0 lets everybody read them."""
    port: int = Field(0, ge=0, le=65535)
    """Port of it; 0 takes a free one, which `.prometheus/NAME.json` in `run.dir` names."""
    wandb_project: str | None = None
    """Project at Weights & Biases; empty sends nothing there. Needs the extra `wandb`."""


class LimitsConfig(Section):
    """Bounds and deadlines."""

    call_attempts: int = Field(3, ge=1)
    """Calls that a ticket may fail in one stage before it is dropped; also pulls of new weights that may fail in a
    row."""
    retry_delay_s: float = Field(0.5, ge=0)
    """Seconds before the second attempt; doubles with each further one."""
    start_timeout_s: float = Field(180.0, gt=0)
    """Seconds until all actors must be up; the learner's own processes are started and bounded by Ray Train."""
    sync_timeout_s: float = Field(120.0, gt=0)
    """Seconds that one attempt of a generation actor to load a published version may take."""
    transport_timeout_s: float = Field(30.0, gt=0)
    """Seconds that a version may take by `generation.transport` where that is not `store`, and then that its bytes may
    take to be in the store; less than half of `limits.sync_timeout_s`."""
    publish_timeout_s: float = Field(120.0, gt=0)
    """Seconds that the learner may take to publish a version, and that one of its calls may take."""
    journal_timeout_s: float = Field(60.0, gt=0)
    """Seconds that writing a ticket's rollouts, or reading recorded ones, may take before the call counts as failed."""
    journal_bytes: int | None = Field(None, ge=1)
    """Size beyond which the run's journal must not grow: the run ends and drops nothing; empty is no bound."""
    liveness_timeout_s: float = Field(60.0, gt=0)
    """Seconds within which every process must answer that it lives; one that does not is ended and replaced."""
    restarts: int = Field(20, ge=0)
    """Processes that may be replaced within `limits.restart_window_s`; one more ends the run with the cause."""
    restart_window_s: float = Field(600.0, gt=0)
    """Seconds over which restarts are counted."""
    outage_s: float = Field(180.0, gt=0)
    """Seconds that the coordinator, the journal or the policy store may be away before their callers give up."""
    stall_warning_s: float = Field(60.0, gt=0)
    """Seconds without progress after which the run says who is waiting for whom."""
    skipped_steps_in_a_row: int = Field(3, ge=0)
    """Optimizer steps that may be skipped in a row because their gradient is not finite; one more ends the run."""
    redraws: int = Field(3, ge=1)
    """Times that a ticket may be drawn again where `train.on_stale` is `redraw`; one more drops it."""
    drops_in_a_row: int = Field(64, ge=1)
    """Tickets that may be dropped with no ticket becoming ready between them; one more ends the run with the cause."""
    ready_bytes: int = Field(1 << 30, ge=1)
    """Size of the sampled tokens and their records that may wait to be trained; beyond it, and with a whole batch
    among them, no tickets are issued."""
