"""The reference policy of DPO, KTO and BCO: whose log-probs they are, and the cache that makes them cost nothing.

A reference is a second model, the policy with its adapter switched off, a named adapter, or sums on disk under a
fingerprint of weights, data and settings. All go through the same head as the policy, so that a policy equal to its
reference has log-ratios of exactly 0.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.data.batch import Batch, Batches
from burnish.data.cache import default_dir
from burnish.logprobs import token_scores
from burnish.model.head import evaluating, read_head
from burnish.objectives.sequences import completion_sums, rated_and_mismatched
from burnish.parallel.shards import local, rest, whole
from burnish.parallel.world import any_of, total, world

_VERSION = 1  # of the sums on disk


class Reference:
    """batch -> sums of log-probs of its sequences under the reference, [S] float32, without gradient.

    model    the network that stands for it, the policy itself included
    standing_in  a context in which that network is the reference (its adapter off, say)
    name     for the report
    """

    def __init__(
        self, model: nn.Module, config: Any, standing_in: Callable[[], AbstractContextManager] = nullcontext, name=""
    ):
        self.model, self.name = model, name
        self._standing_in, self._ld_alpha = standing_in, getattr(config, "ld_alpha", None)

    def __call__(self, batch: Batch) -> Tensor:
        if batch.reference is not None:
            return batch.reference
        if batch.rated is not None and batch.mismatched is not None:  # in the parts that the policy runs, bit for bit
            return torch.cat([self._sums(part) for part in rated_and_mismatched(batch)])
        return self._sums(batch)

    def _sums(self, batch: Batch) -> Tensor:
        with torch.no_grad(), evaluating(self.model), self._standing_in():
            logps = token_scores(self.model, read_head(self.model), batch).logps
        return completion_sums(logps, batch, self._ld_alpha)

    def mix_in(self, policy: nn.Module, share: float) -> None:
        """Move towards the policy: (1 - share) * reference + share * policy (TR-DPO, arXiv 2404.09656)."""
        for network in (self.model, policy):
            rest(network)
        with torch.no_grad():
            for own, new in zip(self.model.parameters(), policy.parameters(), strict=True):
                local(own).lerp_(local(new).to(own.dtype), share)

    def fingerprint(self) -> str:
        """SHA-256 of the weights that the reference computes with."""
        digest = hashlib.sha256()
        with self._standing_in():
            for name, value in sorted(self.model.state_dict().items()):
                digest.update(name.encode())
                value = whole(value)
                digest.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def make_reference(config: Any, policy: nn.Module, given: nn.Module | None) -> Reference | None:
    """The reference that the configuration and the given model ask for; None where the objective needs none.

    given: a model of the user's, loaded and patched like the policy. Without one, and without adapters, it is the
    policy as it is now: a copy, or the policy itself where the sums are computed before training.
    """
    if getattr(config, "reference_free", False) or not hasattr(config, "precompute_ref_log_probs"):
        if given is not None:
            raise UserError("nothing would use the reference model", where="ref_model", mend="Leave it out")
        return None
    adapted = hasattr(policy, "peft_config")
    if given is policy:
        raise UserError(
            "the reference model is the model that is trained", where="ref_model", mend="Leave it out: a copy is made"
        )
    if config.sync_ref_model and adapted:
        raise UserError(
            "a reference can't follow a policy with adapters", where="sync_ref_model", mend="Train the whole model"
        )
    if config.ref_adapter_name:
        return _named_adapter(config, policy, adapted)
    if given is not None and adapted and not config.force_use_ref_model:
        raise UserError(
            "a reference model and adapters are both given",
            where="ref_model",
            mend="The base model without adapters is the reference: leave ref_model out, or set force_use_ref_model",
        )
    if given is not None:
        return Reference(given.requires_grad_(False).eval(), config, name="a model of its own")
    if adapted:
        return Reference(policy, config, policy.disable_adapter, "the model with its adapter off")  # type: ignore[arg-type]
    if config.precompute_ref_log_probs:
        return Reference(policy, config, name="the model before training")
    twin = copy.deepcopy(policy).requires_grad_(False).eval()
    return Reference(twin, config, name="a copy of the model")


def _named_adapter(config: Any, policy: Any, adapted: bool) -> Reference:
    if not adapted or config.ref_adapter_name not in policy.peft_config:
        raise UserError(
            f"the model has no adapter {config.ref_adapter_name}",
            where="ref_adapter_name",
            mend=f"It has {', '.join(policy.peft_config) if adapted else 'none'}",
        )
    own = config.model_adapter_name or policy.active_adapter

    @contextmanager
    def switched() -> Iterator[None]:
        trained = [p for p in policy.parameters() if p.requires_grad]
        policy.set_adapter(config.ref_adapter_name)
        try:
            yield
        finally:
            policy.set_adapter(own)  # which makes its parameters trainable and no others
            for parameter in trained:
                parameter.requires_grad_(True)

    return Reference(policy, config, switched, f"the adapter {config.ref_adapter_name}")


def cache_sums(reference: Reference, batches: Batches, config: Any, cache_dir: Path | None = None) -> str:
    """Give `batches` the reference's sums of all its rows, from disk or by one pass over them; returns what was done.

    They are kept in the cache folder under a fingerprint of the reference's weights, the tokens and the settings that
    change a sum, so that no run with other ones reads them.
    """
    parameter = next(reference.model.parameters())
    settings = {
        "version": _VERSION,
        "weights": reference.fingerprint(),
        "reference": reference.name,  # one model with its adapter on or off has the same weights
        "computed on": [str(parameter.device.type), str(parameter.dtype)],
        "ld_alpha": getattr(config, "ld_alpha", None),
        "kernels": config.kernels,
        "batches": batches.fingerprint(),
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    path = (cache_dir or default_dir()) / "reference" / f"{key}.npy"
    shape = (len(batches.examples), 1 + batches.mismatch)
    stored = np.load(path, allow_pickle=False) if path.is_file() else np.empty(0)
    if not any_of(stored.shape != shape or not np.isfinite(stored).any()):
        batches.reference = stored
        return f"log-probs of {shape[0]:,} sequences from {path}"
    batches.reference = _computed(reference, batches, config, shape)
    _write(path, batches.reference)
    return f"log-probs of {shape[0]:,} sequences computed, kept in {path}"


def _computed(reference: Reference, batches: Batches, config: Any, shape: tuple[int, int]) -> np.ndarray:
    """The sums [R, 1 or 2], NaN where there is none. Several processes take turns at the batches, each forward of one
    beside those of the others (where there is none left, of its last batch again)."""
    own, sums, known = world(), np.zeros(shape), np.zeros(shape)
    device = next(reference.model.parameters()).device
    turns = iter(_pass_over(batches, config))
    while window := list(itertools.islice(turns, own.shares)):
        batch = window[min(own.share, len(window) - 1)]
        values = reference(batch.to(device)).cpu().numpy()
        if own.share >= len(window):
            continue
        numbers = np.asarray(batch.examples)
        real = len(batch.rated) if batch.mismatched is not None and batch.rated is not None else len(numbers)
        place = numbers, np.arange(len(numbers)) // max(real, 1)
        sums[place], known[place] = values, 1.0
    sums, known = (total(torch.from_numpy(part)).numpy() for part in (sums, known))
    return np.where(known > 0, sums / np.maximum(known, 1.0), np.nan).astype(np.float32)


def _pass_over(batches: Batches, config: Any) -> Iterator[Batch]:
    """Every row once. With mismatched sequences in training's own micro-batches, which decide the mismatches."""
    if batches.mismatch:
        return batches.epoch(0)
    size = config.precompute_ref_batch_size or config.per_device_train_batch_size
    plain = dataclasses.replace(config, per_device_eval_batch_size=size)
    return Batches(batches.examples, plain, train=False).epoch(0)


def _write(path: Path, sums: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".npy")
    with os.fdopen(handle, "wb") as file:
        np.save(file, sums, allow_pickle=False)
    os.replace(aside, path)
