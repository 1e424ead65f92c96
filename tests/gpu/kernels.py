"""Each Triton kernel against its function in spec.reference, bit for bit, on whichever device is asked for.

Shared by tests/torch (CPU tensors, Triton's interpreter) and tests/gpu (a GPU).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.helpers import Bits, tiny_config, tiny_tensors

import torch
from veriattn.prover.cuda import elementwise, gemm, mlp, qkv
from veriattn.prover.cuda.attention import Attention, DevicePlan, Plan, RunPlace, Shape, block_rows
from veriattn.prover.cuda.cache import DeviceCache, KvPages
from veriattn.prover.cuda.exponential import device_table
from veriattn.spec import partial, reference
from veriattn.spec.kv import PAGE

Array = np.ndarray[Any, Any]


class Device:
    """Arrays to and from a device."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)

    def put(self, x: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(x, order="C")).to(self.torch)

    def new(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Filled with a value that no result has by chance."""
        return torch.full(shape, 77, dtype=dtype, device=self.torch)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch)

    def same(self, got: torch.Tensor, expected: Array) -> None:
        values = got.cpu().numpy()
        assert values.shape == expected.shape and values.dtype == expected.dtype
        # Bytes: -0.0 and NaN count.
        if values.tobytes() != np.ascontiguousarray(expected).tobytes():
            wrong = np.argwhere(values != expected)
            raise AssertionError(f"{len(wrong)} of {values.size} differ, first at {wrong[:1].tolist()}")


def check_gemm(device: Device, m: int, n: int, k: int, extreme: bool = False) -> None:
    bits = Bits(f"gemm/{m}/{n}/{k}")
    a, w = (bits.integers(-127, 127, *s).astype(np.int8) for s in ((m, k), (n, k)))
    if extreme:
        a, w = np.full_like(a, 127), np.where(bits.integers(0, 1, n, k) == 0, -127, 127).astype(np.int8)
        w[0] = 127
    y = device.new(m, n, dtype=torch.int32)
    gemm.gemm_i8(device.put(a), device.put(w), y)
    device.same(y, reference.gemm_i8(a, w))
    if gemm.fits_cublas(m, n, k):
        y = device.new(m, n, dtype=torch.int32)
        gemm.gemm_cublas(device.put(a), device.put(w), y)
        device.same(y, reference.gemm_i8(a, w))


def rows_of(bits: Bits, rows: int, width: int) -> Array:
    """Rows of very different sizes: ordinary, tiny (below the floor), large, one outlier, exact ties, zero."""
    x = bits.uniform(-3, 3, rows, width)
    kinds = np.arange(rows) % 7
    x[kinds == 1] *= np.float32(2.0**-24)
    x[kinds == 2] *= np.float32(2.0**37)
    x[kinds == 3, width // 2] = np.float32(1000.0)
    x[kinds == 4] = bits.integers(-254, 254, int((kinds == 4).sum()), width).astype(np.float32) / 2
    x[kinds == 4, 0] = 127.0
    x[kinds == 5] = 0.0
    x[kinds == 6] = -x[kinds == 6] * 0
    return x.astype(np.float32)


def check_norm(device: Device, rows: int, width: int) -> None:
    x = rows_of(Bits(f"norm/{rows}/{width}"), rows, width)
    a, scale = device.new(rows, width, dtype=torch.int8), device.new(rows, dtype=torch.float32)
    flag = device.zeros(1)
    elementwise.norm_quantise(device.put(x), float(np.float32(1e-5)), a, scale, flag)
    expected = reference.norm_quantise(x, np.float32(1e-5))
    device.same(a, expected[0])
    device.same(scale, expected[1])
    assert int(flag) == 0


def check_norm_flags(device: Device, value: float) -> None:
    """A value that is not finite, or too large, is noted wherever it stands."""
    for row, column in ((0, 0), (4, 66), (2, 33)):
        x = np.ones((5, 67), np.float32)
        x[row, column] = value
        flag = device.zeros(1)
        elementwise.norm_quantise(
            device.put(x), 1e-5, device.new(5, 67, dtype=torch.int8), device.new(5, dtype=torch.float32), flag
        )
        assert int(flag) == 1


def check_residual(device: Device, rows: int, width: int) -> None:
    bits = Bits(f"residual/{rows}/{width}")
    y = bits.integers(-(2**31), 2**31 - 1, rows, width).astype(np.int32)
    x, a_scale, w_scale = bits.uniform(-9, 9, rows, width), bits.uniform(1e-4, 2, rows), bits.uniform(1e-6, 1e-3, width)
    stream = device.put(x)
    elementwise.residual_add(stream, device.put(y), device.put(a_scale), device.put(w_scale), stream)
    device.same(stream, reference.residual_add(x, y, a_scale, w_scale))
    out = device.new(rows, width, dtype=torch.float32)
    elementwise.logits(device.put(y), device.put(a_scale), device.put(w_scale), out)
    device.same(out, reference.logits(y, a_scale, w_scale))


def check_gather(device: Device, rows: int, width: int) -> None:
    bits = Bits(f"gather/{rows}/{width}")
    table = bits.uniform(-2, 2, 50, width).astype(np.float16)
    index = bits.integers(0, 49, rows).astype(np.int32)
    out = device.new(rows, width, dtype=torch.float32)
    elementwise.gather_rows(device.put(table), device.put(index), out)
    device.same(out, table[index].astype(np.float32))


def check_mlp(device: Device, rows: int, width: int, gain: float = 1.0) -> None:
    bits = Bits(f"mlp/{rows}/{width}/{gain}")
    y = bits.integers(-(2**20), 2**20, rows, 2 * width).astype(np.int32)
    y[:, ::5] = 0
    a_scale, w_scale = bits.uniform(1e-3, 2e-2, rows), bits.uniform(1e-4, 2e-3, 2 * width) * np.float32(gain)
    h, top = device.new(rows, width, dtype=torch.float32), device.zeros(rows)
    a, scale, flag = device.new(rows, width, dtype=torch.int8), device.new(rows, dtype=torch.float32), device.zeros(1)
    mlp.mlp_epilogue(device.put(y), device.put(a_scale), device.put(w_scale), h, top, a, scale, flag)
    expected = reference.mlp_epilogue(y, a_scale, w_scale)
    device.same(a, expected[0])
    device.same(scale, expected[1])
    assert int(flag) == 0


def check_mlp_flags(device: Device) -> None:
    for size in (2.0**20, 2.0**18):  # the product itself; then only its Hadamard sum
        y = np.full((2, 128), 2**20, np.int32)
        y[0] = 1
        arguments = (
            device.put(y),
            device.put(np.ones(2, np.float32)),
            device.put(np.full(128, size / 2**20, np.float32)),
        )
        flag = device.zeros(1)
        h, a = device.new(2, 64, dtype=torch.float32), device.new(2, 64, dtype=torch.int8)
        mlp.mlp_epilogue(*arguments, h, device.zeros(2), a, device.new(2, dtype=torch.float32), flag)
        assert int(flag) == 1


def check_epilogue(device: Device, rows: int, heads: int, kv_heads: int, d: int) -> None:
    bits = Bits(f"epilogue/{rows}/{heads}/{d}")
    row_sum = bits.integers(16336, 2**31 - 1, rows, heads).astype(np.int32)
    o = (bits.integers(-(2**31), 2**31 - 1, rows, heads, d) * row_sum[:, :, None]) >> 24
    v_scale = bits.uniform(1e-3, 1, kv_heads)
    a, scale, flag = (
        device.new(rows, heads * d, dtype=torch.int8),
        device.new(rows, dtype=torch.float32),
        device.zeros(1),
    )
    elementwise.attention_epilogue(device.put(o), device.put(row_sum), device.put(v_scale), a, scale, flag)
    expected = reference.attention_epilogue(o, row_sum, v_scale)
    device.same(a, expected[0])
    device.same(scale, expected[1])
    assert int(flag) == 0


def check_qkv(device: Device, tokens: int, **switches: Any) -> None:
    """Queries in place, keys and values where their pages are; a token whose key is not kept leaves no trace."""
    config = tiny_config(**switches)
    all_tensors = tiny_tensors(config)
    prefix = "layers.0."
    layer = {k.removeprefix(prefix): v for k, v in all_tensors.items() if k.startswith(prefix)}
    names = {"qkv.scale": "qkv_scale", "v_scale": "v_scale", "qkv.bias": "qkv_bias", "k_center": "k_center"}
    names |= {"q_norm": "q_norm", "k_norm": "k_norm"}
    tensors = {new: layer[old] for old, new in names.items() if old in layer}
    bits = Bits(f"qkv/{tokens}/{sorted(switches.items())}")
    y = bits.integers(-(2**18), 2**18, tokens, config.qkv_size).astype(np.int32)
    a_scale = bits.uniform(1e-2, 5e-2, tokens)
    start = 250
    positions = np.arange(start, start + tokens, dtype=np.int32)
    cos, sin = all_tensors["rope.cos"], all_tensors["rope.sin"]
    eps = np.float32(config.rms_eps)
    expected = reference.qkv_epilogue(
        y, a_scale, tensors["qkv_scale"], tensors.get("qkv_bias"), cos[positions], sin[positions], tensors["v_scale"],
        config.num_heads, config.num_kv_heads, config.head_dim, tensors.get("k_center"), tensors.get("q_norm"),
        tensors.get("k_norm"), eps,
    )  # fmt: skip
    cache = DeviceCache(config, 8, device.torch)
    cache.reserve(7, 1)
    cache.reserve(3, start + tokens)
    slots = cache.slots(3, start, tokens)
    slots[tokens // 2] = -1
    q = device.new(tokens, config.num_heads, config.head_dim, dtype=torch.int8)
    q_scale, flag = device.new(tokens, config.num_heads, dtype=torch.float32), device.zeros(1)
    qkv.qkv_epilogue(
        config, device.put(y), device.put(a_scale), {k: device.put(v) for k, v in tensors.items()}, device.put(cos),
        device.put(sin), device.put(positions), device.put(slots), q, q_scale, cache.layer(0), flag, float(eps),
    )  # fmt: skip
    device.same(q, expected[0])
    device.same(q_scale, expected[1])
    assert int(flag) == 0
    pages = cache.layer(0)
    kept = slots >= 0
    where = torch.from_numpy(slots[kept].astype(np.int64)).to(device.torch)
    page, place = where // PAGE, where % PAGE
    device.same(pages.k[page, :, place], expected[2][kept])
    device.same(pages.k_scale[page, :, place], expected[3][kept])
    device.same(pages.v[page, :, :, place], expected[4][kept])
    assert int(torch.count_nonzero(pages.k_scale)) == int(kept.sum()) * config.num_kv_heads


class Sequences:
    """Random queries, keys and values of several runs, on the device in pages and here in one piece."""

    def __init__(
        self, device: Device, runs: list[tuple[int, int]], heads: int, kv_heads: int, d: int, kind: str = "random"
    ) -> None:
        """runs: (start, rows) each; `kind`: random, flat (all scores close), or extreme (largest operands)."""
        self.runs, self.heads, self.kv_heads, self.d = runs, heads, kv_heads, d
        bits = Bits(f"attention/{runs}/{heads}/{kv_heads}/{d}/{kind}")
        self.row_starts = np.concatenate([[0], np.cumsum([rows for _, rows in runs])]).tolist()
        total = self.row_starts[-1]
        self.q = bits.integers(-127, 127, total, heads, d).astype(np.int8)
        self.q_scale = bits.uniform(0.01, 0.4, total, heads) * np.float32(4.0 / d)
        self.keys = []
        pages = sum(-(-(start + rows) // PAGE) for start, rows in runs)
        k = np.zeros((pages + 1, kv_heads, PAGE, d), np.int8)
        k_scale, v = (
            np.zeros((pages + 1, kv_heads, PAGE), np.float32),
            np.zeros((pages + 1, kv_heads, PAGE, d), np.int8),
        )
        self.tables = []
        free = list(range(pages, 0, -1))
        for start, rows in runs:
            n = start + rows
            parts = [
                bits.integers(-127, 127, n, kv_heads, d).astype(np.int8),
                bits.uniform(0.001, 0.02, n, kv_heads),
                bits.integers(-127, 127, n, kv_heads, d).astype(np.int8),
            ]
            if kind == "flat":
                parts[1] = parts[1] * np.float32(2.0**-10)
            if kind == "extreme":
                parts[0][:], parts[2][:] = 127, -127
            self.keys.append(parts)
            table = [free.pop(0) for _ in range(-(-n // PAGE))]
            self.tables.append(table)
            for j, page in enumerate(table):
                m = min(PAGE, n - j * PAGE)
                for array, part in zip((k, k_scale, v), parts, strict=True):
                    array[page, :, :m] = part[j * PAGE : j * PAGE + m].swapaxes(0, 1)
        if kind == "extreme":
            self.q[:] = 127
        self.pages = KvPages(device.put(k), device.put(k_scale), device.put(v.swapaxes(2, 3)))
        self.device = device

    def expected(self) -> tuple[Array, Array]:
        parts = []
        for (start, _), (k, k_scale, v), rows in zip(self.runs, self.keys, self.rows(), strict=True):
            parts.append(reference.attention_contiguous(self.q[rows], self.q_scale[rows], k, k_scale, v, start))
        return np.concatenate([o for o, _ in parts]), np.concatenate([s for _, s in parts])

    def rows(self) -> list[slice]:
        return [slice(a, b) for a, b in zip(self.row_starts[:-1], self.row_starts[1:], strict=True)]

    def plan(self, keys: list[int] | None = None) -> tuple[DevicePlan, int]:
        """The plan of all runs over their own keys (or the first `keys`), and how many scores they have."""
        group, places, at = self.heads // self.kv_heads, [], 0
        for i, ((start, rows), table) in enumerate(zip(self.runs, self.tables, strict=True)):
            n = start + rows if keys is None else keys[i]
            places.append(RunPlace(self.row_starts[i], rows, start, n, table, at))
            at += self.heads * rows * n
        plan = Plan.make(places, group, block_rows(max(rows for _, rows in self.runs), group))
        put = self.device.put
        device_plan = DevicePlan(
            put(plan.runs_i64), put(plan.tables_i32), put(plan.tiles_i32), plan.block_m, plan.max_keys
        )
        return device_plan, at

    def shape(self) -> Shape:
        return Shape(self.heads, self.kv_heads, 0, self.kv_heads, self.d)


def check_attention(device: Device, by_table: bool, *args: Any, **kwargs: Any) -> None:
    """Prefill in one kernel, and by way of scores in memory, against `attention_contiguous`; scores against `gemm_i8`."""
    case = Sequences(device, *args, **kwargs)
    expected_o, expected_l = case.expected()
    attention = Attention(device_table(device.torch), by_table)
    plan, scores_count = case.plan()
    q, q_scale = device.put(case.q), device.put(case.q_scale)
    o, total = device.new(*case.q.shape, dtype=torch.int64), device.new(*case.q.shape[:2], dtype=torch.int32)
    attention.prefill(case.shape(), q, q_scale, case.pages, plan, o, total)
    device.same(o, expected_o)
    device.same(total, expected_l)
    scores, top = device.new(scores_count, dtype=torch.int32), device.zeros(*case.q.shape[:2]).view(torch.uint32)
    attention.scores(case.shape(), q, case.pages, plan, scores, top)
    shares = [partial.share_scores(case.q[r], k) for r, (k, _, _) in zip(case.rows(), case.keys, strict=True)]
    device.same(scores, np.concatenate([s.reshape(-1) for s in shares]))
    o, total = device.zeros(*case.q.shape, dtype=torch.int64), device.zeros(*case.q.shape[:2])
    attention.values(case.shape(), scores, q_scale, top, case.pages, plan, o, total)
    device.same(o, expected_o)
    device.same(total, expected_l)


def check_weighted_values(device: Device, *args: Any) -> None:
    """P V of given weights."""
    case = Sequences(device, *args)
    ((start, rows),) = case.runs
    p = Bits("weights").integers(0, 16336, case.heads, rows, start + rows).astype(np.uint16)
    p[0, 0] = 16336
    attention = Attention(device_table(device.torch), True)
    plan, _ = case.plan()
    o, total = device.zeros(*case.q.shape, dtype=torch.int64), device.zeros(*case.q.shape[:2])
    attention.weighted_values(case.shape(), device.put(p), case.pages, plan, o, total)
    device.same(o, partial.share_outputs(p, case.keys[0][2]))
    device.same(total, partial.share_sums(p))


def check_share(device: Device, by_table: bool, resident: int, rows: int) -> None:
    """A share that all rows see, relative to a maximum from outside."""
    case = Sequences(device, [(resident, rows)], 6, 3, 24)
    k, k_scale, v = (x[:resident] for x in case.keys[0])
    scores = partial.share_scores(case.q, k)
    row_max = partial.share_maximum(scores, k_scale) + np.float32(0.25)
    p = partial.share_weights(scores, case.q_scale, k_scale, row_max)
    bits = row_max.view(np.int32)
    top = np.where(bits < 0, ~bits, bits ^ np.int32(-(2**31))).astype(np.int32)
    attention = Attention(device_table(device.torch), by_table)
    plan, count = case.plan([resident])
    got = device.new(count, dtype=torch.int32)
    attention.scores(case.shape(), device.put(case.q), case.pages, plan, got, None)
    device.same(got, scores.reshape(-1))
    o, total = device.zeros(*case.q.shape, dtype=torch.int64), device.zeros(*case.q.shape[:2])
    attention.values(
        case.shape(), got, device.put(case.q_scale), device.put(top).view(torch.uint32), case.pages, plan, o, total,
        causal=False
    )  # fmt: skip
    device.same(o, partial.share_outputs(p, v))
    device.same(total, partial.share_sums(p))
