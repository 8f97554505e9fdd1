"""Quantisation by tiles on Hopper, bound by memory: one read of the source, any of 1x128, 128x1 and 128x128 written.

512 threads own 128 x 128 elements: lane l of warp w holds 4 rows from 8 w + 4 (l / 16) and 8 columns from
8 (l mod 16) in registers. Maxima of magnitudes are taken as integers: the order is the same and NaN is the largest.
128x1 results are transposed through SMEM (units of 4 bytes, exclusive-or'd with the column group against bank
conflicts) and leave as [K, M]. Everything is one `plgpu.inline_mgpu` body: Pallas has no byte-wise transposition.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import hopper
from pallas_kernels.quantize.reference import FORMATS, TINY, ceil_div

REF = plgpu.RefType()
SCALAR = plgpu.Layout.WG_SPLAT(())
ROWS = 4  # of a thread


@dataclasses.dataclass(frozen=True)
class Job:
    """What one launch does to [batch, M, K] (the output's sizes)."""

    batch: int
    M: int
    K: int
    source: str  # dtype of what is read
    scaled: bool = False  # the source is in 1x128 tiles, its scale [batch, blocks, M] comes with it
    swiglu: bool = False  # the source is [batch, M, 2 K]: gate, up
    rows: str | None = None  # format of the copy that keeps the layout
    columns: bool = False  # E4M3 copy as [K, M]
    block: bool = False  # one scale per 128 x 128 instead of 1 x 128 and 128 x 1
    power_of_two: bool = False


def tiles_a_block(job: Job) -> int:
    """Two where more than 64 registers a thread would be used: for 1024 threads ptxas has no more, and it takes 32 warps
    a multiprocessor to hide the latency of memory."""
    return 2 if job.swiglu or job.rows and job.columns and not job.block else 1


def unfit(job: Job) -> str:
    """Why the kernel does not take this job ('' when it does)."""
    if job.K % 8 or job.swiglu and job.scaled and job.K % 128:
        return f"{job.K} columns: must be a multiple of {128 if job.K % 8 == 0 else 8}"
    if job.columns and job.M % 16:
        return f"{job.M} rows: must be a multiple of 16 for a transposed copy"
    if job.source not in ("bfloat16", "float16", "float32", "float8_e4m3fn"):
        return f"no kernel reads {job.source}"
    return ""


class _Emit:
    """Scalar code: `+ - *` of i32 and the PTX that MLIR has no operation for."""

    def __init__(self):
        self.i32, self.i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        self.f32, self.f16 = ir.F32Type.get(), ir.F16Type.get()

    def int(self, n):
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, n - (1 << 32) if n >= 1 << 31 else n))

    def float(self, x):
        return arith.constant(self.f32, ir.FloatAttr.get(self.f32, x))

    def add(self, a, *rest):
        for b in rest:
            a = arith.addi(a, self.int(b) if isinstance(b, int) else b)
        return a

    def mul(self, a, n):
        return arith.muli(a, self.int(n))

    def div(self, a, n):
        return arith.divui(a, self.int(n))

    def rem(self, a, n):
        return arith.remui(a, self.int(n))

    def less(self, a, b):
        return arith.cmpi(arith.CmpIPredicate.slt, a, self.int(b) if isinstance(b, int) else b)

    def bits(self, x):
        return arith.bitcast(self.i32, x)

    def to_float(self, x):
        return arith.bitcast(self.f32, x)

    def asm(self, result, ptx, operands, constraints, effects=True):
        return llvm.inline_asm(result, operands, ptx, constraints, has_side_effects=effects)

    def void(self, ptx, operands, constraints):
        self.asm(ir.Type.parse("!llvm.void"), ptx, operands, constraints)

    def pointer(self, ref, element, itemsize):
        """Address of an element, counted in 64 bits."""
        size = arith.constant(self.i64, ir.IntegerAttr.get(self.i64, itemsize))
        base = llvm.ptrtoint(self.i64, utils.memref_ptr(ref))
        return arith.addi(base, arith.muli(element, size))

    def element(self, row, pitch, column):
        pitch = arith.constant(self.i64, ir.IntegerAttr.get(self.i64, pitch))
        return arith.addi(arith.muli(arith.extsi(self.i64, row), pitch), arith.extsi(self.i64, column))

    def load(self, address, words, live):
        """`words` registers from GMEM, zeros unless `live`."""
        names = [f"${i}" for i in range(words)]
        vector = f".v{words}.b32 {{{', '.join(names)}}}" if words > 1 else f".b32 {names[0]}"
        ptx = ("{\n.reg .pred p;\n" + f"setp.ne.b32 p, ${words + 1}, 0;\n" + "".join(f"mov.b32 {n}, 0;\n" for n in names)
               + f"@p ld.global.nc.L1::no_allocate{vector}, [${words}];\n}}")
        result = llvm.StructType.get_literal([self.i32] * words) if words > 1 else self.i32
        out = self.asm(result, ptx, [address, arith.extui(self.i32, live)],
                       ",".join(["=&r"] * words + ["l", "r"]), effects=False)
        return [llvm.extractvalue(self.i32, out, [i]) for i in range(words)] if words > 1 else [out]

    def store(self, address, words, live):
        n = len(words)
        names = ", ".join(f"${i + 2}" for i in range(n))
        what = f".v{n}.b32 [$0], {{{names}}}" if n > 1 else f".b32 [$0], {names}"
        self.void("{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n" + f"@p st.global{what};\n}}",
                  [address, arith.extui(self.i32, live), *words], ",".join(["l", "r"] + ["r"] * n + ["~{memory}"]))

    def shuffle(self, x, lane, mode):
        return self.asm(self.i32, f"shfl.sync.{mode}.b32 $0, $1, $2, 0x1f, 0xffffffff;", [x, lane], "=r,r,r")

    def max_u16x2(self, a, b):
        return self.asm(self.i32, "max.u16x2 $0, $1, $2;", [a, b], "=r,r,r", False)

    def barrier(self):
        self.void("bar.sync 0;", [], "~{memory}")

    def floats(self, words, dtype):
        """The values packed in 32-bit words."""
        out = []
        for word in words:
            if dtype == "float32":
                out.append(self.to_float(word))
            elif dtype == "bfloat16":
                out += [self.to_float(arith.shli(word, self.int(16))),
                        self.to_float(arith.andi(word, self.int(0xFFFF0000)))]
            else:
                pairs = [word]
                if dtype == "float8_e4m3fn":
                    i16 = ir.IntegerType.get_signless(16)
                    halves = [arith.trunci(i16, w) for w in (word, arith.shrui(word, self.int(16)))]
                    pairs = [self.asm(self.i32, "cvt.rn.f16x2.e4m3x2 $0, $1;", [h], "=r,h", False) for h in halves]
                for pair in pairs:
                    for shift in (0, 16):
                        half = arith.trunci(ir.IntegerType.get_signless(16), arith.shrui(pair, self.int(shift)))
                        out.append(arith.extf(self.f32, arith.bitcast(self.f16, half)))
        return out

    def swiglu(self, gate, up):
        # With effects, so one after the other: LLVM otherwise starts all and needs twice the registers.
        power = self.asm(self.f32, "ex2.approx.ftz.f32 $0, $1;",
                         [arith.mulf(gate, self.float(-1.4426950408889634))], "=f,f")
        sigmoid = self.asm(self.f32, "rcp.approx.ftz.f32 $0, $1;", [arith.addf(power, self.float(1.0))], "=f,f")
        return arith.mulf(arith.mulf(gate, sigmoid), up)

    def pack(self, values, format):
        """Rounds scaled values to the format; words of four E4M3 or two float16."""
        words = []
        if format == "e4m3":
            for i in range(0, len(values), 4):
                a, b, c, d = values[i:i + 4]
                words.append(self.asm(
                    self.i32, "{\n.reg .b16 x, y;\ncvt.rn.satfinite.e4m3x2.f32 x, $2, $1;\n"
                    "cvt.rn.satfinite.e4m3x2.f32 y, $4, $3;\nmov.b32 $0, {x, y};\n}", [a, b, c, d], "=r,f,f,f,f", False))
            return words
        rounded = []
        for x in values:  # to 6 bits of mantissa, ties to even; below the smallest normal number zero; NaN stays
            bits = self.bits(x)
            odd = arith.andi(arith.shrui(bits, self.int(17)), self.int(1))
            near = arith.andi(self.add(bits, 0xFFFF, odd), self.int(0xFFFE0000))
            size = arith.andi(near, self.int(0x7FFFFFFF))
            near = arith.select(self.less(size, (127 - 14) << 23), arith.andi(near, self.int(0x80000000)), near)
            finite = self.less(arith.andi(bits, self.int(0x7FFFFFFF)), 0x7F800000)
            x = arith.select(finite, self.to_float(near), x)
            largest = self.float(FORMATS["e5m6"].largest)
            rounded.append(arith.maximumf(arith.minimumf(x, largest), self.float(-FORMATS["e5m6"].largest)))
        for lo, hi in zip(rounded[::2], rounded[1::2], strict=True):
            words.append(self.asm(self.i32, "cvt.rn.f16x2.f32 $0, $2, $1;", [lo, hi], "=r,f,f", False))
        return words

    def scale(self, amax, format, power_of_two):
        """`reference.tile_scale` of the bits of a magnitude: (scale, 1 / scale)."""
        largest = FORMATS[format].largest
        if power_of_two:
            exponent = math.frexp(largest)[1] - 1
            mantissa = int((largest / 2.0**exponent - 1) * 2**23)
            bits = arith.andi(self.add(amax, 0x7FFFFF - mantissa), self.int(0x7F800000))
            bits = arith.maxsi(self.add(bits, -(exponent << 23)), self.int(1 << 23))
            scale = self.to_float(arith.select(self.less(amax, 0x7F800000), bits, amax))
        else:
            scale = arith.maximumf(arith.divf(self.to_float(amax), self.float(largest)), self.float(TINY))
        return scale, arith.divf(self.float(1.0), scale)


