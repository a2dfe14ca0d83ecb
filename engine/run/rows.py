"""The data of a run: what a configuration or a script names becomes batches, each split reported."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.preference import BCOConfig, KTOConfig, ORPOConfig, RewardConfig
from burnish.data.batch import Batches, Examples
from burnish.data.completion import ConstantLengthDataset, Templates
from burnish.data.preference import prepare_pairs, prepare_unpaired
from burnish.data.prepare import prepare
from burnish.data.read import is_stream
from burnish.data.report import DataReport
from burnish.data.split import hold_out
from burnish.data.stream import StreamBatches
from burnish.data.vision import AnyBatches
from burnish.metrics import Log
from burnish.model.load import dress_tokenizer, load_config, load_tokenizer
from burnish.run.checks import Finding, of_copies, of_rows, of_setup, settle
from burnish.run.vision import collated, collator_for


def read_data(
    config: Any,
    tokenizer: Any,
    vocabulary: int,
    given: tuple,
    formatting_func: Callable | None,
    log: Log,
    templates: Templates | None = None,
    data_collator: Callable | None = None,
    found: list[Finding] | None = None,
) -> tuple[AnyBatches | None, AnyBatches | None]:
    """Training and evaluation batches, each reported; None where there is no such data.

    What is wrong with them is said, or raised as a UserError, or only put into `found` where that is given.
    """
    collate = collator_for(config, tokenizer, given[1] if given[0] is None else given[0], data_collator)
    if collate is not None:
        padded = collated(config, collate, given, formatting_func, log)
        _check_evaluation(config, padded)
        return padded.get("train"), padded.get("eval")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    sources = _sources(config, *given)
    examples: dict[str, Examples] = {}
    findings: list[Finding] = [] if found is None else found
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
                templates=templates,
            )
            log.say("data" if role == "train" else "eval", "a stream: rows are read, cut and packed as they come")
            continue
        text = formatting_func, templates
        examples[role], report = tokens(config, tokenizer, vocabulary, rows, split, role == "train", *text)
        for line in report.lines():
            log.say("data" if role == "train" else "eval", line)
        findings += of_rows(config, report, role == "train")
    findings += _of_whole(config, tokenizer, vocabulary, examples)
    if found is None:
        settle(findings, log)
    if config.test_split_size is not None:
        _check_hold_out(examples, sources)
        examples["train"], examples["eval"] = hold_out(examples["train"], config.test_split_size, config.seed)
    form = {
        "mismatch": isinstance(config, KTOConfig) and config.loss_type == "kto",
        "label_prompts": isinstance(config, ORPOConfig),
    }
    made |= {role: Batches(rows, config, train=role == "train", **form) for role, rows in examples.items()}
    _check_evaluation(config, made)
    return made.get("train"), made.get("eval")


def _sources(config: Any, train_dataset: Any, eval_dataset: Any) -> dict[str, tuple[Any, str]]:
    """(rows, split) by role: what a script gave, else what the configuration names. Raises UserError for nothing."""
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
    return sources


def _check_hold_out(examples: dict[str, Examples], sources: dict[str, tuple[Any, str]]) -> None:
    """Raises UserError for training data of which no rows can be held out."""
    if "train" not in examples:
        raise UserError("rows can't be held out of a stream", where="test_split_size", mend="Give eval_dataset")
    if isinstance(sources["train"][0], ConstantLengthDataset):
        raise UserError(
            "blocks of constant length cut texts in two, and parts of one would be trained on and evaluated",
            where="test_split_size",
            mend="Hold texts out before they are cut, and give eval_dataset",
        )


def _of_whole(config: Any, tokenizer: Any, vocabulary: int, examples: dict[str, Examples]) -> Iterator[Finding]:
    """Findings about all splits together, and about the model that they are for."""
    positions, name = None, config.model_name_or_path
    if name:
        with suppress(UserError):  # a script may bring a model that has nothing to do with this name
            settings = load_config(name, trust_remote_code=config.trust_remote_code, here=True).get_text_config()
            positions = getattr(settings, "max_position_embeddings", None)
    longest = max((int(part.lengths.max()) for part in examples.values()), default=0)
    if getattr(config, "packing", False) and config.max_length:
        longest = min(longest, config.max_length)  # longer rows are divided, and positions start again
    yield from of_setup(config, positions, vocabulary, tokenizer, longest)
    if len(examples) == 2:
        source = config.eval_dataset_name or config.dataset_name or "eval_dataset"
        yield from of_copies(examples["train"], examples["eval"], str(source))


def _check_evaluation(config: Any, made: Mapping[str, Any]) -> None:
    """Raises UserError for a key that asks for evaluations where there is no data for them."""
    for key in ("eval_strategy", "load_best_model_at_end", "eval_on_start"):
        if "eval" not in made and getattr(config, key) not in ("no", False):
            raise UserError(
                f"{key} without evaluation data", where=key, mend="Set eval_dataset_name or test_split_size"
            )


def tokens(
    config: Any,
    tokenizer: Any,
    vocabulary: int,
    rows: Any,
    split: str,
    train: bool,
    formatting_func: Callable | None,
    templates: Templates | None = None,
) -> tuple[Examples, DataReport]:
    """The tokens of one split, in the form that the objective trains on."""
    common = {"split": split, "config_name": config.dataset_config, "vocab_size": vocabulary}
    if isinstance(config, SFTConfig):
        text: dict[str, Any] = {"formatting_func": formatting_func, "templates": templates}
        return prepare(rows, tokenizer, config, train=train, **text, **common)
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
    quiet: list[Finding] = []  # a plan and a preview are of rows as they are
    batches, _ = read_data(
        config, read_tokenizer(config), vocabulary, (None, None), None, Log(None, quiet=True), found=quiet
    )
    if not isinstance(batches, Batches):
        raise UserError("no training data", where="dataset_name", mend="Give a file, a folder or a hub id")
    return batches


def make_tokenizer(config: Any, name: str, given: Any = None) -> Any:
    """The tokenizer a script brings, or the one beside the model, with the template and tokens that the keys set."""
    dress = {
        "trust_remote_code": config.trust_remote_code,
        "chat_template_path": config.chat_template_path,
        "eos_token": config.eos_token,
        "pad_token": config.pad_token,
    }
    if given is None:
        return load_tokenizer(name, **dress)
    dress_tokenizer(getattr(given, "tokenizer", given), **dress)  # a processor's
    return given


def vocabulary_of(source: str | nn.Module, trust_remote_code: bool) -> int:
    """How many token ids the model embeds, before it is loaded."""
    if isinstance(source, nn.Module):
        return source.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    return load_config(source, trust_remote_code=trust_remote_code).get_text_config().vocab_size
