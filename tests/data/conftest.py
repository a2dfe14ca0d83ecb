"""A tiny byte-level tokenizer with chat tokens, and a configuration with every field that the data room reads."""

import types

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the cat sat on the mat", "What is two and two? It is four.", "user assistant system tool weather in Paris"]


def _tokenizer(*, bos: bool = False, trim: bool = False, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def make_tokenizer():
    """Call with bos=True (the tokenizer puts a BOS first), trim=True (offsets without white space), template=..."""
    return _tokenizer


@pytest.fixture
def tokenizer():
    return _tokenizer()


@pytest.fixture
def make_config():
    def make(**changes):
        fields = dict(
            dataset_text_field="text",
            dataset_kwargs=None,
            max_length=1024,
            truncation_mode="keep_start",
            packing=False,
            packing_strategy="bfd",
            eval_packing=None,
            completion_only_loss=None,
            assistant_only_loss=False,
            shuffle_dataset=False,
            chat_template_path=None,
            eos_token=None,
            pad_token=None,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            max_tokens_per_batch=None,
            train_sampling_strategy="random",
            dataloader_drop_last=False,
            gradient_accumulation_steps=1,
            max_steps=-1,
            seed=42,
            data_seed=None,
            max_prompt_length=None,
            max_completion_length=None,
            precompute_ref_log_probs=False,
        )
        assert set(changes) <= set(fields), f"no such field: {set(changes) - set(fields)}"
        return types.SimpleNamespace(**{**fields, **changes})

    return make
