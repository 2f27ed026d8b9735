"""Whole layers of experts on their way to the GPU's memory and back, as the run leaves room for them.

A run begins with every expert streamed from host memory. `Controller` learns what its passes take, and layers whose
weights then stay on the GPU need no copies. The copy in host memory stays, so that memory can be given back at once.
Results are the same to the bit.

Where ranks divide the experts all of them meet when a pass begins, and one function of what all have said gives each
the same answer. What one rank does alone is to give memory back at once when it runs out of it; the others follow with
the next pass.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..backends.gpu.streamed import StreamedBackend
from ..ranks import Ranks
from ..shapes import ExpertShape
from ..system.memory import DeviceMemory
from .controller import Controller
from .passes import Seen
from .states import State, joint_pass, states_of_all
from .tiers import spread

logger = logging.getLogger(__name__)
GB = 10**9


class Memory(Protocol):
    """A device's memory, in bytes."""

    def allocated(self) -> int:
        """Taken by tensors now."""

    def peak(self) -> int:
        """The most that the allocator had taken since `reset_peak`."""

    def reset_peak(self) -> None:
        """The peak is what the allocator has taken now."""

    def trim(self) -> None:
        """Have the allocator give back what no tensor uses."""

    def limit(self) -> int:
        """What the allocator could take in all."""


