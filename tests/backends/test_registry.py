"""Where kt-kernel's operators cannot run, `auto` takes torch and says why, and AMXBF16 is refused in words."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from kt_hf import KTAMXConfigError, KTAMXNotAvailableError, apply_kt_moe
from kt_hf.backends import Availability, ExpertWeights, choose_backend
from kt_hf.backends import registry as backends
from kt_hf.backends.kt_kernel import installation as kernel_module
from kt_hf.backends.kt_kernel.backend import KTKernelBackend
from kt_hf.backends.kt_kernel.operators import check_shape
from kt_hf.shapes import ExpertShape
from kt_hf.system.cpu import CpuFeatures, ThreadPlan
from tests.support.cases import KERNEL_MARKS, make_config
from tests.support.helpers import MIXTRAL
from tests.support.machine import features

SHAPE = ExpertShape(8, 2, 64, 96)

SCRIPT = """
import logging, os, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kt_kernel":
            raise ImportError("No module named 'kt_kernel', for the test")

if sys.argv[1] == "hidden":
    sys.meta_path.insert(0, Hide())
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
import torch
from kt_hf import KTAMXNotAvailableError, KTConfig, apply_kt_moe
from tests.support.models import FAMILIES

family = FAMILIES["mixtral"]
model = family()
modules = dict(model.named_modules())
try:
    apply_kt_moe(model, KTConfig(kt_backend="AMXBF16"))
except KTAMXNotAvailableError as error:
    print("REFUSED", error)
    assert isinstance(error, ImportError)
assert dict(model.named_modules()) == modules
with torch.no_grad():
    expected = model(family.inputs()).logits
    patched = apply_kt_moe(model, KTConfig(kt_lora_rank=0))
    assert patched._kt_wrappers[0].backend_name == "torch"
    torch.testing.assert_close(patched(family.inputs()).logits, expected, rtol=1e-3, atol=1e-3)
print("DONE")
"""


NEEDS_KT_KERNEL = pytest.mark.skipif(importlib.util.find_spec("kt_kernel") is None, reason="kt-kernel is not installed")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        pytest.param("avx2", "avx2 variant has no SFT operators", marks=NEEDS_KT_KERNEL),
        ("hidden", "No module named 'kt_kernel', for the test"),
    ],
)
def test_in_a_process_without_operators(how: str, why: str) -> None:
    environment = {**os.environ, "KT_KERNEL_CPU_VARIANT": "avx2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "DONE"
    (refusal,) = [line for line in lines if line.startswith("REFUSED")]
    assert "kt_backend=AMXBF16" in refusal
    assert "kt_backend=torch" in refusal
    (warning,) = [line for line in lines if line.startswith("WARNING kt_hf")]
    assert "backend torch" in warning
    assert why in refusal
    assert why in warning
    assert (
        how != "hidden" or ("pip install kt-kernel==" if kernel_module.has_wheels() else "it has wheels for") in warning
    )


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "availability", lambda *_: Availability(True, "kt-kernel 0.7.2, amx variant"))


@pytest.mark.usefixtures("available")
def test_auto_takes_the_operators_where_they_run() -> None:
    assert choose_backend("auto", SHAPE) == ("AMXBF16", "kt-kernel 0.7.2, amx variant")
    assert choose_backend("AMXBF16", SHAPE)[0] == "AMXBF16"
    assert choose_backend("torch", SHAPE) == ("torch", "asked for")


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize(
    ("amx", "workers", "dtype", "expected"),
    [
        (False, 1, torch.bfloat16, "torch"),
        (False, 1, None, "torch"),
        (False, 1, torch.float32, "AMXBF16"),  # PyTorch would compute in fp32
        (True, 1, torch.bfloat16, "AMXBF16"),
        (False, 2, torch.bfloat16, "AMXBF16"),
        (False, None, torch.bfloat16, "AMXBF16"),  # the user has set the number
    ],
)
def test_auto_computes_by_pytorch_on_few_cores(
    amx: bool, workers: int | None, dtype: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "cpu_features", lambda: CpuFeatures("", amx, True, True))
    monkeypatch.setattr(backends, "affinity", lambda: {0, 1})
    monkeypatch.setattr(backends, "physical_cores", sorted)
    assert choose_backend("auto", SHAPE, workers=workers, dtype=dtype)[0] == expected
    assert choose_backend("AMXBF16", SHAPE, workers=workers, dtype=dtype)[0] == "AMXBF16"
    monkeypatch.setattr(backends, "affinity", lambda: set(range(64)))  # two cores of many
    assert choose_backend("auto", SHAPE, workers=workers, dtype=dtype)[0] == "AMXBF16"


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_auto_goes_by_the_machine_and_not_by_pytorchs_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS=1, which torchrun sets, changes the advice and not the choice; two threads of a core are one."""
    monkeypatch.setattr(backends, "cpu_features", lambda: features(avx512_bf16=True))
    monkeypatch.setattr(backends, "affinity", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(backends, "physical_cores", lambda cpus: sorted(cpus)[:2])
    name, reason = choose_backend("auto", SHAPE, workers=1)
    assert name == "torch"
    assert "two physical cores without AMX" in reason
    assert ("OMP_NUM_THREADS=2 uses both cores" in reason) == (threads == 1)
    for cores in (1, 3):
        monkeypatch.setattr(backends, "physical_cores", lambda cpus, cores=cores: sorted(cpus)[:cores])
        assert choose_backend("auto", SHAPE, workers=1) == ("AMXBF16", "kt-kernel 0.7.2, amx variant")


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (ExpertShape(8, 2, 72, 96), "hidden size 72 is not a multiple of 32"),
        (ExpertShape(8, 2, 64, 40), "intermediate size 40 is not a multiple of 32"),
        (ExpertShape(8, 9, 64, 96), "9 experts a token of 8"),
    ],
)
def test_shapes_that_the_operators_cannot_compute(shape: ExpertShape, words: str) -> None:
    name, reason = choose_backend("auto", shape)
    assert name == "torch"
    assert words in reason
    with pytest.raises(KTAMXConfigError, match=rf"kt_backend=AMXBF16: .*{words}.*kt_backend=torch takes any shape"):
        choose_backend("AMXBF16", shape)


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize(
    ("name", "sizes", "pools", "words"),
    [
        ("AMXInt8", (96, 64), 1, "hidden size 96 is not a multiple of 64. kt_backend=AMXBF16 can compute them"),
        (
            "AMXInt4",
            (576, 1536),
            1,
            "hidden size 576 is not a multiple of 128. kt_backend=AMXBF16 and kt_backend=AMXInt8",
        ),
        ("AMXInt4", (128, 192), 1, "intermediate size 192 is not a multiple of 128"),
        ("AMXInt4", (2048, 1408), 2, "1408 does not split into 2 pools of multiples of 128 (kt_tp_enabled=False"),
        ("AMXBF16", (64, 96), 2, "96 does not split into 2 pools of multiples of 32 (kt_tp_enabled=False"),
    ],
)
def test_each_arithmetic_has_its_multiples(name: str, sizes: tuple[int, int], pools: int, words: str) -> None:
    with pytest.raises(KTAMXConfigError, match=rf"kt_backend={name}: .*{re.escape(words)}"):
        choose_backend(name, ExpertShape(8, 2, *sizes), pools)


