"""Scalar code of a kernel body in MLIR: arithmetic of i32 and the PTX that MLIR has no operation for."""
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


class Emit:
    """Each method adds its instructions where it is called; values are ir.Values, words i32."""

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

    def store(self, address, words, live, hint=""):
        """hint: '.cs' for what is written once and not read again soon, so that it leaves L2 first."""
        n = len(words)
        names = ", ".join(f"${i + 2}" for i in range(n))
        what = hint + (f".v{n}.b32 [$0], {{{names}}}" if n > 1 else f".b32 [$0], {names}")
        self.void("{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n" + f"@p st.global{what};\n}}",
                  [address, arith.extui(self.i32, live), *words], ",".join(["l", "r"] + ["r"] * n + ["~{memory}"]))

    def copy16(self, place, address, offset: int, live):
        """Starts a copy from GMEM at address + offset to SMEM at place (address, offset), of zeros unless `live`."""
        size = arith.select(live, self.int(16), self.int(0))
        self.void(f"cp.async.cg.shared.global [$0 + {place[1]}], [$1 + {offset}], 16, $2;", [place[0], address, size], "r,l,r,~{memory}")

    def commit(self):
        """Ends a fill: the copies since the last one."""
        self.void("cp.async.commit_group;", [], "~{memory}")

    def filled(self, ahead: int):
        """Waits until all copies but those of the last `ahead` fills are there."""
        self.void(f"cp.async.wait_group {ahead};", [], "~{memory}")

    def shared16(self, address, offset: int):
        """Four words of SMEM. Volatile: ptxas would keep what it has read once, in registers."""
        out = self.asm(llvm.StructType.get_literal([self.i32] * 4), f"ld.volatile.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];",
                       [address], "=r,=r,=r,=r,r,~{memory}")
        return [llvm.extractvalue(self.i32, out, [k]) for k in range(4)]

    def shuffle(self, x, lane, mode):
        return self.asm(self.i32, f"shfl.sync.{mode}.b32 $0, $1, $2, 0x1f, 0xffffffff;", [x, lane], "=r,r,r")

    def across(self, values, lanes: int):
        """Each summed over groups of so many lanes, a power of two, which all get the same bits."""
        while lanes := lanes // 2:
            others = [self.to_float(self.shuffle(self.bits(v), self.int(lanes), "bfly")) for v in values]
            values = [arith.addf(v, other) for v, other in zip(values, others, strict=True)]
        return values

    def anew(self, x):
        """x, but what follows from it is worked out where it is used: hoisted out of a loop it would cost registers."""
        return self.asm(self.i32, "mov.b32 $0, $1;", [x], "=r,r")

    def barrier(self, part=None):
        """Of the whole block, or of the 512 threads of a part."""
        if part is None:
            self.void("bar.sync 0;", [], "~{memory}")
        else:
            self.void("bar.sync $0, 512;", [self.add(part, 1)], "r,~{memory}")

    def load_shared(self, address, words):
        names = ", ".join(f"${i}" for i in range(words))
        result = llvm.StructType.get_literal([self.i32] * words)
        out = self.asm(result, f"ld.shared.v{words}.b32 {{{names}}}, [${words}];", [address],
                       ",".join(["=r"] * words + ["r", "~{memory}"]))
        return [llvm.extractvalue(self.i32, out, [i]) for i in range(words)]

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

    def words(self, values, dtype):
        """Values rounded to float32, bfloat16 or float16 and packed in 32-bit words."""
        if dtype == "float32":
            return [self.bits(v) for v in values]
        half = "bf16x2" if dtype == "bfloat16" else "f16x2"
        return [self.asm(self.i32, f"cvt.rn.{half}.f32 $0, $2, $1;", [lo, hi], "=r,f,f", False)
                for lo, hi in zip(values[::2], values[1::2], strict=True)]

    def sigmoid(self, x):
        # With effects, so one after the other: LLVM otherwise starts all and needs twice the registers.
        power = self.asm(self.f32, "ex2.approx.ftz.f32 $0, $1;", [arith.mulf(x, self.float(-1.4426950408889634))], "=f,f")
        return self.asm(self.f32, "rcp.approx.ftz.f32 $0, $1;", [arith.addf(power, self.float(1.0))], "=f,f")

    def swiglu(self, gate, up):
        return arith.mulf(arith.mulf(gate, self.sigmoid(gate)), up)