class Promotion:
    """Moves the streamed layers of one model, at the begin of its passes.

    Args:
        device: The GPU.
        vocabulary: Logits of a token.
        memory: Of the device; None asks PyTorch.
        ranks: The processes that the layers' experts are divided among; None in a run of one.

    Attributes:
        fixed: Whether layers stay where they are from now on.
        resumed: Folder of the checkpoint that the run under way goes on from; None for a new run.
        controller: What was learned, and how many layers are held; None before the first pass.
    """

    def __init__(
        self, device: torch.device, vocabulary: int = 0, memory: Memory | None = None, ranks: Ranks | None = None
    ) -> None:
        self.fixed = False
        self.resumed: Path | None = None
        self.controller: Controller | None = None
        self._device, self._vocabulary = device, vocabulary
        self._memory, self._ranks = memory or DeviceMemory(device), ranks
        self._layers: dict[int, StreamedBackend] = {}
        self._order: list[StreamedBackend] = []
        self._rank = 0
        self._most: int | None = None  # layers that the device had room for, where it had none for more
        self._forgets = self._interrupted = False  # which the next pass begins with, on all ranks
        self._told = 0  # the most layers held so far, as the log says
        self._told_back = False  # whether it says that all were given back
        self._steps = StepTimes()
        _PROMOTIONS.add(self)
        watch_first_steps()

    def add(self, layer_idx: int, backend: StreamedBackend) -> None:
        """A layer that may be moved.

        Args:
            layer_idx: Its index among the model's layers.
            backend: Of the whole layer.
        """
        self._layers[layer_idx] = backend
        self._order, self.controller = [], None

    @property
    def held(self) -> list[int]:
        """Indices of the layers whose weights are on the GPU, ascending."""
        return sorted(i for i, layer in self._layers.items() if layer.weights.resident is not None)

    def forget(self) -> None:
        """Begin to learn anew: another optimizer, or another run."""
        self._most, self._forgets = None, True
        if self.controller is not None:
            self.controller.forget()

    def restore(self, held: Sequence[int], seen: Mapping[str, Seen]) -> None:
        """Go on as a checkpoint's run did: its layers on the GPU, as far as there is room, and what it had learned.

        Args:
            held: Indices of the layers whose weights were on the GPU.
            seen: What passes took, by kind.
        """
        if self._layers:
            self._forgets = False
            self._begun().seen.update(seen)
            self.hold(len(held))

    def release(self) -> None:
        """Give all memory back now."""
        for layer in self._layers.values():
            layer.weights.to_host()
        if self.controller is not None:
            self.controller.moved(0)

    def ran_out(self, label: str) -> bool:
        """The device has too little memory for a layer: give all back now, and hold fewer layers from the next pass on.

        Args:
            label: Of the layer, for the log.

        Returns:
            Whether any layer was held.
        """
        held = len(self.held)
        if not held:
            return False
        self.release()
        self._memory.trim()
        self._most, self._interrupted = held - max(1, held // 4), True
        logger.warning(
            "kt_hf: the GPU ran out of memory in %s: the %d layers of experts there are streamed again, and it is "
            "computed once more. From the next pass on %d layers at most are held.", label, held, self._most,
        )  # fmt: skip
        return True

    def hold(self, count: int) -> None:
        """Have the first `count` layers of the order on the GPU, and no others.

        What does not fit after all is left in host memory: fewer layers are held then.

        Args:
            count: How many.
        """
        order = self._ordered()
        for layer in order[count:]:
            layer.weights.to_host()
        self._memory.trim()  # so that layers do not lie in what passes have left, which then need more
        for held, layer in enumerate(order[:count]):
            try:
                layer.weights.to_gpu(self._device)
            except torch.OutOfMemoryError:
                self._most = max(0, held - 1)  # and some room for what else is allocated
                logger.info("kt_hf: the GPU has room for %d layers of experts, not for %d.", self._most, count)
                self.hold(self._most)
                return
        if self.controller is not None:
            self.controller.moved(count)

    def begins(self, layer_idx: int, tokens: int, gradients: bool, training: bool, optimizer_steps: int) -> None:
        """A layer's forward begins, and with the first layer a pass of the model.

        Args:
            layer_idx: Of the layer.
            tokens: Of the forward.
            gradients: Whether a backward may follow.
            training: Whether the layer is in training mode.
            optimizer_steps: Of any optimizer so far.
        """
        if self.fixed or not self._layers or layer_idx != min(self._layers):
            return
        rank = self._layers[layer_idx].rank
        if rank and self._rank and rank != self._rank:  # another adapter; without any it may be DPO's reference
            self.forget()
        self._rank = rank or self._rank
        states = states_of_all(self._ranks, layer_idx, self._state(tokens, gradients, training, optimizer_steps))
        if not all(state.is_turn for state in states):
            self.release()  # another model's passes take memory that this one's cannot tell from its own
            self.forget()
            return
        controller = self._begun()
        if any(state.forgets for state in states):
            controller.forget()
            self._most, states = None, [state._replace(most=-1) for state in states]
        if any(state.interrupted for state in states):
            controller.interrupted()
        self._forgets = self._interrupted = False
        if training:
            self._steps.begins(optimizer_steps, len(self.held))
        owners = 1 if self._ranks is None else self._ranks.owners.size
        count, fresh = controller.begins(joint_pass(states, owners), *(state.reading for state in states))
        if count != len(self.held):
            self.hold(count)
            self._tell(self._memory.limit())
        if fresh:
            if count == 0:
                self._memory.trim()
            self._memory.reset_peak()

    def _state(self, tokens: int, gradients: bool, training: bool, optimizer_steps: int) -> State:
        """This rank as a pass begins."""
        memory, most = self._memory, -1 if self._most is None else self._most
        return State(
            tokens, gradients, training, self._is_turn(), self._forgets, self._interrupted, memory.allocated(),
            memory.peak(), memory.limit(), optimizer_steps, len(self.held), most,
        )  # fmt: skip

    def _is_turn(self) -> bool:
        """Whether the pass before on this device was this model's, or the first."""
        before = _latest.get(self._device)
        other = before() if before is not None else None
        _latest[self._device] = weakref.ref(self)
        return other is None or other is self

    def _begun(self) -> Controller:
        if self.controller is None:
            order = self._ordered()
            sizes = [layer.weights.nbytes for layer in order]
            self.controller = Controller(sizes, self._vocabulary, max(work_bytes(layer.shape) for layer in order))
        return self.controller

    def _ordered(self) -> list[StreamedBackend]:
        """The layers in the order in which they come to the GPU: those of any begin of it are spread evenly."""
        if not self._order:
            by_index = [self._layers[i] for i in sorted(self._layers)]
            self._order = [by_index[i] for i in spread(len(by_index), len(by_index))]
        return self._order

    def _tell(self, limit: int) -> None:
        """Log what changed: layers that come, and those that go for the first time. Of several ranks the first does."""
        if self._ranks is not None and self._ranks.rank:
            return
        held, total = len(self.held), len(self._layers)
        size = sum(layer.weights.nbytes for layer in self._ordered()[:held])
        news = held > self._told or (held == 0 and not self._told_back)
        level = logging.INFO if news else logging.DEBUG
        self._told, self._told_back = max(held, self._told), self._told_back or held == 0
        logger.log(
            level,
            "kt_hf: %d of %d layers of experts are on the GPU now (%.1f GB of %.1f), the others streamed to it.",
            held, total, size / GB, limit / GB,
        )  # fmt: skip


class StepTimes:
    """Seconds from one step of the optimizer to the next, and once in the log what layers on the GPU changed."""

    def __init__(self) -> None:
        self._streamed: float | None = None
        self._began: tuple[int, int, float] | None = None  # steps of the optimizer, layers held, when
        self._logged = False

    def begins(self, optimizer_steps: int, held: int) -> None:
        """A training pass begins.

        Args:
            optimizer_steps: Before it.
            held: Layers that were on the GPU until now.
        """
        if self._logged or (self._began and self._began[0] == optimizer_steps):
            return
        now, before = time.perf_counter(), self._began
        self._began = optimizer_steps, held, now
        if before is None or before[:2] != (optimizer_steps - 1, held):
            return
        if held == 0:
            self._streamed = now - before[2]
        elif self._streamed is not None:
            self._logged = True
            logger.info("kt_hf: a step takes %.3g s with them, %.3g s before.", now - before[2], self._streamed)


def work_bytes(shape: ExpertShape) -> int:
    """Bytes of a token that a layer on the GPU takes at most while its backward is computed.

    Its K rows, in bf16: three of the hidden size (input, gradient, gradient of the input), nine of the intermediate
    size (gate and up, their gradients, and what lies between), and as much again for copies.

    Args:
        shape: Of the layer.
    """
    return 2 * 2 * shape.top_k * (3 * shape.hidden_size + 9 * shape.intermediate_size)


_PROMOTIONS: weakref.WeakSet[Promotion] = weakref.WeakSet()
_latest: dict[torch.device, weakref.ref[Promotion]] = {}  # whose pass it was that began last
_stepped: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_first_steps() -> None:
    """Have layers give their memory back before the first step of any optimizer, which makes its state."""
    if getattr(watch_first_steps, "handle", None) is None:
        watch_first_steps.handle = register_optimizer_step_pre_hook(_before_step)  # type: ignore[attr-defined]


def _before_step(optimizer: Any, *_: Any) -> None:
    if optimizer in _stepped:
        return
    _stepped.add(optimizer)
    if optimizer.state:  # a checkpoint's: it is there already
        return
    for promotion in _PROMOTIONS:
        if promotion.held and not promotion.fixed:
            promotion.release()
            promotion.forget()
