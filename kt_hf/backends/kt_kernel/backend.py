"""Experts by kt-kernel's SFT operators: in bf16, INT8 or INT4 on AMX or AVX512-BF16, and others of low bits.

The modules of `kt_hf/backends/kt_kernel/` are the only ones that import kt_kernel. Its operators take raw pointers and
check nothing: a wrong size or dtype ends the process or gives wrong gradients. So every rule they have is checked in
`KTKernelBackend`, before a pointer crosses. The rules were established by experiment on kt-kernel 0.7.2;
tests/backends/kt_kernel pins those that are relied on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import KTAMXBackwardError, KTAMXConfigError, KTAMXForwardError
from ...shapes import LORA_NAMES, ExpertShape, expert_bytes
from ...system.cpu import ThreadPlan
from ..base import ExpertWeights, Gradients, SavedForward
from ..transfer import host_empty, split_lora, to_host, track_reads, wait_for_reads
from .engine import Cache, Engine
from .gate_overflow import careful_backward
from .idle_workers import CallGap
from .input_checks import check_inputs, check_tensor, check_weights
from .installation import bytes_per_weight, check_available
from .kept_memory import KEPT
from .low_bit_weights import packed_experts, point_to
from .native_code import native_output_to_log, never_destroy
from .operator_config import operator_config
from .operators import OPERATORS, check_rank, check_shape, most_tokens
from .packed_files import PackedLayerFiles, check_saved, folder_to_load, folder_to_save

logger = logging.getLogger(__name__)


@dataclass
class _KernelForward(SavedForward):
    generation: int
    tokens: int


class KTKernelBackend:
    """Experts of one layer, packed for the operators of one arithmetic.

    Args:
        weights: bf16 or castable to it, on any device. Emptied: the source is released as soon as it is copied. Those
            of low bits are taken as they are by the operators that compute with them, and widened for the others. Or
            a `PackedLayerFiles`, what `save_to` once wrote, of the same operators and number of pools.
        shape: Sizes; H, and I by the number of pools, are multiples of what `OPERATORS` has: 32, 64 or 128.
        rank: LoRA rank the operator is built for; smaller ones are padded with zeros. 0 packs for inference.
        plan: Worker threads.
        max_len: Most tokens in a call. Costs virtual memory only.
        share_backward: One buffer of backward weights for all layers instead of one a layer.
        share_cache: One saved forward for all layers (little memory) instead of one a layer.
        label: The layer's name, for messages.
        backend: A key of `OPERATORS`.
        save_to: Also write the packed weights there (AMXInt8, AMXInt4); the folder is made. The backward weights are
            left out with `share_backward`.

    Raises:
        KTAMXNotAvailableError: The operators do not run here.
        KTAMXConfigError: A shape, rank or length the operators cannot take, or saved weights that do not fit.
        OSError: The weights could not be written.
    """

    dtype = torch.bfloat16
    device = torch.device("cpu")

    def __init__(
        self,
        weights: ExpertWeights | PackedLayerFiles,
        shape: ExpertShape,
        rank: int,
        plan: ThreadPlan,
        max_len: int,
        share_backward: bool,
        share_cache: bool,
        label: str,
        backend: str = "AMXBF16",
        save_to: Path | None = None,
    ) -> None:
        check_available(backend)
        self.name, self._operators = backend, OPERATORS[backend]
        self._engine = Engine.get(plan)
        pools = len(self._engine.plan.pools)
        check_shape(shape, pools, backend, label)
        check_rank(rank, backend, label)
        if save_to is not None and pools != len(plan.pools):
            raise KTAMXConfigError(
                f"{label}: this process computes on {pools} pools of threads already, and the weights are to be saved "
                f"for {len(plan.pools)}: do that in a process of its own (kt-hf quantize)."
            )
        if rank < 0 or max_len < 1:
            raise KTAMXConfigError(f"{label}: LoRA rank {rank} and length {max_len} cannot be negative or empty.")
        if max_len > (most := most_tokens(shape)):
            raise KTAMXConfigError(
                f"{label}: kt_max_len={max_len} needs buffers larger than this machine's memory. Set it to {most} or "
                "less; longer batches are computed in pieces."
            )
        if isinstance(weights, ExpertWeights):
            check_weights(weights, shape, label)
        else:
            check_saved(weights, self._operators, pools, share_backward, label)
        forced = self._operators.shares_backward
        share_backward = share_backward if forced is None else forced
        rank, share_cache = self._operators.packed_rank(rank), share_cache and not self._operators.one_saved
        self.shape, self.label, self.max_rank, self.max_len = shape, label, rank, max_len
        self._unused: int | None = None  # tokens of a saved forward without its backward, where that matters
        self.overflow_noted = self._lora_on = False
        self._lora = tuple(host_empty(size, torch.bfloat16).zero_() for size in shape.lora_shapes(rank) if rank)
        self._grads: tuple[Tensor, ...] = ()
        self._cache = self._engine.shared_cache if share_cache else Cache()
        self._pauses, self._moe = dict[str, CallGap](), None
        self._expert_map = torch.arange(shape.num_experts, dtype=torch.int64, device="cpu")
        never_destroy(self)
        pool = self._engine.cpu_infer.backend_
        config = operator_config(shape, self._lora, max_len, share_backward, share_cache, self._expert_map, pool)
        if isinstance(weights, PackedLayerFiles):
            with folder_to_load(weights.folder, config.layer_idx) as path:
                config.load, config.path = True, path
                self._moe = self._build(config)
        elif save_to is not None:
            with folder_to_save(save_to, config.layer_idx) as path:
                config.save, config.path = True, path
                self._load(weights, config)
        else:
            self._load(weights, config)
        KEPT.add(int(shape.num_experts * expert_bytes(shape) * bytes_per_weight(backend) / 2))

    def _load(self, weights: ExpertWeights, config: Any) -> None:
        if self._operators.code:
            packed = packed_experts(weights, self.shape, self._operators, self.label)
            kept = point_to(config, packed, self.shape, self._operators)
            self._moe = self._build(config)
            weights.packed_as = self
            weights.gate_up, weights.down, weights.low_bit = torch.empty(0), torch.empty(0), None
            del kept
            return
        if weights.low_bit is not None:
            wide = weights.wide(range(self.shape.num_experts), torch.device("cpu"), torch.bfloat16)
            weights.gate_up, weights.down, weights.low_bit = wide.gate_up, wide.down, None
        inner = self.shape.intermediate_size
        gate = weights.gate_up[:, :inner].to("cpu", torch.bfloat16, copy=True).contiguous()
        up = weights.gate_up[:, inner:].to("cpu", torch.bfloat16, copy=True).contiguous()
        down = weights.down.to("cpu", torch.bfloat16).contiguous()
        config.gate_proj, config.up_proj, config.down_proj = gate.data_ptr(), up.data_ptr(), down.data_ptr()
        like = weights.gate_up.new_empty(0)
        try:
            weights.gate_up = torch.empty(0)  # released before the packed copy is made
            self._moe = self._build(config)
            weights.packed_as = self
        except BaseException:  # KeyboardInterrupt among them
            weights.gate_up = torch.cat((gate, up), 1).to(like)  # so that the layer can be packed again
            raise
        weights.down = torch.empty(0)

    def _build(self, config: Any) -> Any:
        from kt_kernel import kt_kernel_ext

        cpu_infer = self._engine.cpu_infer
        self._engine.workers.gather()
        with native_output_to_log(logger):
            moe = getattr(kt_kernel_ext.moe, self._operators.class_name)(config)
            try:
                cpu_infer.submit(moe.load_weights_task())
            finally:  # interrupted as well: the task reads tensors and files that go then
                cpu_infer.sync()
            if self._lora:
                moe.update_lora_weights(*(t.data_ptr() for t in self._lora))
        return moe

    _moe: Any
    kept = False  # becomes true at the interpreter's end and in a fork: `never_destroy`

    def natives(self) -> list[Any]:
        """kt-kernel's objects that must not be destroyed at the interpreter's end: see `never_destroy`."""
        return [self._moe]

    def __del__(self) -> None:
        self._moe = None  # before the worker pools it uses, which go with the last layer

    @property
    def engine(self) -> Engine:
        """kt-kernel's worker pools (`.cpu_infer`), one object for all layers of the process."""
        return self._engine

    @property
    def torch_threads(self) -> int:
        """Upper bound for torch.set_num_threads while the operators compute: their workers need the other cores."""
        return 1 if torch.cuda.is_initialized() else self._engine.torch_threads

    @property
    def rank(self) -> int:
        """`max_rank` while LoRA values are held, whatever rank they came with; else 0."""
        return self.max_rank if self._lora_on else 0

    def set_lora(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy six tensors of one rank up to `max_rank` into the operator's buffers; () makes LoRA contribute zeros.

        Raises:
            KTAMXConfigError: The rank is larger than the operator was built for, or a shape does not fit.
        """
        if tensors:
            rank = tensors[0].shape[1]
            if rank > self.max_rank:
                raise KTAMXConfigError(
                    f"{self.label}: the adapter has LoRA rank {rank}, the experts were packed for {self.max_rank}. "
                    f"Patch with KTConfig(kt_lora_rank={rank}) or more."
                )
            for name, tensor, size in zip(LORA_NAMES, tensors, self.shape.lora_shapes(rank), strict=True):
                if tuple(tensor.shape) != size:
                    raise KTAMXConfigError(f"{self.label}: {name} has shape {tuple(tensor.shape)}, not {size}.")
        elif not self._lora_on:
            return
        self._cache.holds = 0  # before the copies: an interruption must not leave a stale forward looking valid
        self._lora_on = True  # nor half of the copies pass for none
        if tensors and tensors[0].is_cuda:
            straight = self._lora if rank == self.max_rank else ()
            tensors = to_host(tensors, [torch.bfloat16] * len(tensors), straight).wait()
        if tensors and tensors[0] is not self._lora[0]:
            for buffer, tensor, axis in zip(self._lora, tensors, (1, 2) * 3, strict=True):
                buffer.narrow(axis, 0, rank).copy_(tensor)
                if rank < self.max_rank:
                    buffer.narrow(axis, rank, self.max_rank - rank).zero_()
        elif not tensors:
            for buffer in self._lora[1::2]:  # B alone: zero times anything finite is zero
                buffer.zero_()
        self._engine.workers.gather()
        self._moe.update_lora_weights(*(t.data_ptr() for t in self._lora))
        self._lora_on = bool(tensors)

    def lora_copy(self) -> tuple[Tensor, ...]:
        """Copies of the six LoRA tensors, bf16 on the CPU, padded with zeros to `max_rank`; () without LoRA."""
        return tuple(t.clone() for t in self._lora) if self._lora_on else ()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, save: bool) -> tuple[Tensor, SavedForward | None]:
        """Compute the output [T, H], bf16 on the CPU, and with `save` keep what backward needs, until the next forward.

        Raises:
            KTAMXForwardError: Inputs that the operators cannot take, or a fork of the process that packed the weights.
        """
        self._check_process()
        check_inputs(x, ids, weights, self.shape, self.max_len, self.label)
        T, K = ids.shape
        out = host_empty((T, self.shape.hidden_size), torch.bfloat16)
        length = torch.tensor([T], dtype=torch.int32, device="cpu")
        if save:
            self._drop_saved()
            self._unused = T if self._operators.one_saved else None
        # Any forward spoils the one saved before, also one without save: backward goes by the last list of experts.
        self._cache.holds = 0
        # A checkpointed layer's forward is followed by attention, its recompute by the backward.
        with self._engine.workers.at_work(self._pauses, "saved forward" if save else "forward"):
            self._moe.forward_sft(
                length.data_ptr(), K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), save
            )
        if not save:
            return out, None
        self._cache.holds = next(self._cache.generations)
        return out, _KernelForward(self._cache.holds, T)

    def can_backward(self, saved: SavedForward) -> bool:
        """Whether no other forward, and no backward, has come after the one that gave `saved`."""
        return isinstance(saved, _KernelForward) and self._cache.holds == saved.generation

    def backward(self, saved: SavedForward, grad_output: Tensor) -> Gradients:
        """Gradients of a saved forward, once; those of LoRA are in buffers that the next backward overwrites.

        Raises:
            KTAMXBackwardError: The saved forward is gone, or grad_output is not [T, H], bf16, contiguous on the CPU.
            KTAMXForwardError: The process is a fork of the one that packed the weights.
        """
        self._check_process()
        if not self.can_backward(saved):
            raise KTAMXBackwardError(f"{self.label}: the saved forward is gone; compute the forward again.")
        assert isinstance(saved, _KernelForward)
        size = saved.tokens, self.shape.hidden_size
        check_tensor(grad_output, "grad_output", size, torch.bfloat16, self.label, KTAMXBackwardError)
        return self._backward(grad_output)

    def _backward(self, grad_output: Tensor) -> Gradients:
        """The backward of the forward that the operator holds."""
        T, K = len(grad_output), self.shape.top_k
        if self.max_rank and not self._grads:
            # Buffers of this layer alone: the operator adds into experts that it has not written to before, and clears
            # those it has. Buffers shared between layers gave wrong gradients where an expert had no tokens.
            sizes = self.shape.lora_shapes(self.max_rank)
            if torch.cuda.is_initialized():  # pinned: the sum would be rounded up to a power of two
                self._grads = track_reads(tuple(host_empty(size, torch.bfloat16).zero_() for size in sizes))
            else:
                flat = torch.zeros(sum(map(math.prod, sizes)), dtype=torch.bfloat16, device="cpu")
                self._grads = split_lora(flat, sizes)
        wait_for_reads(self._grads)  # copies to a GPU, of the backward before
        if not T:  # an empty tensor has no address, which operators of low bits refuse
            grad_output = torch.zeros(1, self.shape.hidden_size, dtype=torch.bfloat16, device="cpu")
        grad_input = host_empty((max(T, 1), self.shape.hidden_size), torch.bfloat16)
        grad_weights = host_empty((max(T, 1), K), torch.float32)
        if not self._operators.clears_gradients:
            for buffer in self._grads:
                buffer.zero_()
        pointers = [t.data_ptr() for t in self._grads] if self.max_rank else [0] * 6
        self._cache.holds, self._unused = 0, None  # one backward a saved forward
        with self._engine.workers.at_work(self._pauses, "backward"):
            self._moe.backward(
                grad_output.data_ptr(), grad_input.data_ptr(), *pointers, grad_weights.data_ptr(), 0, 0, 0, False, 1.0
            )
        return Gradients(grad_input[:T], grad_weights[:T], self._grads)

    def _drop_saved(self) -> None:
        """Have the operator forget a saved forward whose backward never came, where the next would end the process.

        There is no other way than that backward, for nothing. (An evaluation with gradients, two losses of one layer.)
        """
        if self._unused is not None:
            with contextlib.suppress(RuntimeError):  # the forward raised, and nothing was saved
                self._backward(torch.zeros(self._unused, self.shape.hidden_size, dtype=torch.bfloat16, device="cpu"))
            self._unused = None

    def careful_backward(self, x: Tensor, ids: Tensor, weights: Tensor, grad_output: Tensor, bad: Tensor) -> Gradients:
        """Gradients where tokens `bad` [T] (bool) have gates too far below zero: see `gate_overflow`."""
        return careful_backward(self, x, ids, weights, grad_output, bad)

    def raw_operator(self) -> Any:
        """kt-kernel's operator of this layer, for benchmarks that call it without this class around it.

        Its methods take addresses (`forward_sft`, `backward`, `update_lora_weights`) and check nothing: the rules are
        in docs/kernel-contract.md. Get it anew before each pair of calls: it comes with its workers awake, and with
        the forward that this backend had saved forgotten, for the caller's forward overwrites it.

        Raises:
            KTAMXForwardError: The process is a fork of the one that packed the weights.
        """
        self._check_process()
        self._cache.holds = 0
        self._drop_saved()
        self._engine.workers.gather()
        return self._moe

    def _check_process(self) -> None:
        if self._engine.pid != os.getpid():
            raise KTAMXForwardError(
                f"{self.label}: this process is a fork of the one that packed the experts, and the operators' threads "
                "did not come along. Compute in the parent, or start workers by spawn."
            )
