"""Runs model-written Python in a child process under limits, and says what came of it.

Always: isolated interpreter (-I -S), empty environment, empty working directory, own session killed as a group, limits
on CPU, memory, file size, open files and (none may be started) processes, root given up, output cut; an audit hook
refuses sockets, processes, foreign libraries and files outside the directory and the library. Where the kernel lets
us, namespaces as well: no network, the file system read-only, /proc hidden, the directory a small tmpfs.
`Result.isolation` says which. The hook is a fence, not a wall: without namespaces do not run what someone hostile
wrote.
"""
import dataclasses
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time

# Runs in the child, before and around the program. argv: directory, isolation, then the numbers `limits` of `run`.
_BOOT = r'''
import os, resource, sys, sysconfig
home, asked, (status, cpu, memory, size, nobody) = *sys.argv[1:3], map(int, sys.argv[3:])
program, tests = (open(f"{home}/{name}", encoding="utf-8").read() for name in ("program.py", "tests.py"))
library = sysconfig.get_paths()["stdlib"]
for name in ("program.py", "tests.py", "stdin"): os.remove(f"{home}/{name}")  # nothing to read the tests from

def drop():
    os.setgroups([]); os.setgid(nobody); os.setuid(nobody)

def isolate():
    import ctypes
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    def must(result):
        if result: raise OSError(ctypes.get_errno(), "refused")
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges: setuid programs give none
    os.unshare(os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWIPC | (os.CLONE_NEWUSER if uid else 0))
    maps = dict(setgroups="deny", uid_map=f"{uid} {uid} 1", gid_map=f"{gid} {gid} 1")
    for name, text in maps.items() if uid else ():
        with open(f"/proc/self/{name}", "w") as f: f.write(text)
    must(libc.mount(None, b"/", None, 0x44000, None))  # private: nothing done below reaches the outside
    for place, options in ((b"/proc", b"size=4k"), (home.encode(), f"size={size + 65536}".encode())):
        must(libc.mount(b"tmpfs", place, b"tmpfs", 6, options))  # nosuid, nodev; /proc shows our parent's environment
    os.mkdir(home + "/lib")  # the library may lie where only its owner can read
    must(libc.mount(library.encode(), (home + "/lib").encode(), None, 0x5000, None))
    sys.path[:] = [home + "/lib", home + "/lib/lib-dynload"]
    for name, module in [*sys.modules.items()]:
        if "ctypes" in name: del sys.modules[name]
        elif hasattr(module, "__path__"): module.__path__ = [p.replace(library, home + "/lib") for p in module.__path__]
    read_only = ((b"/", 0x8000, (1, 0, 0, 0)), (home.encode(), 0, (0, 1, 0, 0)))  # set everywhere, cleared for home
    for place, recursive, attributes in read_only:
        must(libc.syscall(442, -100, place, recursive, (ctypes.c_uint64 * 4)(*attributes), 32))  # mount_setattr
    os.chdir(home)
    if uid: os.unshare(os.CLONE_NEWUSER)  # leaves the rights over those mounts behind
    else: drop()

isolation = "limits"
if asked == "auto":
    try:
        isolate()
        isolation = "namespaces"
    except (OSError, AttributeError, ImportError):
        pass
if os.getuid() == 0:  # root without namespaces, where the library is open to others
    os.chown(home, nobody, nobody); os.seteuid(nobody)
    readable = os.access(os.path.join(library, "os.py"), os.R_OK, effective_ids=True)
    os.seteuid(0)
    if readable: drop()
for name, value in (("CORE", 0), ("NPROC", 0), ("NOFILE", 64), ("FSIZE", size), ("CPU", cpu), ("AS", memory)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
os.write(status, isolation.encode() + b" ")

def guard(home=os.path.realpath(home) + "/", library=os.path.realpath(library) + "/", real=os.path.realpath,
          fspath=os.fspath, fsdecode=os.fsdecode, writing=os.O_WRONLY | os.O_RDWR | os.O_CREAT):
    named = frozenset("os." + name for name in "remove rename rmdir mkdir chmod chown link symlink truncate utime "
                      "listdir scandir".split())
    refused = ("socket.", "subprocess.", "ctypes.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill",
               "pty.", "gc.get_objects", "gc.get_referrers", "sys._current_frames", "syslog.")
    def hook(event, args):
        if event.startswith(refused):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "open" or event in named:
            for path in args[:2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
                if isinstance(path, int): continue
                path = real(fsdecode(fspath(path if path is not None else "."))) + "/"
                free = event == "open" and not (args[2] or 0) & writing or event in ("os.listdir", "os.scandir")
                if not path.startswith(home) and not (free and path.startswith(library)):
                    raise PermissionError(f"the sandbox refuses {event} of {path[:-1]}")
    return hook

codes = [compile(text, label, "exec") for text, label in ((program, "program.py"), (tests, "tests.py"))]
sys.argv, sys.modules["__main__"] = ["program.py"], type(sys)("__main__")
names = vars(sys.modules["__main__"])
sys.addaudithook(guard())
for code in codes:
    exec(code, names)
os.write(status, b"finished")
'''


