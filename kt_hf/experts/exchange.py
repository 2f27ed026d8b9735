"""A layer whose experts are divided among ranks: each computes its own experts for the tokens of all.

Forward: every rank gets the tokens of all ranks, computes them with the experts it owns, and sends each rank its rows;
these are summed in fp32, in the order of the ranks, so that a run repeats its bits. Backward is the transpose: every
rank gets the gradients of all outputs, and the gradients of the inputs are summed like the outputs. A rank keeps its
own inputs alone: those of the others come once more with the gradients, which is less than to hold N times as much of
every layer. In each of the four exchanges the ranks compare where they are, and a rank that has failed says so there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import KTAMXConfigError, KTAMXForwardError
from ..ranks import Kind, Place, Ranks, Share
from .lora_tensors import optimizer_steps
from .tickets import in_backward

# The layers of this process, of whatever models, whose experts are divided among ranks.
DIVIDED: weakref.WeakSet[Any] = weakref.WeakSet()
_NUMBER = 40  # bits of a header's last number that are for tokens; the others are for an exchange that is known
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Gathered:
    """The inputs of all owners, in rank order: S = sum of `lengths` tokens.

    Attributes:
        x: [S, H], as the ranks' models gave it.
        ids: [S, K] int64, counted from this rank's first expert; those of other ranks' experts are outside [0, E/N).
        weights: [S, K] fp32.
        lengths: Tokens of each rank.
        number: Of this exchange, among those of the layer: the same on all ranks.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    lengths: list[int]
    number: int


