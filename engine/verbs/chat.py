"""`burnish chat RUN`: talk to what a run left, streaming; with the base model's answer beside it where asked for."""

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.model.adapters import adapter_base, load_adapter
from burnish.model.load import load_model, load_tokenizer
from burnish.verbs.runfiles import read_run

HELLO = "an empty line starts a new conversation, Ctrl-D ends"


class Talker:
    """A model with its tokenizer and the conversation so far."""

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, without: Any = nullcontext):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.without = without  # () -> context in which the model answers: an adapter switched off, or nothing
        self.turns: list[dict[str, str]] = []

    def answer(self, text: str, max_new_tokens: int, temperature: float) -> str:
        """The reply to `text` after the turns so far, printed as it comes. Greedy at temperature 0."""
        from transformers import TextStreamer

        self.turns.append({"role": "user", "content": text})
        if self.tokenizer.chat_template:
            prompt = self.tokenizer.apply_chat_template(
                self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            prompt = self.tokenizer(text, return_tensors="pt")  # a base model goes on where the text ends
        prompt = prompt.to(self.model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with self.without(), torch.no_grad():
            made = self.model.generate(  # type: ignore[operator]
                **prompt,
                **sampling,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        reply = self.tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.turns.append({"role": "assistant", "content": reply})
        return reply


def talkers(folder: str, beside: bool) -> list[Talker]:
    """The run's model, and with `beside` its base: an adapter's by switching it off, else the model it started from.

    Raises UserError where the folder holds neither, or doesn't say what the base was.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = adapter_base(folder), load_tokenizer(folder)
    if base is not None:
        model = load_adapter(load_model(base, dtype="auto", device=device, attn="sdpa"), folder).eval()
        tuned = Talker("tuned", model, tokenizer)
        return [Talker("base", model, tokenizer, model.disable_adapter), tuned] if beside else [tuned]
    tuned = Talker("tuned", load_model(folder, dtype="auto", device=device, attn="sdpa").eval(), tokenizer)
    if not beside:
        return [tuned]
    name = read_run(folder).config.get("model_name_or_path", (None, ""))[0]
    if not name:
        raise UserError("config.yaml names no base model", where=folder, mend="Leave out base=true")
    network = load_model(str(name), dtype="auto", device=device, attn="sdpa").eval()
    return [Talker("base", network, load_tokenizer(str(name))), tuned]


def chat(folder: str, words: list[str], lines: Iterable[str] | None = None) -> None:
    """Read questions from `lines` (the terminal) and answer each. Words: base=true, max_new_tokens=N, temperature=T."""
    settings = _settings(words)
    if not Path(folder).is_dir():
        raise UserError("no such folder", where=folder, mend="Name the output_dir of a run")
    people = talkers(folder, settings["base"])
    print(HELLO)
    for line in _typed() if lines is None else lines:
        question = line.strip()
        if not question:
            for person in people:
                person.turns = []
            continue
        for person in people:
            if len(people) > 1:
                print(f"[{person.name}]")
            person.answer(question, settings["max_new_tokens"], settings["temperature"])


def _typed() -> Iterable[str]:
    """What is typed, or piped in; a prompt where it is typed."""
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return


def _settings(words: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"base": False, "max_new_tokens": 512, "temperature": 0.0}
    read: dict[str, Callable[[str], Any]] = {
        "base": lambda text: {"true": True, "false": False}[text],
        "max_new_tokens": int,
        "temperature": float,
    }
    for word in words:
        name, _, text = word.partition("=")
        try:
            settings[name] = read[name](text)
        except (KeyError, ValueError):
            raise UserError(
                f"{word!r} is not understood",
                where="command line",
                mend="Words: base=true, max_new_tokens=512, temperature=0",
            ) from None
    if settings["max_new_tokens"] < 1 or settings["temperature"] < 0:
        raise UserError("max_new_tokens and temperature can't be negative", where="command line")
    return settings
