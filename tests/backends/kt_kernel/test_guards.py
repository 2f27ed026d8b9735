"""Each rule whose violation would crash the process or be silently wrong is a Python error of kt_hf instead.

Every case runs in a process of its own, forked from one that has imported everything: were the guard missing, that
process would die of a signal, and the test fail with its exit status, not take the suite with it.
"""

import textwrap

import pytest

from tests.support.cases import KERNEL_MARKS
from tests.support.forked import forked

pytestmark = list(KERNEL_MARKS)

PRELUDE = """
import tests.support.contract_layer
import torch
from kt_hf import *
from kt_hf.backends import ExpertShape, ExpertWeights
from kt_hf.backends.kt_kernel.backend import KTKernelBackend
from kt_hf.system.cpu import ThreadPlan

PLAN = ThreadPlan(((0, 1),))

def build(E=8, K=2, H=64, I=96, rank=8, max_len=64, plan=PLAN, weights=None, label="layer 3"):
    weights = weights or ExpertWeights(torch.randn(E, 2 * I, H).bfloat16(), torch.randn(E, H, I).bfloat16())
    return KTKernelBackend(weights, ExpertShape(E, K, H, I), rank, plan, max_len, False, False, label)

def batch(T=4, K=2, H=64):
    return torch.randn(T, H).bfloat16(), torch.randint(0, 8, (T, K)), torch.rand(T, K)

def expect(error, *words):
    import contextlib
    @contextlib.contextmanager
    def inner():
        try:
            yield
        except error as e:
            missing = [w for w in words if w not in str(e)]
            assert not missing, f"{missing} not in: {e}"
            print("REFUSED", e)
        else:
            raise SystemExit("not refused")
    return inner()
"""

