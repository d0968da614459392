"""The experiment: every knob, typed, frozen, strict. No torch here, so checking a file takes no time.

Rule: a knob that changes the learned weights has no default and stands in the experiment file, but for what a recipe
can do without and is off or 1 where it is not named (weight, repeat, replay_steps, document_mask); a knob that only
changes what we see, or how fast, may have one. Absent is `null`, never -1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Upper bounds: far above any use, and low enough that no arithmetic on a file of strangers can exhaust the memory.
Positive = Annotated[int, Field(ge=1, le=2**40)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Size = Annotated[int, Field(ge=1, le=2**24)]
Depth = Annotated[int, Field(ge=1, le=4096)]
Rate = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SpecialistShape(Strict):
    """A stage behind a frozen model (SPEC 8)."""

    n_layer: Depth = Field(description="new blocks, full attention, no value embeddings")
    parent: Count | None = Field(description="the specialist it stands on, by its place in the list; null = the base")


class ModelConfig(Strict):
    """Architecture (SPEC 1), stages (SPEC 2) and specialists (SPEC 8). All but `specialists` is of the base."""

    n_layer: Depth
    n_embd: Size
    n_head: Size
    n_kv_head: Size = Field(description="key/value heads; fewer than n_head is grouped-query attention")
    intermediate_size: Size | None = Field(description="inner size of the MLP; null means 4 * n_embd")
    vocab_size: Size = Field(description="tokens, the nine specials included")
    sequence_len: Size = Field(description="T, the training context in tokens")
    window_pattern: str = Field(pattern="^[SL]+$", description="tiled over layers; the last layer is always L")
    poe_mode: Literal["none", "flat", "hier"] = Field(
        description="none = backprop with one loss; flat = PoE, detached stages; hier = stage losses, no detach")
    poe_every: Depth | None = Field(description="a stage boundary after every so many layers")
    poe_stage_layers: tuple[Depth, ...] | None = Field(description="layers of each stage; sums to n_layer")
    stage_heads: bool = Field(description="an additive head per stage beside the shared one")
    detach_x0: bool = Field(description="also cut the gradient into x0: embedding learns from stage 0 alone")
    ve_layers: tuple[Count, ...] | None = Field(
        default=None,
        description="layers with value embeddings; null derives them from n_layer (truncated models say it)")
    window_sizes: tuple[Size, ...] | None = Field(
        default=None, description="left window of each layer in tokens; null derives them from window_pattern")
    specialists: tuple[SpecialistShape, ...] = Field(
        default=(), description="stages on the frozen base, each behind its parent; a specialist task trains the last")

    @property
    def base(self) -> ModelConfig:
        """The model without its specialists."""
        return self.model_copy(update={"specialists": ()})


class ObjectiveConfig(Strict):
    """The loss of a stage (SPEC 2)."""

    kind: Literal["ce", "residual_logop"]
    alpha: Fraction = Field(description="total = sum_k CE_k / K^(1-alpha); inert but for optimizer eps")
    rho: Fraction | None = Field(description="residual_logop only: weight of the pooled term")


class SourceConfig(Strict):
    """One folder of parquet shards."""

    name: str = Field(pattern="^[A-Za-z0-9._-]+$")
    path: str = Field(description="folder of *.parquet with a string column `text`")
    files: str | None = Field(default=None, description="glob inside the folder; null means *.parquet")
    weight: Rate = Field(default=1.0, description="share of the tokens, relative to the other sources; not of "
                                                  "conversations, where repeat counts")
    repeat: Size = Field(default=1, description="conversations: how often each comes in an epoch")
    code: bool = Field(default=False, description="program text: never case-augmented")


class DataConfig(Strict):
    """What is read, in which order, and how rows are packed."""

    kind: Literal["text", "conversations"] = Field(
        default="text", description="conversations train on what the assistant says, all else is masked")
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    val: tuple[SourceConfig, ...] = Field(min_length=1)
    packing: Literal["bestfit_crop", "bestfit_split", "concat", "bestfit_pad"] = Field(
        description="how documents fill rows: crop drops what does not fit, split goes on with it in the next row, "
                    "concat cuts one endless stream; pad, of conversations, fills up with masked tokens")
    lanes: Annotated[int, Field(ge=1, le=65536)] = Field(
        description="fixed logical streams; the world size must divide it")
    buffer_documents: Positive = Field(description="documents a lane chooses from when it fills a row")
    case_aug_prob: Fraction = Field(description="share of training documents re-cased (SPEC 8); 0 of conversations")
    json_layout_prob: Fraction | None = Field(
        default=None, description="conversations: share of those with tools whose JSON is laid out anew, with indent "
                                  "4, indent 2 or compact; null for text")
    document_mask: bool = Field(
        default=False, description="no position of a row reads from another document than its own, neither by "
                                   "attention nor by smear; false = a row is one context, as published")
    replay_steps: Positive | None = Field(
        default=None, description="the order of batches begins anew every so many steps: later passes read the very "
                                  "same rows, so that what a frozen base computed for them can be kept")


class BatchConfig(Strict):
    tokens_per_step: Positive = Field(description="global batch in tokens")
    device_batch_size: Positive = Field(description="rows of one micro-batch on one rank")


class CycleConfig(Strict):
    """One warm-up, hold, warm-down; cycles follow each other and are append-only (SPEC 9)."""

    steps: Positive
    warmup_steps: Count
    warmdown_ratio: Fraction = Field(description="warm-down lasts round(ratio * steps)")
    peak: Rate = Field(description="multiplier of every learning rate at the hold")
    final_frac: Fraction = Field(description="the last multiplier as a fraction of the peak")
    momentum_warmup_steps: Count = Field(description="Muon momentum .85 -> .97 over these; 0 = no ramp")


class ScheduleConfig(Strict):
    cycles: tuple[CycleConfig, ...] = Field(min_length=1)


class OptimConfig(Strict):
    """Learning rates before scaling; the group table is nanopoe/optim/groups.py (SPEC 9)."""

    matrix_lr: Rate
    embedding_lr: Rate | None = Field(description="null with task specialist, which trains no embedding")
    unembedding_lr: Rate
    scalar_lr: Rate
    weight_decay: NonNegative = Field(description="Muon, before the two scalings; cosine to 0 over a cycle")
    reference_batch_tokens: Positive | None = Field(
        description="rates times sqrt(batch / this), decay likewise; null = no scaling")
    reference_scaling_params: Positive | None = Field(
        description="decay times this / scaling parameters of the model; null = no scaling")


class StartConfig(Strict):
    """Weights to start from, in a run of its own: its schedule and its data begin at step 0."""

    path: str = Field(min_length=1, description="folder of a run")
    step: Count | None = Field(description="its checkpoint; null = the newest there is at the first start")
    optimizer: bool | None = Field(
        default=None, description="pretrain: true also takes its optimizer's moments, for every tensor that is trained "
                                  "here; false begins with none, as it must where tensors are new. null with task sft, "
                                  "which begins with none")


class SpecialistConfig(Strict):
    """What the last of model.specialists is trained on; the tensors of it all stay as they are."""

    base: str = Field(min_length=1, description="folder of a run, of a specialist's run, or of a delta")
    base_step: Count | None = Field(description="its checkpoint; null = the newest at the first start, or a delta")
    warm_start: bool = Field(description="give the chat tokens the embeddings of words that mean about the same, once; "
                                         "false where the base has learned them")
    scale_entry: bool = Field(
        description="begin with r of the first new block at the power of two that brings the base's last state to "
                    "about one a channel; false begins with 1, as published, where a long state drowns new blocks")
    cache_states: bool = Field(
        default=False, description="keep what the frozen part computed for a row in RUN/cache and read it when the row "
                                   "comes again (data.replay_steps); the same bits, for disk space")


class RuntimeConfig(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    numerics: Literal["fast", "strict"] = Field(
        default="fast", description="strict adds micro-gradients in their global order: the same bits on any number "
                                    "of CPU ranks (with the same threads), for world_size times the traffic")
    threads: Depth | None = Field(default=None, description="CPU threads of a rank; null = cores / ranks here")
    timeout_s: Positive = Field(
        default=600, description="seconds without progress after which a rank counts as hung, and in which all ranks "
                                 "of a run must have met")
    attention: Literal["auto", "flash", "flex", "blocks"] = Field(
        default="auto", description="kernel of windowed attention: flash = FlashAttention 3 or 2, flex = "
                                    "FlexAttention, blocks = ours, of matmuls or PyTorch's attention; auto = the first "
                                    "that fits")
    float8: bool = Field(
        default=False, description="matrix products of the blocks that are trained in 8-bit floats, for NVIDIA GPUs "
                                   "from Ada and Hopper on; less exact than bfloat16")
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile of the blocks for batches of the training's shape; auto is off on a "
                                    "CPU, and on a GPU with triton on")
    activation_checkpointing: bool = Field(
        default=False, description="keep of each block that is trained its input alone and run it again in the "
                                   "backward: less memory for one more forward pass of the blocks")
    compare_every: Positive | None = Field(
        default=500, description="steps between comparisons of the weights of all ranks, bit for bit; null = never")


class ParallelConfig(Strict):
    stages: Depth = Field(
        default=1, description="ranks that share the stages of one model, consecutive ones each, and read the same "
                               "rows; the world size is a multiple of it. 1 = every rank runs all stages. More only "
                               "with poe_mode flat, and without the pool's training loss")


class CheckpointConfig(Strict):
    every: Positive | None = Field(default=None, description="steps; null = only at the end")
    keep_last: Positive | None = Field(default=None, description="older ones are removed; null = keep all")
    keep_every: Positive | None = Field(
        default=None, description="multiples of so many steps are never removed; null = only keep_last counts")
    async_save: bool = Field(
        default=True, description="write beside training, from a copy in CPU memory of what a rank writes: its share "
                                  "of weights and state; false = training waits")
    max_failed: Positive = Field(
        default=3, description="saves in a row that the disk may refuse before the run stops")


class EvaluationConfig(Strict):
    every: Positive | None = Field(default=None, description="steps; null = only at the end")
    tokens: Positive = Field(default=131072, description="of the validation split, rounded up to whole batches")


class LoggingConfig(Strict):
    every: Positive = Field(default=1, description="steps between console lines when not on a terminal")
    pool_every: Positive = Field(
        default=10, description="steps between looks at the pool's training loss, which costs a pass")
    audit: bool = Field(
        default=False, description="write which documents every row was made of to RUN/audit, for scripts.data audit")
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "nanopoe"


class ResumeConfig(Strict):
    step: Count | None = Field(default=None, description="checkpoint to go on from; null = the newest, or a new run")
    fallback: bool = Field(
        default=False, description="put a damaged newest checkpoint aside and go on from the one before")
    allow: tuple[str, ...] = Field(
        default=(), description="keys or groups that change learning and may differ from the checkpoint's")


class Experiment(Strict):
    """One YAML file. `run_dir` is where everything of the run is written."""

    name: str = Field(pattern="^[A-Za-z0-9._-]+$")
    run_dir: str | None = Field(default=None, description="null means out/<name>")
    seed: Count
    tokenizer: str = Field(description="folder written by scripts.train_tokenizer")
    task: Literal["pretrain", "sft", "specialist"] = Field(
        default="pretrain", description="sft trains all weights of init_from on; specialist trains the last of "
                                        "model.specialists on a frozen base")
    init_from: StartConfig | None = Field(
        default=None, description="the weights to start from; sft needs it, pretrain may have it")
    specialist: SpecialistConfig | None = None
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    optim: OptimConfig
    runtime: RuntimeConfig = RuntimeConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    resume: ResumeConfig = ResumeConfig()

    @property
    def out(self) -> str:
        return self.run_dir or f"out/{self.name}"
