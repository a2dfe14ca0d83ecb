"""`burnish check --replay FILE`: the rows of an update that had no number, run again, to see where it begins.

Forward and backward are watched module by module; the first output, and the first gradient of an output, that is not
finite is named with its token, its row and its layer. Nothing is updated and nothing is written.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.data.batch import Batch
from burnish.kernels import use
from burnish.logprobs import token_scores
from burnish.model.adapters import adapter_base
from burnish.model.head import read_head
from burnish.run import assemble
from burnish.training import Run
from burnish.training.broken import load_batches, model_of
from burnish.verbs.merge import run_config

# of how the run was spread, saved memory or told others; none changes a number
_PLAIN = {
    "report_to": "none",
    "push_to_hub": False,
    "nproc": None,
    "parallel": None,
    "sequence_parallel": 1,
    "gradient_checkpointing": False,
    "activation_offloading": False,
    "checkpoint_segment": 1,
    "keep_attention": None,
    "tile_tokens": None,
    "memory": "config",
    "resume_from_checkpoint": None,
}


class Watch:
    """Hooks on all modules of a model; `forward` and `backward` name the first that gave something not finite."""

    def __init__(self, model: nn.Module):
        self.forward: tuple[str, Tensor] | None = None
        self.backward: tuple[str, Tensor] | None = None
        self._handles = [
            module.register_forward_hook(self._hook(name or "the model")) for name, module in model.named_modules()
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def look(module: nn.Module, given: tuple, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            tensor = getattr(tensor, "last_hidden_state", tensor)
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return
            if self.forward is None and not tensor.isfinite().all():
                self.forward = name, tensor.detach()
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._look_back(name, gradient))

        return look

    def _look_back(self, name: str, gradient: Tensor) -> None:
        if self.backward is None and not gradient.isfinite().all():
            self.backward = name, gradient.detach()


def replay(path: str | Path) -> int:
    """Run kept micro-batches again and print what isn't finite first. 0 where it was found, 1 where all is finite now.

    Raises UserError where FILE holds no kept rows or the run's folder can't be read.
    """
    file = Path(path)
    batches = load_batches(file)
    run = _assembled(file)
    rows = sorted({row for batch in batches if batch.counted for row in batch.rows})
    print(f"replay   {file}  micro-batches {len(batches)}, rows {', '.join(map(str, rows[:12]))}")
    for name, parameter in run.model.named_parameters():
        if not parameter.isfinite().all():
            print(f"weights  {name} is not finite: the model was broken before this step")
            return 0
    device = next(run.model.parameters()).device
    placed = [batch.to(device) for batch in batches]
    count = max(1, sum(run.objective.count(batch) for batch in batches if batch.counted))
    with use(run.config.kernels):
        shared = run.objective.window(placed)
        for batch in placed:
            if batch.counted and (lines := _watched(run, batch, shared, count)):
                print("\n".join(lines))
                return 0
    print("finite   forward, loss and backward: it does not happen again with these rows and weights")
    return 1


def _assembled(file: Path) -> Run:
    """The run that wrote the file, without its data, with the weights it had then."""
    kept = model_of(file)
    config = run_config(file.parent, [])
    config = dataclasses.replace(config, **_PLAIN)
    source = kept if kept.is_dir() else next(reversed(disk.checkpoints(file.parent)), None)
    if source is None:
        raise UserError("there is no model beside these rows", where=str(kept), mend="Keep it with the file")
    if source != kept:
        print(f"weights  of {source}: the model of that step was not kept")
    adapter = None
    if adapter_base(source) is not None and not config.use_peft:
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(source)
    run = assemble(config, model=None if config.model_name_or_path else str(source), peft_config=adapter, stepwise=True)
    disk.load_weights(run.model, source)
    run.model.train()
    return run


def _watched(run: Run, batch: Batch, shared: Any, count: int) -> list[str]:
    """What isn't finite first in forward, loss and backward of one micro-batch; nothing where all is."""
    watch = Watch(run.model)
    try:
        loss_sum, _ = run.objective.step(batch, shared)
        if watch.forward is not None:
            return [f"forward  {_place(run, batch, *watch.forward)}"]
        if not loss_sum.isfinite():
            return [f"loss     {_loss_place(run, batch)}"]
        run.model.zero_grad(set_to_none=True)
        (loss_sum / count).backward()
    finally:
        watch.close()
    if watch.backward is not None:
        return [f"backward {_place(run, batch, *watch.backward)}"]
    broken = [n for n, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return [f"backward the gradient of {broken[-1]}, of all outputs' none"] if broken else []


def _loss_place(run: Run, batch: Batch) -> str:
    """The token whose log-prob isn't finite, or that it is the loss that is made of finite ones."""
    if hasattr(run.config, "center_rewards_coefficient"):
        return f"of scores that are finite, in rows {', '.join(map(str, batch.rows))}"
    with torch.no_grad():
        logps = token_scores(run.model, read_head(run.model), batch).logps
    if logps.isfinite().all():
        return f"of log-probs that are finite, in rows {', '.join(map(str, batch.rows))}"
    return _place(run, batch, "the head", logps[:, None])


def _place(run: Run, batch: Batch, name: str, tensor: Tensor) -> str:
    """`name`, and the first of the tensor's tokens [..., T, H] that isn't finite."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    if batch.inputs is not None or flat.shape[0] != len(batch.input_ids):
        return f"in {name}, rows {', '.join(map(str, batch.rows))}"
    at = int((~flat.isfinite().all(dim=-1)).nonzero()[0])
    sequence = int(torch.searchsorted(batch.cu_seqlens.long(), at, right=True)) - 1
    token = int(batch.input_ids[at])
    text = getattr(run.tokenizer, "tokenizer", run.tokenizer).decode([token])
    position = at - int(batch.cu_seqlens[sequence])
    return f"in {name}, token {position} ({text!r}, id {token}) of row {batch.rows[sequence]}"
