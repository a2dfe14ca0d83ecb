"""What moves as a run goes on, and what the loop asks of whoever assembled it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from burnish.data.batch import Batch
from burnish.parallel.world import world


@dataclass
class TrainState:
    """Where a run stands. Every field goes into a checkpoint's state.json. The properties are what callbacks written
    for transformers read beside the fields."""

    global_step: int = 0  # updates done
    epoch_index: int = 0  # the epoch whose micro-batches are being read
    micro_batch: int = 0  # micro-batches of it already trained on
    window: int = 0  # micro-batches of an update, of all processes; set by the first
    epoch: float = 0.0
    num_tokens: int = 0  # tokens seen, trained or not
    max_steps: int = 0
    train_loss_sum: float = 0.0  # of every step up to the last log or checkpoint
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    evaluation_owed: bool = False  # the run was stopped inside an evaluation
    log_history: list[dict] = field(default_factory=list)

    @property
    def is_world_process_zero(self) -> bool:
        return world().main

    @property
    def is_local_process_zero(self) -> bool:
        return world().local_rank == 0

    @property
    def num_input_tokens_seen(self) -> int:
        return self.num_tokens

    @property
    def is_hyper_param_search(self) -> bool:
        return False


@dataclass
class Control:
    """What a callback may ask for; read after each step, the names are transformers'."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
    interrupted: bool = False  # set by the loop: it has saved and stopped early because hooks.stopping said so


@dataclass
class Hooks:
    """What the loop hands back to whoever assembled it.

    evaluate  () -> metrics of the evaluation set, names already starting with eval_; may raise Stopped
    save      (metrics or None, asked) -> None: write a checkpoint of the current state; `asked`: somebody wants this
              one, whole, whatever the strategy
    notify    (event, **extra) -> None: tell the callbacks (event is one of transformers' on_... names)
    stopping  () -> whether somebody wants the run to stop: asked after every step and batch of an evaluation
    saving    () -> whether somebody wants a checkpoint: asked after every step
    window    () -> a context: the forwards and backwards of one step run inside it
    heaviest  () -> a micro-batch to run first, forward and backward without an update, or None
    measured  (GiB) -> None: the peak of memory after that, or on a GPU after the first window
    broken    (step, its micro-batches) -> the file that keeps them, whose loss or gradient isn't a number, or ""
    """

    evaluate: Callable[[], dict[str, float]] | None = None
    save: Callable[[dict[str, float] | None, bool], None] | None = None
    notify: Callable[..., None] = lambda event, **extra: None
    stopping: Callable[[], bool] = lambda: False
    saving: Callable[[], bool] = lambda: False
    window: Callable[[], AbstractContextManager] = nullcontext
    heaviest: Callable[[], Batch | None] = lambda: None
    measured: Callable[[float], None] = lambda gib: None
    broken: Callable[[int, list[Batch]], str] = lambda step, batches: ""


class Stopped(Exception):
    """An evaluation was left because the run is to stop; what it had found so far is gone."""
