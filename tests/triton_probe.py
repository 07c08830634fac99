"""A Triton kernel whose integer argument is specialised, for the test that counts compilations."""

import triton
import triton.language as tl


@triton.jit
def probe(out, size):
    tl.store(out + tl.program_id(0), size)
