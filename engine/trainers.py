"""TRL's names over `burnish.run`: a script changes one import. No logic of their own.

The constructors take TRL's arguments; `train`, `evaluate`, `save_model` and `state` are what scripts call next.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.preference import BCOConfig, CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig
from burnish.run import assemble
from burnish.training import RunResult


class Trainer:
    """What the trainers share. Their constructors take TRL's arguments.

    model, ref_model: a folder, a hub id or a transformers model. args: the trainer's configuration (None: its
    defaults). train_dataset, eval_dataset: a path, a hub id, a list of rows, a datasets.Dataset. processing_class: the
    tokenizer, loaded beside the model when None. peft_config: a peft configuration. callbacks: objects with
    transformers' on_... methods. optimizers: (optimizer, schedule) of the caller's own.
    Everything is loaded and checked in the constructor; UserError says what to mend.
    """

    config_class: type = SFTConfig

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        formatting_func: Callable | None = None,
        ref_model: str | nn.Module | None = None,
    ):
        name = type(self).__name__
        if data_collator is not None:
            raise UserError(
                "data_collator can't be honoured: burnish packs rows itself",
                where=f"{name}(data_collator=...)",
                mend="Give rows with input_ids and labels instead",
            )
        if args is not None and not isinstance(args, self.config_class):
            raise UserError(
                f"args is a {type(args).__name__}", where=f"{name}(args=...)", mend=f"Use {self.config_class.__name__}"
            )
        self.args = args or self.config_class()
        self.run = assemble(
            self.args,
            model=model,
            ref_model=ref_model,
            processing_class=processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            formatting_func=formatting_func,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model, self.processing_class = self.run.model, self.run.tokenizer

    @property
    def state(self) -> Any:
        """global_step, epoch, max_steps, log_history, best_metric, best_model_checkpoint."""
        return self.run.state

    def train(self, resume_from_checkpoint: str | bool | None = None) -> RunResult:
        """Train to the end, or on from a checkpoint folder (True: the last whole one in output_dir)."""
        return self.run.train(resume_from_checkpoint)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the evaluation set, their names starting with eval_."""
        return self.run.evaluate()

    def save_model(self, output_dir: str | None = None) -> Path:
        """Save weights (or the adapter) and tokenizer as from_pretrained reads them."""
        return self.run.save_model(output_dir)


class SFTTrainer(Trainer):
    """Supervised fine-tuning. formatting_func: row -> text."""

    config_class = SFTConfig


class _WithReference(Trainer):
    """TRL puts ref_model second where an objective has a reference."""

    def __init__(
        self,
        model: str | nn.Module | None = None,
        ref_model: str | nn.Module | None = None,
        args: Any = None,
        **given: Any,
    ):
        super().__init__(model, args, ref_model=ref_model, **given)


class DPOTrainer(_WithReference):
    """Direct preference optimization and its family (DPOConfig.loss_type)."""

    config_class = DPOConfig


class KTOTrainer(_WithReference):
    """Kahneman-Tversky optimization of completions rated good or bad."""

    config_class = KTOConfig


class BCOTrainer(_WithReference):
    """Binary classifier optimization of completions rated good or bad."""

    config_class = BCOConfig


class CPOTrainer(Trainer):
    """Contrastive preference optimization, SimPO and AlphaPO: no reference."""

    config_class = CPOConfig


class ORPOTrainer(Trainer):
    """Odds-ratio preference optimization: no reference."""

    config_class = ORPOConfig


class RewardTrainer(Trainer):
    """Reward modelling: a sequence classifier of one score, trained on pairs (Bradley-Terry)."""

    config_class = RewardConfig
