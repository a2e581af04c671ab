"""Compiling for GPUs that are not here: what is read from the compiler's output, and, where its
parts are installed, the engine's own decode step."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fairkv_jax.aot.hlo import Module
from fairkv_jax.aot.kernels import POOL_BYTES, lower_kernels
from fairkv_jax.aot.launches import Launches, count_launches
from fairkv_jax.aot.report import (
    MAX_MOVED_SHARE,
    AssemblerError,
    Kernel,
    Report,
    compile_and_report,
    parse_assembler,
    read_kernels,
)
from fairkv_jax.aot.steps import Setup, config_of, device_bytes, lower_decode_step, lower_prefill
from fairkv_jax.aot.targets import Target, find_ptxas, missing_parts, targets
from fairkv_jax.config import KVConfig
from fairkv_jax.pallas.ragged_decode.pieces import MAX_PAIRS
from fairkv_jax.plan import SHAPES, make_plan
from fairkv_jax.profile import synthetic_profile

needs_compiler = pytest.mark.skipif(missing_parts() is not None, reason=missing_parts() or "")

KERNELS = {
    ("a100", "auto"): {"append_and_decode", "merge_pieces"},
    ("h200", "auto"): {"append_and_decode", "merge_pieces"},
    ("h200", "mosaic"): {"list_pieces", "ragged_decode_mosaic_gpu_kernel", "merge_pieces"},
}


@pytest.fixture(scope="module", autouse=True)
def optimised() -> Iterator[None]:
    """Compiles with XLA's usual optimisations, without which its own kernels spill.

    Programs for GPUs that are not here cannot be read back from the cache of compiled programs.
    """
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    usual = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true"
    jax.config.update("jax_disable_most_optimizations", usual)


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

MOVES = """\
HloModule jit_decode_step

%merged_weights (p0: bf16[80,8192,3584], p1: s32[], p2: bf16[80,8192,3584]) -> bf16[8192,7168] {
  %p0 = bf16[80,8192,3584]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[80,8192,3584]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %gate = bf16[1,8192,3584]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), \
dynamic_slice_sizes={1,8192,3584}
  %gate.1 = bf16[8192,3584]{1,0} bitcast(%gate)
  %up = bf16[1,8192,3584]{2,1,0} dynamic-slice(%p2, %p1, %zero, %zero), \
dynamic_slice_sizes={1,8192,3584}
  %up.1 = bf16[8192,3584]{1,0} bitcast(%up)
  ROOT %both = bf16[8192,7168]{1,0} concatenate(%gate.1, %up.1), dimensions={1}
}

%dynamic-slice-fusion (p0: bf16[80,3584,8192], p1: s32[], p2: bf16[64,3584]) -> bf16[64,8192] {
  %p0 = bf16[80,3584,8192]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[64,3584]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %down = bf16[1,3584,8192]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), \
dynamic_slice_sizes={1,3584,8192}
  %down.1 = bf16[3584,8192]{1,0} bitcast(%down)
  ROOT %product = (bf16[64,8192]{1,0}, s8[33554432]{0}) custom-call(%p2, %down.1), \
custom_call_target="__cublas$lt$matmul"
}

%normed (p0: bf16[80,8192], p1: s32[], p2: f32[64,8192]) -> (f32[64,8192], bf16[8192]) {
  %p0 = bf16[80,8192]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64,8192]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %scale = bf16[1,8192]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8192}
  %scale.1 = bf16[8192]{0} bitcast(%scale)
  %wide = bf16[64,8192]{1,0} broadcast(%scale.1), dimensions={1}
  %scaled = f32[64,8192]{1,0} multiply(%p2, %wide)
  ROOT %results = (f32[64,8192]{1,0}, bf16[8192]{0}) tuple(%scaled, %scale.1)
}

%dequantized (p0: s8[8192,512]) -> bf16[8192,512] {
  %p0 = s8[8192,512]{1,0} parameter(0)
  ROOT %converted = bf16[8192,512]{1,0} convert(%p0)
}

