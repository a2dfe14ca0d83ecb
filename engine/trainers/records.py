"""What scripts written for transformers' Trainer call around training: records on disk and on the screen, uploads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from burnish.card import write_card
from burnish.hub import push
from burnish.parallel.world import world
from burnish.training.publish import facts_of


class Records:
    """Methods of the trainers; `run` is theirs."""

    run: Any

    def is_world_process_zero(self) -> bool:
        return world().main

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """A line of the log for each metric."""
        for name, value in sorted(metrics.items()):
            self.run.log.say(split, f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """output_dir/{split}_results.json, and the same among those of other splits in all_results.json."""
        if not world().main:
            return
        self._write(f"{split}_results.json", metrics)
        together = self.run.folder / "all_results.json"
        if combined:
            before = json.loads(together.read_text(encoding="utf-8")) if together.is_file() else {}
            self._write("all_results.json", {**before, **metrics})

    def save_state(self) -> None:
        """output_dir/trainer_state.json: the step, the best checkpoint and log_history. A checkpoint has its own."""
        if world().main:
            self._write("trainer_state.json", dataclasses.asdict(self.run.state))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """The model card in output_dir, with a title, a data set's name and tags of the script's own where given.

        Saving writes a card as well, and anew; a README.md of somebody's own stays.
        """
        if not world().main:
            return
        own = (tags,) if isinstance(tags, str) else tuple(tags or ())
        facts = dataclasses.replace(facts_of(self.run), title=model_name or "", dataset=dataset_name or "", tags=own)
        self.run.folder.mkdir(parents=True, exist_ok=True)
        if not write_card(self.run.folder, facts):
            self.run.log.say("card", f"{self.run.folder / 'README.md'} is somebody's own: left as it is")

    def push_to_hub(self, commit_message: str = "Trained with burnish") -> str:
        """Save the model and upload it to hub_model_id; its address. Raises UserError where the hub doesn't take it.

        With push_to_hub among the keys saving uploads already.
        """
        config, folder = self.run.config, self.run.save_model()
        if config.push_to_hub or not world().main:
            return config.hub_model_id or folder.resolve().name
        return push(config, folder, commit_message)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = Path(self.run.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
