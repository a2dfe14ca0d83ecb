"""Checkpointing of decoder layers: put on model instances in place of transformers' own, and taken back.

Layers that burnish.model.blocks matches run as one autograd.Function a segment of layers (checkpoint by construction,
see burnish.memory.tiles); every other layer runs through torch's checkpoint as transformers has it. Both keep their
input on the device or in the host's arena.

The way in is `_gradient_checkpointing_func`, which transformers' layers and burnish's own layer forward call in
training mode with the layer's forward, its keyword arguments bound, and the hidden states.
"""

import contextvars
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from burnish.config.errors import UserError
from burnish.kernels.once import differentiable_once
from burnish.memory import tiles
from burnish.memory.arena import Arena, Copies, Pass, rounded
from burnish.memory.attended import Attention, Call, groups
from burnish.memory.settings import Memory
from burnish.model import blocks, forwards

_FUNCTION = "_gradient_checkpointing_func"


@dataclass
class Installed:
    """What `install` did, and what the checkpoints of one model share.

    segments  the layers of each checkpoint, in the order in which they run
    by_hand   how many layers run as burnish's own Function
    others    {reason: layers} for those that run through transformers' checkpointing
    """

    memory: Memory
    segments: list[list[nn.Module]] = field(default_factory=list)
    by_hand: int = 0
    others: dict[str, int] = field(default_factory=dict)
    arena: Arena | None = None
    scratch: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)
    _pass: Pass | None = None
    _newest: int = -1

    def line(self) -> str:
        """What was installed, for the run's report."""
        memory, layers = self.memory, sum(map(len, self.segments))
        if not memory.checkpointing:
            return "no checkpointing: all activations are kept"
        if not layers:
            return "checkpointing is the model's own: no segments, kept attention, tiles or offloading"
        parts = [f"{layers} layers checkpointed"]
        parts += [f"segments of {memory.segment}"] if memory.segment > 1 and self.by_hand else []
        parts += ["attention kept"] if memory.keep_attention and self.by_hand else []
        parts += [f"tiles of {memory.tile} tokens"] if memory.tile and self.by_hand else []
        if memory.offload:
            parts.append(f"{self.offloaded} of {len(self.segments)} checkpoints on the host")
        for reason, count in self.others.items():
            asked = memory.segment > 1 or memory.keep_attention or memory.tile
            parts.append(
                f"{count} by transformers ({reason}){', without segments, kept attention and tiles' if asked else ''}"
            )
        return "  ".join(parts)

    def news(self) -> list[str]:
        """What turned out since the last call: how the host's memory was had, and what a setting couldn't do."""
        lines = list(self.notes)
        if self.arena is not None and self.arena.capacity:
            lines.append(f"{self.arena.capacity / 2**30:.2f} GiB on the host for checkpoints, {self.arena.note}")
        if self.arena is not None and self.arena.stayed:
            lines.append("some checkpoints stayed on the device: the host's share grows at the next step")
        fresh = [line for line in dict.fromkeys(lines) if line not in self._told]
        self._told.update(fresh)
        return fresh

    @property
    def offloaded(self) -> int:
        """How many checkpoints of a pass go to the host."""
        return max(0, len(self.segments) - self.memory.keep_on_device) if self.memory.offload else 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Forwards and backwards of one step: whatever happens inside, no checkpoint outlives it on the host."""
        try:
            yield
        except BaseException:
            self._pass = None
            if self.arena is not None:
                self.arena.abandon()
            raise
        self._pass = None
        if self.arena is not None:
            assert not self.arena.live, f"{len(self.arena.live)} checkpoints were never read"

    def pass_for(self, index: int, size: int) -> Pass | None:
        """The pass of checkpoint `index` (`size` bytes), which is made now; None where nothing goes to the host."""
        if self.arena is None:
            return None
        if self._pass is None or index <= self._newest:  # a new forward
            self._pass = None
            self._pass = self.arena.begin(self.offloaded, max(0, self.offloaded - index) * size)
        self._newest = index
        return self._pass

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def install(model: nn.Module, memory: Memory, *, copies: Copies | None = None) -> Installed:
    """Checkpoint the model's layers as `memory` says; it happens in training mode, where gradients are made.

    model   a transformers model, bare or inside a PeftModel, on its device; burnish.patch may come before or after
    copies  moves checkpoints to the host and back; default: the device's way

    Takes the place of an earlier installation and of transformers' own gradient checkpointing.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    uninstall(model)
    state = Installed(memory)
    if not memory.checkpointing:
        return state
    try:
        if hasattr(model, "activation_checkpointing_enable"):  # the newer of transformers' names
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    except ValueError as error:
        raise UserError(str(error), where="gradient_checkpointing", mend="Set gradient_checkpointing: false") from error
    _no_made_up_gradients(model)
    if memory.offload:
        state.arena = Arena(next(model.parameters()).device, copies)
    segment, before = None, ""
    for name, layer in model.named_modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        reason, parent = _reason(layer), name.rpartition(".")[0]
        if reason is None:
            state.by_hand += 1
        else:
            state.others[reason] = state.others.get(reason, 0) + 1
        full = segment is None or len(segment.layers) >= memory.segment or parent != before
        if segment is None or full or reason is not None or not segment.by_hand:
            segment = _Segment(state, len(state.segments), [], reason is None)
            state.segments.append(segment.layers)
        setattr(layer, _FUNCTION, partial(segment.call, len(segment.layers)))
        segment.layers.append(layer)
        before = parent
    return state


