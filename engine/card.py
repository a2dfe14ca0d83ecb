"""The model card: README.md in a trained model's folder, with this run's own numbers and nothing that isn't known."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MARK = re.compile(r"<!-- burnish ([0-9a-f]{64}): .* -->\n?\Z")
_SAYS = "written by burnish, which writes it anew unless it was edited"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")
_METHODS = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimization",
    "cpo": "contrastive preference optimization",
    "orpo": "odds-ratio preference optimization",
    "kto": "Kahneman-Tversky optimization",
    "bco": "binary classifier optimization",
    "reward": "reward modelling",
}
# (verb, loss_type): what the loss is called, its paper on arXiv
_LOSSES: dict[tuple[str, str], tuple[str, str]] = {
    ("sft", "nll"): ("negative log-likelihood of the trained tokens", ""),
    ("sft", "dft"): ("log-likelihood weighted by each token's own probability", "2508.05629"),
    ("dpo", "sigmoid"): ("logistic loss of the difference of log-ratios", "2305.18290"),
    ("dpo", "sigmoid_norm"): ("logistic loss of the difference of log-ratios per token", "2305.18290"),
    ("dpo", "ipo"): ("squared distance of the difference from its target", "2310.12036"),
    ("dpo", "hinge"): ("hinge loss of the difference of log-ratios", "2305.10425"),
    ("dpo", "robust"): ("logistic loss that expects a share of swapped pairs", "2403.00409"),
    ("dpo", "exo_pair"): ("divergence between the pair's probabilities and smoothed labels", "2402.00856"),
    ("dpo", "nca_pair"): ("noise-contrastive alignment", "2402.05369"),
    ("dpo", "bco_pair"): ("binary classification of the two completions", "2404.04656"),
    ("dpo", "sppo_hard"): ("self-play preference optimization", "2405.00675"),
    ("dpo", "aot"): ("alignment by optimal transport", "2406.05882"),
    ("dpo", "aot_unpaired"): ("alignment by optimal transport, unpaired", "2406.05882"),
    ("dpo", "apo_zero"): ("anchored preference optimization, zero", "2408.06266"),
    ("dpo", "apo_down"): ("anchored preference optimization, down", "2408.06266"),
    ("dpo", "discopop"): ("log-ratio modulated loss", "2406.08414"),
    ("dpo", "sft"): ("negative log-likelihood of the chosen completion", ""),
    ("dpo", "kto_pair"): ("Kahneman-Tversky loss of the two completions", "2402.01306"),
    ("cpo", "sigmoid"): ("logistic loss of the difference of log-probs", "2401.08417"),
    ("cpo", "hinge"): ("hinge loss of the difference of log-probs", "2401.08417"),
    ("cpo", "ipo"): ("squared distance of the difference of log-probs", "2401.08417"),
    ("cpo", "simpo"): ("SimPO", "2405.14734"),
    ("cpo", "alphapo"): ("AlphaPO", "2501.03884"),
    ("orpo", ""): ("likelihood of the chosen and a log odds ratio", "2403.07691"),
    ("kto", "kto"): ("Kahneman-Tversky loss", "2402.01306"),
    ("kto", "apo_zero_unpaired"): ("anchored loss of single completions", "2408.06266"),
    ("bco", ""): ("binary classification against a running mean reward", "2404.04656"),
    ("reward", ""): ("Bradley-Terry log-likelihood of the pairs", ""),
}


@dataclass
class Facts:
    """What a card is made of, as the run knows it.

    model     the base model's name or folder; may be empty
    rows      training rows, None where they came as a stream
    trained   parameters that were trained, and all
    adapter   the model is an adapter on its base
    history   the run's records (state.log_history)
    about     hardware and versions, in words
    title     the card's title; default: the last part of output_dir
    dataset   the data's name; default: dataset_name of the configuration
    tags      of the script's own, after burnish's
    """

    config: Any
    model: str
    rows: int | None
    trained: tuple[int, int]
    adapter: bool
    history: list[dict]
    about: dict[str, str]
    title: str = ""
    dataset: str = ""
    tags: tuple[str, ...] = ()


def write_card(folder: Path, facts: Facts) -> bool:
    """Write README.md into `folder`; False, with nothing changed, where one lies there that burnish did not write, or
    that somebody has edited since."""
    path = folder / "README.md"
    if path.exists() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        return False
    text = card(facts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    aside = path.with_name(".README.md.writing")
    aside.write_text(f"{text}\n<!-- burnish {digest}: {_SAYS} -->\n", encoding="utf-8")
    os.replace(aside, path)
    return True


def is_ours(text: str) -> bool:
    """Whether burnish wrote this card and nobody changed it."""
    found = _MARK.search(text)
    return found is not None and hashlib.sha256(text[: found.start() - 1].encode()).hexdigest() == found[1]


def card(facts: Facts) -> str:
    """The card's Markdown: the header that the hub reads, the run in a table, its last metrics."""
    config, verb = facts.config, _verb(facts.config)
    base, data = _shown(facts.model), _shown(_dataset(facts))
    rows = [
        ("model", base or "a model that the script made"),
        ("data", _data(data, facts.rows)),
        ("objective", objective(config)),
        ("trained", _trained(facts)),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_scheduler_type}, {config.optim}"),
        ("batch", _batch(config)),
        ("length", f"at most {config.max_length:,} tokens" if config.max_length else "never cut"),
        *sorted(facts.about.items()),
    ]
    lines = ["---", _header(facts, verb), "---", "", f"# {facts.title or Path(config.output_dir).resolve().name}", ""]
    lines += [f"{_METHODS.get(verb, verb).capitalize()} of {base or 'a model'} with burnish.", ""]
    lines += _table(("", ""), rows)
    metrics = final_metrics(facts.history)
    if metrics:
        lines += [
            "",
            "## Metrics",
            "",
            *_table(("metric", "last value"), [(n, _number(v)) for n, v in metrics.items()]),
        ]
    return "\n".join(lines) + "\n"


