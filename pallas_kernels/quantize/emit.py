"""What quantisation alone emits: magnitudes, scales and the rounding to E4M3 and E5M6."""
import math

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.emit import Emit
from pallas_kernels.quantize.reference import FORMATS, TINY


class QuantizeEmit(Emit):
    def max_u16x2(self, a, b):
        return self.asm(self.i32, "max.u16x2 $0, $1, $2;", [a, b], "=r,r,r", False)

    def max_u32(self, a, b):
        """With effects: LLVM leaves it where it stands."""
        return self.asm(self.i32, "max.u32 $0, $1, $2;", [a, b], "=r,r,r")

    def largest(self, values, maximum=arith.maxui):
        out = values[0]
        for v in values[1:]:
            out = maximum(out, v)
        return out

    def largest_across(self, value, lanes, maximum=arith.maxui):
        for step in lanes:
            value = maximum(value, self.shuffle(value, self.int(step), "bfly"))
        return value

    def load_values(self, address, size, live):
        """`size` bytes from GMEM in words, at most 16 bytes a load; zeros unless `live`."""
        words = []
        for n in range(0, size, 16):
            at = arith.addi(address, arith.constant(self.i64, ir.IntegerAttr.get(self.i64, n)))
            words += self.load(at, min(4, size // 4), live)
        return words

    def load16(self, address, live):
        """Four words from GMEM, zeros unless `live`, kept in L1 for the block's other tile. With effects: loads stay together."""
        out = self.asm(llvm.StructType.get_literal([self.i32] * 4),
                       "{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
                       "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];\n}",
                       [address, arith.extui(self.i32, live)], "=&r,=&r,=&r,=&r,l,r")
        return [llvm.extractvalue(self.i32, out, [i]) for i in range(4)]

    def either(self, condition, a, b):
        return arith.select(condition, a, b)

    def of_row(self, values, row):
        """values[row mod their number]."""
        own = values[0]
        for i, value in enumerate(values[1:], 1):
            own = arith.select(arith.cmpi(arith.CmpIPredicate.eq, self.rem(row, len(values)), self.int(i)), value, own)
        return own

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