class LayerExchange:
    """What a layer exchanges with its counterparts on the other ranks.

    Args:
        ranks: The processes.
        share: The experts that this rank owns.
        layer_idx: Index of the layer in the model.
        label: Its full name, for messages.

    Attributes:
        unaveraged: Whether gradients of owned LoRA are of this host's tokens alone, where other hosts have the same
            experts.
    """

    def __init__(self, ranks: Ranks, share: Share, layer_idx: int, label: str) -> None:
        self.ranks = ranks
        self.share = share
        self.layer_idx = layer_idx
        self.label = label
        self.unaveraged = False
        self._gatherings = 0
        self._checked: set[bool] = set()

    @contextlib.contextmanager
    def telling(self, kind: Kind) -> Iterator[None]:
        """Tell the other ranks, which wait in the exchange of this kind or will, of an error that is raised inside."""
        try:
            yield
        except Exception as error:
            self.ranks.agree(self._place(kind), failure=error)
            raise

    def gather(
        self, x: Tensor, ids: Tensor, weights: Tensor, gradients: bool, known: int = -1, sure: bool = False
    ) -> Gathered | None:  # fmt: skip
        """The inputs of all ranks' forwards; None if all ranks know what comes of theirs.

        Args:
            x: Hidden states of this rank, [T, H], any floating dtype and device.
            ids: [T, K] integers.
            weights: [T, K], floating.
            gradients: Whether a backward may come.
            known: The number of an earlier exchange, if this is a recompute whose output this rank has kept; else -1.
            sure: Whether the other ranks must know it too.

        Raises:
            KTAMXForwardError: The ranks are in different places, or one has failed or ended.
        """
        with self.telling(Kind.TOKENS):  # before it is known whether they are needed: later nobody could be told
            rows, layout = _packed(_inputs(x, ids, weights))
        place = self._place(Kind.TOKENS, gradients, x.dtype, ids.shape[1])
        number, later = (known + 1) << _NUMBER | x.shape[0], in_backward() and self.ranks.defers(place, x.device)
        if sure and later:
            self.ranks.agree_later(place, number, judge=functools.partial(self._all_know, known))
            said = [number]
        else:
            said = self.ranks.agree(place, number)
        if known >= 0 and all(number >> _NUMBER == known + 1 for number in said):  # not only alike on this rank
            if self.ranks.replicas.size > 1:  # hosts meet where a pass leaves the layers
                self.ranks.agree(self._place(Kind.OUTPUTS))
            return None
        lengths = [number & ((1 << _NUMBER) - 1) for number in said]
        self._gatherings += 1
        return self._gathered(_unpacked(self.ranks.rows_to_all(rows, lengths, place), layout), lengths)

    def gather_gradients(
        self, grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Gathered]:
        """The gradients of all ranks' outputs, [S, H], and once more the inputs they are of.

        Args:
            grad: Of this rank's output, [T, H], on x's device.
            x: As given to `gather`, like the two that follow.
            ids: [T, K] integers.
            weights: [T, K], floating.
            lengths: Tokens of each rank.

        Raises:
            KTAMXBackwardError: The ranks are in different places, or one has failed or ended.
        """
        place = self._place(Kind.GRADIENTS, dtype=grad.dtype)
        later = self.ranks.defers(place, grad.device)
        try:
            rows, layout = _packed([*_inputs(x, ids, weights), grad.detach()])
        except Exception as error:
            if later:
                like, _ = _packed([*_inputs(x[:0], ids[:0], weights[:0]), grad[:0].detach()])
                self.ranks.fail_to_all(like, lengths, place, error)
            else:
                self.ranks.agree(place, failure=error)
            raise
        if later:
            self.ranks.agree_later(place, grad.shape[0])
        else:
            self.ranks.agree(place, grad.shape[0])
        self.unaveraged = self.ranks.replicas.size > 1
        *inputs, grads = _unpacked(self.ranks.rows_to_all(rows, lengths, place), layout)
        return grads, self._gathered(inputs, list(lengths))

    def _all_know(self, known: int, said: Sequence[int]) -> None:
        """Refuse that another rank computes a recompute again whose output this one has kept."""
        if any(number >> _NUMBER != known + 1 for number in said):
            raise KTAMXForwardError(
                f"{self.label}: the ranks do not agree which forward is computed again for its backward. Set "
                "kt_expert_activations to recompute."
            )

    def _gathered(self, inputs: list[Tensor], lengths: list[int]) -> Gathered:
        ids, weights, x = inputs
        return Gathered(x, ids - self.share.lo, weights, lengths, self._gatherings)

    def summed(
        self, kind: Kind, compute: Callable[[], Sequence[Tensor]], like: Sequence[Tensor], lengths: Sequence[int]
    ) -> list[Tensor]:
        """Of each tensor [S, …], what all ranks have for this rank's tokens, summed: [T, …] in its dtype.

        Args:
            kind: What is exchanged. An error of `compute` is told to the other ranks.
            compute: Gives what this rank's experts have for the tokens of all ranks, on the device of `like`.
            like: Tensors whose dtypes and columns are those that `compute` gives.
            lengths: Tokens of each rank.

        Raises:
            KTAMXError: Another rank has failed, or has ended.
        """
        place, layout = self._place(kind), [_layout(tensor) for tensor in like]
        try:
            rows, layout = _packed(list(compute()))
        except Exception as error:
            rows = like[0].new_empty(0, sum(size for _, _, size in layout), dtype=torch.uint8)
            self.ranks.rows_to_owners(rows, lengths, place, failure=error)
            raise
        of_ranks = [_unpacked(part, layout) for part in self.ranks.rows_to_owners(rows, lengths, place)]
        return [_sum(addends) for addends in zip(*of_ranks, strict=True)]

    def check_owners(self, tensors: Sequence[Tensor]) -> None:
        """At the first step, with and without DDP: refuse LoRA that another owner holds too, to the bit.

        Something has broadcast it then, as DDP does with parameters that it was not told to leave alone. Replicas on
        other hosts must hold the same.

        Args:
            tensors: The A of each adapter and projection, [E/N, r, in].

        Raises:
            KTAMXConfigError: On every rank.
        """
        wrapped = ddp_module() is not None
        if wrapped in self._checked or not tensors:
            return
        self.ranks.agree(self._place(Kind.OWNERS, gradients=True))
        self._checked.add(wrapped)  # on all ranks or on none
        every = self.ranks.all_values(torch.tensor([_digest(tensor) for tensor in tensors], device="cpu")).tolist()
        owners = self.ranks.owners.size
        for second, its in enumerate(every):
            for first, others in enumerate(every[:second]):
                if (second - first) % owners == 0:
                    self._check_replicas(first, second, others == its)
                elif any(a == b != 0 for a, b in zip(others, its, strict=True)):
                    raise KTAMXConfigError(
                        f"{self.label}: ranks {first} and {second} hold the same LoRA, bit for bit, for different "
                        "experts: it was broadcast, as DistributedDataParallel does with parameters that it is not "
                        "told to leave alone. Do not replace `_ddp_params_and_buffers_to_ignore` of the model, give "
                        "DDP the model or its PeftModel itself, and do not broadcast LoRA of experts."
                    )

    def _check_replicas(self, first: int, second: int, same: bool) -> None:
        if not same:
            raise KTAMXConfigError(
                f"{self.label}: ranks {first} and {second}, of two hosts, hold different LoRA for the same experts. "
                "Start all ranks with one seed (torch.manual_seed, transformers.set_seed) before adapters are made, "
                "and load the same adapter on all hosts."
            )

    def joined_load(self, load: Tensor) -> Tensor:
        """How often each of the layer's experts was used, [E], from what this rank counted of its own, [E/N] int64."""
        self.ranks.agree(self._place(Kind.LOAD))
        hosts, owners = self.ranks.replicas.size, self.ranks.owners.size
        return self.ranks.all_values(load).view(hosts, owners, -1).sum(0).flatten()

    def joined_tokens(self, tokens: int) -> int:
        """Tokens of all hosts, from those of this one."""
        if self.ranks.replicas.size == 1:
            return tokens
        self.ranks.agree(self._place(Kind.LOAD))
        return int(self.ranks.all_values(torch.tensor([tokens], device="cpu"))[:: self.ranks.owners.size].sum())

    def _place(self, kind: Kind, gradients: bool = False, dtype: torch.dtype | None = None, columns: int = 0) -> Place:
        step = self.ranks.steps_since_first(optimizer_steps())
        synchronized = gradients and bool(getattr(ddp_module(), "require_backward_grad_sync", False))
        mode = Place.mode_of(gradients, synchronized, in_backward() and kind is Kind.TOKENS)
        number = _DTYPES.index(dtype) if dtype in _DTYPES else -1
        return Place(kind, self.layer_idx, step, mode, number, columns, self.label)


