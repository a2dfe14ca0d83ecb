"""What the planner's tests hold it against: small models that no fit saw, and two meters of bytes."""

import weakref
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.data.batch import Examples, collate
from burnish.memory.saved import Place
from burnish.memory.shape import describe
from burnish.model.attention import register
from burnish.model.patch import patch

MODELS = {
    "llama": {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2,
              "head_dim": 8, "tie_word_embeddings": False},
    "qwen3": {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3,
              "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3,
               "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3,
                    "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
}  # fmt: skip
VOCABULARY = 97
LORA = {
    "lora": {"target_modules": "all-linear", "lora_dropout": 0.0},
    "few": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.1},
}


def build(name, dtype=torch.float32, trained="full", layers=3, **sizes):
    """A patched random model in training mode; trained: "full" or a key of LORA."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    register()
    settings = {**MODELS[name], "num_hidden_layers": layers, "vocab_size": VOCABULARY, "pad_token_id": None, **sizes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), attn_implementation="burnish")
    model = model.to(dtype).train()
    if trained != "full":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **LORA[trained]))
    patch(model)
    return model


def place_of(model, shape=None) -> Place:
    """Bytes of an activation and of the adapters, as the model has them, on the CPU."""
    adapters = [t.itemsize for t in (shape or describe(model)).tensors if t.kind == "adapter"]
    return Place(next(model.parameters()).element_size(), adapters[0] if adapters else 0, cuda=False)


def packed(lengths):
    """One batch of random documents of these lengths; every token but each first is trained."""
    total = sum(lengths)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, total).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    examples = Examples(ids, np.ones(total, bool), offsets, np.arange(len(lengths)))
    return collate(examples, [(i, 0, n) for i, n in enumerate(lengths)])


class Saved:
    """Bytes of the unique storages that autograd saves inside, parameters and buffers left out."""

    def __init__(self, model):
        self._known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._seen = {}  # holds the storages, so that no address comes twice

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._seen[storage._cdata] = storage
        return tensor

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    @property
    def total(self):
        return sum(storage.nbytes() for storage in self._seen.values())


class Live(TorchDispatchMode):
    """Bytes of all storages alive that were made inside, operation by operation; `peak` since it was last set to 0."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self._refs = {}
        self._known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._refs or key in self._known:
            return

        def gone(_):
            self.now -= size
            del self._refs[key]

        self._refs[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def llama_8b(folder: Path) -> str:
    """A folder with the config.json of Llama-3.1-8B's sizes, and nothing else."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return str(folder)


class Products(TorchDispatchMode):
    """Operations of every product of matrices that runs inside, 2 a multiply-add; products with a row count nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            if min(a.shape[0], b.shape[1]) > 1:
                self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))
