"""The tiny models are what the other tests take them for."""

from __future__ import annotations

import torch

from tests.support.models import Family, base_weights, expert_modules


@torch.no_grad()
def token_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def routes(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The sorted experts of every token, one tensor [T, K] a layer."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, args: seen.append(args[1].sort(dim=-1).values))
        for module in expert_modules(model).values()
    ]
    token_losses(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_structure(family: Family) -> None:
    model = family()
    assert tuple(expert_modules(model)) == family.moe_layers
    for base in base_weights(model).values():
        assert base.gate.shape == base.up.shape == (family.num_experts, family.intermediate, family.hidden)
        assert base.down.shape == (family.num_experts, family.hidden, family.intermediate)
    names = dict(model.named_modules())
    assert all(f"model.layers.{index}.mlp.gate_proj" in names for index in family.dense_layers)
    assert family.shared is None or f"model.layers.{family.moe_layers[0]}.mlp.{family.shared}.gate_proj" in names
    assert family.hidden % 32 == family.intermediate % 32 == 0


def test_deterministic_and_equal_in_every_dtype(family: Family) -> None:
    first, again, half, other = family(), family(), family(torch.bfloat16), family(seed=1)
    assert half.dtype is torch.bfloat16
    state, half_state = first.state_dict(), half.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(value, half_state[name].float()) for name, value in state.items())
    assert not torch.equal(state["lm_head.weight"], other.state_dict()["lm_head.weight"])


def test_the_experts_decide_the_loss(family: Family) -> None:
    ids = family.inputs()
    right = token_losses(family(), ids)
    for change in (lambda p: p.zero_(), lambda p: p.copy_(p.roll(1, 0).clone())):
        model = family()
        with torch.no_grad():
            for module in expert_modules(model).values():
                change(module.gate_up_proj)
                change(module.down_proj)
        assert (token_losses(model, ids) - right).abs().mean() > 0.1


def test_routing_is_decided_and_varied(family: Family) -> None:
    """No near tie that bf16 could turn round; most experts get tokens, though not all of them need to."""
    exact, rounded = routes(family(), family.inputs()), routes(family(torch.bfloat16), family.inputs())
    assert len(exact) == len(family.moe_layers)
    assert all(torch.equal(a, b) for a, b in zip(exact, rounded, strict=True))
    assert min(ids.unique().numel() for ids in exact) >= family.num_experts - 3
