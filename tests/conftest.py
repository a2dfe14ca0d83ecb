"""Set up before any burnish or transformers import: no network, Triton's interpreter where there is no GPU, and the
repository root off sys.path (our kernels/ folder would answer to the name of Hugging Face's package)."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, above all under pytest -n

import json  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the quick brown fox jumps over lazy dogs and counts to ten while seven small cats watch from a green hill".split()
)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer trained here: 400 entries, <|im_end|> as EOS, a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rng = random.Random(0)
    backend.train_from_iterator([sentence(rng, 12) for _ in range(200)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer) -> str:
    """Folder of a random two-layer Llama (hidden 32, tied embeddings, 4 query and 2 key heads) and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_rows() -> list[dict]:
    """60 two-turn conversations of differing lengths."""
    rng = random.Random(1)
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(rng, rng.randint(2, 12))},
                {"role": "assistant", "content": sentence(rng, rng.randint(1, 20))},
            ]
        }
        for _ in range(60)
    ]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory, chat_rows) -> str:
    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows), encoding="utf-8")
    return str(path)
