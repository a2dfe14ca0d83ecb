"""A causal language model with a value head: one number a token, from the same hidden states as the log-probs.

Saved as what plain transformers (or peft) loads, with the value head in a safetensors file of its own beside it. A
folder that TRL saved, where the value head stands among the model's own weights, is read too.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.model.adapters import adapter_base, apply_adapter
from burnish.model.head import backbone, causal_lm, head_logits, read_head
from burnish.model.load import load_model

FILE = "value_head.safetensors"
_PREFIX = "v_head."


class ValueHead(nn.Module):
    """hidden [..., H] -> value [...], float32: dropout and a linear layer, as TRL has it and names it."""

    def __init__(self, size: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.summary = nn.Linear(size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.dropout(hidden.to(self.summary.weight.dtype)))[..., 0].float()


class AutoModelForCausalLMWithValueHead(nn.Module):
    """`pretrained_model`, a transformers causal LM or a PeftModel, and `v_head`.

    Made by from_pretrained, or from a model that is loaded already.
    summary_dropout_prob      dropout before the value head, in training mode
    v_head_init_strategy      None: torch's own; "normal": weights from N(0, v_head_initializer_range^2), bias 0
    """

    def __init__(
        self,
        pretrained_model: nn.Module,
        *,
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ):
        super().__init__()
        if v_head_init_strategy not in (None, "normal"):
            raise UserError(
                f"unknown v_head_init_strategy {v_head_init_strategy!r}", mend="Use normal, or leave it out"
            )
        weight = read_head(pretrained_model).weight
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(weight.shape[1], summary_dropout_prob).to(weight.device)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)

    @classmethod
    def from_pretrained(cls, name_or_model: Any, *, peft_config: Any = None, **given: Any) -> Any:
        """From a folder or hub id (of a model or an adapter, with or without a value head), or round a loaded model.

        peft_config  a peft configuration: adapters are trained, the model itself stays
        given        the value head's arguments (see the class), dtype or torch_dtype (float32 unless said),
                     trust_remote_code, and further arguments of transformers' from_pretrained

        A value head that isn't there starts new. Raises UserError as load_model does, and for a value head of another
        size.
        """
        names = ("summary_dropout_prob", "v_head_init_strategy", "v_head_initializer_range")
        own = {name: given.pop(name) for name in names if name in given}
        if isinstance(name_or_model, nn.Module):
            if given:
                raise UserError(
                    f"{next(iter(given))} is for loading, and the model is loaded already", where=cls.__name__
                )
            model, stored = name_or_model, {}
        else:
            model = _load(str(name_or_model), given)  # first: it says best what is wrong with a name
            stored = _stored_head(str(name_or_model))
        if peft_config is not None:
            model = apply_adapter(model, peft_config)
        whole = cls(model, **own)
        if stored:
            try:
                whole.v_head.load_state_dict(stored)
            except RuntimeError as error:
                raise UserError("its value head is not of this model's size", where=str(name_or_model)) from error
        return whole

    @property
    def is_peft_model(self) -> bool:
        return hasattr(self.pretrained_model, "peft_config")

    @property
    def config(self) -> Any:
        return self.pretrained_model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None, Tensor]:
        """(logits [B, T, V], None, values [B, T]), float32, of a padded batch: for scripts, not used in training."""
        hidden = backbone(self.pretrained_model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return head_logits(read_head(self.pretrained_model), hidden).float(), None, self.v_head(hidden)

    def generate(self, *args: Any, **given: Any) -> Any:
        """transformers' generate of the model."""
        return self.pretrained_model.generate(*args, **given)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **given: Any) -> None:
        """transformers' own, of the model: layers are recomputed in the backward."""
        self.pretrained_model.gradient_checkpointing_enable(**given)  # type: ignore[operator]

    def save_pretrained(self, folder: str | Path) -> None:
        """The model (or the adapter) as its own library loads it, and the value head in value_head.safetensors."""
        from safetensors.torch import save_file

        self.pretrained_model.save_pretrained(str(folder))  # type: ignore[operator]
        state = {_PREFIX + name: value.detach().cpu().contiguous() for name, value in self.v_head.state_dict().items()}
        save_file(state, str(Path(folder) / FILE), metadata={"format": "pt"})


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None) -> nn.Module:
    """A frozen copy of `model` in eval mode.

    num_shared_layers: the embeddings and this many of the first layers are shared with `model` instead of copied, and
    frozen in both. Raises UserError where the model has fewer.
    """
    shared: list[Tensor] = []
    if num_shared_layers:
        trunk = backbone(getattr(model, "pretrained_model", model))
        layers = max((m for m in trunk.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
        if num_shared_layers > len(layers):
            raise UserError(f"the model has {len(layers)} layers", where="num_shared_layers", mend="Name fewer")
        embeddings = causal_lm(getattr(model, "pretrained_model", model)).get_input_embeddings()  # type: ignore[operator]
        for module in (embeddings, *layers[:num_shared_layers]):
            shared += [parameter.requires_grad_(False) for parameter in module.parameters()]
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return twin.requires_grad_(False).eval()


def _load(name: str, given: dict) -> nn.Module:
    dtype = given.pop("dtype", given.pop("torch_dtype", "float32"))
    options = {"dtype": dtype, "trust_remote_code": given.pop("trust_remote_code", False)}
    base = adapter_base(name)
    model = load_model(base or name, model_init_kwargs=given, **options)
    if base is None:
        return model
    import peft

    return peft.PeftModel.from_pretrained(model, name, is_trainable=True)  # type: ignore[arg-type]


def _stored_head(name: str) -> dict[str, Tensor]:
    """The value head's weights that a folder or hub id holds, or nothing. Raises UserError for a pickled one."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        return cached_file(name, file, **quiet)

    path = find(FILE) or find("model.safetensors")
    if path is None and (index := find("model.safetensors.index.json")):
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        path = find(shards[key]) if (key := f"{_PREFIX}summary.weight") in shards else None
    if path is None:
        if Path(name, "adapter_config.json").is_file() and Path(name, "pytorch_model.bin").is_file():
            raise UserError(
                "its value head is a pickle (pytorch_model.bin), which can run code when it is read",
                where=name,
                mend=f"Save its v_head entries as {FILE}, or delete it to start with a new value head",
            )
        return {}
    with safe_open(path, framework="pt") as file:
        names = [key for key in file.keys() if key.startswith(_PREFIX)]  # noqa: SIM118  # no mapping: keys() only
        return {key.removeprefix(_PREFIX): file.get_tensor(key) for key in names}
