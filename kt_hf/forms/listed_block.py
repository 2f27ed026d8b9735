"""How a block that calls its experts one by one is computed with all of them at once.

The block's own code is run twice. In the first pass its experts take down the rows they are called with and give zeros;
then all rows are computed together; in the second pass the experts give the results. Whatever the block does with its
router, weights and shared experts stays its own, and so do their gradients. Where the block has a method that takes
rows, ids and weights (DeepSeek's `moe_infer`), that is replaced instead, and one pass is enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KTAMXForwardError, KTAMXModelNotSupportedError
from .listed_mlps import ExpertMlps, same

# rows [N, H], ids [N, K], weights [N, K] -> [N, H]: what KTExperts computes.
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
_TOKENS = 16


class ExpertCalls:
    """Stands for the list of experts while its block is computed: what `block.experts[e](rows)` calls.

    Args:
        experts: E.
        compute: Of all experts: rows [N, H], ids [N, K] and weights [N, K] to their weighted sum [N, H].
    """

    def __init__(self, experts: int, compute: Compute) -> None:
        self.experts, self.compute = experts, compute
        self._taken: list[tuple[int, Tensor]] | None = None
        self._given: Iterator[tuple[int, Tensor]] | None = None

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, e: Any) -> Callable[[Tensor], Tensor]:
        e = int(e)
        if not -self.experts <= e < self.experts:
            raise IndexError(e)
        return lambda rows: self._called(e % self.experts, rows)

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return (self[e] for e in range(self.experts))

    def _called(self, e: int, rows: Tensor) -> Tensor:
        if self._given is not None:
            expert, result = next(self._given, (-1, rows))
            if expert != e or result.shape != rows.shape:
                raise KTAMXForwardError(f"Expert {e} was called with other rows when its block was computed again.")
            return result
        if self._taken is not None:
            self._taken.append((e, rows))
            return torch.zeros_like(rows)
        return self._together([(e, rows)])[0]

    def _together(self, calls: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for _, part in calls])
        counts = torch.tensor([part.shape[:-1].numel() for _, part in calls])
        ids = torch.tensor([e for e, _ in calls]).repeat_interleave(counts).to(rows.device)[:, None]
        results = self.compute(rows, ids, torch.ones(ids.shape, device=rows.device)).split(counts.tolist())
        return [result.view(part.shape) for result, (_, part) in zip(results, calls, strict=True)]

    def run(self, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a block's own forward, which calls these experts.

        Raises:
            KTAMXForwardError: The block calls other experts when it is computed again.
        """
        draws = _Draws(args)
        try:
            taken = self._taken = []
            # It may write to its input, as Mixtral's noise does.
            copied = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            result = block(*copied, **{k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()})
            if not taken:
                return result
            del result
            self._taken = None
            draws.again()
            given = self._given = iter(list(zip((e for e, _ in taken), self._together(taken), strict=True)))
            result = block(*args, **kwargs)
            if next(given, None) is not None:
                raise KTAMXForwardError("Fewer experts were called when their block was computed again.")
            return result
        finally:
            self._taken = self._given = None