# the child's whole environment; some interpreters find their own library by the second
_ENVIRONMENT = {"LC_ALL": "C.UTF-8"} | {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}


@dataclasses.dataclass(frozen=True)
class Result:
    """`finished`: program and tests ran to their last line (an exit before it is no pass). `status` is the exit code,
    negative for a signal. `timed_out`, `truncated` (output over the cap) say why it was killed.
    """

    finished: bool
    status: int
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool
    seconds: float
    isolation: str


def run(program: str, *, tests: str = "", stdin: str = "", timeout_s: float = 5.0, memory_mb: int = 512,
        file_mb: int = 16, max_output: int = 65536, isolation: str = "auto") -> Result:  # fmt: skip
    """Run `program`, then `tests` in the same names. Returns within about timeout_s; RuntimeError if the child cannot be set up.

    isolation: 'auto' takes namespaces where they can be had, 'limits' does without.
    """
    start, output, truncated = time.monotonic(), {"stdout": bytearray(), "stderr": bytearray()}, False
    status_in, status_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, open(status_in, "rb") as status:
        for name, text in (("program.py", program), ("tests.py", tests), ("stdin", stdin)):
            with open(os.path.join(home, name), "w", encoding="utf-8", errors="replace") as f:
                f.write(text)
        limits = (status_out, int(timeout_s) + 1, memory_mb << 20, file_mb << 20, 65534)
        with open(os.path.join(home, "stdin"), "rb") as source:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, home, isolation, *map(str, limits)], stdin=source,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_ENVIRONMENT, cwd=home,
                start_new_session=True, pass_fds=(status_out,),
            )  # fmt: skip
        os.close(status_out)
        try:
            with child, selectors.DefaultSelector() as ready:
                for name in output:
                    ready.register(getattr(child, name), selectors.EVENT_READ, name)
                while ready.get_map() and not truncated and (left := start + timeout_s - time.monotonic()) > 0:
                    for key, _ in ready.select(left):
                        piece = os.read(key.fd, 65536)
                        output[key.data] += piece[: max_output - len(output[key.data]) + 1]
                        truncated |= len(output[key.data]) > max_output
                        if not piece:
                            ready.unregister(key.fileobj)
                # both pipes may be closed by a program that goes on; it is not reaped before the group is killed, so that
                # its number is still its own
                how = (os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                while not (ended := os.waitid(*how)) and not truncated and time.monotonic() < start + timeout_s:
                    time.sleep(0.002)
                timed_out = not ended and not truncated
                kill(child)
        except BaseException:
            kill(child)
            raise
        said = status.read(64).split()
    if not said and not timed_out:  # a sandbox that does not work must not pass for a program that fails
        raise RuntimeError(f"the sandbox did not start: {output['stderr'].decode('utf-8', 'replace')[-300:]!r}")
    texts = (output[n][:max_output].decode("utf-8", "replace") for n in output)
    return Result(b"finished" in said, child.returncode, *texts, timed_out, truncated, time.monotonic() - start,
                  said[0].decode() if said else "none")  # fmt: skip


def kill(child: subprocess.Popen) -> None:
    """End the child's whole session."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