def meet_before_pass(ranks: Ranks, synchronized: bool) -> None:
    """Meet the other ranks before what is around a model exchanges something: DDP its buffers, FSDP2 its parameters.

    A rank with a forward more would wait there for the others, and they for it in an exchange of ours.

    Args:
        ranks: The processes, all of which begin a forward of the model.
        synchronized: Whether gradients are exchanged in the backward that follows.

    Raises:
        KTAMXForwardError: The ranks are in different places, or one has failed or ended.
    """
    gradients = torch.is_grad_enabled()
    mode = Place.mode_of(gradients, gradients and synchronized, False)
    ranks.agree(Place(Kind.PASS, step=ranks.steps_since_first(optimizer_steps()), mode=mode))


def ddp_module() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is under way; None outside of one."""
    get = getattr(DistributedDataParallel, "_get_active_ddp_module", None)  # private; without it nothing is known
    return None if get is None else get()


def _digest(tensor: Tensor) -> int:
    """A number that tells a tensor's values from others'; 0 where they are zero, as at the start of an adapter."""
    values = tensor.detach().flatten()[:4096].float().cpu()
    if not bool(values.any()):
        return 0
    return int.from_bytes(hashlib.sha256(values.numpy().tobytes()).digest()[:7], "little")


_Layout = tuple[torch.dtype, tuple[int, ...], int]  # a tensor's dtype, its shape but for the rows, bytes of a row


def _layout(tensor: Tensor) -> _Layout:
    return tensor.dtype, tuple(tensor.shape[1:]), tensor.element_size() * math.prod(tensor.shape[1:])


def _inputs(x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """A forward's inputs as they are sent: what has the widest values first."""
    return [ids.detach().to(torch.int64), weights.detach().to(torch.float32), x.detach()]


def _packed(tensors: list[Tensor]) -> tuple[Tensor, list[_Layout]]:
    """Tensors [T, …] of one device as rows of bytes, [T, B] uint8, and how to unpack them."""
    rows = [t.reshape(t.shape[0], math.prod(t.shape[1:])).contiguous().view(torch.uint8) for t in tensors]
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0], [_layout(t) for t in tensors]


def _unpacked(rows: Tensor, layout: list[_Layout]) -> list[Tensor]:
    columns = rows.split([size for _, _, size in layout], dim=1)
    return [
        _aligned(part.contiguous(), dtype).view(dtype).view(rows.shape[0], *shape)
        for part, (dtype, shape, _) in zip(columns, layout, strict=True)
    ]


def _aligned(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes that may be seen as values of a dtype: one row of several columns is contiguous wherever it begins."""
    return data.clone() if data.storage_offset() % dtype.itemsize else data


def _sum(addends: Sequence[Tensor]) -> Tensor:
    if len(addends) == 1:
        return addends[0]
    total = addends[0].float() if addends[0].dtype != torch.float64 else addends[0].clone()
    for addend in addends[1:]:
        total = total.add_(addend) if total is not addends[0] else total + addend
    return total.to(addends[0].dtype)
