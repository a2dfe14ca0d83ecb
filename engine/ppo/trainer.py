"""PPO on a language model in TRL 0.8's form: the script generates and scores, `step` updates.

Queries and responses run packed, as every batch of burnish does. Log-probs and entropy come from the fused head and
values from the value head on the same hidden states; logits never exist (kl_penalty full makes them a chunk at a time).
The arithmetic is in burnish.objectives.rl.

Two differences from TRL, both on purpose. Losses are averages over the tokens of a whole update, so that
gradient_accumulation_steps changes the memory and nothing else. The model's own dropout is off, because with it the
policy that is updated is not the one whose log-probs were taken; the value head's stays.
"""

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.config.errors import UserError
from burnish.config.ppo import PPOConfig
from burnish.metrics import Log
from burnish.model.attention import register
from burnish.model.head import check_head, read_head
from burnish.model.isolation import check_isolation
from burnish.model.load import align, drop_dropout
from burnish.model.patch import patch
from burnish.model.sampling import respond
from burnish.model.value_head import AutoModelForCausalLMWithValueHead, create_reference_model
from burnish.objectives import rl
from burnish.parallel.world import started
from burnish.ppo.update import optimize, roll_out, statistics

_READ = {"input_ids", "attention_mask", "labels", "label", "query", "response"}  # columns the data loader keeps


