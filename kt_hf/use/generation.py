"""Answers of a model: token by token as they are generated, and stopped from outside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import KTAMXConfigError
from ..experts.layer import kt_layers
from ..system.threads import torch_threads
from .opening import Opened
from .row_linears import row_linears

Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token always; above it tokens are drawn.
        top_p: Drawn from the likeliest tokens that have this probability together.
        max_new_tokens: Tokens of an answer at most.
        seed: Of the random numbers, set before each answer; None leaves them as they are.

    Raises:
        KTAMXConfigError: A value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise KTAMXConfigError(f"--temperature {self.temperature}: it must lie between 0 (the likeliest) and 100.")
        if not 0 < self.top_p <= 1:
            raise KTAMXConfigError(f"--top-p {self.top_p}: it must be above 0, and 1 at most.")
        if self.max_new_tokens < 1:
            raise KTAMXConfigError(f"--max-new-tokens {self.max_new_tokens}: it must be 1 or more.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise KTAMXConfigError(f"--seed {self.seed}: it must lie between 0 and 4294967295.")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        if self.temperature == 0:  # None: a model's own settings of sampling would be warned of
            none = {"temperature": None, "top_p": None, "top_k": None}
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, **none}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, **drawn}


@dataclass
class Answerer:
    """Puts conversations to a model.

    Attributes:
        opened: The model.
        sampling: How tokens are chosen.
        thinking: `enable_thinking` of the chat template; None leaves it to the template.
    """

    opened: Opened
    sampling: Sampling
    thinking: bool | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    def inputs(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Token ids and attention mask of a conversation that asks for an answer, on the model's device.

        Raises:
            KTAMXConfigError: As `encode`.
        """
        encoded = encode(self.opened.tokenizer, self.opened.model.config, messages, self.thinking)
        return dict(encoded.to(self.opened.model.device))

    def stream(self, messages: Sequence[Message], adapter: bool = True) -> Iterator[str]:
        """The pieces of an answer as they are generated, by a thread of its own; `stop` ends it.

        Args:
            messages: The conversation so far; the last message is the user's.
            adapter: Whether the adapter answers, or the base model.
        """
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        inputs = self.inputs(messages)
        self._stopped.clear()
        streamer = TextIteratorStreamer(self.opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []
        ended = threading.Event()

        def generate() -> None:
            try:
                stopping = StoppingCriteriaList([self._is_stopped])
                self._generate(inputs, adapter, streamer=streamer, stopping_criteria=stopping)
            except BaseException as error:
                failures.append(error)
                streamer.end()
            finally:
                ended.set()

        thread = threading.Thread(target=generate, name="kt-hf answer", daemon=True)
        try:
            thread.start()
            yield from streamer
        finally:  # whoever stops listening, in `start` too, ends it: a thread that outlives Python aborts
            self._stopped.set()
            while not ended.wait(0.1) and thread in threading.enumerate():
                pass
        if failures:
            raise failures[0]

    def answer(self, messages: Sequence[Message], adapter: bool = True) -> str:
        """A whole answer, without the white space around it."""
        inputs = self.inputs(messages)
        output = self._generate(inputs, adapter)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(self.opened.tokenizer.decode(new, skip_special_tokens=True)).strip()

    def _generate(self, inputs: dict[str, Any], adapter: bool, **more: Any) -> Any:
        from transformers import set_seed

        if self.sampling.seed is not None:
            set_seed(self.sampling.seed)
        model = self.opened.model
        with (
            torch_threads(threads_beside(model)),
            row_linears(model),
            contextlib.nullcontext() if adapter else self.opened.without_adapter(),
        ):
            arguments = self.sampling.arguments()
            positions = positions_of(model.config)
            if positions is not None:
                arguments["max_new_tokens"] = min(arguments["max_new_tokens"], positions - inputs["input_ids"].shape[1])
            return model.generate(**inputs, **arguments, pad_token_id=self._pad(), **more)

    def _pad(self) -> int | None:
        tokenizer = self.opened.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return None if pad is None else int(pad)

    def _is_stopped(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), self._stopped.is_set(), dtype=torch.bool, device=ids.device)


def encode(tokenizer: Any, config: Any, messages: Sequence[Message], thinking: bool | None = None) -> Any:
    """Token ids and attention mask of a conversation that asks for an answer.

    Args:
        tokenizer: With a chat template.
        config: The model's configuration.
        messages: The conversation.
        thinking: `enable_thinking` of the chat template; None leaves it to the template.

    Raises:
        KTAMXConfigError: The chat template refuses the conversation, or no position of the model is left for an answer.
    """
    options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True, **options
        )
    except Exception as error:  # templates are programs of strangers
        words = " ".join(str(error).split()) or type(error).__name__
        raise KTAMXConfigError(f"The chat template refuses the conversation: {words}") from error
    length, positions = encoded["input_ids"].shape[1], positions_of(config)
    if positions is not None and length >= positions:
        raise KTAMXConfigError(
            f"The conversation has {length:,} tokens, and the model positions for {positions:,}, an answer's too: "
            "shorten it, or begin anew."
        )
    return encoded


def positions_of(config: Any) -> int | None:
    """How many tokens a model has positions for, at most; None where its configuration sets no bound.

    Args:
        config: Of the model. Where its positions are stretched (YaRN and the like) the stretched number counts.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    stretched = [positions]
    for values in (rope, *rope.values()):  # of all layers, or of each kind of them
        factor = values.get("factor") if isinstance(values, dict) else None
        if isinstance(factor, (int, float)):
            stretched.append(int((values.get("original_max_position_embeddings") or positions) * factor))
    return max(stretched)


def threads_beside(model: Any) -> int | None:
    """The number of PyTorch's threads while a model generates: as in training, a core is left to idle operators.

    Their workers spin between calls. On two cores a token takes two thirds of the time so.

    Args:
        model: A patched model, or a wrapper of one.

    Returns:
        Fewer threads than PyTorch has now; None where it may keep them: no operators, or the model is on a GPU.
    """
    import torch

    layers = kt_layers(model)
    most = layers[0].backend.torch_threads if layers else None
    on_cpu = next(model.parameters()).device.type == "cpu"
    return most if most is not None and on_cpu and most < torch.get_num_threads() else None
