"""Compiling for GPUs that are not here: what is read from the compiler's output, and, where its
parts are installed, the engine's own decode step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fairkv_jax.aot.kernels import POOL_BYTES, lower_kernels
from fairkv_jax.aot.report import (
    Kernel,
    Report,
    compile_and_report,
    count_collectives,
    parse_assembler,
)
from fairkv_jax.aot.steps import Setup, config_of, device_bytes, lower_decode_step, lower_prefill
from fairkv_jax.aot.targets import missing_parts, targets
from fairkv_jax.config import KVConfig
from fairkv_jax.plan import SHAPES, make_plan
from fairkv_jax.profile import synthetic_profile

needs_compiler = pytest.mark.skipif(missing_parts() is not None, reason=missing_parts() or "")

KERNELS = {
    ("a100", "auto"): {"append_and_decode", "merge_pieces"},
    ("h200", "auto"): {"append_and_decode", "merge_pieces"},
    ("h200", "mosaic"): {"list_pieces", "ragged_decode_mosaic_gpu_kernel", "merge_pieces"},
}
ASSEMBLER = """\
ptxas info    : Compiling entry function 'append_and_decode' for 'sm_90a'
ptxas info    : Function properties for append_and_decode
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function 'fusion_7' for 'sm_90a'
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
HLO = """\
HloModule jit_decode_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%layer.2 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[8]{0} all-reduce(%x), to_apply=%sum
  %start = f32[8]{0} all-reduce-start(%y), to_apply=%sum
  %copy.1 = bf16[64,16,128]{2,1,0} copy(%pool)
}

%step.1 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %loop = (s32[], f32[8]) while(%init), condition=%cond, body=%layer.2, \
backend_config={"known_trip_count":{"n":"30"},"known_init_step":{"init":"0","step":"1"}}
  %all-reduce.4 = f32[8]{0} all-reduce(%x), to_apply=%sum
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %steps = (s32[], f32[8]) while(%init), condition=%more, body=%step.1
  %all-gather.3 = f32[16]{0} all-gather(%z), dimensions={0}
  %copy.2 = f32[8]{0} copy(%z)
}
"""


def report(hlo: str) -> Report:
    return Report(0.0, 0, 0, 0, (), {}, hlo)


def setup_of(model: str, num_devices: int, batch: int) -> Setup:
    shape = SHAPES[model]
    profile = synthetic_profile(shape, 256, imbalance=0.6)
    return Setup(config_of(shape), make_plan(profile, num_devices), profile, batch)


def test_targets_say_what_is_compiled_for() -> None:
    found = {name: (t.architecture, t.memory_bytes) for name, t in targets().items()}
    assert found["a100"] == ("sm_80", 85050982400)
    assert found["h100"] == ("sm_90a", 84942979072)
    assert found["h200"] == ("sm_90a", 150120366080)


def test_the_assembler_is_read() -> None:
    kernels = parse_assembler(ASSEMBLER)
    assert kernels == [Kernel("append_and_decode", 128, 0), Kernel("fusion_7", 255, 32)]
    read = dataclasses.replace(report(""), kernels=tuple(kernels))
    assert [kernel.name for kernel in read.own_kernels] == ["append_and_decode"]
    assert [kernel.name for kernel in read.spilling] == ["fusion_7"]


def test_collectives_in_a_loop_count_as_often_as_it_turns() -> None:
    assert count_collectives(HLO) == {"all-reduce": 61, "all-gather": 1}


def test_copies_are_found_by_their_size() -> None:
    assert len(report(HLO).copies_of(8)) == 2
    assert "copy.1" in report(HLO).copies_of(64 * 16 * 128)[0]
    assert not report(HLO).copies_of(64 * 16 * 128 + 1)


@needs_compiler
@pytest.mark.parametrize(
    ("backend", "name", "group", "width", "dtype", "kv_cache_dtype"),
    [
        ("triton", "a100", 8, 128, "bfloat16", "auto"),
        ("triton", "a100", 8, 128, "bfloat16", "int8"),
        ("triton", "a100", 4, 256, "float32", "auto"),
        ("triton", "h200", 16, 96, "float16", "auto"),
        ("triton", "h200", 16, 96, "float16", "int8"),
        ("triton", "h200", 16, 256, "float32", "auto"),
        ("mosaic", "h200", 8, 128, "bfloat16", "auto"),
        ("mosaic", "h200", 8, 128, "bfloat16", "int8"),
        ("mosaic", "h200", 16, 256, "float16", "auto"),
    ],
)
@pytest.mark.slow
def test_kernels_compile_without_spills(
    backend: str, name: str, group: int, width: int, dtype: str, kv_cache_dtype: str
) -> None:
    target = targets()[name]
    lowered = lower_kernels(backend, target, group, width, dtype, kv_cache_dtype)
    compiled = compile_and_report(lowered, target.architecture)
    assert len(compiled.own_kernels) == {"triton": 2, "mosaic": 3}[backend]
    assert not compiled.spilling
    assert not compiled.copies_of(POOL_BYTES // 16)


CUBLAS_BYTES = 32 << 20
"""XLA grants cuBLAS as much on Hopper, and less elsewhere."""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_the_decode_step_runs_the_kernels_and_copies_no_pool(name: str, backend: str) -> None:
    setup = setup_of("smollm2-135m", num_devices=2, batch=8)
    setup = dataclasses.replace(setup, attention_backend=backend)
    target = targets()[name]
    mesh = target.mesh(2)
    layers = setup.config.num_layers
    compiled = compile_and_report(lower_decode_step(setup, mesh), target.architecture)
    assert {kernel.name for kernel in compiled.own_kernels} == KERNELS[name, backend]
    assert not compiled.spilling
    assert not compiled.copies_of(setup.pool_elements // 4)
    # A layer's MLP weights are read where they lie.
    assert not compiled.copies_of(setup.config.hidden_size * setup.config.intermediate_size // 2)
    assert compiled.collectives == {"all-reduce": 2 * layers + 1, "all-gather": 1}
    # Updated in place: beside the pool, and what cuBLAS works in, there is no room for another one.
    beside = compiled.temporary_bytes + compiled.new_output_bytes
    assert beside < setup.pool_elements + CUBLAS_BYTES


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "compression"])
def test_a_prefill_compiles(name: str) -> None:
    setup = setup_of("smollm2-135m", num_devices=2, batch=8)
    target = targets()["h100"]
    lowered = lower_prefill(setup, target.mesh(2), 512, KVConfig("ada_snapkv", budget=256))
    compiled = compile_and_report(lowered[name], target.architecture)
    assert not compiled.spilling
    assert compiled.argument_bytes > 0


@needs_compiler
def test_device_bytes_are_those_of_one_shard() -> None:
    mesh = targets()["h100"].mesh(4)
    placed = NamedSharding(mesh, PartitionSpec("tensor"))
    assert device_bytes([jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=placed)]) == 12
