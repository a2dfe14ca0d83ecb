"""The keys of the preference objectives: DPO, CPO (with SimPO and AlphaPO), ORPO, KTO, BCO and reward modelling.

Names and defaults are TRL 1.16's, with the older ones that people still write: max_prompt_length, rpo_alpha,
reference_free, the adapter names. A key that the chosen loss would not read is an error, never ignored.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from burnish.config.fields import TrainConfig
from burnish.config.values import key

DPO_LOSSES = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "kto_pair",
)
_OLDER_LOSSES = {"aot_pair": "aot_unpaired"}
# Losses of the difference of two scores, in which f-DPO's normaliser cancels (and sft, which has no scores).
_F_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
_SMOOTHED = {"sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired"}
_SORTED = {"aot", "aot_unpaired"}


def _default(config: TrainConfig, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(config) if field.name == name)


@dataclass
class PreferenceConfig(TrainConfig):
    """What all objectives on completions share."""

    learning_rate: float = key(1e-6, "highest learning rate", low=0, common=True)
    disable_dropout: bool = key(True, "set every dropout of the model to 0")
    beta: float = key(0.1, "how strongly preferences pull; with a reference: how close to it", above=0, common=True)
    max_prompt_length: int | None = key(None, "longest prompt in tokens; of a longer one the end stays", low=1)
    max_completion_length: int | None = key(
        None, "longest completion in tokens; of a longer one the start stays", low=1
    )

    def _check_pairs(self) -> None:
        super()._check_pairs()
        if self.max_prompt_length and self.max_length and self.max_prompt_length >= self.max_length:
            self._fail(
                f"max_prompt_length {self.max_prompt_length} leaves no room for a completion in max_length "
                f"{self.max_length}",
                "max_prompt_length",
                "max_length",
                mend="Lower max_prompt_length or raise max_length",
            )

    def _only_with(self, name: str, used: bool, reader: str) -> None:
        """Refuse a value that nothing would read. (A value equal to the default says nothing, and files hold it.)"""
        if not used and getattr(self, name) != _default(self, name):
            self._fail(f"{name} is only read with {reader}", name, mend=f"Delete {name}")

    def _check_smoothing(self, losses: list[str], smoothed: set[str]) -> None:
        """label_smoothing is the share of swapped pairs: a half or more would say that the labels are wrong."""
        self._only_with("label_smoothing", bool(smoothed & {*losses}), f"loss_type {', '.join(sorted(smoothed))}")
        if self.label_smoothing >= 0.5:  # type: ignore[attr-defined]
            self._fail("label_smoothing must be below 0.5", "label_smoothing", mend="Use a value such as 0.1")


@dataclass
class ReferenceConfig(PreferenceConfig):
    """What the objectives with a reference policy share."""

    precompute_ref_log_probs: bool = key(
        False, "compute the reference's log-probs once, before training, and keep them on disk", common=True
    )
    precompute_ref_batch_size: int | None = key(
        None, "rows in a batch of that pass; default: as in training and evaluation", low=1
    )
    sync_ref_model: bool = key(False, "move the reference towards the policy every ref_model_sync_steps (TR-DPO)")
    ref_model_mixup_alpha: float = key(0.6, "share of the policy in the moved reference", above=0, high=1)
    ref_model_sync_steps: int = key(512, "steps between two moves of the reference", low=1)
    model_adapter_name: str | None = key(None, "adapter of the given peft model that is trained")
    ref_adapter_name: str | None = key(None, "adapter of the given peft model that is the reference")
    force_use_ref_model: bool = key(False, "take a given reference model even where adapters are trained")

    def _check_pairs(self) -> None:
        super()._check_pairs()
        self._only_with("precompute_ref_batch_size", self.precompute_ref_log_probs, "precompute_ref_log_probs: true")
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            self._only_with(name, self.sync_ref_model, "sync_ref_model: true")
        if self.sync_ref_model:
            for name in ("use_peft", "precompute_ref_log_probs", "ref_adapter_name"):
                if getattr(self, name):
                    self._fail(
                        f"sync_ref_model needs a reference model of its own, which {name} does without",
                        "sync_ref_model",
                        name,
                        mend="Keep one",
                    )
        if self.ref_adapter_name and self.ref_adapter_name == self.model_adapter_name:
            self._fail(
                f"policy and reference are both the adapter {self.ref_adapter_name}",
                "model_adapter_name",
                "ref_adapter_name",
                mend="Name another reference",
            )
        if self.force_use_ref_model and self.ref_adapter_name:
            self._fail(
                "force_use_ref_model and ref_adapter_name name two references",
                "force_use_ref_model",
                "ref_adapter_name",
                mend="Keep one",
            )


@dataclass
class DPOConfig(ReferenceConfig):
    """Direct preference optimisation, with all of TRL's losses. `loss_type` is always a list once it is checked."""

    loss_type: str = key("sigmoid", f"one or a list of: {' '.join(DPO_LOSSES)}", common=True, also=list[str])
    loss_weights: list[float] | None = key(None, "weight of each loss in the list; default: 1 each")
    label_smoothing: float = key(0.0, "share of pairs taken to be the wrong way round; exo_pair's epsilon", low=0)
    f_divergence_type: str = key(
        "reverse_kl",
        "divergence from the reference (f-DPO)",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = key(0.5, "alpha of alpha_divergence; 1 is reverse_kl")
    ld_alpha: float | None = key(
        None, "weight of a completion's tokens beyond the pair's shorter one (LD-DPO)", low=0, high=1
    )
    use_weighting: bool = key(False, "weigh pairs by how likely the policy is to write them (WPO)")
    rpo_alpha: float | None = key(None, "weight of the chosen completions' negative log-likelihood (RPO)", low=0)
    reference_free: bool = key(False, "a reference that finds everything equally likely: no second model")
    discopop_tau: float = key(0.05, "temperature of discopop's blend", above=0)

    def _check_pairs(self) -> None:
        super()._check_pairs()
        self._check_losses()
        self._check_smoothing([*self.loss_type], _SMOOTHED)
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            self._fail(
                "exo_pair needs a label_smoothing above 0",
                "loss_type",
                "label_smoothing",
                mend="Set label_smoothing: 0.001, as its paper does",
            )
        unfit = [name for name in self.loss_type if name not in _F_LOSSES]
        if self.f_divergence_type != "reverse_kl" and unfit:
            self._fail(
                f"{unfit[0]} is not a loss of the difference of two scores, so f_divergence_type "
                f"{self.f_divergence_type} has no meaning for it",
                "loss_type",
                "f_divergence_type",
                mend=f"Use f_divergence_type: reverse_kl, or losses of {', '.join(sorted(_F_LOSSES))}",
            )
        alpha = self.f_divergence_type == "alpha_divergence"
        self._only_with("f_alpha_divergence_coef", alpha, "f_divergence_type: alpha_divergence")
        self._only_with("discopop_tau", "discopop" in self.loss_type, "loss_type: discopop")
        unfit = [name for name in self.loss_type if name in _SORTED]
        if self.use_weighting and unfit:
            self._fail(
                f"{unfit[0]} sorts the pairs apart, so their weights have nothing to weigh",
                "use_weighting",
                "loss_type",
                mend="Keep one",
            )
        for name in ("precompute_ref_log_probs", "sync_ref_model", "ref_adapter_name", "force_use_ref_model"):
            if self.reference_free and getattr(self, name):
                self._fail(f"reference_free has no reference for {name}", "reference_free", name, mend="Keep one")

    def _check_losses(self) -> None:
        """Make loss_type a list of today's names, and see that the weights fit it."""
        given = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        self.loss_type = [_OLDER_LOSSES.get(name, name) for name in given]  # type: ignore[assignment]
        if not self.loss_type:
            self._fail("loss_type is empty", "loss_type", mend="Use sigmoid")
        for name in self.loss_type:
            if name not in DPO_LOSSES:
                close = difflib.get_close_matches(name, DPO_LOSSES, n=1)
                mend = f"Did you mean {close[0]}?" if close else f"Use one of {', '.join(DPO_LOSSES)}"
                self._fail(f"unknown loss_type {name}", "loss_type", mend=mend)
        if self.loss_weights is None:
            return
        if len(self.loss_weights) != len(self.loss_type):
            self._fail(
                f"{len(self.loss_weights)} loss_weights for {len(self.loss_type)} loss types",
                "loss_weights",
                "loss_type",
                mend="Give one weight for each",
            )
        if min(self.loss_weights) < 0 or max(self.loss_weights) == 0:
            self._fail("loss_weights must not be negative, nor all 0", "loss_weights")


@dataclass
class CPOConfig(PreferenceConfig):
    """Contrastive preference optimisation, SimPO and AlphaPO: no reference. alphapo is simpo with cpo_alpha 0."""

    loss_type: str = key(
        "sigmoid",
        "sigmoid, hinge: of summed log-probs; ipo, simpo, alphapo: of averaged ones",
        choices=("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
        common=True,
    )
    label_smoothing: float = key(0.0, "share of pairs taken to be the wrong way round", low=0)
    cpo_alpha: float = key(
        1.0, "weight of the chosen completions' negative log-likelihood; SimPO proper: 0", low=0, common=True
    )
    simpo_gamma: float = key(0.5, "margin that simpo and alphapo ask for between the two rewards")
    alpha: float = key(0.0, "shape of the reward (1 - p^-alpha) / alpha (AlphaPO); 0: log p")

    def _check_pairs(self) -> None:
        super()._check_pairs()
        self._check_smoothing([self.loss_type], {"sigmoid", "simpo", "alphapo"})
        self._only_with("simpo_gamma", self.loss_type in ("simpo", "alphapo"), "loss_type simpo or alphapo")
        if self.loss_type == "alphapo":
            if self.cpo_alpha and self.origins["cpo_alpha"] != "default":
                self._fail(
                    "alphapo has no likelihood term for cpo_alpha to weigh",
                    "loss_type",
                    "cpo_alpha",
                    mend="Delete cpo_alpha, or use loss_type: simpo",
                )
            self.cpo_alpha = 0.0


@dataclass
class ORPOConfig(PreferenceConfig):
    """Odds-ratio preference optimisation: the likelihood of the chosen and beta times an odds ratio. No reference."""


@dataclass
class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation, on single rated completions."""

    loss_type: str = key(
        "kto",
        "kto: against an estimate of the policy's divergence; apo_zero_unpaired: against 0",
        choices=("kto", "apo_zero_unpaired"),
        common=True,
    )
    desirable_weight: float = key(1.0, "weight of the losses of desirable completions", low=0, common=True)
    undesirable_weight: float = key(1.0, "weight of the losses of undesirable completions", low=0, common=True)

    def _check_pairs(self) -> None:
        super()._check_pairs()
        if self.desirable_weight == self.undesirable_weight == 0:
            self._fail("both weights are 0: nothing would be trained", "desirable_weight", "undesirable_weight")


@dataclass
class BCOConfig(ReferenceConfig):
    """Binary classifier optimisation, on single rated completions: rewards against their running mean."""


@dataclass
class RewardConfig(TrainConfig):
    """Reward modelling: one score a sequence, chosen above rejected (Bradley-Terry)."""

    learning_rate: float = key(1e-4, "highest learning rate", low=0, common=True)
    disable_dropout: bool = key(True, "set every dropout of the model to 0")
    center_rewards_coefficient: float | None = key(
        None, "weight of (chosen + rejected)^2, which keeps scores around 0; 0.01 is a good one", low=0, common=True
    )
