"""A layer whose experts are divided among ranks: each computes its own experts for the tokens of all.

Forward: every rank gets the tokens of all ranks, computes them with the experts it owns, and sends each rank its rows;
these are summed in fp32, in one order, so that a run repeats its bits. Backward is the transpose: every
rank gets the gradients of all outputs, and the gradients of the inputs are summed like the outputs. A rank keeps its
own inputs alone: those of the others come once more with the gradients, which is less than to hold N times as much of
every layer. In each of the four exchanges the ranks compare where they are, and a rank that has failed says so there.

On GPUs no host waits for the others inside of a pass: a layer is taken to have as many tokens of each rank as the layer
where the pass entered, and is computed anew if the header, once it is looked at, says otherwise.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..backends.transfer import looking_first
from ..errors import KTAMXBackwardError, KTAMXConfigError
from ..ranks import Kind, Place, Ranks, Share, is_told
from .lora_tensors import digest, optimizer_steps
from .row_bytes import Layout, inputs_of, layout_of, packed, sum_of, unpacked, with_rows
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
        said: Where `lengths` were assumed, what the ranks have said in its place, once it was looked at; else None.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    lengths: list[int]
    number: int
    said: list[int] | None = None


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
        self._steady = True  # each rank's tokens were always as many as where the pass entered
        self._answered = False  # the latest recompute, without an exchange
        self._unsaid = -1  # of an exchange that this rank knows: the gradients' header says it
        self._rows: tuple[Tensor, Tensor] | None = None  # none, as wide as those of a forward and of a backward
        self._checked: set[bool] = set()

    @contextlib.contextmanager
    def telling(self, kind: Kind) -> Iterator[None]:
        """Tell the other ranks, which wait in the exchange of this kind or will, of an error that is raised inside."""
        try:
            with looking_first(self.ranks.settled):
                yield
        except Exception as error:
            if is_told(error):
                raise
            place, rows, lengths = self._place(kind), self._rows, self.ranks.lengths
            goes_on = kind is Kind.TOKENS and (self._answered if in_backward() else self._steady)
            if goes_on and rows and lengths and self.ranks.defers(place, rows[0].device):  # the others send rows by now
                self.ranks.fail_to_all(rows[in_backward()], lengths, place, error)
            else:
                self.ranks.agree(place, failure=error)
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
        place = self._place(Kind.TOKENS, gradients, x.dtype, ids.shape[1])
        later = self.ranks.defers(place, x.device)
        self._answered = sure and later
        self._unsaid = known if self._answered else -1
        if self._answered:
            return None
        assumed = self.ranks.lengths if later and self._steady and self._rows and not in_backward() else None
        with self.telling(Kind.TOKENS):  # before it is known whether they are needed: later nobody could be told
            rows, layout = packed(inputs_of(x, ids, weights))
            rows = with_rows(rows, assumed[self.ranks.owners.index]) if assumed else rows
        number = (known + 1) << _NUMBER | x.shape[0]
        if assumed:
            said: list[int] = []
            self.ranks.agree_later(place, number, judge=said.extend)
            return self._received(rows, layout, assumed, place, said)
        said = self.ranks.agree(place, number)
        if known >= 0 and all(number >> _NUMBER == known + 1 for number in said):  # not only alike on this rank
            if self.ranks.replicas.size > 1:  # hosts meet where a pass leaves the layers
                self.ranks.agree(self._place(Kind.OUTPUTS))
            return None
        lengths = _tokens(said)
        if not later:
            self.ranks.lengths = lengths
        return self._received(rows, layout, lengths, place)

    def certain(self, every: Gathered, x: Tensor, ids: Tensor, weights: Tensor) -> Gathered:
        """What `gather` gave, after the ranks' numbers of tokens were looked at: gathered anew if it assumed others.

        Args:
            every: Of `gather`.
            x: As given to it, like the two that follow.
            ids: [T, K] integers.
            weights: [T, K], floating.

        Raises:
            KTAMXForwardError: The ranks are in different places, or one has failed or ended.
        """
        if every.said is None:
            return every
        self.ranks.settled()
        lengths = _tokens(every.said)
        if lengths == every.lengths:
            return every
        self._steady, place = False, self._place(Kind.TOKENS)  # on all ranks
        with self.telling(Kind.TOKENS):
            rows, layout = packed(inputs_of(x, ids, weights))
        self.ranks.agree(place)  # of those that have failed meanwhile no rows come
        return self._received(rows, layout, lengths, place)

    def _received(
        self, rows: Tensor, layout: list[Layout], lengths: Sequence[int], place: Place, said: list[int] | None = None
    ) -> Gathered:
        self._rows = rows.new_empty(0, rows.shape[1]), rows.new_empty(0, rows.shape[1] + layout[-1][2])
        self._gatherings += 1
        inputs = unpacked(self.ranks.rows_to_all(rows, lengths, place), layout)
        return self._gathered(inputs, list(lengths), said)

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
        number, self._unsaid = (self._unsaid + 1) << _NUMBER | grad.shape[0], -1
        try:
            rows, layout = packed([*inputs_of(x, ids, weights), grad.detach()])
        except Exception as error:
            if later:
                like, _ = packed([*inputs_of(x[:0], ids[:0], weights[:0]), grad[:0].detach()])
                self.ranks.fail_to_all(like, lengths, place, error)
            else:
                self.ranks.agree(place, failure=error)
            raise
        if later:
            self.ranks.agree_later(place, number, judge=self._all_know)
        else:
            self._all_know(self.ranks.agree(place, number))
        self.unaveraged = self.ranks.replicas.size > 1
        *inputs, grads = unpacked(self.ranks.rows_to_all(rows, lengths, place), layout)
        return grads, self._gathered(inputs, list(lengths))

    def _all_know(self, said: Sequence[int]) -> None:
        """Refuse that ranks have kept the outputs of different forwards, for one recompute."""
        if len({number >> _NUMBER for number in said}) > 1:
            raise KTAMXBackwardError(
                f"{self.label}: the ranks do not agree which forward is computed again for its backward. Set "
                "kt_expert_activations to recompute."
            )

    def _gathered(self, inputs: list[Tensor], lengths: list[int], said: list[int] | None = None) -> Gathered:
        ids, weights, x = inputs
        return Gathered(x, ids - self.share.lo, weights, lengths, self._gatherings, said)

    @contextlib.contextmanager
    def owed(
        self, kind: Kind, like: Sequence[Tensor], lengths: Sequence[int], said: Sequence[int] | None = None
    ) -> Iterator[None]:
        """While this is open, the other ranks are told of an error: they wait for rows, or will, that `summed` sends.

        Args:
            kind: What is exchanged.
            like: Tensors whose dtypes and columns are those that are sent, on their device.
            lengths: Tokens of each rank.
            said: Of `Gathered`, where they were assumed.
        """
        try:
            with looking_first(self.ranks.settled):
                yield
        except Exception as error:
            if said is not None and not is_told(error) and self.ranks.settled(error) and _tokens(said) != lengths:
                self.ranks.agree(self._place(Kind.TOKENS), failure=error)  # where the others gather anew
            if is_told(error):
                raise
            rows = like[0].new_empty(0, sum(layout_of(tensor)[2] for tensor in like), dtype=torch.uint8)
            self.ranks.rows_to_owners(rows, lengths, self._place(kind), failure=error)
            raise

    def summed(self, kind: Kind, tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Of each tensor [S, …], what all ranks have for this rank's tokens, summed: [T, …] in its dtype.

        Args:
            kind: What is exchanged.
            tensors: What this rank's experts have for the tokens of all ranks.
            lengths: Tokens of each rank.

        Raises:
            KTAMXError: Another rank has failed, or has ended.
        """
        with self.owed(kind, tensors, lengths):
            rows, layout = packed(list(tensors))
        of_ranks = self.ranks.rows_to_owners(rows, lengths, self._place(kind))
        assert of_ranks is not None
        return [sum_of(addends) for addends in unpacked(of_ranks, layout)]

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
        every = self.ranks.all_values(torch.tensor([digest(tensor) for tensor in tensors], device="cpu")).tolist()
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


def _tokens(said: Sequence[int]) -> list[int]:
    """Of each rank, from what it said in its header."""
    return [number & ((1 << _NUMBER) - 1) for number in said]