def uninstall(model: nn.Module) -> None:
    """Take checkpointing off the model, burnish's or transformers'; nothing where there is none."""
    _no_made_up_gradients(model)
    for module in model.modules():
        if vars(module).pop(_FUNCTION, None) is not None:
            module.gradient_checkpointing = False  # type: ignore[assignment]


def _no_made_up_gradients(model: nn.Module) -> None:
    """Undo enable_input_require_grads, which gives frozen embeddings' output a gradient of [T, H] that nobody reads.

    Checkpoints by an older way need an input with a gradient to have any; those made here don't.
    """
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()  # type: ignore[operator]


def _reason(layer: nn.Module) -> str | None:
    """Why this layer can't run by hand, or None."""
    if forwards.installed_op(layer) == "decoder_layer":
        return None  # patch has proved it
    if "forward" in vars(layer):
        return "their forward was replaced"
    reason = blocks.matches(layer)
    return None if reason is None else f"a {type(layer).__name__} {reason}"


@dataclass
class _Segment:
    """Layers that share one checkpoint. All but the last only note their call; the last runs them all."""

    state: Installed
    index: int
    layers: list[nn.Module]
    by_hand: bool
    _x: Tensor | None = None
    _calls: list[partial] = field(default_factory=list)

    def call(self, position: int, run: partial, *args: Any) -> Tensor:
        """Stands in for torch's checkpoint(run, *args) of the layer at `position`."""
        if not torch.is_grad_enabled():
            return run(*args)
        if not self.by_hand or len(args) != 1 or not self._answers(run.keywords):
            if len(self.layers) > 1 or self.by_hand:
                self.state.note("a layer was called in a way that only transformers' checkpointing answers")
            return self._by_transformers(run, *args)
        if position == 0:
            self._x, self._calls = args[0], []
        if args[0] is not self._x or len(self._calls) != position:
            raise UserError(
                "something changes the hidden states between the layers of one checkpoint",
                where="checkpoint_segment",
                mend="Set checkpoint_segment: 1",
            )
        self._calls.append(run)
        if position < len(self.layers) - 1:
            return args[0]
        x, calls, self._x, self._calls = self._x, self._calls, None, []
        return self._run(x, calls)

    def _answers(self, call: dict) -> bool:
        """Whether all layers of the segment can run by hand now: no hooks that would be passed by."""
        return all(
            forwards.answers(layer, call) and not any(p._backward_hooks for p in layer.parameters())
            for layer in self.layers
        )

    def _run(self, x: Tensor, calls: list[partial]) -> Tensor:
        parameters = [p for layer in self.layers for p in tiles.trained(layer)]
        if not x.requires_grad and not parameters:
            for run in calls:
                x = run(x)
            return x
        packed = all("cu_seq_lens_q" in run.keywords for run in calls)
        attentions: list[Attention | None] = [None for _ in calls]
        if self.state.memory.keep_attention and packed:
            tile, pairs = self.state.memory.tile, zip(self.layers, calls, strict=True)
            attentions = [Attention(groups(layer, x, run.keywords, tile)) for layer, run in pairs]
        size = rounded(x.numel() * x.element_size())
        size += sum(a.size(layer, x) for a, layer in zip(attentions, self.layers, strict=True) if a is not None)
        pass_ = self.state.pass_for(self.index, size)
        work = _Work(self.state, self.index, self.layers, [run.keywords for run in calls], attentions, pass_)
        return _Checkpoint.apply(x, work, *parameters)

    def _by_transformers(self, run: partial, *args: Any) -> Any:
        """torch's checkpoint; the hidden states that it keeps go to the host."""
        x = args[0]
        pass_ = None
        if len(self.layers) == 1:  # a segment's layers would all be the same checkpoint
            pass_ = self.state.pass_for(self.index, rounded(x.numel() * x.element_size()))
        if pass_ is None:
            return checkpoint(run, *args, use_reentrant=False)

        def pack(tensor: Tensor) -> Tensor | list[Tensor]:
            if tensor.data_ptr() != x.data_ptr() or tensor.shape != x.shape:
                return tensor  # another argument; torch 2.11 saves an empty tensor of its own too
            return [] if pass_.put(self.index, tensor) else [tensor]

        def unpack(kept: Tensor | list[Tensor]) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with pass_.reading(self.index) as found:  # also where it stayed: the one before starts to come
                return kept[0] if kept else found[0].clone()

        with saved_tensors_hooks(pack, unpack):
            return checkpoint(run, *args, use_reentrant=False)


