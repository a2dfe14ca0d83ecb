"""Every key a training run takes, with TRL's and transformers' names and defaults (TRL 1.16, transformers 5.23).

`TrainConfig` holds what all objectives share; `SFTConfig` adds supervised fine-tuning's own keys. Making one checks
every value and every pair of values and raises `UserError` naming the place. stdlib and yaml only: `--help` and a typo
are answered before torch is imported.
"""

import math
from dataclasses import dataclass

from burnish.config.aliases import todays_loading
from burnish.config.base import Keys
from burnish.config.outside import check_dataset_kwargs, check_quantized, check_trackers
from burnish.config.unread import check_read
from burnish.config.values import key

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
OPTIMIZERS = (
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_bf16",
    "adamw_bf16_sr",
    "adamw_8bit",
    "adamw_torch_8bit",
    "sgd",
    "adafactor",
)


@dataclass
class TrainConfig(Keys):
    """Keys shared by every objective. Keyword arguments only, but for `output_dir`, which may come first.

    `config.origins` says where each value came from: "run.yaml:3", "command line", "SFTConfig(name=...)" or "default".
    """

    # where results go
    output_dir: str = key(
        "trainer_output",
        "folder for the model, checkpoints, metrics.jsonl and the resolved config.yaml",
        common=True,
        kw_only=False,
    )
    overwrite_output_dir: bool = key(False, "start anew in an output_dir that already holds a run")
    report_to: list[str] | str | None = key("none", "tensorboard, wandb, trackio; metrics.jsonl is always written")
    run_name: str | None = key(None, "name of the run in trackers; default: the last part of output_dir")
    project: str = key("huggingface", "project that wandb and trackio file the run under")
    push_to_hub: bool = key(False, "upload the model to the hub when it is saved")
    hub_model_id: str | None = key(None, "repository to upload to; default: output_dir's last part")
    hub_token: str | None = key(None, "token for the upload; default: the one you logged in with")
    hub_private_repo: bool | None = key(None, "make a new repository private; default: as your account does")
    hub_revision: str | None = key(None, "branch to upload to; default: main")

    # model
    model_name_or_path: str | None = key(None, "model to train: a folder or a hub id", common=True)
    model_init_kwargs: dict | None = key(None, "further arguments for from_pretrained, as a mapping")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    dtype: str = key(
        "float32", "dtype of the master weights; auto: as saved", choices=("float32", "bfloat16", "auto"), common=True
    )
    bf16: bool | None = key(
        None,
        "compute in bfloat16; default: on CUDA only. With dtype float32 the master weights stay float32",
        common=True,
    )
    chat_template_path: str | None = key(None, "chat template: a .jinja file, or a folder or hub id of a tokenizer")
    eos_token: str | None = key(None, "token that ends a reply; default: the tokenizer's")
    pad_token: str | None = key(None, "padding token saved with the tokenizer; training itself never pads")
    kernels: str = key(
        "auto", "auto: Triton on CUDA; reference: the plain PyTorch definitions", choices=("auto", "reference")
    )
    strict_patch: bool = key(False, "stop when some norm, MLP or rotary module can't use a burnish kernel")
    use_cpu: bool = key(False, "stay on the CPU where a GPU is at hand")

    # processes
    nproc: int | None = key(
        None, "start so many processes on this machine, one a GPU; default: one, or torchrun's", low=1
    )
    parallel: str | None = key(
        None,
        "ddp: every process has the whole model; fsdp: a part of it; default: ddp where it fits, else fsdp",
        choices=("none", "ddp", "fsdp"),
    )
    sequence_parallel: int = key(1, "so many processes share each document, its tokens divided among them", low=1)
    ddp_timeout: int = key(1800, "seconds to wait for another process before giving up", low=1)
    max_restarts: int = key(
        0, "how often to start all processes again, from the last checkpoint, after one died", low=0
    )
    async_save: bool = key(False, "with fsdp: write checkpoints while training goes on")

    # adapters
    use_peft: bool = key(False, "train LoRA adapters and leave the base model as it is", common=True)
    lora_r: int = key(16, "rank of the adapters", low=1, common=True)
    lora_alpha: int = key(
        32, "scale of the adapters: their output is multiplied by lora_alpha / lora_r", low=1, common=True
    )
    lora_dropout: float = key(0.05, "dropout before the adapters; only 0 runs on the fused kernels", low=0, high=1)
    lora_target_modules: list[str] | str | None = key(
        None, "modules that get adapters (names, or all-linear); default: peft's choice"
    )
    lora_modules_to_save: list[str] | None = key(None, "modules trained in full beside the adapters")
    use_rslora: bool = key(False, "scale adapters by 1/sqrt(rank) instead of 1/rank")
    use_dora: bool = key(False, "weight-decomposed adapters (DoRA)")
    load_in_8bit: bool = key(False, "hold the frozen base in 8 bits (bitsandbytes); adapters train on it")
    load_in_4bit: bool = key(False, "hold the frozen base in 4 bits (bitsandbytes); adapters train on it (QLoRA)")
    bnb_4bit_quant_type: str = key("nf4", "kind of 4-bit numbers", choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = key(False, "quantise the 4-bit base's scales as well")

    # data
    dataset_name: str | None = key(
        None, "training rows: a jsonl, json, csv or parquet file, a folder, or a hub id", common=True
    )
    dataset_config: str | None = key(None, "configuration of a hub data set")
    dataset_train_split: str = key("train", "split to train on")
    dataset_test_split: str | None = key(None, "split to evaluate on")
    eval_dataset_name: str | None = key(None, "evaluation rows, as dataset_name", common=True)
    test_split_size: float | None = key(
        None,
        "hold out this many rows (or, below 1, this share) of the training rows for evaluation",
        above=0,
        common=True,
    )
    max_length: int | None = key(
        1024, "longest sequence in tokens; longer rows are cut and counted. null: never cut", low=2, common=True
    )
    truncation_mode: str = key("keep_start", "which end of a long row stays", choices=("keep_start", "keep_end"))
    allow_truncation: bool = key(
        False, "train even where cutting rows to max_length takes more than 5 % of the trained tokens"
    )
    padding_free: bool = key(True, "burnish never pads, so this key changes nothing; taken because TRL files set it")

    # batches
    per_device_train_batch_size: int = key(8, "rows (packs, when packing) in a micro-batch", low=1, common=True)
    per_device_eval_batch_size: int = key(8, "rows (packs, when packing) in an evaluation batch", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches in a step", low=1, common=True)
    max_tokens_per_batch: int | None = key(
        None, "tokens in a micro-batch; takes the place of per_device_train_batch_size", low=2, common=True
    )
    dataloader_drop_last: bool = key(False, "leave out an epoch's last micro-batch when it is not full")
    train_sampling_strategy: str = key("random", "order of the rows", choices=("random", "sequential"))
    num_train_epochs: float = key(3.0, "passes over the training rows", above=0, common=True)
    max_steps: int = key(
        -1, "stop after this many steps, whatever num_train_epochs says; -1: no limit", low=-1, common=True
    )

    # optimizer
    learning_rate: float = key(5e-5, "highest learning rate", low=0, common=True)
    lr_scheduler_type: str = key("linear", "course of the learning rate after warm-up", choices=SCHEDULES, common=True)
    lr_scheduler_kwargs: dict | None = key(None, "further arguments of the schedule, as a mapping")
    warmup_steps: float = key(
        0, "steps (or, below 1, share of all steps) over which the learning rate rises", low=0, common=True
    )
    warmup_ratio: float = key(0.0, "older name for warmup_steps as a share of all steps", low=0, high=1)
    optim: str = key(
        "adamw_torch_fused",
        "optimizer; adamw_bf16 takes 10 bytes a parameter, adamw_bf16_sr 8, adamw_torch 18 (in bfloat16 compute)",
        choices=OPTIMIZERS,
    )
    optimizer_in_bwd: bool = key(
        False, "step each parameter inside backward and free its gradient; needs max_grad_norm: 0, no accumulation"
    )
    weight_decay: float = key(0.0, "decay of weights that are neither biases nor norms", low=0, common=True)
    adam_beta1: float = key(0.9, "AdamW's decay of the mean of gradients", low=0, high=1)
    adam_beta2: float = key(0.999, "AdamW's decay of the mean of squared gradients", low=0, high=1)
    adam_epsilon: float = key(1e-8, "AdamW's term against division by zero", above=0)
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm; 0: never", low=0)
    neftune_noise_alpha: float | None = key(
        None, "noise on the input embeddings in training, within alpha / sqrt(document length * width) (NEFTune)", low=0
    )
    gradient_checkpointing: bool = key(
        True, "recompute activations in the backward pass: less memory, about a third more time", common=True
    )
    gradient_checkpointing_kwargs: dict | None = key(None, "only {use_reentrant: false}, which is what burnish does")

    # memory
    activation_offloading: bool = key(
        False, "keep checkpoints in the host's memory: room for longer sequences on a GPU", common=True
    )
    checkpoint_segment: int = key(
        1, "layers a checkpoint; more: fewer checkpoints, half a forward pass more work", low=1, high=4
    )
    keep_attention: bool | None = key(
        None, "keep each layer's attention output, don't compute it twice; default: on a GPU, where sequences are long"
    )
    tile_tokens: int | None = key(
        None, "tokens of a tile, in which layers compute all but attention; 0: never; default: by the device", low=0
    )
    memory: str = key(
        "config",
        "config: as the keys say; auto: the plan chooses checkpointing, offloading, segments, tiles and kept attention",
        choices=("config", "auto"),
    )
    heaviest_batch_first: bool | None = key(
        None, "run the heaviest micro-batch once before training, without an update; default: on a GPU"
    )

    # logging, evaluation, saving
    logging_steps: float = key(
        10, "steps (or, below 1, share of all steps) between two log lines", above=0, common=True
    )
    logging_first_step: bool = key(False, "log the first step as well")
    eval_strategy: str = key("no", "when to evaluate", choices=("no", "steps", "epoch"), common=True)
    eval_steps: float | None = key(
        None, "steps (or share of all steps) between evaluations; default: logging_steps", above=0, common=True
    )
    eval_on_start: bool = key(False, "evaluate before the first step")
    save_strategy: str = key("steps", "when to write a checkpoint", choices=("no", "steps", "epoch", "best"))
    save_steps: float = key(500, "steps (or share of all steps) between checkpoints", above=0, common=True)
    save_total_limit: int | None = key(None, "how many checkpoints to keep; the best one is never deleted", low=1)
    save_only_model: bool = key(
        False, "checkpoints without the optimizer: smaller, but training can't resume from them"
    )
    load_best_model_at_end: bool = key(False, "end with the checkpoint that evaluated best")
    metric_for_best_model: str | None = key(None, "metric that decides which checkpoint is best; default: loss")
    greater_is_better: bool | None = key(None, "whether more of it is better; default: false for a loss, else true")
    resume_from_checkpoint: str | None = key(
        None, "a checkpoint folder, or true for the last one in output_dir", common=True, also=bool
    )
    seed: int = key(42, "seed of everything random", low=0, common=True)
    data_seed: int | None = key(None, "seed of the data order; default: seed", low=0)

    def _check_pairs(self) -> None:
        self._check_loading()
        check_trackers(self)
        check_quantized(self)
        if self.dtype == "bfloat16" and self.bf16 is False:
            self._fail("dtype bfloat16 with bf16 false", "dtype", "bf16", mend="Delete bf16, or set dtype to float32")
        if self.warmup_steps and self.warmup_ratio:
            self._fail("warmup_steps and warmup_ratio are both set", "warmup_steps", "warmup_ratio", mend="Keep one")
        if self.max_steps == 0:
            self._fail("max_steps 0 would train nothing", "max_steps", mend="Use -1 for no limit")
        if self.gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}):
            self._fail(
                f"gradient_checkpointing_kwargs {self.gradient_checkpointing_kwargs} can't be honoured",
                "gradient_checkpointing_kwargs",
                mend="Checkpointing is always non-reentrant: remove the key",
            )
        if self.max_tokens_per_batch and self.max_length and self.max_tokens_per_batch < self.max_length:
            self._fail(
                f"a row of max_length {self.max_length} would not fit max_tokens_per_batch {self.max_tokens_per_batch}",
                "max_tokens_per_batch",
                "max_length",
                mend="Lower max_length or raise max_tokens_per_batch",
            )
        if self.test_split_size is not None:
            if self.test_split_size >= 1 and not float(self.test_split_size).is_integer():
                self._fail("test_split_size must be a share below 1 or a whole number of rows", "test_split_size")
            for name in ("eval_dataset_name", "dataset_test_split"):
                if getattr(self, name):
                    self._fail(f"test_split_size and {name} are both set", "test_split_size", name, mend="Keep one")
        if self.optimizer_in_bwd:
            self._check_in_backward()
        for name in ("activation_offloading", "keep_attention", "tile_tokens"):
            if getattr(self, name) and not self.gradient_checkpointing and self.memory == "config":
                self._fail(
                    f"{name} is about checkpoints, and gradient_checkpointing is off",
                    name,
                    "gradient_checkpointing",
                    mend=f"Set gradient_checkpointing: true, or delete {name}",
                )
        self._check_best()
        check_read(self)

    def _check_loading(self) -> None:
        """Bring model_init_kwargs to today's names."""
        try:
            taken, notes = todays_loading(self.model_init_kwargs or {})
        except KeyError:
            self._fail("torch_dtype and dtype are both given", "model_init_kwargs", mend="Keep dtype")
        if self.model_init_kwargs:
            self.model_init_kwargs = taken or None
            self.notes.extend(notes)

    def _check_in_backward(self) -> None:
        """What can't be done when a parameter is updated before the gradients of the others are known."""
        if self.gradient_accumulation_steps > 1:
            self._fail(
                "optimizer_in_bwd updates after every micro-batch, gradient_accumulation_steps asks for sums of them",
                "optimizer_in_bwd",
                "gradient_accumulation_steps",
                mend="Set gradient_accumulation_steps: 1, or optimizer_in_bwd: false",
            )
        if self.max_grad_norm > 0:
            self._fail(
                f"optimizer_in_bwd can't clip to max_grad_norm {self.max_grad_norm:g}: the norm of all gradients is "
                "only known when the first parameters have been updated",
                "optimizer_in_bwd",
                "max_grad_norm",
                mend="Set max_grad_norm: 0",
            )

    def _check_best(self) -> None:
        """Which checkpoint is best can only be told where every checkpoint was evaluated."""
        tracks = self.load_best_model_at_end or self.save_strategy == "best"
        if tracks and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        if not tracks:
            return
        name = "load_best_model_at_end" if self.load_best_model_at_end else "save_strategy"
        if self.eval_strategy == "no":
            self._fail(f"{name} needs evaluations", name, mend="Set eval_strategy to steps or epoch")
        if self.save_strategy not in ("best", self.eval_strategy):
            self._fail(
                f"{name} with save_strategy {self.save_strategy} and eval_strategy {self.eval_strategy}: "
                "checkpoints would be saved without being evaluated",
                name,
                "save_strategy",
                "eval_strategy",
                mend="Make both the same",
            )
        if self.save_strategy == "steps" and self.eval_strategy == "steps":
            every = self.eval_steps or self.logging_steps
            if every < 1 or self.save_steps < 1:
                fits = every == self.save_steps
            else:
                fits = self.save_steps % every == 0
            if not fits:
                self._fail(
                    f"{name} needs save_steps to be a multiple of eval_steps, got {self.save_steps:g} and {every:g}",
                    name,
                    "save_steps",
                    "eval_steps",
                )


