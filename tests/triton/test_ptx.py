"""The emulator of tests/triton/ptx itself: single instructions by hand, lanes that part, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.triton.ptx.machine import Machine, Order
from tests.triton.ptx.memory import Fault, Memory, Region
from tests.triton.ptx.ops import step_of
from tests.triton.ptx.parse import Program
from tests.triton.ptx.run import warps

KERNEL = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u32 kernel_param_1
)
.reqntid THREADS
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r7, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    BODY
$L__end:
    st.global.b32 [%rd3 + 0], %r2;
    ret;
}
"""


def run(body: str, number: int = 0, threads: int = 32, order: Order = Order.FORWARDS) -> list[int]:
    """What a kernel leaves in ``%r2`` of each thread (``%r1`` is its number, ``%r7`` the kernel's)."""
    out = np.zeros(threads, np.int32)
    memory = Memory([Region(out.ctypes.data, out.view(np.uint8))])
    program = Program(KERNEL.replace("BODY", body).replace("THREADS", str(threads)))
    Machine(program, step_of, 1024).launch((1,), [out.ctypes.data, number], memory, order)
    return out.tolist()


@pytest.mark.parametrize(
    ("line", "number", "want"),
    [
        ("mov.b32 %r2, -3;", 0, -3),
        ("div.s32 %r2, %r7, 4;", -7, -1),
        ("rem.s32 %r2, %r7, 4;", -7, -3),
        ("div.u32 %r2, %r7, 2;", -2, (1 << 31) - 1),
        ("mul.hi.s32 %r2, %r7, %r7;", 1 << 20, 1 << 8),
        ("mad.lo.s32 %r2, %r7, 3, 4;", 5, 19),
        ("shl.b32 %r2, %r7, 32;", 5, 0),
        ("shr.s32 %r2, %r7, 40;", -5, -1),
        ("shr.u32 %r2, %r7, 28;", -1, 15),
        ("bfe.u32 %r2, %r7, 4, 8;", 0xABCD, 0xBC),
        ("bfe.s32 %r2, %r7, 4, 8;", 0xABCD, 0xBC - 256),
        ("popc.b32 %r2, %r7;", 0x1F1, 6),
        ("prmt.b32 %r2, %r7, %r1, 0x3302;", 0x12345678, 0x12127834),
        ("prmt.b32 %r2, %r7, %r1, 0x4448;", 0x80, 0xFF),
        ("mov.b32 {%rs1, %rs2}, %r7; mov.b32 %r2, {%rs2, %rs1};", 0x12345678, 0x56781234),
        ("cvt.rn.f32.s32 %r2, %r7;", 2, 0x40000000),
        ("cvt.rzi.s32.f32 %r2, 0fC0200000;", 0, -2),
        ("cvt.rzi.s32.f32 %r2, 0f7F800000;", 0, (1 << 31) - 1),
        ("cvt.rmi.f32.f32 %r3, 0fC0200000; cvt.rzi.s32.f32 %r2, %r3;", 0, -3),
        ("cvt.rn.bf16.f32 %rs1, 0f3F808001; cvt.u32.u16 %r2, %rs1;", 0, 0x3F81),
        ("mov.b32 %r2, 1; setp.lt.f32 %p1, 0f7FC00000, 0f00000000; @%p1 mov.b32 %r2, 2;", 0, 1),
        ("mov.b32 %r2, 1; setp.geu.f32 %p1, 0f7FC00000, 0f00000000; @%p1 mov.b32 %r2, 2;", 0, 2),
        ("min.f32 %r2, 0f7FC00000, %r7;", 0x3F800000, 0x3F800000),
        ("fma.rn.f32 %r2, 0f40000000, 0f40400000, 0f3F800000;", 0, 0x40E00000),
    ],
)
def test_what_an_instruction_computes(line: str, number: int, want: int) -> None:
    assert set(run(line.replace("%r1,", "0,"), number & 0xFFFFFFFF)) == {want}