@dataclass
class _Work:
    """A checkpoint between forward and backward: whose it is, how it was called, and what must be as it was then."""

    state: Installed
    index: int
    layers: list[nn.Module]
    calls: list[Call]
    attentions: list[Attention | None]
    pass_: Pass | None
    away: list[bool] = field(default_factory=list)  # of the tensors kept, in order: on the host
    generators: list[tuple[Tensor, ...]] = field(default_factory=list)  # before each layer, where dropout is
    autocast: dict = field(default_factory=dict)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # kernels.use: backward has a thread

    def put(self, tensor: Tensor) -> list[Tensor]:
        """Send a tensor to the host, or return it in a list to be kept here."""
        self.away.append(self.pass_ is not None and self.pass_.put(self.index, tensor))
        return [] if self.away[-1] else [tensor]

    def rewind(self, number: int) -> None:
        """Random generators as they were before layer `number`."""
        if self.generators:
            cpu, *cuda = self.generators[number]
            torch.set_rng_state(cpu)
            for state in cuda:
                torch.cuda.set_rng_state(state)  # of the current device: autograd makes it the forward's


def _draws(layer: nn.Module) -> bool:
    """Whether the layer's forward draws random numbers."""
    dropouts = (m for m in layer.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    attention = getattr(layer.self_attn, "attention_dropout", 0.0)
    return bool(attention) or any(m.p > 0 and m.training for m in dropouts)


class _Checkpoint(torch.autograd.Function):
    """Layers forward without a graph, keeping what `_Work` says; backward by `tiles.backward`, layer by layer.

    The trained parameters are inputs, so that each gets its gradient from autograd once, whatever waits for it there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: _Work, *parameters: Tensor) -> Tensor:
        tile, kind = work.state.memory.tile, x.device.type
        work.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": False,  # tiles are differentiated one by one: a cached cast is gone after the first
        }
        draws = any(map(_draws, work.layers))
        here = work.put(x)
        hidden = x
        for layer, call, attention in zip(work.layers, work.calls, work.attentions, strict=True):
            if draws:
                cuda = [torch.cuda.get_rng_state()] if x.is_cuda else []
                work.generators.append((torch.get_rng_state(), *cuda))
            hidden = tiles.forward(layer, hidden, call, tile, attention)
            if attention is not None:
                if attention.refused:
                    work.state.note(f"attention runs again in backward: {attention.refused}")
                for tensor in attention.kept:
                    here += work.put(tensor)
        for attention in work.attentions:
            if attention is not None:
                attention.kept = [None] * len(attention.kept)  # type: ignore[list-item]
        ctx.save_for_backward(*here, *parameters)  # the parameters for autograd to see that nobody changes them
        ctx.work = work
        return hidden

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.work.context.run(_backward, ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    work: _Work = ctx.work
    nothing: AbstractContextManager[list[Tensor]] = nullcontext([])
    reading = nothing if work.pass_ is None else work.pass_.reading(work.index)
    devices = [grad.device] if grad.is_cuda else []
    with (
        reading as there,
        torch.autocast(**work.autocast),
        torch.random.fork_rng(devices, enabled=bool(work.generators)),
    ):
        sources = iter(ctx.saved_tensors), iter(there)
        tensors = iter([next(sources[away]) for away in work.away])
        x = next(tensors)
        kept = [[] if a is None else [next(tensors) for _ in a.kept] for a in work.attentions]
        dx, grads = _layers_backward(work, x, kept, grad, ctx.needs_input_grad[0])
    return dx, None, *grads


def _layers_backward(
    work: _Work, x: Tensor, kept: list[list[Tensor]], grad: Tensor, wants_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the segment's input and of its trained parameters, in order."""
    tile = work.state.memory.tile
    attentions = [a if a is not None and not a.refused else None for a in work.attentions]
    inputs = [x]
    work.rewind(0)
    for layer, call, attention, tensors in zip(work.layers[:-1], work.calls, attentions, kept, strict=False):
        attended = None if attention is None else attention.output(tensors)
        inputs.append(tiles.again(layer, inputs[-1], call, tile, attended, bool(work.generators)))
    grads: list[Tensor | None] = []
    wanted: Tensor | None = grad
    for number in reversed(range(len(work.layers))):
        layer, source = work.layers[number], inputs.pop()
        below = wants_x or any(tiles.trained(each) for each in work.layers[:number])
        sums = tiles.Sums(layer, len(tiles.spans(x.shape[1], tile)) > 1, work.state.scratch)
        assert wanted is not None
        wanted = tiles.backward(
            layer, source, work.calls[number], wanted, attentions[number], kept[number], tile, below, sums,
            partial(work.rewind, number),
        )  # fmt: skip
        kept[number] = []
        grads = [*sums.results(), *grads]
        if wanted is None:
            grads = [None] * sum(len(tiles.trained(each)) for each in work.layers[:number]) + grads
            break
    return wanted, grads