@dataclass
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: the shared keys and its own."""

    learning_rate: float = key(2e-5, "highest learning rate", low=0, common=True)
    dataset_text_field: str = key("text", "column that holds plain text")
    completion_only_loss: bool | None = key(
        None, "train on the completion only; default: where rows have prompt and completion", common=True
    )
    assistant_only_loss: bool = key(False, "train on the assistant's turns only", common=True)
    packing: bool = key(
        False, "put several rows into one sequence of max_length; rows never see each other", common=True
    )
    packing_strategy: str = key(
        "bfd",
        "bfd: whole rows, best fit first; bfd_split: long rows in pieces; wrapped: cut anywhere",
        choices=("bfd", "bfd_split", "wrapped"),
    )
    eval_packing: bool | None = key(None, "pack evaluation rows; default: as packing")
    shuffle_dataset: bool = key(False, "shuffle the rows before they are packed")
    dataset_kwargs: dict | None = key(
        None,
        "{add_special_tokens: false}, {append_concat_token: false}: no BOS, EOS to text; {skip_prepare_dataset: true}",
    )
    loss_type: str = key(
        "nll",
        "nll: negative log-likelihood; dft: weighted by the token's own probability (arXiv 2508.05629)",
        choices=("nll", "dft"),
    )

    def _check_pairs(self) -> None:
        super()._check_pairs()
        for name in ("packing", "eval_packing"):
            if getattr(self, name) and self.max_length is None:
                self._fail(f"{name} needs max_length, the length of a pack", name, "max_length")
        check_dataset_kwargs(self)


def in_steps(value: float, total: int) -> int:
    """A number of steps, or below 1 a share of all `total` steps, rounded up, as transformers counts them."""
    return int(value) if value >= 1 or value == 0 else math.ceil(total * value)