def _body(job: Job):
    itemsize = jnp.dtype(job.source).itemsize
    k_tiles, m_tiles = ceil_div(job.K, 128), ceil_div(job.M, 128)
    source_k = job.K * (2 if job.swiglu else 1)

    def body(ctx, block, *refs):
        e = _Emit()
        refs = list(refs)
        x_gmem = refs.pop(0)
        s_gmem = refs.pop(0) if job.scaled else None
        q_gmem = refs.pop(0) if job.rows else None
        rows_gmem = refs.pop(0) if job.rows and not job.block else None
        t_gmem = refs.pop(0) if job.columns else None
        columns_gmem = refs.pop(0) if job.columns and not job.block else None
        block_gmem = refs.pop(0) if job.block else None
        amax_smem, bytes_smem = (llvm.ptrtoint(e.i32, utils.memref_ptr(r)) for r in refs)

        block = block.registers.item()
        thread = utils.thread_idx()
        part, thread = e.div(thread, 512), e.rem(thread, 512)
        block = e.add(e.mul(block, tiles_a_block(job)), part)
        exists = e.less(block, job.batch * m_tiles * k_tiles)
        lane, warp = e.rem(thread, 32), e.div(thread, 32)
        group, column = e.rem(lane, 16), e.mul(e.rem(lane, 16), 8)
        slot = e.add(e.mul(warp, 2), e.div(lane, 16))  # of ROWS rows
        tile_k, tile_m = e.rem(block, k_tiles), e.rem(e.div(block, k_tiles), m_tiles)
        batch = e.div(block, k_tiles * m_tiles)
        row0, col0 = e.add(e.mul(tile_m, 128), e.mul(slot, ROWS)), e.add(e.mul(tile_k, 128), column)
        amax_smem, bytes_smem = (e.add(at, e.mul(part, n)) for at, n in ((amax_smem, 512), (bytes_smem, 128 * 128)))
        in_columns = arith.andi(exists, e.less(col0, job.K))
        live = [arith.andi(e.less(e.add(row0, i), job.M), in_columns) for i in range(ROWS)]
        at_row = [e.add(e.mul(batch, job.M), row0, i) for i in range(ROWS)]

        def read(first, unpack=True):
            """ROWS x 8 floats from column `first` of this tile."""
            words = []
            for i in range(ROWS):
                address = e.pointer(x_gmem, e.element(at_row[i], source_k, e.add(col0, first)), itemsize)
                words.append([])
                for part in range(max(itemsize * 8 // 16, 1)):
                    at = arith.addi(address, arith.constant(e.i64, ir.IntegerAttr.get(e.i64, 16 * part)))
                    words[i] += e.load(at, min(4, itemsize * 2), live[i])
            if not unpack:
                return words
            values = [e.floats(w, job.source) for w in words]
            if not job.scaled:
                return values
            line = e.add(e.mul(batch, ceil_div(source_k, 128)), tile_k, first // 128)
            scales = [e.load(e.pointer(s_gmem, e.element(line, job.M, e.add(row0, i)), 4), 1, live[i])[0]
                      for i in range(ROWS)]
            return [[arith.mulf(v, e.to_float(s)) for v in row] for row, s in zip(values, scales, strict=True)]

        def largest(values, maximum=arith.maxui):
            out = values[0]
            for v in values[1:]:
                out = maximum(out, v)
            return out

        def across(value, lanes, maximum=arith.maxui):
            for step in lanes:
                value = maximum(value, e.shuffle(value, e.int(step), "bfly"))
            return value

        def store_row(i, values):
            size = 1 if job.rows == "e4m3" else 2
            e.store(e.pointer(q_gmem, e.element(at_row[i], job.K, col0), size), e.pack(values, job.rows), live[i])

        def store_row_scale(row, scale, keep):
            line = e.element(e.add(e.mul(batch, k_tiles), tile_k), job.M, row)
            e.store(e.pointer(rows_gmem, line, 4), [e.bits(scale)], arith.andi(arith.andi(exists, keep), e.less(row, job.M)))

        if job.swiglu and not job.columns:  # row by row: no more than one is in float32
            for i, (gate, up) in enumerate(zip(read(0), read(job.K), strict=True)):
                x = [e.swiglu(g, u) for g, u in zip(gate, up, strict=True)]
                amax = across(largest([arith.andi(e.bits(v), e.int(0x7FFFFFFF)) for v in x]), (8, 4, 2, 1))
                scale, inverse = e.scale(amax, job.rows, job.power_of_two)
                store_row_scale(e.add(row0, i), scale, e.less(group, 1))
                store_row(i, [arith.mulf(v, inverse) for v in x])
            return
        if job.source == "bfloat16" and not job.swiglu:
            # Stays packed in half the registers: an asm with effects keeps LLVM from unpacking it all at once.
            packed = read(0, unpack=False)
            size = [[arith.andi(w, e.int(0x7FFF7FFF)) for w in row] for row in packed]

            def value(i, j):
                ptx = "and.b32 $0, $1, 0xffff0000;" if j % 2 else "shl.b32 $0, $1, 16;"
                return e.to_float(e.asm(e.i32, ptx, [packed[i][j // 2]], "=r,r"))

            def halves(word):  # as magnitudes of float32
                return [arith.shli(word, e.int(16)), arith.andi(word, e.int(0xFFFF0000))]

            def row_maxima():
                rows = [largest(row, e.max_u16x2) for row in size]
                rows = [e.max_u16x2(w, arith.shrui(w, e.int(16))) for w in rows]
                pairs = [arith.ori(arith.andi(rows[i], e.int(0xFFFF)), arith.shli(rows[i + ROWS // 2], e.int(16)))
                         for i in range(ROWS // 2)]
                pairs = [halves(across(w, (8, 4, 2, 1), e.max_u16x2)) for w in pairs]
                return [p[0] for p in pairs] + [p[1] for p in pairs]

            def column_maxima():
                words = [across(largest([row[j] for row in size], e.max_u16x2), (16,), e.max_u16x2) for j in range(4)]
                return [m for w in words for m in halves(w)]
        else:
            x = read(0)
            if job.swiglu:
                x = [[e.swiglu(g, u) for g, u in zip(*pair, strict=True)] for pair in zip(x, read(job.K), strict=True)]
            size = [[arith.andi(e.bits(v), e.int(0x7FFFFFFF)) for v in row] for row in x]

            def value(i, j):
                return x[i][j]

            def row_maxima():
                return [across(largest(row), (8, 4, 2, 1)) for row in size]

            def column_maxima():
                return [across(largest([row[j] for row in size]), (16,)) for j in range(8)]

        first_half = e.less(lane, 16)
        if job.columns or job.block:  # maxima of columns (or of everything) meet in SMEM
            with utils.when(e.less(thread, 128)):
                e.void("st.shared.b32 [$0], $1;", [e.add(amax_smem, e.mul(thread, 4)), e.int(0)], "r,r,~{memory}")
            e.barrier()
            maxima = column_maxima()
            if job.block:
                maxima = [across(largest(maxima), (8, 4, 2, 1))]
            with utils.when(e.less(lane, 1) if job.block else first_half):
                for j, m in enumerate(maxima):
                    at = amax_smem if job.block else e.add(amax_smem, e.mul(column, 4), 4 * j)
                    e.void("red.shared.max.u32 [$0], $1;", [at, m], "r,r,~{memory}")
            e.barrier()
            mine = amax_smem if job.block else e.add(amax_smem, e.mul(e.rem(thread, 128), 4))
            amax = e.asm(e.i32, "ld.shared.b32 $0, [$1];", [mine], "=r,r,~{memory}")
            scale, inverse = e.scale(amax, "e4m3", job.power_of_two)
            if job.block:
                line = e.element(e.add(e.mul(batch, m_tiles), tile_m), k_tiles, tile_k)
                e.store(e.pointer(block_gmem, line, 4), [e.bits(scale)], arith.andi(exists, e.less(thread, 1)))
                column_inverse = row_inverse = [inverse] * 8
            else:
                at = e.add(e.mul(tile_k, 128), thread)
                line = e.element(e.add(e.mul(batch, m_tiles), tile_m), job.K, at)
                e.store(e.pointer(columns_gmem, line, 4), [e.bits(scale)],
                        arith.andi(e.less(thread, 128), arith.andi(exists, e.less(at, job.K))))
                e.barrier()  # all have read the maxima
                e.void("st.shared.b32 [$0], $1;", [mine, e.bits(inverse)], "r,r,~{memory}")
                e.barrier()
                column_inverse = [e.to_float(e.asm(e.i32, "ld.shared.b32 $0, [$1];",
                                                   [e.add(amax_smem, e.mul(column, 4), 4 * j)], "=r,r,~{memory}"))
                                  for j in range(8)]

        if job.rows:
            if not job.block:
                maxima = row_maxima()
                own = maxima[0]  # lane group g works out the scale of row g mod ROWS
                for i in range(1, ROWS):
                    own = arith.select(arith.cmpi(arith.CmpIPredicate.eq, e.rem(group, ROWS), e.int(i)), maxima[i], own)
                scale, inverse = e.scale(own, job.rows, job.power_of_two)
                store_row_scale(e.add(row0, group), scale, e.less(group, ROWS))
                half = arith.andi(lane, e.int(16))
                row_inverse = [e.to_float(e.shuffle(e.bits(inverse), e.add(half, i), "idx")) for i in range(ROWS)]
            for i in range(ROWS):
                store_row(i, [arith.mulf(value(i, j), row_inverse[i]) for j in range(8)])

        if job.columns:
            swizzled = e.mul(arith.xori(slot, e.mul(group, 2)), 4)
            for j in range(8):
                words = e.pack([arith.mulf(value(i, j), column_inverse[j]) for i in range(ROWS)], "e4m3")
                at = e.add(bytes_smem, e.mul(column, 128), 128 * j, swizzled)
                e.void("st.shared.b32 [$0], $1;", [at, *words], "r,r,~{memory}")
            e.barrier()
            for i in range(4):
                col = e.add(slot, 32 * i)
                at = e.add(bytes_smem, e.mul(col, 128), e.mul(arith.xori(group, e.div(col, 8)), 8))
                pair = e.asm(llvm.StructType.get_literal([e.i32] * 2), "ld.shared.v2.b32 {$0, $1}, [$2];", [at],
                             "=r,=r,r,~{memory}")
                words = [llvm.extractvalue(e.i32, pair, [n]) for n in range(2)]
                out_col, out_row = e.add(e.mul(tile_k, 128), col), e.add(e.mul(tile_m, 128), column)
                line = e.element(e.add(e.mul(batch, job.K), out_col), job.M, out_row)
                e.store(e.pointer(t_gmem, line, 1), words,
                        arith.andi(arith.andi(exists, e.less(out_col, job.K)), e.less(out_row, job.M)))

    return body


@functools.partial(jax.jit, static_argnums=0)  # traced and compiled once a shape, however often a model calls it
def quantize(job: Job, x: jax.Array, scale: jax.Array | None = None) -> list[jax.Array]:
    """x [batch, M, K or 2K] (and its scale [batch, K/128, M]) -> in this order, those asked for: q [batch, M, K], its
    scale [batch, K/128, M]; transposed q [batch, K, M], its scale [batch, M/128, K]; block scale [batch, M/128, K/128].
    """
    B, M, K, k_tiles, m_tiles = job.batch, job.M, job.K, ceil_div(job.K, 128), ceil_div(job.M, 128)
    out = []
    if job.rows:
        out.append(jax.ShapeDtypeStruct((B, M, K), FORMATS[job.rows].dtype))
        out += [] if job.block else [jax.ShapeDtypeStruct((B, k_tiles, M), jnp.float32)]
    if job.columns:
        out.append(jax.ShapeDtypeStruct((B, K, M), jnp.float8_e4m3fn))
        out += [] if job.block else [jax.ShapeDtypeStruct((B, m_tiles, K), jnp.float32)]
    if job.block:
        out.append(jax.ShapeDtypeStruct((B, m_tiles, k_tiles), jnp.float32))
    operands = (x,) if scale is None else (x, scale)
    inner = _body(job)

    def body(*refs):
        plgpu.inline_mgpu(arg_types=(SCALAR,) + (REF,) * len(refs))(inner)(lax.axis_index("grid"), *refs)

    tiles = tiles_a_block(job)
    scratch = plgpu.SMEM((128 * tiles,), jnp.int32), plgpu.SMEM((4096 * tiles if job.columns else 8,), jnp.int32)
    return list(hopper.launch(body, operands, tuple(out), scratch, name="quantize", cluster=1, warpgroups=4 * tiles,
                              grid=ceil_div(B * m_tiles * k_tiles, tiles)))
