"""Compiled for sm_90a without a GPU: registers, spills and tensor core instructions of every kernel.

How, and what has to be installed for it: `tests/sass.py`. Ten seconds a kernel.
"""
import re

import pytest

from pallas_kernels import target
from tests import sass
from tests.test_kernels_lowering import KERNELS

pytestmark = pytest.mark.sass

LAUNCH = 65536  # registers of a multiprocessor: a product's block has them all, and deals them anew by setmaxnreg
SPILLED = {"dense gradient": 12, "fp8 grouped gradient": 48, "fp8 grouped gradient in place": 52}  # bytes at most


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The kernels of one entry of KERNELS, tile tables only where it is about them."""
    assert not sass.missing(), sass.missing()
    monkeypatch.setattr(target, "is_hopper", lambda: True)

    def compile_(name):
        run, shapes = KERNELS[name]
        codes = [c for c in sass.kernels(run, *shapes) if (b"tile_table" in c) == name.startswith("tile table")]
        assert codes, "no kernel of ours in what was lowered"
        return [sass.compile_for_hopper(code, tmp_path / str(i)) for i, code in enumerate(codes)]

    return compile_


@pytest.mark.parametrize("name", [n for n in KERNELS if "fp8" in n or "bf16" in n or "dense" in n])
def test_a_product_runs_on_the_tensor_cores_out_of_registers(compiled, name):
    ours, other = ("HGMMA", "QGMMA") if "bf16" in name else ("QGMMA", "HGMMA")
    for kernel in compiled(name):
        assert kernel.registers * kernel.threads <= LAUNCH
        assert kernel.spilled <= SPILLED.get(name, 0)
        assert kernel.count(ours) >= 4 and not kernel.count(other)
        assert not [w for w in kernel.warnings if "spill" not in w], "ptxas runs wgmmas one at a time"
        in_turn = "bf16" in name and "long" not in name
        assert bool(kernel.count("BAR.ARV")) == in_turn  # consumers that have tiles in turn hand it over


@pytest.mark.parametrize("name", [n for n in KERNELS if "quanti" in n or "swiglu" in n])
def test_a_quantisation_leaves_room_for_32_warps(compiled, name):
    for kernel in compiled(name):
        assert kernel.registers <= 64 and kernel.spilled == 0 and not kernel.warnings
        assert not kernel.count("QGMMA") + kernel.count("HGMMA")


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("rows")])
def test_rows_move_by_16_bytes_with_all_loads_under_way_before_the_first_use(compiled, name):
    (kernel,) = compiled(name)
    assert kernel.registers <= (72 if "back" in name else 64) and kernel.spilled == 0 and not kernel.warnings
    loads = [m.start() for m in re.finditer(r"LDG\.E\S*\.128", kernel.sass)]
    stores = [m.start() for m in re.finditer(r"STG\.E\S*\.128", kernel.sass)]
    assert len(loads) == (sum(map(int, re.findall(r"\d+", name))) if "sum" in name else 8)
    assert len(stores) == (1 if "sum" in name else 4 if "back" in name else 8)
    assert loads[-1] < stores[0] and not re.search(r"F(FMA|MUL|ADD)", kernel.sass[loads[0]:loads[-1]]), "a load waits for another's use"


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("norm")])
def test_a_norm_copies_by_16_bytes_ahead_of_its_use_and_loads_nothing_else(compiled, name):
    (kernel,) = compiled(name)
    assert kernel.registers <= 128 and kernel.spilled == 0 and not kernel.warnings
    copies, operands = re.findall(r"LDGSTS\S*", kernel.sass), 3 if "back" in name else 1 if "narrow" in name else 2
    a_turn = 4 * operands
    assert len(copies) - (6 // operands + 1) * a_turn == (4 if "wide" in name else 1)  # before and in the loop; the rest is the scale
    assert all("128" in copy for copy in copies) and not re.search(r"\bLD[GL]\.", kernel.sass)
    in_the_loop = kernel.sass[kernel.sass.rindex("MUFU.RSQ"):]  # and after it: a turn's copies stand together
    between = in_the_loop[in_the_loop.index("LDGSTS"):in_the_loop.rindex("LDGSTS")]
    assert between.count("LDGSTS") == a_turn - 1 and "DEPBAR" not in between and "FFMA" not in between


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("latent norm")])
def test_a_norm_of_latents_copies_by_16_bytes_ahead_of_its_use_and_loads_scales_before_its_loop(compiled, name):
    (kernel,) = compiled(name)
    assert kernel.registers * kernel.threads <= LAUNCH and kernel.spilled == 0 and not kernel.warnings
    copies, loads = re.findall(r"LDGSTS\S*", kernel.sass), [m.start() for m in re.finditer(r"\bLDG\.", kernel.sass)]
    assert all("128" in copy for copy in copies) and not re.search(r"\bLDL\b|STL", kernel.sass)
    assert len(loads) == (16 if "V3" in name else 6 if "700m" in name else 4)  # of four columns each
    assert loads[-1] < kernel.sass.index("LDS.128")


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("cross entropy")])
def test_a_cross_entropy_copies_a_turn_ahead_of_its_use_and_spends_eight_instructions_a_logit(compiled, name):
    (kernel,) = compiled(name)
    assert kernel.registers <= 64 and kernel.spilled == 0 and not kernel.warnings
    assert not re.search(r"\bLDL\b|STL", kernel.sass) and len(re.findall(r"LDG\.", kernel.sass)) == (3 if "backward" in name else 0)
    if "narrow" in name:  # its loops are unrolled
        return
    copies = re.findall(r"LDGSTS\S*", kernel.sass)
    assert len(copies) == 4 * (6 + 1) and all("128" in copy for copy in copies)  # before the loop and in it
    lines = re.findall(r"/\*[0-9a-f]{4}\*/ +(.*)|^(\.L_x_\d+):", kernel.sass, re.MULTILINE)
    end = next(i for i, (code, _) in enumerate(lines) if i > _of(lines, "LDGSTS") and re.search(r"BRA `\(\.L_x", code))
    start = next(i for i, (_, label) in enumerate(lines) if label and f"({label})" in lines[end][0])
    loop = [code for code, _ in lines[start:end + 1] if code]
    logits = 16 if "float32" in name else 32
    assert sum("MUFU.EX2" in code for code in loop) == logits + 1  # and a rescaled sum, or the target's
    assert len(loop) <= logits * 8.5 + 16


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("gate")])
def test_a_gate_keeps_a_token_in_registers_and_divides_without_a_call(compiled, name):
    (kernel,) = compiled(name)
    assert kernel.registers <= 128 and kernel.spilled == 0 and not kernel.warnings  # of 65,536: four blocks of 128 threads and more
    assert not re.search(r"\bLDL\b|\bSTL\b|\bCALL\b", kernel.sass)
    if "700m" in name:
        assert len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", kernel.sass)) <= (560 if "backward" in name else 1024)


def _of(lines, instruction: str) -> int:
    """The last line of an instruction."""
    return max(i for i, (code, _) in enumerate(lines) if instruction in code)


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("tile table")])
def test_a_tile_table_waits_for_memory_once_and_for_no_other_warp(compiled, name):
    (kernel,) = compiled(name)
    assert kernel.registers <= 64 and kernel.spilled == 0 and not kernel.warnings
    order = re.findall(r"\b(LDG|SHFL|STG|BAR|LDS)\b", kernel.sass)
    loads = 9 if "many" in name else 2 if "rows" in name else 1  # all sizes, before the first exchange between lanes
    assert [o for o in order if o != "BAR"][:loads + 1] == ["LDG"] * loads + ["SHFL"]
    assert order.count("LDG") == loads and not order.count("LDS") and order.count("BAR") == 2  # those at Mosaic's start
    assert len(re.findall(r"\bBRA\b", kernel.sass)) <= 2  # past the stores; behind the end


@pytest.mark.parametrize("name", [n for n in KERNELS if "gradient" in n and n.startswith(("dense", "fp8"))])
def test_a_stage_of_scales_is_released_only_once_they_were_used(compiled, name):
    """Between the last load of a stage and the arrival that gives it back stands a product (that overwrites what the scales were used
    on) or the store of the finished tile: an arrival alone does not wait for loads in flight."""
    for kernel in compiled(name):
        order = re.findall(r"\b(LDS\.64|QGMMA|STS|SYNCS\.ARRIVE\.TRANS64\.A1T0)\b", kernel.sass)
        assert "LDS.64" in order
        for before, arrival in zip(order, order[1:], strict=False):
            assert (before, arrival) != ("LDS.64", "SYNCS.ARRIVE.TRANS64.A1T0")
