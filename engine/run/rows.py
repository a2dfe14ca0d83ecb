"""The data of a run: what a configuration or a script names becomes batches, each split reported."""

from collections.abc import Callable
from typing import Any

from torch import nn

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.preference import BCOConfig, KTOConfig, ORPOConfig, RewardConfig
from burnish.data.batch import Batches, Examples
from burnish.data.preference import prepare_pairs, prepare_unpaired
from burnish.data.prepare import prepare
from burnish.data.read import is_stream
from burnish.data.report import DataReport
from burnish.data.split import hold_out
from burnish.data.stream import StreamBatches
from burnish.metrics import Log
from burnish.model.load import load_config, load_tokenizer


def read_data(
    config: Any, tokenizer: Any, vocabulary: int, given: tuple, formatting_func: Callable | None, log: Log
) -> tuple[Batches | StreamBatches | None, Batches | StreamBatches | None]:
    """Training and evaluation batches, each reported; None where there is no such data."""
    train_dataset, eval_dataset = given
    sources = {}
    source = train_dataset if train_dataset is not None else config.dataset_name
    if source is not None:
        sources["train"] = (source, config.dataset_train_split)
    if eval_dataset is not None or config.eval_dataset_name:
        source = eval_dataset if eval_dataset is not None else config.eval_dataset_name
        sources["eval"] = (source, config.dataset_test_split or "test")
    elif config.dataset_test_split:
        sources["eval"] = (config.dataset_name, config.dataset_test_split)
    if not sources:
        raise UserError("no data", where="dataset_name", mend="Give a file, a folder or a hub id")
    examples: dict[str, Examples] = {}
    made: dict[str, Batches | StreamBatches] = {}
    for role, (rows, split) in sources.items():
        if isinstance(config, SFTConfig) and is_stream(rows):
            made[role] = StreamBatches(
                rows,
                tokenizer,
                config,
                train=role == "train",
                formatting_func=formatting_func,
                vocab_size=vocabulary,
            )
            log.say("data" if role == "train" else "eval", "a stream: rows are read, cut and packed as they come")
            continue
        examples[role], report = tokens(config, tokenizer, vocabulary, rows, split, role == "train", formatting_func)
        for line in report.lines():
            log.say("data" if role == "train" else "eval", line)
    if config.test_split_size is not None:
        if "train" not in examples:
            raise UserError("rows can't be held out of a stream", where="test_split_size", mend="Give eval_dataset")
        examples["train"], examples["eval"] = hold_out(examples["train"], config.test_split_size, config.seed)
    form = {
        "mismatch": isinstance(config, KTOConfig) and config.loss_type == "kto",
        "label_prompts": isinstance(config, ORPOConfig),
    }
    made |= {role: Batches(rows, config, train=role == "train", **form) for role, rows in examples.items()}
    for key in ("eval_strategy", "load_best_model_at_end", "eval_on_start"):
        if "eval" not in made and getattr(config, key) not in ("no", False):
            raise UserError(
                f"{key} without evaluation data", where=key, mend="Set eval_dataset_name or test_split_size"
            )
    return made.get("train"), made.get("eval")


def tokens(
    config: Any, tokenizer: Any, vocabulary: int, rows: Any, split: str, train: bool, formatting_func: Callable | None
) -> tuple[Examples, DataReport]:
    """The tokens of one split, in the form that the objective trains on."""
    common = {"split": split, "config_name": config.dataset_config, "vocab_size": vocabulary}
    if isinstance(config, SFTConfig):
        return prepare(rows, tokenizer, config, train=train, formatting_func=formatting_func, **common)
    if formatting_func is not None:
        raise UserError("preference rows have no single text to format", where="formatting_func", mend="Leave it out")
    if isinstance(config, (KTOConfig, BCOConfig)):
        return prepare_unpaired(rows, tokenizer, config, **common)
    return prepare_pairs(rows, tokenizer, config, scored=isinstance(config, RewardConfig), **common)


def read_tokenizer(config: Any) -> Any:
    """The tokenizer that a configuration names, with the template and tokens it sets."""
    return make_tokenizer(config, config.model_name_or_path)


def read_batches(config: Any) -> Batches:
    """The training batches of the data file that a configuration names, without its model: for a plan's lengths."""
    name = config.model_name_or_path
    vocabulary = vocabulary_of(name, config.trust_remote_code)
    batches, _ = read_data(config, read_tokenizer(config), vocabulary, (None, None), None, Log(None, quiet=True))
    if not isinstance(batches, Batches):
        raise UserError("no training data", where="dataset_name", mend="Give a file, a folder or a hub id")
    return batches


def make_tokenizer(config: Any, name: str) -> Any:
    return load_tokenizer(
        name,
        trust_remote_code=config.trust_remote_code,
        chat_template_path=config.chat_template_path,
        eos_token=config.eos_token,
        pad_token=config.pad_token,
    )


def vocabulary_of(source: str | nn.Module, trust_remote_code: bool) -> int:
    """How many token ids the model embeds, before it is loaded."""
    if isinstance(source, nn.Module):
        return source.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    return load_config(source, trust_remote_code=trust_remote_code).get_text_config().vocab_size
