"""Compiles our kernels for Hopper (sm_90a) with no GPU: registers, spills and instructions of what would run.

The compiler is `MosaicGpuCompile` of JAX's CUDA plugin. All that it asks the driver for is what card this is, so a stub
libcuda that says 9.0 is enough. The loader and the dump settings read the environment at start: hence a process a kernel.

  uv pip install 'jax[cuda13]==0.11.2' nvidia-cuda-nvdisasm && python -m pytest -m sass tests/test_kernels_sass.py
"""
import ctypes
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax

STUB = """
#define F(name, ...) int name(__VA_ARGS__)
F(cuInit, unsigned f) { return 0; }
F(cuDriverGetVersion, int* v) { *v = 13000; return 0; }
F(cuDeviceGet, int* d, int i) { *d = 0; return 0; }
F(cuDeviceGetCount, int* n) { *n = 1; return 0; }
F(cuCtxGetDevice, int* d) { *d = 0; return 0; }
F(cuCtxGetCurrent, void** c) { *c = (void*)1; return 0; }
F(cuDeviceGetAttribute, int* v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 97 ? 232448 : a == 16 ? 132 : 1; return 0; }
F(cuGetErrorName, int r, const char** s) { *s = "stub"; return 0; }
F(cuGetErrorString, int r, const char** s) { *s = "stub"; return 0; }
F(cuModuleLoadData, void** m, const void* i) { *m = (void*)2; return 0; }
F(cuModuleGetFunction, void** f, void* m, const char* n) { *f = (void*)3; return 0; }
F(cuFuncSetAttribute, void* f, int a, int v) { return 0; }
F(cuModuleUnload, void* m) { return 0; }
"""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What ptxas and the disassembler say of one kernel."""

    registers: int  # of a thread at launch (setmaxnreg deals them anew between warpgroups)
    spilled: int  # bytes stored and loaded, the larger
    threads: int  # of a block
    warnings: tuple[str, ...]  # e.g. a wgmma that ptxas runs one at a time
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def _site() -> pathlib.Path | None:
    """Where the wheels of the plugin lie."""
    spec = importlib.util.find_spec("jax_cuda13_plugin")
    return pathlib.Path(spec.origin).parent.parent if spec else None


def missing() -> str:
    """What is not installed here ('' when all is)."""
    site = _site()
    if site is None:
        return "no jax-cuda13-plugin here"
    wanted = ["jax_plugins/xla_cuda13/xla_cuda_plugin.so", "jax_cuda13_plugin/libmosaic_gpu_runtime.so",
              "nvidia/cu13/bin/ptxas", "nvidia/cu13/bin/nvdisasm"]
    absent = [path for path in wanted if not (site / path).exists()] + ([] if shutil.which("gcc") else ["gcc"])
    return f"missing: {', '.join(absent)}" if absent else ""


def kernels(f, *shapes: jax.ShapeDtypeStruct) -> list[bytes]:
    """The Mosaic GPU modules in f(*shapes) as lowered for CUDA, serialised."""
    module = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).compiler_ir()
    found = []

    def visit(op):
        if "mosaic_gpu" in str(op.attributes["call_target_name"] if "call_target_name" in op.attributes else ""):
            found.append(op.attributes["mhlo.backend_config"]["module"].value_bytes)
        for inner in (o for region in op.regions for block in region for o in block):
            visit(inner)

    with module.context:
        visit(module.operation)
    return found


def compile_for_hopper(code: bytes, directory: pathlib.Path) -> Compiled:
    """Compiles one module of `kernels`; PTX and SASS stay in the directory."""
    directory.mkdir(parents=True)
    (directory / "stub.c").write_text(STUB)
    (directory / "module").write_bytes(code)
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", directory / "libcuda.so.1", directory / "stub.c"], check=True)
    env = dict(os.environ, LD_LIBRARY_PATH=str(directory), MOSAIC_GPU_DUMP_TO=str(directory),
               MOSAIC_GPU_CUDA_ROOT=str(_site() / "nvidia/cu13"),
               MOSAIC_GPU_RUNTIME_LIB_PATH=str(_site() / "jax_cuda13_plugin/libmosaic_gpu_runtime.so"))
    done = subprocess.run([sys.executable, __file__, directory, _site()], env=env, capture_output=True, text=True)
    logs, dumps = list(directory.glob("*.ptxas")), list(directory.glob("*.sass*"))
    if done.returncode or not logs or not dumps:
        raise RuntimeError(f"no kernel came out of the compiler: {done.stdout}{done.stderr}")
    log, ptx = logs[0].read_text(), next(directory.glob("*.ptx")).read_text()
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=max(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        threads=int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)[1]),
        warnings=tuple(line for line in log.splitlines() if "Performance" in line or "warning" in line),
        sass=dumps[0].read_text())


if __name__ == "__main__":
    directory, site = map(pathlib.Path, sys.argv[1:])
    code = (directory / "module").read_bytes()
    ctypes.CDLL(str(directory / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    compile_ = ctypes.CDLL(str(site / "jax_plugins/xla_cuda13/xla_cuda_plugin.so")).MosaicGpuCompile
    compile_.argtypes, compile_.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    compile_(code, len(code))
