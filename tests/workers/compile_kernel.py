"""Compiles the Triton step for GPUs that need not be there, and reads how wide its accesses are."""

import os
import re

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sophia_integrations.optim import triton_step


def accesses(capability, dtype, momentum=tl.float32, **flags):
    """{"ld" or "st": the accesses to global memory of 16 bytes} of the kernel compiled for `capability`."""
    constants = dict(PARAM=dtype, GRAD=dtype, MOMENTUM=momentum, STATE=tl.float32)
    constants.update(MAXIMIZE=False, NESTEROV=True, NOISE=True)
    constants.update(DEPTH=8, CHUNK=triton_step.CHUNK, BLOCK=triton_step.BLOCK, **flags)
    signature = {"table": "*i64", "numbers": "*fp64", "counts": "*i64", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(triton_step._update_kernel, signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert "local" not in "".join(re.findall(r"\.(?:ld|st)\.local", ptx)), "registers were spilt"
    return {kind: len(re.findall(kind + r"\.global\.v4\.b32", ptx)) for kind in ("ld", "st")}


def main():
    # 1,024 elements by 128 threads are 8 a thread: 32 bytes of float32, 16 of bfloat16.
    for capability in (80, 90):
        assert accesses(capability, tl.float32, ALIGNED=True, COUNTING=True) == {"ld": 8, "st": 4}
        assert accesses(capability, tl.bfloat16, ALIGNED=True, COUNTING=False) == {"ld": 6, "st": 3}
        momentum = accesses(capability, tl.float32, momentum=tl.bfloat16, ALIGNED=True, COUNTING=False)
        assert momentum == {"ld": 7, "st": 3}
    assert accesses(90, tl.float16, ALIGNED=False, COUNTING=False) == {"ld": 0, "st": 0}


if __name__ == "__main__":
    main()