@pytest.mark.usefixtures("available")
def test_auto_never_quantises() -> None:
    """Not even where INT8 could compute and bf16 could not be split."""
    assert choose_backend("auto", ExpertShape(8, 2, 128, 128))[0] == "AMXBF16"
    assert choose_backend("auto", SHAPE, 2)[0] == "torch"


def test_a_layer_is_refused_in_the_words_of_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor, which gets the pointers, checks by itself."""
    monkeypatch.setattr(kernel_module, "availability", lambda *_: Availability(False, "no such instructions"))
    weights = ExpertWeights(torch.zeros(8, 192, 64).bfloat16(), torch.zeros(8, 64, 96).bfloat16())
    with pytest.raises(KTAMXNotAvailableError, match=r"AMXBF16 cannot run: no such instructions.*runs on any machine"):
        KTKernelBackend(weights, SHAPE, 0, ThreadPlan(((0, 1),)), 64, False, False, "layer 3")
    with pytest.raises(KTAMXConfigError) as whole_model:
        check_shape(ExpertShape(8, 2, 96, 64), 1, "AMXInt8")
    with pytest.raises(KTAMXConfigError, match=re.escape(f"layer 3: {whole_model.value}")):
        check_shape(ExpertShape(8, 2, 96, 64), 1, "AMXInt8", "layer 3")


@pytest.mark.parametrize("name", ["AMXInt8", "AMXInt4"])
def test_quantised_operators_are_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "availability", lambda *_: Availability(False, "no such instructions"))
    with pytest.raises(KTAMXNotAvailableError, match=rf"kt_backend={name} cannot run: no such instructions"):
        apply_kt_moe(MIXTRAL(), make_config(name))


@pytest.mark.parametrize(
    ("variant", "cpu", "ok"),
    [
        ("amx", features(amx=True, avx512_bf16=True), True),
        ("amx", features(avx512_bf16=True), False),
        ("avx512_bf16", features(avx512_bf16=True), True),
        ("avx512_bf16", features(), False),
    ],
)
def test_forced_variant_needs_the_cpus_instructions(
    monkeypatch: pytest.MonkeyPatch, variant: str, cpu: Any, ok: bool
) -> None:
    """A variant that the environment forces would otherwise end the process by an illegal instruction."""
    module = type(sys)("kt_kernel")
    module.__cpu_variant__, module.__version__ = variant, "0.7.2"
    module.kt_kernel_ext = type(sys)("kt_kernel.kt_kernel_ext")
    module.kt_kernel_ext.moe = type(sys)("moe")
    module.kt_kernel_ext.moe.AMXBF16_SFT_MOE = object
    monkeypatch.setitem(sys.modules, "kt_kernel", module)
    monkeypatch.setattr(kernel_module, "cpu_features", lambda: cpu)
    found = kernel_module.availability.__wrapped__()
    assert found.ok is ok
    assert variant in found.reason
    assert ok or "instructions this CPU lacks" in found.reason


@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        (features(amx=True, avx512_bf16=True), "Some CPU (AMX, AVX512-BF16)"),
        (features(avx512_bf16=True), "Some CPU (AVX512-BF16)"),
        (features(), "Some CPU (AVX2 only)"),
        (features(avx2=False), "Some CPU (no AVX2)"),
    ],
)
def test_cpu_in_words(monkeypatch: pytest.MonkeyPatch, cpu: Any, words: str) -> None:
    monkeypatch.setattr(backends, "cpu_features", lambda: cpu)
    assert backends.describe_cpu() == words


@pytest.mark.parametrize("mark", [pytest.param(None, marks=KERNEL_MARKS, id="kernel")])
def test_operators_that_run_here_are_available(mark: None) -> None:
    """Asked of the package; the mark asked the CPU and kt-kernel."""
    assert backends.kernel_availability().ok
    assert choose_backend("auto", SHAPE)[0] == "AMXBF16"