# name -> what a caller might do wrong. Numbers are those of the rules in docs/kernel-contract.md.
CASES = {
    "1 hidden size": 'with expect(KTAMXConfigError, "layer 3", "hidden size 72", "32"): build(H=72)',
    "1 intermediate size": 'with expect(KTAMXConfigError, "layer 3", "intermediate size 40", "32"): build(I=40)',
    "1 split over pools": (
        'with expect(KTAMXConfigError, "96", "2 pools"): build(I=96, plan=ThreadPlan(((0, 1), (0, 1))))'
    ),
    "1 weights of another shape": """
        weights = ExpertWeights(torch.randn(8, 64, 192).bfloat16(), torch.randn(8, 64, 96).bfloat16())
        with expect(KTAMXConfigError, "gate_up_proj", "(8, 192, 64)"): build(weights=weights)
    """,
    "2 more experts a token": """
        x, _, _ = batch()
        with expect(KTAMXForwardError, "layer 3", "top_k_index", "(4, 3)", "(4, 2)"):
            build().forward(x, torch.zeros(4, 3, dtype=torch.int64), torch.rand(4, 3), True)
    """,
    "3 longer than max_len": """
        with expect(KTAMXForwardError, "65", "kt_max_len=64"): build().forward(*batch(65), True)
    """,
    "3 max_len that no memory holds": """
        with expect(KTAMXConfigError, "layer 3", "kt_max_len=1000000000000"): build(max_len=10**12)
    """,
    "4 ids of int32": """
        x, ids, w = batch()
        with expect(KTAMXForwardError, "top_k_index", "int32", "int64"): build().forward(x, ids.int(), w, True)
    """,
    "4 id too large": """
        x, ids, w = batch()
        ids[2, 1] = 8
        with expect(KTAMXForwardError, "8", "0 to 7"): build().forward(x, ids, w, True)
    """,
    "4 id negative": """
        x, ids, w = batch()
        ids[2, 1] = -2
        with expect(KTAMXForwardError, "-2"): build().forward(x, ids, w, True)
    """,
    "4 huge id through the layer is skipped": """
        from tests.support.contract_layer import layer
        x, ids, w = batch()
        ids[0, 0] = 2**40
        assert torch.isfinite(layer()(x, ids, w)).all()
        print("REFUSED")
    """,
    "5 routing weights of bf16": """
        x, ids, w = batch()
        with expect(KTAMXForwardError, "top_k_weights", "bfloat16"): build().forward(x, ids, w.bfloat16(), True)
    """,
    "5 hidden states of fp32": """
        x, ids, w = batch()
        with expect(KTAMXForwardError, "hidden_states", "float32"): build().forward(x.float(), ids, w, True)
    """,
    "5 hidden states not contiguous": """
        x, ids, w = batch()
        x = x.t().contiguous().t()
        with expect(KTAMXForwardError, "hidden_states", "strides"): build().forward(x, ids, w, True)
    """,
    "5 hidden states of another width": """
        x, ids, w = batch(H=96)
        with expect(KTAMXForwardError, "hidden_states", "(4, 96)", "(4, 64)"): build().forward(x, ids, w, True)
    """,
    "7 a forward in between": """
        b = build()
        x, ids, w = batch()
        _, saved = b.forward(x, ids, w, True)
        b.forward(x[:1], ids[:1], w[:1], False)
        assert not b.can_backward(saved)
        with expect(KTAMXBackwardError, "layer 3"): b.backward(saved, x)
    """,
    "7 a LoRA update in between": """
        b = build()
        x, ids, w = batch()
        _, saved = b.forward(x, ids, w, True)
        b.set_lora(tuple(torch.randn(s) for s in b.shape.lora_shapes(8)))
        with expect(KTAMXBackwardError, "layer 3"): b.backward(saved, x)
    """,
    "8 gradient of another length": """
        b = build()
        x, ids, w = batch()
        _, saved = b.forward(x, ids, w, True)
        with expect(KTAMXBackwardError, "grad_output", "(3, 64)", "(4, 64)"): b.backward(saved, x[:3])
    """,
    "8 backward without a forward": """
        b = build()
        x, ids, w = batch()
        _, saved = b.forward(x, ids, w, True)
        b.backward(saved, x)
        with expect(KTAMXBackwardError, "layer 3"): b.backward(saved, x)
    """,
    "9 rank larger than packed": """
        b = build(rank=8)
        with expect(KTAMXConfigError, "rank 16", "kt_lora_rank=16"):
            b.set_lora(tuple(torch.randn(s) for s in b.shape.lora_shapes(16)))
    """,
    "9 a LoRA tensor of another shape": """
        b = build(rank=8)
        tensors = [torch.randn(s) for s in b.shape.lora_shapes(8)]
        tensors[3] = tensors[3][:, :-1]
        with expect(KTAMXConfigError, "up_lora_b"): b.set_lora(tuple(tensors))
    """,
    "9 rank 0 trains the input": """
        b = build(rank=0)
        x, ids, w = batch()
        _, saved = b.forward(x, ids, w, True)
        assert torch.isfinite(b.backward(saved, x).hidden_states).all()
        print("REFUSED")
    """,
    "10 values changed after packing are seen": """
        b = build(rank=8)
        x, ids, w = batch()
        before = b.forward(x, ids, w, False)[0]
        b.set_lora(tuple(torch.randn(s) for s in b.shape.lora_shapes(8)))
        assert not torch.equal(before, b.forward(x, ids, w, False)[0])
        print("REFUSED")
    """,
    "12 keys are never used twice": """
        from kt_hf.backends.kt_kernel import operator_config
        first = build(); del first
        a = next(operator_config._layer_keys); second = build(); c = next(operator_config._layer_keys)
        assert c == a + 2, (a, c)
        print("REFUSED")
    """,
    "13 one engine for two plans": """
        a = build(); b = build(plan=ThreadPlan(((0, 2),)))
        assert a.engine is b.engine
        print("REFUSED")
    """,
    "14 weights may go once loaded": """
        import gc
        weights = ExpertWeights(torch.randn(8, 192, 64).bfloat16(), torch.randn(8, 64, 96).bfloat16())
        b = build(weights=weights)
        assert weights.gate_up.numel() == 0 and weights.down.numel() == 0
        gc.collect(); junk = [torch.full((8, 192, 64), 3.0) for _ in range(20)]
        assert torch.isfinite(b.forward(*batch(), False)[0]).all()
        print("REFUSED")
    """,
    "15 dropout never reaches the operator": """
        from tests.support.contract_layer import adapted
        model = adapted(lora_dropout=0.5)
        x, ids, w = batch()
        layer = model._kt_wrappers[0].train()
        with torch.no_grad():
            assert torch.equal(layer(x, ids, w), layer(x, ids, w))
        print("REFUSED")
    """,
    "16 a forked child": """
        import os
        b = build()
        child = os.fork()
        if child == 0:
            try:
                b.forward(*batch(), False)
            except KTAMXForwardError as e:
                os._exit(0 if "fork" in str(e) else 5)
            os._exit(6)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("REFUSED")
    """,
    "17 experts on the GPU": """
        from tests.support.contract_layer import model
        with expect(KTAMXConfigError, "kt_num_gpu_experts"):
            apply_kt_moe(model(), KTConfig(kt_backend="AMXBF16", kt_num_gpu_experts=2000))
    """,
    "negative rank": 'with expect(KTAMXConfigError, "-1"): build(rank=-1)',
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    scripts = {name: textwrap.dedent(script) for name, script in CASES.items()}
    return forked(textwrap.dedent(PRELUDE), scripts, tmp_path_factory.mktemp("guards"))


@pytest.mark.parametrize("name", CASES)
def test_refused_in_python(name, ended):
    done = ended[name]
    assert done.code == 0, f"exit {done.code}\n{done.out[-2000:]}\n{done.err[-3000:]}"
    assert "REFUSED" in done.out
