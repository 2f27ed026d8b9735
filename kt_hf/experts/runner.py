"""The runner of an expert layer, which keeps the tickets between a forward and its backward.

An operator keeps one saved forward, and any later forward or change of LoRA on it spoils that one. So each forward that
may see a backward gets a ticket: the saved forward, and the LoRA values it was computed with. Backward uses the saved
forward if nothing has happened since; else it puts the ticket's LoRA values back, computes the forward again from the
inputs autograd saved, and goes on. Any order of forwards, LoRA changes and backwards is right; the usual one is fast.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from ..backends import CALL_LOCK, ExpertsBackend, Gradients, Resumable, SavedForward
from ..backends.finite_checks import DeferredChecks
from ..backends.transfer import to_device, to_host, wait_for
from ..errors import KTAMXBackwardError
from ..system.threads import quiet_torch
from .input_checks import prepared
from .lora_tensors import LoraTensors
from .result_checks import (
    CheckedGradients,
    arrived_gradient,
    check_gpu_gradients,
    check_output,
    checked,
    gradient_error,
    lora_gradients,
)
from .tickets import Known, LoraValues, Recomputes, Retained, Ticket, graph_is_kept, in_backward
from .token_counts import TokenCounts

Result = TypeVar("Result")
Check = Callable[[Gradients], CheckedGradients]  # `checked` with the layer's device


class ExpertsRunner:
    """Calls one layer's backend in any order and keeps the tickets.

    Args:
        backend: What computes.
        label: The layer's name, for messages.
        retain: Whether a first forward is kept for a recompute in backward (`kt_expert_activations: retain`).
        checks: Where results on a GPU are left to be checked, for all layers of the model.
        make_room: Frees memory of a GPU that has run out of it, given the label; returns whether there was any to free.

    Attributes:
        load: How many tokens gradients were computed for, and by which experts.
    """

    def __init__(
        self,
        backend: ExpertsBackend,
        label: str,
        retain: bool,
        checks: DeferredChecks,
        make_room: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.backend = backend
        self._make_room = make_room
        self.label = label
        self.retain = retain
        self.checks = checks
        self._values = LoraValues(None)
        self._recomputes = Recomputes(label, checks)
        self._loaded: torch.cuda.Event | None = None  # recorded after copies from host memory that `begin_load` began
        self._live: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
        self._latest: Ticket | None = None
        self.load = TokenCounts(backend.shape.num_experts, backend.device)

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        """No autocast, and no more threads of PyTorch's than a backend that has its own leaves cores for."""
        most = self.backend.torch_threads
        fewer = most if most is not None and torch.get_num_threads() > most else None
        autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        return quiet_torch(fewer, autocast) if fewer or autocast else contextlib.nullcontext()

    @property
    def on_gpu(self) -> bool:
        """Whether the backend's inputs and results are on a GPU."""
        return self.backend.device.type != "cpu"

    @property
    def lora_key(self) -> Hashable:
        """The key of the LoRA values the backend holds."""
        return self._values.key

    def begin_load(self, key: Hashable, tensors: Callable[[], tuple[Tensor, ...]], from_host: bool = True) -> None:
        """Make the backend hold other LoRA values.

        Args:
            key: What `lora_key` is from now on.
            tensors: Gives the six LoRA tensors, scalings in B; or () for no LoRA.
            from_host: Whether they are made of tensors in host memory, which must stay as they are until `finish_load`:
                copies of them to a GPU may be under way.
        """
        with CALL_LOCK, torch.no_grad(), self._quiet():
            self.checks.settle(wait=True)
            self._swap(LoraValues(key), tensors())
            if self.on_gpu and from_host:
                self._loaded = torch.cuda.Event()
                self._loaded.record(torch.cuda.current_stream(self.backend.device))

    def finish_load(self) -> None:
        """Wait for the copies that `begin_load` has begun."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            wait_for(loaded)

    def _swap(self, values: LoraValues, tensors: tuple[Tensor, ...]) -> None:
        if len(self._values.tickets):
            self._values.kept = self.backend.lora_copy()
        self._values = LoraValues(object())  # if the copy is interrupted, no key fits and the next call copies again
        self.backend.set_lora(tensors)
        self._values = values

    @property
    def resumes(self) -> bool:
        """Whether backward needs nothing but inputs: of several ranks each keeps its own then, and not all tokens."""
        return isinstance(self.backend, Resumable)

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, save: bool, of_ranks: bool = False
    ) -> tuple[Tensor, Ticket | None]:
        """Compute the layer.

        Args:
            x: [T, H], as the model gave it: any floating dtype and device.
            ids: [T, K], as the model gave them: any integer dtype and device.
            weights: [T, K], as the model gave them: any floating dtype and device.
            save: Whether a backward may come.
            of_ranks: Whether these are the tokens of several ranks, each of which keeps its own (`resumes`).

        Returns:
            The output [T, H] in the backend's dtype and on x's device; and with `save` the ticket for the backward.

        Raises:
            KTAMXForwardError: The output is not finite.
        """
        with CALL_LOCK, torch.no_grad(), self._quiet():
            self.checks.settle()
            if save and not of_ranks:
                known = self.recognize(x, ids, weights)
                if known is not None and known.ticket.retained is not None:
                    # Another alias: this one becomes the output of a graph that leads back to the ticket.
                    return to_device(known.ticket.retained.output.detach(), x.device), known.ticket
            hidden, given = x.detach(), (ids.detach(), weights.detach())
            x, ids, weights = self._inputs(x, ids, weights)
            keep = save and not of_ranks and (self.retain or in_backward())
            out, saved = self._with_room(lambda: self._compute(x, ids, weights, keep or (save and of_ranks)))
            result = to_device(out, hidden.device)
            check_output(self.checks, self.label, out, result, hidden)
            if not save:
                return result, None
            ticket = Ticket(self._values, saved if keep else None, ids)
            if saved is not None and isinstance(self.backend, Resumable):
                ticket.rows = self.backend.known_rows(saved)
            if keep and self.retain:
                ticket.retained = Retained(x, *given, out)
            self._live[ticket.number] = ticket
            # A strong reference, for a recompute's own graph dies before the backward it was made for. The operators
            # hold one saved forward a layer anyway.
            self._latest = ticket if in_backward() else None
            return result, ticket

    def forget_recompute(self) -> None:
        """Let go what the latest recompute of checkpointing saved: its backward failed, and will not come."""
        self._latest = None

    def backward(
        self,
        ticket: Ticket,
        number: int,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        grad_output: Tensor,
        lora: LoraTensors | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of the forward of `ticket`, or of the recompute `number` that checkpointing made of it.

        Args:
            ticket: What the forward returned.
            number: Of the recompute's ticket; the forward's own without checkpointing.
            x: [T, H], as given to the forward.
            ids: [T, K], as given to the forward.
            weights: [T, K], as given to the forward.
            grad_output: [T, H], any floating dtype and device.
            lora: Whose parameters want gradients; None if they do not.

        Returns:
            Of x: [T, H]; of the weights: [T, K]; of `lora.parameters`, or [] without `lora`, in fp32 or the
            parameters' dtype. What the CPU computed is on x's device, unless x is empty or `grad_output` not finite.

        Raises:
            KTAMXBackwardError: A second backward without retain_graph, or a gradient that is not finite though the one
                that came in was.
        """
        with CALL_LOCK, torch.no_grad(), self._quiet():
            gradients = self._gradients(ticket, number, x, ids, weights, grad_output, lora)
            if lora is None:
                of_lora = []
            elif gradients.lora:
                of_lora = lora_gradients(self.checks, self.label, gradients, lora, self.on_gpu)
            else:  # nothing was computed
                of_lora = lora.constant_gradients(float("nan") if x.shape[0] else 0.0)
            return gradients.hidden_states, gradients.top_k_weights, of_lora

    def _gradients(
        self, ticket: Ticket, number: int, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor,
        lora: LoraTensors | None,
    ) -> Gradients:  # fmt: skip
        self.checks.settle()
        if number != ticket.number and self._latest is not None and self._latest.number == number:
            ticket, self._latest = self._latest, None
        if x.shape[0] == 0:
            return self._filled(0, ids.shape[1], 0.0)
        grad_output, finite = arrived_gradient(grad_output, self.backend.device, self.backend.dtype)
        # A gradient scaler's overflow: it skips the step when it sees it. On a GPU it goes through by itself.
        if not finite:
            return self._filled(x.shape[0], ids.shape[1], float("nan"))
        values = ticket.values
        if values is None:
            raise KTAMXBackwardError(f"{self.label}: a second backward needs retain_graph=True in the first.")
        if values is not self._values:
            assert values.kept is not None, "LoRA values leave the backend with a copy kept"  # _swap sees to that
            self._swap(values, values.kept)
        saved, check = ticket.saved, functools.partial(checked, home=x.device, lora=lora is not None)
        if saved is not None and self.backend.can_backward(saved):
            inputs = functools.partial(self._inputs, x, ids, weights)
            gradients = self._with_room(lambda: self._backward(saved, inputs, grad_output, check))
        else:
            again = functools.partial(self._recompute, grad=grad_output, check=check, rows=ticket.rows)
            gradients = self._with_room(lambda: again(*self._inputs(x, ids, weights)))
        if self.on_gpu:
            check_gpu_gradients(self.checks, self.label, gradients, grad_output, lora)
        self.load.add(ticket.ids)
        if not graph_is_kept():
            ticket.release()
        return gradients

    def _with_room(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns; it is called once more if a GPU lacks memory that can be freed."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self._make_room(self.label):
                raise
        return compute()  # not above: an exception that is handled keeps what its frames refer to

    def _backward(
        self,
        saved: SavedForward,
        inputs: Callable[[], tuple[Tensor, Tensor, Tensor]],
        grad_output: Tensor,
        check: Check,
    ) -> Gradients:
        if self.on_gpu:
            return self.backend.backward(saved, grad_output)
        result = check(self.backend.backward(saved, grad_output))
        if not result.hidden_finite:
            bad = ~torch.isfinite(result.gradients.hidden_states).all(dim=1).cpu()
            careful = self.backend.careful_backward(*inputs(), grad_output, bad)
            if careful is not None:
                result = check(careful)
        if not result.hidden_finite:
            raise gradient_error(self.label, "hidden_states")
        if not result.weights_finite:
            raise gradient_error(self.label, "top_k_weights")
        return result.gradients

    def _recompute(
        self, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor, check: Check, rows: int | list[int] | None = None
    ) -> Gradients:
        most = self.backend.max_len or max(x.shape[0], 1)
        if x.shape[0] <= most:
            if isinstance(self.backend, Resumable):
                saved: SavedForward | None = self.backend.saved_of(x, ids, weights, rows)
            else:
                _, saved = self.backend.forward(x, ids, weights, save=True)
            assert saved is not None
            return self._backward(saved, lambda: (x, ids, weights), grad, check)
        # Longer than the operators take: piece by piece, the LoRA gradients summed in fp32.
        parts: list[tuple[Tensor, Tensor]] = []
        lora: tuple[Tensor, ...] = ()
        for piece, grad_piece in zip(
            zip(x.split(most), ids.split(most), weights.split(most), strict=True), grad.split(most), strict=True
        ):
            part = self._recompute(*piece, grad_piece, check)
            parts.append((part.hidden_states, part.top_k_weights))
            lora = tuple(
                total.add_(new) for total, new in zip(lora, part.lora, strict=True)
            ) if lora else tuple(new.to(torch.float32, copy=True) for new in part.lora)  # fmt: skip
        return Gradients(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), lora, lora_is_free=True)

    def _compute(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        most = self.backend.max_len
        if x.shape[0] == 0:
            return x.new_zeros(x.shape), None
        if most is None or x.shape[0] <= most:
            return self.backend.forward(x, ids, weights, save)
        pieces = zip(x.split(most), ids.split(most), weights.split(most), strict=True)
        return torch.cat([self.backend.forward(*piece, save=False)[0] for piece in pieces]), None

    def _inputs(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The model's inputs as the backend takes them: shapes, dtypes and device. The CPU converts ids itself."""
        shape, dtype = self.backend.shape, self.backend.dtype
        if self.on_gpu:
            x, ids, weights = (to_device(t, self.backend.device) for t in prepared(x, ids, weights, shape, dtype))
            return x, ids, weights
        if x.is_cuda or ids.is_cuda or weights.is_cuda:
            x, ids, weights = to_host((x, ids, weights), (self.backend.dtype, ids.dtype, weights.dtype)).wait()
        return prepared(x, ids, weights, shape, dtype)

    def recognize(self, x: Tensor, ids: Tensor, weights: Tensor) -> Known | None:
        """The earlier forward of these inputs, if this is a recompute of it and its output was kept.

        Args:
            x: [T, H], as the model gave it, as are `ids` and `weights`.
            ids: [T, K].
            weights: [T, K].
        """
        if not (self.retain and in_backward()):
            return None
        with CALL_LOCK, torch.no_grad():
            x = x.detach().to(self.backend.dtype).contiguous()
            return self._recomputes.find(list(self._live.values()), x, ids, weights)

    def _filled(self, tokens: int, top_k: int, value: float) -> Gradients:
        hidden = torch.full((tokens, self.backend.shape.hidden_size), value, device=self.backend.device)
        return Gradients(hidden, torch.full((tokens, top_k), value, device=self.backend.device))