def test_lanes_that_part_meet_again() -> None:
    """The odd ones take another way, twice as long for each; the sum is of all."""
    body = """
    and.b32 %r3, %r1, 1;
    mov.b32 %r2, 0;
    setp.eq.b32 %p1, %r3, 0;
    @%p1 bra $L__even;
$L__again:
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p2, %r2, %r1;
    @%p2 bra $L__again;
    bra.uni $L__sum;
$L__even:
    mov.b32 %r2, 100;
$L__sum:
    redux.sync.add.s32 %r2, %r2, -1;
    """
    assert set(run(body)) == {16 * 100 + sum(range(1, 32, 2))}


def test_lanes_look_at_each_other() -> None:
    lanes = list(range(32))
    assert run("shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;") == [i ^ 16 for i in lanes]
    assert run("shfl.sync.up.b32 %r2, %r1, 3, 0, -1;") == [i - 3 if i >= 3 else i for i in lanes]
    assert run("shfl.sync.idx.b32 %r2, %r1, 5, 31, -1;") == [5] * 32


def test_warps_wait_for_each_other_at_a_barrier() -> None:
    body = """
    mov.b32 %r5, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r5, %r3;
    st.shared.b32 [%r4 + 0], %r1;
    WAIT
    xor.b32 %r4, %r4, 128;
    ld.shared.b32 %r2, [%r4 + 0];
    """
    waited = [i ^ 32 for i in range(64)]
    for order in Order:
        assert run(body.replace("WAIT", "bar.sync 0;"), threads=64, order=order) == waited
    assert run(body.replace("WAIT", ""), threads=64)[:32] != waited[:32]
    assert run(body.replace("WAIT", ""), threads=64, order=Order.BACKWARDS)[32:] != waited[32:]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 %r2, 0; add.s64 %rd3, %rd3, 4;", "out of bounds: st.global"),
        ("mov.b32 %r2, 0; add.s64 %rd3, %rd3, 2;", "no multiples of 4"),
        ("ld.shared.b32 %r2, [%r1 + 1024];", "no multiples of 4"),
        ("ld.shared.b8 %r2, [%r1 + 1023];", "out of bounds: ld.shared"),
        ("mov.b32 %r2, %r1; mov.b64 %rd3, %rd1;", "different numbers to one address"),
        ("setp.lt.s32 %p1, %r1, 3; @%p1 ret; bar.sync 0;", "wait for others that never come: bar.sync"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 bra $L__end; bar.sync 0;", "some of them have ended"),
    ],
)
def test_what_a_gpu_would_not_do(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body, threads=64)


def test_an_instruction_that_is_not_known() -> None:
    with pytest.raises(NotImplementedError, match="mma"):
        run("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1};")


@triton.jit
def _arithmetic_kernel(out, a, b, n, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + i, mask=i < n, other=1), tl.load(b + i, mask=i < n, other=1)
    number = x.to(tl.float32) * scale
    tl.store(out + i, x // y + (x % y) * 2 + number.to(tl.int64), mask=i < n)


def test_a_kernel_of_several_blocks_whose_lanes_divide_by_different_ways() -> None:
    """64-bit numbers are divided as 32-bit ones where they fit: a branch in each lane."""
    a = torch.randint(0, 1 << 20, (300,)) << torch.randint(0, 30, (300,))
    b = torch.randint(1, 1000, (300,)) << torch.randint(0, 34, (300,))
    out = torch.zeros(302, dtype=torch.int64)
    with warps() as ran:
        _arithmetic_kernel[(3,)](out, a, b, 300, 0.25, BLOCK=128)
    assert ran == {"_arithmetic_kernel"}
    want = a // b + a % b * 2 + (a.float() * 0.25).long()
    assert torch.equal(out[:300], want)
    assert out[300:].tolist() == [0, 0]