%appended (p0: bf16[4096,128], p1: bf16[1,128], p2: s32[]) -> bf16[4096,128] {
  %p0 = bf16[4096,128]{1,0} parameter(0)
  %p1 = bf16[1,128]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %updated = bf16[4096,128]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%layer (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %merged = bf16[8192,7168]{1,0} fusion(%gates, %index, %ups), kind=kInput, calls=%merged_weights
  %direct = (bf16[64,8192]{1,0}, s8[33554432]{0}) fusion(%downs, %index, %x), kind=kCustom, \
calls=%dynamic-slice-fusion
  %norm = (f32[64,8192]{1,0}, bf16[8192]{0}) fusion(%scales, %index, %x), kind=kLoop, calls=%normed
  %wide = bf16[8192,512]{1,0} fusion(%narrow), kind=kLoop, calls=%dequantized
  %append = bf16[4096,128]{1,0} fusion(%pool, %new, %index), kind=kLoop, calls=%appended
}

%greedy (arg.1: (f32[64,512])) -> (f32[64,512]) {
  ROOT %arg.1 = (f32[64,512]{1,0}) parameter(0)
}

%penalised (arg.2: (f32[64,512])) -> (f32[64,512]) {
  %logits = f32[64,512]{1,0} get-tuple-element(%arg.2), index=0
  ROOT %copy.3 = f32[64,512]{1,0} copy(%logits)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %layers = (s32[], f32[8]) while(%init), condition=%cond, body=%layer, \
backend_config={"known_trip_count":{"n":"80"}}
  %sampled = (f32[64,512]{1,0}) conditional(%which, %a, %b), \
branch_computations={%greedy, %penalised}
  %copy.4 = f32[64,512]{1,0} copy(%gathered)
  %start = (f32[16,1024]{1,0}, f32[16,1024]{1,0}, u32[]) copy-start(%host)
}
"""
"""Gate and up weights that are copied side by side, as XLA has compiled them as two parameters; and
what a step may well do."""

THUNKS = """\
000: kCommandBuffer [source       | next=008 (1)]
    001: kCopy         [source | sink] kCopy
    002: kCustomKernel [source | sink] loop_broadcast_fusion
008: kWhile         [prev=000 (1) | sink        ]
condition:
    009: kCustomKernel [source | sink] wrapped_compare_1
  body:
    019: kWhile          [prev=000 (1) | next=053 (1)]
condition:
        020: kCustomKernel [source | sink] loop_compare_fusion
      body:
        000: kCommandBuffer [source | sink]
            021: kAsyncStart         [source       | next=028 (3)]
                023: kDynamicSliceFusion [source | sink] params=1, results=1
                    022: kCopy [source | sink] kCopy
            027: kAsyncDone          [source       | sink        ] async_id=21
            034: kCustomKernel       [prev=032 (2) | next=035 (1)] append_and_decode
    055: kAllGather      [prev=054 (1) | next=000 (1)] kAllGather
    093: kConditional    [prev=000 (1) | next=000 (1)]
      false_branch:
        094: kCustomKernel [source | sink] input_scatter_fusion
        095: kCustomKernel [source | sink] loop_select_fusion
      true_branch:
        096: kCopy [source | sink] kCopy
"""
THUNK_NAMES = """\
thunk_metadata {
  thunk_info {
    profile_annotation: "steps"
    thunk_id: 8
  }
  thunk_kind: "kWhile"
}
thunk_metadata {
  thunk_info {
    profile_annotation: "loop"
    thunk_id: 19
  }
  thunk_kind: "kWhile"
}
"""


def report(hlo: str) -> Report:
    return Report(0.0, 0, 0, 0, (), {}, tuple(Module(hlo).moves()), None, hlo)


def setup_of(model: str, num_devices: int, batch: int) -> Setup:
    shape = SHAPES[model]
    profile = synthetic_profile(shape, 256, imbalance=0.6)
    return Setup(config_of(shape), make_plan(profile, num_devices), profile, batch)


def test_targets_say_what_is_compiled_for() -> None:
    found = {name: (t.architecture, t.memory_bytes) for name, t in targets().items()}
    assert found["a100"] == ("sm_80", 85050982400)
    assert found["h100"] == ("sm_90a", 84942979072)
    assert found["h200"] == ("sm_90a", 150120366080)
    assert found["l4"][1] < found["l40"][1] == found["l40s"][1]


@pytest.mark.parametrize("target", targets().values(), ids=targets())
def test_targets_describe_hosts(target: Target) -> None:
    for field in ("driver_version", "compile_time_toolkit_version", "device_interconnect_info"):
        assert field in target.description


def _executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_wheels_assembler_comes_before_that_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = _executable(tmp_path / "bin" / "ptxas", "exit 0")
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setattr("numpy.__file__", str(tmp_path / "numpy" / "__init__.py"))
    assert find_ptxas() == on_path
    in_wheel = _executable(tmp_path / "nvidia" / "cu13" / "bin" / "ptxas", "exit 0")
    assert find_ptxas() == in_wheel


def test_an_assembler_that_fails_is_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ptxas = _executable(tmp_path / "ptxas", "echo 'fatal: Unsupported .version 9.4' >&2; exit 255")
    monkeypatch.setattr("fairkv_jax.aot.report.find_ptxas", lambda: ptxas)
    (tmp_path / "a.ptx").write_text("")
    with pytest.raises(AssemblerError, match=r"ptxas cannot assemble a.ptx .*Unsupported .version"):
        read_kernels(tmp_path, "sm_90a")


def test_the_assembler_is_read() -> None:
    kernels = parse_assembler(ASSEMBLER)
    assert kernels == [Kernel("append_and_decode", 128, 0), Kernel("fusion_7", 255, 32)]
    read = dataclasses.replace(report(""), kernels=tuple(kernels))
    assert [kernel.name for kernel in read.own_kernels] == ["append_and_decode"]
    assert [kernel.name for kernel in read.spilling] == ["fusion_7"]


def test_collectives_in_a_loop_count_as_often_as_it_turns() -> None:
    assert Module(HLO).collectives() == {"all-reduce": 61, "all-gather": 1}


def test_launches_in_a_loop_count_as_often_as_it_turns() -> None:
    launches = count_launches(THUNKS, THUNK_NAMES, Module(HLO))
    alone = 1 + 30 + 2  # The conditions of both loops; the collective and the shorter branch.
    assert launches == Launches(graphs=1 + 30, in_graphs=2 + 2 * 30, alone=alone)


def test_what_a_step_moves_without_computing_is_counted() -> None:
    moved = {move.line.split()[0]: (move.calls, move.num_bytes) for move in report(MOVES).moves}
    assert moved == {
        "%merged": (80, 2 * 2 * 8192 * 7168),
        "%norm": (80, 2 * 2 * 8192),
        "%wide": (80, 2 * 2 * 8192 * 512),
        "%append": (80, 2 * 2 * 128),
        "%copy.4": (1, 2 * 4 * 64 * 512),
        "%start": (1, 2 * 4 * 16 * 1024),
    }
    assert report(MOVES).moves[0].line.startswith("%merged")
    weights_bytes = 80 * 2 * 3 * 8192 * 3584
    assert report(MOVES).moved_bytes() > weights_bytes
    without_logits = report(MOVES).moved_bytes() - report(MOVES).moved_bytes(2 * 4 * 64 * 512)
    assert without_logits == 2 * 4 * (64 * 512 + 16 * 1024)


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


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("pairs", [MAX_PAIRS // 2, MAX_PAIRS])
@pytest.mark.parametrize(("backend", "name"), [("triton", "a100"), ("mosaic", "h200")])
def test_the_most_pairs_compile_without_spills(backend: str, name: str, pairs: int) -> None:
    target = targets()[name]
    lowered = lower_kernels(backend, target, 8, 128, "bfloat16", pairs=pairs)
    assert not compile_and_report(lowered, target.architecture).spilling


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
    # All weights are read where they lie.
    weights = device_bytes(setup.shapes(mesh).model)
    assert compiled.moved_bytes(setup.logits_move_bytes) < MAX_MOVED_SHARE * weights
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