def final_metrics(history: Iterable[dict]) -> dict[str, float]:
    """The last value of every metric that the run logged, the summary's included; bookkeeping left out."""
    found: dict[str, float] = {}
    for record in history:
        found |= {name: value for name, value in record.items() if isinstance(value, (int, float))}
    left_out = ("learning_rate", "data_wait", "eval_runtime", "eval_samples_per_second")
    return {name: found[name] for name in sorted(found) if name not in left_out}


def objective(config: Any) -> str:
    """The loss by its name and paper; several with their weights."""
    verb = _verb(config)
    kinds = getattr(config, "loss_type", "") or ""
    kinds = [kinds] if isinstance(kinds, str) else kinds
    weights = getattr(config, "loss_weights", None) or [1.0] * len(kinds)
    parts = []
    for kind, weight in zip(kinds, weights, strict=True):
        name, paper = _LOSSES.get((verb, kind), (kind, ""))
        shown = f"{name} (`{kind}`)" if kind else name
        shown += f", [arXiv {paper}](https://arxiv.org/abs/{paper})" if paper else ""
        parts.append(shown if len(kinds) == 1 else f"{weight:g} x {shown}")
    if hasattr(config, "beta"):
        parts[-1] += f"; beta {config.beta:g}"
    return " + ".join(parts)


def _verb(config: Any) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _header(facts: Facts, verb: str) -> str:
    """The YAML that the hub reads: only what is known for certain. A local folder is no name on the hub."""
    header: dict[str, Any] = {}
    if _on_hub(facts.model):
        header["base_model"] = facts.model
    header["library_name"] = "peft" if facts.adapter else "transformers"
    header["tags"] = ["burnish", verb, *(["lora"] if facts.adapter else []), *facts.tags]
    if _on_hub(_dataset(facts)):
        header["datasets"] = [_dataset(facts)]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()


def _dataset(facts: Facts) -> str:
    return facts.dataset or facts.config.dataset_name or ""


def _on_hub(name: str) -> bool:
    return bool(_HUB_ID.match(name)) and not Path(name).expanduser().exists()


def _shown(name: str) -> str:
    """A hub id with its link, or a local name without the folders above it: a card may be read elsewhere."""
    if _on_hub(name):
        return f"`{name}`"
    return f"`{Path(name).name}` (local)" if name else ""


def _data(name: str, rows: int | None) -> str:
    count = "a stream" if rows is None else f"{rows:,} rows"
    return f"{name}, {count}" if name else f"{count} that the script gave"


def _trained(facts: Facts) -> str:
    some, every = facts.trained
    config = facts.config
    how = "an adapter" if facts.adapter else "full parameters"
    if facts.adapter and config.use_peft:
        how = f"LoRA of rank {config.lora_r}, alpha {config.lora_alpha}"
        how += " on a base in 4 bits" * config.load_in_4bit + " on a base in 8 bits" * config.load_in_8bit
    return f"{some:,} of {every:,} parameters ({how})"


def _batch(config: Any) -> str:
    size = f"{config.per_device_train_batch_size} rows"
    if config.max_tokens_per_batch:
        size = f"up to {config.max_tokens_per_batch:,} tokens"
    elif getattr(config, "packing", False):
        size = f"{config.per_device_train_batch_size} packs"
    steps = config.gradient_accumulation_steps
    return size + (f" x {steps} micro-batches" if steps > 1 else "")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    for name, value in rows:
        safe = " ".join(str(value).split()).replace("|", "\\|")
        lines.append(f"| {name} | {safe} |")
    return lines
