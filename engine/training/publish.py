"""What a saved model gets beside its weights: the model card, and an upload where the configuration asks for one."""

from pathlib import Path
from typing import Any

from burnish.card import Facts, write_card
from burnish.data.batch import Batches
from burnish.hub import push


def publish(run: Any, folder: Path) -> None:
    """Write the model card of a `Run` into `folder`, where its model lies now, and push that where asked to.

    A README.md of somebody's own stays. Raises UserError where the upload fails; the model is saved all the same.
    """
    if not write_card(folder, facts_of(run)):
        run.log.say("card", f"{folder / 'README.md'} is somebody's own: left as it is")
    if run.config.push_to_hub:
        run.log.say("hub", push(run.config, folder))


def facts_of(run: Any) -> Facts:
    """What the model card says of a `Run`."""
    rows = None
    if isinstance(run.batches, Batches):
        rows = len(run.batches.examples) // (2 if run.batches.examples.paired else 1)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in run.model.parameters()]
    return Facts(
        config=run.config,
        model=str(run.config.model_name_or_path or getattr(run.model, "name_or_path", "")),
        rows=rows,
        trained=(sum(n for n, trained in counts if trained), sum(n for n, _ in counts)),
        adapter=hasattr(run.model, "peft_config"),
        history=run.state.log_history,
        about=run.about,
    )