class PPOTrainer:
    """TRL 0.8's constructor. Raises UserError for everything a user can mend.

    model        an AutoModelForCausalLMWithValueHead
    ref_model    the policy that KL is measured from, with or without a value head; None: `model` with its adapter off,
                 or a frozen copy of it that shares `num_shared_layers` layers
    tokenizer    gives generate its padding and end-of-sequence tokens; saved with the model
    dataset      rows for `dataloader` (columns input_ids, query, ...), batched by `data_collator`
    optimizer    default: Adam on what is trainable. lr_scheduler: advanced once a step
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: nn.Module | None = None,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
    ):
        self.config = config = config or PPOConfig()
        if not isinstance(config, PPOConfig):
            raise UserError(
                f"config is a {type(config).__name__}", where="PPOTrainer(config=...)", mend="Use PPOConfig"
            )
        if not isinstance(model, AutoModelForCausalLMWithValueHead):
            raise UserError(
                f"{type(model).__name__} has no value head",
                where="PPOTrainer(model=...)",
                mend="Load it with AutoModelForCausalLMWithValueHead.from_pretrained, which takes a loaded model too",
            )
        if started():
            raise UserError("PPO trains on one process", where="torchrun", mend="Start the script with python")
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.log = Log(None)
        if folder := config.project_kwargs.get("logging_dir"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.log.open(Path(folder))
        cuda = torch.cuda.is_available() and not config.accelerator_kwargs.get("cpu")
        self.current_device = torch.device("cuda" if cuda else "cpu")
        self.accelerator = SimpleNamespace(device=self.current_device, num_processes=1, is_main_process=True)
        self.model, self.tokenizer = self._prepare(model), tokenizer
        self.is_peft_model = config.is_peft_model = model.is_peft_model
        self.ref_model = self._reference(ref_model, num_shared_layers)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or torch.optim.Adam(trainable, lr=config.learning_rate)
        self.lr_scheduler = lr_scheduler
        adaptive = rl.AdaptiveKL(config.init_kl_coef, config.target, config.horizon)
        self.kl_ctl = adaptive if config.adap_kl_ctrl else rl.FixedKL(config.init_kl_coef)
        self.running = rl.RunningMoments()
        self.dataset = dataset
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self.steps, self._order = 0, np.random.default_rng(config.seed)

    def _prepare(self, model: Any) -> Any:
        """The model on the device, with burnish's attention and kernels, proved fit for packed rows and our head."""
        trunk = getattr(model, "pretrained_model", model)
        trunk.set_attn_implementation(register())
        if getattr(trunk, "hf_device_map", None) is None:
            model.to(self.current_device)
            align(model)
        drop_dropout(trunk)
        report = patch(trunk)
        self.log.say("kernels", "  ".join(f"{op} {count}" for op, count in report.patched.items()))
        for name, reason in report.skipped:
            self.log.say("kernels", f"not {name}: {reason}")
        if "linear_cross_entropy" not in report.patched:
            check_head(trunk, read_head(trunk))  # else patch has tried it
        check_isolation(trunk)
        return model.train()

    def _reference(self, given: Any, shared_layers: int | None) -> nn.Module:
        """The reference's transformers model: the policy's own where its adapter is switched off for it."""
        if given is self.model:
            raise UserError(
                "the reference model is the model that is trained",
                where="ref_model",
                mend="Leave it out: a copy is made",
            )
        if given is not None:
            return self._prepare(given).requires_grad_(False).eval()
        if self.is_peft_model:
            if shared_layers:
                raise UserError(
                    "the reference is the model with its adapter off, which shares every layer",
                    where="num_shared_layers",
                    mend="Leave it out",
                )
            self.log.say("reference", "the model with its adapter off")
            return self.model
        self.log.say(
            "reference", "a frozen copy of the model" + f", {shared_layers} layers shared" * bool(shared_layers)
        )
        return create_reference_model(self.model, shared_layers)

    # ---- data and responses

    def prepare_dataloader(self, dataset: Any, data_collator: Callable | None = None) -> torch.utils.data.DataLoader:
        """Shuffled batches of config.batch_size rows; a last one that is not full is left out."""
        names = getattr(dataset, "column_names", None)
        if self.config.remove_unused_columns and names and hasattr(dataset, "remove_columns"):
            unused = [name for name in names if name not in _READ]
            if unused:
                self.log.say("data", f"columns left out: {', '.join(unused)} (remove_unused_columns)")
                dataset = dataset.remove_columns(unused)
        return torch.utils.data.DataLoader(
            dataset, batch_size=self.config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True
        )

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to a query [Q], returned as [1, Q + R]; or to each of a list, as a list of [Q + R].

        length_sampler  gives max_new_tokens, drawn for each call
        batch_size      queries of a list at a time
        return_prompt   False: responses without their queries
        generate_ref_response  also the reference's: a pair (responses, reference's responses)

        A response ends with its end-of-sequence token where it has one. Further arguments are transformers' generate's.
        """
        single = isinstance(query_tensor, Tensor)
        queries: list[Tensor] = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        vocabulary = read_head(self.model.pretrained_model).weight.shape[0]
        for number, query in enumerate(queries):
            _check_ids(query, f"queries[{number}]", vocabulary)
        queries = [query.to(self.current_device).long() for query in queries]
        pad, eos = self._special(generation_kwargs)
        options = {key: value for key, value in generation_kwargs.items() if key != "pad_token_id"}
        if length_sampler is not None:
            options["max_new_tokens"] = length_sampler()

        def answers(model: Any) -> Any:
            found = respond(
                getattr(model, "pretrained_model", model), queries, pad, eos, batch_size=batch_size, **options
            )
            if return_prompt:
                found = [torch.cat([query, response]) for query, response in zip(queries, found, strict=True)]
            return found[0][None] if single else found

        ours = answers(self.model)
        if not generate_ref_response:
            return ours
        with self._as_reference():
            return ours, answers(self.ref_model)

    def _special(self, options: dict) -> tuple[int, set[int]]:
        """(padding token, end-of-sequence tokens) of a generation."""
        settings = getattr(self.model.pretrained_model, "generation_config", None)

        def first(name: str) -> Any:
            places = (options.get(name), getattr(self.tokenizer, name, None), getattr(settings, name, None))
            return next((value for value in places if value is not None), None)

        eos = first("eos_token_id")
        ends = set(eos) if isinstance(eos, (list, tuple)) else {eos} - {None}
        pad = first("pad_token_id")
        if pad is None:
            pad = min(ends, default=-1)
        if pad < 0:
            raise UserError(
                "no padding token", where="generate(pad_token_id=...)", mend="Give one, or a tokenizer that has"
            )
        return int(pad), ends

    def _as_reference(self) -> AbstractContextManager:
        """A context in which `ref_model` is the reference."""
        return self.model.pretrained_model.disable_adapter() if self.ref_model is self.model else nullcontext()

    # ---- a step

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor] | list[float] | Tensor,
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on config.batch_size rows: ppo_epochs passes over them. Returns statistics under TRL's names.

        queries, responses   [Q_b], [R_b] token ids, none empty
        scores               one number a row
        response_masks       [R_b], 0 for tokens that count nowhere (a tool's output, say)

        The statistics are floats (those of losses, policy and values: means over mini-batches and epochs) and numpy
        arrays (objective/kl_dist, ppo/policy/ratio, ...). Raises UserError for rows that don't fit.
        """
        config, began = self.config, time.perf_counter()
        masks = self._check(queries, responses, response_masks)
        raw, rows = self._check_scores(scores), list(zip(queries, responses, strict=True))
        times = [time.perf_counter()]
        reference = getattr(self.ref_model, "pretrained_model", self.ref_model)
        known = roll_out(self.model, reference, self._as_reference, rows, masks, config)
        times.append(time.perf_counter())
        coefficient = self.kl_ctl.value
        rewards, penalty = rl.token_rewards(known.kl, self._scaled(raw), known.mask, coefficient)
        times.append(time.perf_counter())
        if config.whiten_rewards:
            rewards = rl.whiten(rewards, known.mask, shift_mean=False)
        advantages, returns = rl.advantages(known.values, rewards, known.mask, config.gamma, config.lam)
        advantages = rl.whiten(advantages, known.mask)
        times.append(time.perf_counter())
        found = optimize(
            self.model, self.optimizer, rows, known, advantages, returns, config, self._order, self.log.warn
        )
        times.append(time.perf_counter())
        stats = statistics(known, raw, penalty, found, rows, coefficient)
        stats["ppo/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        self.kl_ctl.update(stats["objective/kl"], config.batch_size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.steps += 1
        times.append(time.perf_counter())
        names = ("forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats")
        stats |= {f"time/ppo/{name}": end - start for name, start, end in zip(names, times, times[1:], strict=False)}
        return stats | {"time/ppo/total": times[-1] - began}

    def _check(self, queries: Any, responses: Any, masks: Any) -> list[Tensor]:
        """The rows' masks [R_b], float32 of 0 and 1; UserError in one line for what doesn't fit."""
        size, vocabulary = self.config.batch_size, read_head(self.model.pretrained_model).weight.shape[0]
        given = {"queries": queries, "responses": responses, "response_masks": masks}
        for name, rows in given.items():
            if rows is None:
                continue
            if not isinstance(rows, (list, tuple)):
                raise UserError(f"{name} is a {type(rows).__name__}", where="step", mend="Give a list of tensors")
            if len(rows) != size:
                raise UserError(f"{len(rows)} {name}, and batch_size is {size}", where="step", mend="Give one a row")
        for name in ("queries", "responses"):
            for number, row in enumerate(given[name]):
                _check_ids(row, f"{name}[{number}]", vocabulary)
        if masks is None:
            masks = [torch.ones(len(row)) for row in responses]
        for number, (mask, row) in enumerate(zip(masks, responses, strict=True)):
            if not isinstance(mask, Tensor) or mask.shape != row.shape or not mask.bool().any():
                raise UserError(
                    f"no mask for a response of {len(row)} tokens",
                    where=f"response_masks[{number}]",
                    mend="Give a tensor with one entry a token, and at least one that is not 0",
                )
        masks = [mask.bool().float().to(self.current_device) for mask in masks]
        if sum(int(mask.sum()) for mask in masks) < 2:
            raise UserError(
                "one token in all has no advantage over others", where="step", mend="Give longer responses, or more"
            )
        return masks

    def _check_scores(self, scores: Any) -> Tensor:
        """[B] float32 on the device; UserError in one line for anything but one finite number a row."""
        numbers = [torch.as_tensor(score).detach().float().cpu().reshape(-1) for score in scores]
        if len(numbers) != self.config.batch_size:
            raise UserError(
                f"{len(numbers)} scores, and batch_size is {self.config.batch_size}",
                where="step",
                mend="Give one a row",
            )
        for number, score in enumerate(numbers):
            if len(score) != 1 or not torch.isfinite(score).all():
                raise UserError(
                    f"{score.tolist()} is no finite number", where=f"scores[{number}]", mend="Give one number a row"
                )
        return torch.cat(numbers).to(self.current_device)

    def _scaled(self, scores: Tensor) -> Tensor:
        """The scores as use_score_scaling, use_score_norm and score_clip have them."""
        if self.config.use_score_scaling:
            self.running.update(scores)
            mean = self.running.mean if self.config.use_score_norm else 0.0
            scores = (scores - mean) / (self.running.std + torch.finfo(torch.float32).eps)
        limit = self.config.score_clip
        return scores if limit is None else scores.clamp(-limit, limit)

    # ---- out

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: list[Tensor] | list[float],
        columns_to_log: tuple[str, ...] | list[str] = ("query", "response"),
    ) -> None:
        """One line on the console, and all of `stats` that is a number, with env/reward_mean, env/reward_std and the
        named columns of `batch`, into metrics.jsonl in project_kwargs["logging_dir"] where that is set."""
        missing = [name for name in columns_to_log if name not in batch]
        if missing:
            raise UserError(
                f"the batch has no column {', '.join(missing)}",
                where="log_stats(columns_to_log=...)",
                mend=f"It has {', '.join(batch)}",
            )
        numbers = np.array([float(reward) for reward in rewards])
        record = {name: value for name, value in stats.items() if isinstance(value, (int, float))}
        record |= {"env/reward_mean": numbers.mean().item(), "env/reward_std": numbers.std().item()}
        self.log.say(
            "ppo",
            f"{self.steps}  reward {record['env/reward_mean']:.4f}  kl {stats['objective/kl']:.4f}  "
            f"kl_coef {stats['objective/kl_coef']:.4f}  loss {stats['ppo/loss/total']:.4f}  "
            f"clipped {stats['ppo/policy/clipfrac']:.3f}  {stats['time/ppo/total']:.2f} s",
        )
        columns = {name: [_plain(value) for value in batch[name]] for name in columns_to_log}
        self.log.write({"step": self.steps} | record | {"rewards": numbers.tolist()} | columns)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Model (or adapter), value head and tokenizer, as from_pretrained reads them."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
        return Path(folder)


def _check_ids(row: Any, place: str, vocabulary: int) -> None:
    """Raises UserError unless `row` is a 1-D tensor of at least one token id."""
    if not isinstance(row, Tensor) or row.dim() != 1 or row.is_floating_point():
        shape = f" of {row.dtype} and shape {list(row.shape)}" if isinstance(row, Tensor) else ""
        raise UserError(f"a {type(row).__name__}{shape}", where=place, mend="Give a 1-D tensor of token ids")
    if not len(row):
        raise UserError("is empty", where=place, mend="Leave such rows out, and give others in their place")
    if int(row.min()) < 0 or int(row.max()) >= vocabulary:
        raise UserError(
            f"holds token ids from {int(row.min())} to {int(row.max())}, the model has {vocabulary}",
            where=place,
            mend="Use the model's own tokenizer",
        )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
