"""TRL's names over `burnish.run`: a script changes one import. No logic of their own.

The constructors take TRL's arguments; `train`, `evaluate`, `save_model` and `state` are what scripts call next.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from burnish.config.fields import SFTConfig
from burnish.config.preference import BCOConfig, CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig
from burnish.run import assemble
from burnish.trainers.arguments import check_adapter, configuration, one_of, one_set, refuse, with_collator
from burnish.trainers.records import Records
from burnish.training import RunResult
from burnish.training.callbacks import heard


class Trainer(Records):
    """What the trainers share. Their constructors take TRL's arguments, those of v0.7 to v0.11 included.

    model, ref_model: a folder, a hub id or a transformers model. args: the trainer's configuration, or transformers'
    TrainingArguments (None: the defaults). train_dataset, eval_dataset: a path, a hub id, a list of rows, a
    datasets.Dataset. processing_class, tokenizer: the tokenizer, loaded beside the model when None. peft_config: a peft
    configuration. callbacks: transformers' TrainerCallbacks, or objects with methods of their names. optimizers:
    (optimizer, schedule) of the caller's own. model_init: makes the model. Every key of the configuration is taken as
    an argument too, by its older names as well: that is where TRL once had them.
    Everything is loaded and checked in the constructor; UserError says what to mend.
    """

    config_class: type = SFTConfig
    stepwise = False  # the script brings the rows of each update

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        formatting_func: Callable | None = None,
        ref_model: str | nn.Module | None = None,
        **older: Any,
    ):
        name = type(self).__name__
        refuse(older, name)
        self.args = configuration(self.config_class, args, older, name)
        check_adapter(self.args, peft_config, name)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.run = assemble(
            self.args,
            model=one_of(name, model=model, model_init=model_init),
            ref_model=ref_model,
            processing_class=one_of(name, processing_class=processing_class, tokenizer=tokenizer),
            train_dataset=train_dataset,
            eval_dataset=one_set(eval_dataset, name),
            peft_config=peft_config,
            formatting_func=formatting_func,
            callbacks=callbacks,
            optimizers=optimizers,
            stepwise=self.stepwise,
            **with_collator(data_collator, self.args, name),
        )
        self.model, self.processing_class = self.run.model, self.run.tokenizer
        self.tokenizer = self.processing_class
        self.run.notify("on_init_end")

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

    def add_callback(self, callback: Any) -> None:
        """A TrainerCallback or a class of them, told from now on."""
        self.run.callbacks += heard([callback], self.run.log)

    def remove_callback(self, callback: Any) -> None:
        """Tell this callback (or those of this class) nothing more."""
        kind = callback if isinstance(callback, type) else ()
        self.run.callbacks[:] = [c for c in self.run.callbacks if c is not callback and not isinstance(c, kind)]


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
