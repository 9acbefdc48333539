"""Compile every kernel of the engine "triton" for GPUs that need not be there, and print what it takes, as JSON.

Run as a script, without TRITON_INTERPRET: what the interpreter runs cannot be compiled.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from climax_elevation.attention import triton_kernels as kernels
from climax_elevation.attention.engines import triton as engine

CAPABILITIES = (80, 90)  # A100, H100
NUMBERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
HEADS, UNITS = 16, 64
OF_ATTENTION = ("q", "k", "v", "grad")  # in q's type; dblock and the sums of the physics bias too
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel, constants, launch, capability, absent, of_type, number):
    """Registers, bytes of stack and of shared memory of one kernel."""
    names = [parameter.name for parameter in kernel.params]
    constants = {**constants, "EVEN": False, "ROWS": launch.rows, "COLUMNS": launch.columns}
    constants = {name: constants.get(name) for name in names if name in constants or name in absent}
    whole = ("tokens", "block_stride", "sample_stride", "head_stride", "token_stride")
    whole += ("first_row", "end_row", "first_column", "end_column")

    def kind(name):
        if name in constants:
            return "constexpr"
        return "i32" if name in whole else number if name in of_type else "*fp32"

    signature = {name: kind(name) for name in names}
    # as a launch finds them: addresses, strides and lengths are multiples of 16
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if kind(name) != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "stack": stack, "shared": made.metadata.shared}


def attention_kernels(capability, dtype, width, physics):
    """Those of one type and width, with the bias computed inside, or read from a block."""
    launches = engine._launches_of(dtype, width)
    constants = {"HEADS": HEADS, "WIDTH": width, **engine._parts(width), "SCALE": width**-0.5}
    constants |= {"DIRECTION": "key_above", "RESUME": not physics}
    features = ("dheight", "dexcess")
    absent = ("block", "dblock", *features) if physics else (*engine._Physics._fields, *features)
    of_type = (*OF_ATTENTION, "dblock", *(("out", "dq", "dk", "dv") if physics else ()))
    for launch, kernel in zip(
        launches,
        (kernels.attention_forward, kernels.attention_backward_queries, kernels.attention_backward_keys),
        strict=True,
    ):
        if physics or kernel is not kernels.attention_backward_queries:
            name = f"{capability} {dtype} {width} {'physics' if physics else 'block'} {kernel.__name__}"
            yield name, compiled(kernel, constants, launch, capability, absent, of_type, NUMBERS[dtype])


def relative_kernels(capability):
    constants = {"HEADS": HEADS, "HEADS_HELD": HEADS, "UNITS": UNITS, "UNITS_HELD": UNITS, "PRECISION": "tf32"}
    for kernel in (kernels.relative_bias, kernels.relative_bias_backward):
        launch = engine.PAIRS[UNITS]
        yield (
            f"{capability} {kernel.__name__}",
            compiled(kernel, constants, launch, capability, (), ("dblock",), "*bf16"),
        )


if __name__ == "__main__":
    found = {}
    for capability in CAPABILITIES:
        for width in (64, 96):
            found.update(attention_kernels(capability, torch.bfloat16, width, physics=True))
        found.update(attention_kernels(capability, torch.bfloat16, 96, physics=False))
        found.update(relative_kernels(capability))
    found.update(attention_kernels(80, torch.float32, 64, physics=True))
    print(json.dumps(found))
