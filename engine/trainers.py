"""TRL's names over `burnish.run`: a script changes one import. No logic of their own.

The constructors take TRL's arguments; `train`, `evaluate`, `save_model` and `state` are what scripts call next.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.run import assemble
from burnish.training import RunResult


class SFTTrainer:
    """Supervised fine-tuning with TRL's constructor.

    model: a folder, a hub id or a transformers model. args: SFTConfig (or None for its defaults). train_dataset,
    eval_dataset: a path, a hub id, a list of rows, a datasets.Dataset. processing_class: the tokenizer, loaded beside
    the model when None. peft_config: a peft configuration. formatting_func: row -> text. callbacks: objects with
    transformers' on_... methods. optimizers: (optimizer, schedule) of the caller's own.
    Everything is loaded and checked here; UserError says what to mend.
    """

    config_class = SFTConfig

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
    ):
        if data_collator is not None:
            raise UserError(
                "data_collator can't be honoured: burnish packs rows itself",
                where="SFTTrainer(data_collator=...)",
                mend="Give rows with input_ids and labels instead",
            )
        self.args = args or self.config_class()
        self.run = assemble(
            self.args,
            model=model,
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
