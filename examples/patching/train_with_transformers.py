"""Only burnish's kernels, in transformers' own Trainer: a model, two lines, and the Trainer as it always was.

    python train_with_transformers.py MODEL train.jsonl out/patched [steps]

MODEL is a folder or a hub id; the rows have a `text` column. Needs `pip install accelerate`, as the Trainer does.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import burnish


def collate(rows: list[dict], pad: int) -> dict:
    """Rows of token ids as one padded batch; padding trains on nothing."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[number, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main(name: str, rows: str, folder: str, steps: int = 10) -> float:
    """Train for `steps` steps; returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    print(burnish.patch(model))  # what runs on burnish's kernels now, what doesn't, and why
    data = load_dataset("json", data_files=rows, split="train")
    data = data.map(
        lambda row: {"input_ids": tokenizer(row["text"])["input_ids"][:512]}, remove_columns=data.column_names
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = Trainer(
        model,
        TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=4, logging_steps=1, report_to="none"),
        data_collator=lambda batch: collate(batch, pad),
        train_dataset=data,
    )
    trainer.train()
    burnish.unpatch(model)
    trainer.save_model(folder)
    return next(record["loss"] for record in reversed(trainer.state.log_history) if "loss" in record)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