class _Draws:
    """The state of the random numbers, so that the second pass draws the same as the first."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda}
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def again(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


@dataclass
class BlockPlan:
    """How a block's experts are replaced.

    Attributes:
        methods: Names of its methods that take rows [T, H], ids [T, K] and weights [T, K] and give [T, H].
        evaluates: Whether the block's own code computes no gradients of experts in training, so that it is run as in
            evaluation: its own part and its router's.
    """

    methods: list[str] = field(default_factory=list)
    evaluates: bool = False

    def install(self, block: nn.Module, calls: ExpertCalls) -> None:
        """Have the block compute its experts by these calls."""
        for name in self.methods:
            setattr(block, name, calls.compute)
        original, quiet = block.forward, [block, *_leaves(block)] if self.evaluates else []

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _evaluating(quiet):
                return calls.run(original, args, kwargs)

        block.forward = forward


def plan_block(block: nn.Module, attribute: str, mlps: ExpertMlps, top_k: int, name: str) -> BlockPlan:
    """Find out how a block calls its experts, by trying it on random input; the block stays as it is.

    Args:
        block: The module around the experts; its weights are on a device.
        attribute: The name that the experts have in it.
        mlps: The experts.
        top_k: Experts a token is sent to.
        name: The experts' full name, for messages.

    Raises:
        KTAMXModelNotSupportedError: The block does not compute the same with its experts computed together, or no
            gradient can reach them.
    """
    trial = _Trial(block, attribute, mlps, top_k)
    try:
        with torch.enable_grad():
            return trial.plan()
    except Exception as error:  # the model's code, which may raise anything
        problem = " ".join(str(error).split())
        raise KTAMXModelNotSupportedError(
            f"{name}: {type(block).__name__} computes its experts in a way in which they cannot be computed together: "
            f"{problem[:300]}"
        ) from error
    finally:
        trial.undo()


class _Trial:
    """A block tried on random rows with its own experts, called as they will be."""

    def __init__(self, block: nn.Module, attribute: str, mlps: ExpertMlps, top_k: int) -> None:
        self.block, self.attribute, self.mlps, self.top_k = block, attribute, mlps, top_k
        self.training = {module: module.training for module in block.modules()}
        like = getattr(mlps.modules[0], mlps.names[0]).weight
        generator = torch.Generator(like.device).manual_seed(0)
        x = torch.randn(_TOKENS, mlps.sizes[1], generator=generator, device=like.device)
        self.x = x.to(like.dtype)
        self.result: Tensor | None = None
        self.error: Exception | None = None

    def undo(self) -> None:
        for name in {"forward", self.attribute, *_methods(self.block, self.attribute)}:
            vars(self.block).pop(name, None)
        for module, training in self.training.items():
            module.training = training

    def compute(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What KTExperts will compute, by the block's own MLPs; a leaf, to see whether gradients reach it."""
        with torch.no_grad():
            total = torch.zeros(rows.shape, dtype=torch.promote_types(weights.dtype, rows.dtype), device=rows.device)
            for e, mlp in enumerate(self.mlps.modules):
                token, slot = (ids == e).nonzero(as_tuple=True)
                total.index_add_(0, token, mlp(rows[token]) * weights[token, slot, None].to(total.dtype))
        self.result = total.to(rows.dtype).requires_grad_()
        return self.result

    def plan(self) -> BlockPlan:
        modes = (True, False)
        wanted = {training: self._called(training) for training in modes}
        before, self.error = self.error, None
        plan = BlockPlan([name for name in _methods(self.block, self.attribute) if self._is_routed_sum(name)])
        calls = ExpertCalls(len(self.mlps.modules), self.compute)
        vars(self.block)[self.attribute] = calls  # which hides the module of that name
        original = self.block.forward
        plan.install(self.block, calls)
        reached = {}
        for training in modes:
            if wanted[training] is not None:
                self.result = None
                actual = self._called(training)
                if actual is None or not all(map(same, actual, wanted[training] or ())):
                    mode = "training" if training else "evaluation"
                    raise ValueError(f"in {mode} it gives something else when they are ({self.error or 'another sum'})")
                reached[training] = self._reached(actual)
        self.block.forward = original
        if not any(reached.values()):
            raise ValueError(f"no gradient reaches its experts ({before or 'it computes them without gradients'})")
        plan.evaluates = not reached.get(True)
        return plan

    def _called(self, training: bool) -> list[Tensor] | None:
        """What the block gives, None if it raises."""
        self.block.train(training)
        with torch.random.fork_rng(devices=[self.x.device] if self.x.is_cuda else []):
            torch.manual_seed(0)
            try:
                result = self.block(self.x.clone()[None].requires_grad_().clone())
            except Exception as error:  # the model's code, which may raise anything
                self.error = error
                return None
        return [part for part in (result if isinstance(result, (tuple, list)) else (result,)) if _floating(part)]

    def _reached(self, outputs: list[Tensor]) -> bool:
        if self.result is None or not outputs[0].requires_grad:
            return False
        return torch.autograd.grad(outputs[0].sum(), self.result, allow_unused=True)[0] is not None

    @torch.no_grad()
    def _is_routed_sum(self, name: str) -> bool:
        """Whether a method of the block gives the sum of experts for rows, ids and weights."""
        T, E = len(self.x), len(self.mlps.modules)
        ids = torch.stack([torch.randperm(E)[: self.top_k] for _ in range(T)]).to(self.x.device)
        weights = torch.rand(ids.shape, device=self.x.device)
        try:
            result = getattr(self.block, name)(self.x.clone(), ids.clone(), weights.clone())
        except Exception:  # the model's code, which may want anything
            return False
        return isinstance(result, Tensor) and same(result.to(self.x.dtype), self.compute(self.x, ids, weights).detach())


def _methods(block: nn.Module, attribute: str) -> list[str]:
    """Methods of a block's class with three arguments, whose code uses its experts."""
    names = []
    for name in dir(type(block)):
        method = inspect.getattr_static(type(block), name)
        if name.startswith("__") or name == "forward" or not inspect.isfunction(method) or hasattr(nn.Module, name):
            continue
        code = inspect.unwrap(method).__code__
        if attribute in code.co_names and len(inspect.signature(method).parameters) == 4:
            names.append(name)
    return names


def _leaves(block: nn.Module) -> list[nn.Module]:
    """The block's children that hold no modules: its router, where that is written out."""
    return [child for child in block.children() if not list(child.children())]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """These modules, not what is in them, are in evaluation mode."""
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
