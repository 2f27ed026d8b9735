"""What kt_hf relies on in kt-kernel's operators. A failure here means that an upgrade changed the ground under us.

Numbers in names are those of the rules in docs/kernel-contract.md.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.support import contract_operator as driver
from tests.support.cases import KERNEL_MARKS
from tests.support.contract_operator import Operator, error

pytestmark = list(KERNEL_MARKS)


def check_backward(op, batch, got, limit=0.02):
    _, grad_input, grad_weights, lora = op.reference(*batch)
    assert error(got[0], grad_input) < limit
    assert error(got[1], grad_weights) < limit
    for ours, reference in zip(got[2], lora, strict=True):
        assert error(ours, reference) < limit


@pytest.mark.parametrize("rank", [0, 1, 4, 8, 16, 32, 64, 128, 256])
def test_numbers_at_every_rank(rank):
    op = Operator(rank=rank)
    batch = op.batch(64)
    assert error(op.forward(*batch[:3]), op.reference(*batch)[0]) < 0.01
    check_backward(op, batch, op.backward(batch[3]))


@pytest.mark.parametrize("tokens", [0, 1, 3, 512])
def test_rule_3_any_number_of_tokens_up_to_max_len(tokens):
    op = Operator(max_len=512)
    batch = op.batch(tokens)
    out = op.forward(*batch[:3])
    assert out.shape == (tokens, op.H)
    if tokens:
        assert error(out, op.reference(*batch)[0]) < 0.01
        check_backward(op, batch, op.backward(batch[3]))


def test_rule_4_minus_one_means_no_expert():
    op = Operator()
    x, ids, weights, grad = op.batch(32)
    ids[::3, 1] = -1
    ids[5] = -1
    out = op.forward(x, ids, weights)
    assert torch.equal(out[5], torch.zeros(op.H, dtype=torch.bfloat16))
    grad_input, grad_weights, _ = op.backward(grad)
    assert torch.equal(grad_input[5], torch.zeros(op.H, dtype=torch.bfloat16))
    assert not grad_weights[ids == -1].any()
    check_backward(op, (x, ids, weights, grad), (grad_input, grad_weights, op.grads))


def test_rule_4_repeated_ids_in_a_row_are_added():
    op = Operator()
    x, ids, weights, grad = op.batch(16)
    ids[:, 1] = ids[:, 0]
    out = op.forward(x, ids, weights)
    assert error(out, op.reference(x, ids, weights, grad)[0]) < 0.01
    check_backward(op, (x, ids, weights, grad), op.backward(grad))


def test_rule_6_one_saved_forward_the_second_overwrites_the_first():
    op = Operator()
    first, second = op.batch(64, seed=1), op.batch(64, seed=2)
    op.forward(*first[:3])
    op.forward(*second[:3])
    check_backward(op, second, op.backward(second[3]))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_rule_7_a_small_forward_in_between_spoils_grad_input_only(tokens):
    op = Operator(E=64, K=6, H=256, inner=128)
    batch = op.batch(64)
    _, reference, _, lora_reference = op.reference(*batch)
    op.forward(*batch[:3])
    clean = error(op.backward(batch[3])[0], reference)
    op.forward(*batch[:3])
    between = op.batch(tokens, seed=3, experts=range(0, 6))
    op.forward(*between[:3], save=False)
    grad_input, _, lora = op.backward(batch[3])
    assert error(grad_input, reference) > 3 * clean, "the list of active experts is kept now: tickets can be simpler"
    assert error(lora[5], lora_reference[5]) < 0.02  # which is why a test of LoRA gradients alone does not see it


def test_rule_7_a_forward_with_other_lora_in_between_spoils_it_even_if_restored():
    op = Operator()
    batch = op.batch(64)
    op.forward(*batch[:3])
    before = [t.clone() for t in op.lora]
    for tensor in op.lora:
        tensor.normal_(std=0.5)
    op.update_lora()
    op.forward(*op.batch(3, seed=3)[:3], save=False)  # repacking is lazy: done here
    for tensor, old in zip(op.lora, before, strict=True):
        tensor.copy_(old)
    op.update_lora()
    spoiled = op.backward(batch[3])[0]
    assert error(spoiled, op.reference(*batch)[1]) > 0.5, "LoRA is packed at the update now: tickets can be simpler"


def test_rule_7_a_forward_over_all_experts_after_restoring_makes_it_right_again():
    op = Operator(E=8, K=2)
    batch = op.batch(64)
    op.forward(*batch[:3])
    op.update_lora()
    x, _, weights, _ = op.batch(4, seed=5)
    op.forward(x, torch.arange(8).view(4, 2).contiguous(), weights, save=False)
    check_backward(op, batch, op.backward(batch[3]))


@pytest.mark.parametrize(("tokens", "right"), [(100, True), (400, False)])
def test_rule_7_unless_an_expert_had_more_than_32_tokens(tokens, right):
    """So a small forward cannot take the place of computing the saved one again."""
    op = Operator()
    batch = op.batch(tokens)
    most = int(torch.bincount(batch[1].flatten()).max())
    assert (most <= 32) == right
    op.forward(*batch[:3])
    every = torch.arange(op.E).view(-1, op.K).contiguous()
    op.forward(torch.zeros(len(every), op.H, dtype=torch.bfloat16), every, torch.zeros(every.shape), save=False)
    wrong = error(op.backward(batch[3])[0], op.reference(*batch)[1])
    assert wrong < 0.02 if right else wrong > 0.1


def test_rule_8_backward_on_an_empty_cache_raises_and_leaves_the_layer_usable():
    op = Operator()
    batch = op.batch(16)
    with pytest.raises(RuntimeError):
        op.backward(batch[3])
    op.forward(*batch[:3])
    check_backward(op, batch, op.backward(batch[3]))


def test_rule_10_changed_lora_needs_an_update():
    op = Operator()
    batch = op.batch(32)
    before = op.forward(*batch[:3], save=False)
    op.lora[5].mul_(3.0)
    assert torch.equal(op.forward(*batch[:3], save=False), before), "down's B is read live now"
    op.update_lora()
    assert error(op.forward(*batch[:3], save=False), op.reference(*batch)[0]) < 0.01


def test_rule_11_authoritative_gradients_overwrite_and_zero_the_untouched():
    op = Operator(E=8)
    batch = op.batch(32, experts=range(0, 4))
    op.forward(*batch[:3])
    for tensor in op.grads:
        tensor.fill_(7.0)
    check_backward(op, batch, op.backward(batch[3]))
    assert all(not tensor[4:].any() for tensor in op.grads)


def test_rule_11_buffers_must_be_the_layers_own():
    """After its first backward the operator clears only what it wrote itself: a foreign value in the buffers stays."""
    op = Operator(E=8)
    batch = op.batch(32, experts=range(0, 4))
    for _ in range(2):
        op.forward(*batch[:3])
        for tensor in op.grads:
            tensor.fill_(7.0)
        op.backward(batch[3])
    assert all((tensor[4:] == 7).all() for tensor in op.grads), "all buffers are cleared now: layers could share them"


def test_rule_11_own_buffers_are_right_whichever_experts_are_active():
    op = Operator(E=8)
    for seed, experts in enumerate((range(0, 4), range(2, 8), range(0, 2), range(0, 8), range(5, 7))):
        batch = op.batch(16, seed=seed, experts=experts)
        op.forward(*batch[:3])
        check_backward(op, batch, op.backward(batch[3]))


def test_rule_15_dropout_drops_in_forwards_without_backward_too():
    op = Operator(lora_dropout=0.5)
    batch = op.batch(64)
    outputs = [op.forward(*batch[:3], save=False) for _ in range(4)]
    assert any(not torch.equal(out, outputs[0]) for out in outputs[1:]) or (
        error(outputs[0], op.reference(*batch)[0]) > 0.01
    ), "dropout is off without save now: it could be offered"


def test_rule_18_a_shared_cache_pool_keeps_one_forward_for_all_layers():
    first, second = (Operator(seed=seed, share_cache_pool=True) for seed in (0, 1))
    batch = first.batch(64)
    first.forward(*batch[:3])
    other = second.batch(64, seed=9)
    second.forward(*other[:3])
    try:
        spoiled = first.backward(batch[3])[0]
    except RuntimeError:
        return
    assert error(spoiled, first.reference(*batch)[1]) > 0.05, "the pool keeps one forward a layer now"


def test_rank_padding_with_zeros_is_exact():
    small, large = Operator(rank=8), Operator(rank=32)
    for a, b, axis in zip(small.lora, large.lora, (1, 2) * 3, strict=True):
        b.zero_()
        b.narrow(axis, 0, 8).copy_(a)
    large.update_lora()
    for mine, other in ((small.gate, large.gate), (small.up, large.up), (small.down, large.down)):
        assert torch.equal(mine, other)
    batch = small.batch(64)
    assert torch.equal(small.forward(*batch[:3]), large.forward(*batch[:3]))
    assert torch.equal(small.backward(batch[3])[0], large.backward(batch[3])[0])


def test_inputs_are_only_read():
    op = Operator()
    batch = op.batch(32)
    kept = [t.clone() for t in batch]
    op.forward(*batch[:3])
    op.backward(batch[3])
    assert all(torch.equal(a, b) for a, b in zip(batch, kept, strict=True))


def test_zero_lora_b_equals_rank_zero_to_the_bit():
    with_lora, without = Operator(rank=8), Operator(rank=0)
    for tensor in with_lora.lora[1::2]:
        tensor.zero_()
    with_lora.update_lora()
    batch = without.batch(64)
    assert torch.equal(with_lora.forward(*batch[:3]), without.forward(*batch[:3]))


def test_workers_have_names_and_a_core_each():
    """Or kt_hf cannot move them out of PyTorch's way: everything else would go on, slower."""
    op = Operator()
    op.forward(*op.batch(8)[:3])
    tasks = [Path("/proc/self/task", number) for number in os.listdir("/proc/self/task")]
    workers = [int(task.name) for task in tasks if (task / "comm").read_text().startswith("numa_")]
    assert len(workers) >= driver._engine.plan.workers  # more if an engine of other tests is alive
    assert all(len(os.sched_getaffinity(worker)) == 1 for worker in workers)
