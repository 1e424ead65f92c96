"""Compiles every kernel for sm_90, as the backend would start it for models of real size, and looks at the PTX.

Run as a program (`python -m tests.gpu.ptx`) without TRITON_INTERPRET; needs no GPU. Prints one JSON object per
kernel; with --few those of two models.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import torch
from veriattn.prover.cuda import elementwise, exponential, gemm, mlp, qkv
from veriattn.prover.cuda.attention import Attention, DevicePlan, Shape, block_rows
from veriattn.prover.cuda.cache import KvPages
from veriattn.prover.cuda.launch import Launch, recording
from veriattn.spec.kv import PAGE
from veriattn.spec.model import ModelConfig

_TYPES = {
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint32: "*u32",
    torch.float32: "*fp32", torch.float16: "*fp16",
}  # fmt: skip

#: 8B with grouped heads; SmolLM2's odd group and width; a wide head with biases, norms and centres.
CONFIGS = (
    ModelConfig(4096, 2, 32, 8, 128, 14336, 128256, 8192, 128, 1e-5),
    ModelConfig(576, 2, 9, 3, 64, 1536, 49152, 8192, 64, 1e-5),
    ModelConfig(5120, 2, 40, 8, 80, 13824, 152064, 8192, 60, 1e-6, qkv_bias=True, qk_norm=True, k_center=True),
)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(config: ModelConfig, tokens: int, by_table: bool) -> list[Launch]:
    """What one layer and the logits of a step of `tokens` rows start, and the kernels of shares of the keys."""
    c, i8, i32, i64 = config, torch.int8, torch.int32, torch.int64
    flag, rows = tensor(1, dtype=i32), tensor(tokens)
    with recording() as noted:
        exponential.launch(
            exponential.exponential_kernel, (1,), tensor(64, dtype=i32), tensor(1024, dtype=i32), tensor(64, dtype=i32),
            COUNT=1024, TABLE=by_table,
        )  # fmt: skip
        x, a = tensor(tokens, c.hidden_size), tensor(tokens, c.hidden_size, dtype=i8)
        elementwise.gather_rows(tensor(c.vocab_size, c.hidden_size, dtype=torch.float16), tensor(tokens, dtype=i32), x)
        elementwise.norm_quantise(x, 1e-5, a, rows, flag)
        for out, width in dict.fromkeys(c.linear_shapes().values()):
            gemm.gemm_i8(tensor(tokens, width, dtype=i8), tensor(out, width, dtype=i8), tensor(tokens, out, dtype=i32))
        layer = {"qkv_scale": tensor(c.qkv_size), "v_scale": tensor(c.num_kv_heads)}
        if c.qkv_bias:
            layer |= {"qkv_bias": tensor(c.qkv_size), "k_center": tensor(c.num_kv_heads, c.head_dim)}
            layer |= {"q_norm": tensor(c.head_dim), "k_norm": tensor(c.head_dim)}
        shape = Shape(c.num_heads, c.num_kv_heads, 0, c.num_kv_heads, c.head_dim)
        pages = KvPages(
            tensor(8, c.num_kv_heads, PAGE, c.head_dim, dtype=i8),
            tensor(8, c.num_kv_heads, PAGE),
            tensor(8, c.num_kv_heads, c.head_dim, PAGE, dtype=i8),
        )
        tables = tensor(c.max_positions, c.rotary_dim // 2)
        q, q_scale = tensor(tokens, c.num_heads, c.head_dim, dtype=i8), tensor(tokens, c.num_heads)
        places = tensor(tokens, dtype=i32)
        y = tensor(tokens, c.qkv_size, dtype=i32)
        qkv.qkv_epilogue(c, y, rows, layer, tables, tables, places, places, q, q_scale, pages, flag, 1e-5)
        block = block_rows(tokens, shape.group)
        plan = DevicePlan(tensor(1, 6, dtype=i64), tensor(8, dtype=i32), tensor(16, 2, dtype=i32), block, 2048)
        attention = Attention(tensor(64, dtype=i32), by_table)
        o, total = tensor(tokens, c.num_heads, c.head_dim, dtype=i64), tensor(tokens, c.num_heads, dtype=i32)
        scores = tensor(c.num_heads * tokens * 2048, dtype=i32)
        top = tensor(tokens, c.num_heads, dtype=torch.uint32)
        attention.prefill(shape, q, q_scale, pages, plan, o, total)
        attention.scores(shape, q, pages, plan, scores, top)
        attention.scores(shape, q, pages, plan, scores, None)
        for causal in (True, False):
            attention.values(shape, scores, q_scale, top, pages, plan, o, total, causal=causal)
        weights = tensor(c.num_heads, tokens, 2048, dtype=torch.uint16)
        attention.weighted_values(shape, weights, pages, plan, o, total)
        elementwise.attention_epilogue(
            o, total, layer["v_scale"], tensor(tokens, c.attention_size, dtype=i8), rows, flag
        )
        elementwise.residual_add(x, tensor(tokens, c.hidden_size, dtype=i32), rows, tensor(c.hidden_size), x)
        mlp.mlp_epilogue(
            tensor(tokens, 2 * c.intermediate_size, dtype=i32), rows, tensor(2 * c.intermediate_size),
            tensor(tokens, c.intermediate_size), places, tensor(tokens, c.intermediate_size, dtype=i8), rows, flag,
        )  # fmt: skip
        vocab = tensor(tokens, c.vocab_size, dtype=i32)
        elementwise.logits(vocab, rows, tensor(c.vocab_size), tensor(tokens, c.vocab_size))
    return noted.launches


def compiled(launch: Launch, target: GPUTarget) -> dict[str, Any]:
    """What the compiler makes of a launch, as far as it needs no GPU: PTX, and cubin where Triton brings an assembler."""
    kernel, names = launch.kernel, launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        if name in launch.constants:
            signature[name], constants[(i,)] = "constexpr", launch.constants[name]
            continue
        value = launch.args[i]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[(i,)] = "constexpr", 1
            continue
        else:
            signature[name] = "i32"
        # What the just-in-time compiler finds out of the arguments: aligned pointers, multiples of 16.
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=target, options=launch.options)
    return {"ptx": result.asm["ptx"], "shared_bytes": result.metadata.shared}


def facts(ptx: str) -> dict[str, Any]:
    """What the PTX of a canonical kernel is asked about."""
    operations = re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)", ptx, re.M)
    return {
        "fused": sorted({o for o in operations if re.match(r"(fma|mad)\.(rn|rz|rm|rp|ftz)?.*f(16|32|64)", o)}),
        "flushing": sorted({o for o in operations if ".ftz" in o}),
        # Without a rounding mode the assembler may contract.
        "unrounded": sorted({o for o in operations if re.match(r"(add|sub|mul)\.f(32|64)", o)}),
        "approximate": sorted({o for o in operations if ".approx" in o or ".full" in o}),
        "mma": sorted({o for o in operations if "mma" in o and "s8" in o}),
        "float_mma": sorted({o for o in operations if "mma" in o and "s8" not in o and re.search(r"\.(f16|bf16|tf32|f32)", o)}),
        "lines": ptx.count("\n"),
    }  # fmt: skip


def every_launch(few: bool = False) -> Iterator[tuple[str, Launch]]:
    """All distinct kernels of all configurations, with a name for people. few: of the first, and the last in a short step."""
    seen = set()
    for number, config in enumerate(CONFIGS):
        steps = ((1, False), (5, False), (512, False), (512, True))
        if few:
            steps = (steps[0], *steps[2:]) if number == 0 else steps[1:2] if number == len(CONFIGS) - 1 else ()
        for tokens, by_table in steps:
            for launch in launches(config, tokens, by_table):
                types = tuple(a.dtype if isinstance(a, torch.Tensor) else a == 1 or a % 16 == 0 for a in launch.args)
                key = (launch.kernel.fn.__name__, types, *sorted({**launch.constants, **launch.options}.items()))
                if key not in seen:
                    seen.add(key)
                    yield f"{launch.kernel.fn.__name__}[{number},{tokens}{',table' if by_table else ''}]", launch


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    for name, launch in every_launch(few="--few" in sys.argv[1:]):
        result = compiled(launch, target)
        print(json.dumps({"name": name, "kernel": launch.kernel.fn.__name__, **facts(result["ptx"]),
                          "shared_bytes": result["shared_bytes"]}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
