"""The sandbox: hostile programs end in time, reach nothing, and cannot pass for finished. Both isolations."""
import os
import socket
import tempfile
import time

import pytest

from train import sandbox


@pytest.fixture(params=["auto", "limits"])
def run(request):
    return lambda program, **k: sandbox.run(program, isolation=request.param, **k)


def test_a_program_runs_with_library_input_and_its_own_directory(run):
    r = run("import json, math, re, collections.abc, dataclasses, itertools, random, datetime, heapq\n"
            "open('note', 'w').write('kept')\nprint(json.dumps([math.factorial(5), input(), open('note').read()]))",
            stdin="héllo\n")  # fmt: skip
    assert (r.finished, r.status, r.stdout, r.stderr) == (True, 0, '[120, "h\\u00e9llo", "kept"]\n', "")
    assert not r.timed_out and not r.truncated and r.seconds < 5 and r.isolation in ("namespaces", "limits")


@pytest.mark.parametrize("program", [
    "while True: pass", "import time; time.sleep(60)", "import os\nos.close(1); os.close(2)\nwhile True: pass",
    "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
])  # fmt: skip
def test_an_endless_program_is_killed_in_time(run, program):
    start = time.monotonic()
    r = run(program, timeout_s=0.5)
    assert r.timed_out and not r.finished and r.status == -9 and time.monotonic() - start < 3


@pytest.mark.parametrize("attempt", [
    "import os\nfor _ in range(200): os.fork()", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])",
    "import os\nos.system('true')", "import os\nos.execv('/bin/sh', ['sh'])", "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
    "import multiprocessing\nmultiprocessing.Process(target=print).start()", "import ctypes\nctypes.CDLL(None).fork()",
    "import ctypes\nctypes.pythonapi.PyGILState_Check()",
])  # fmt: skip
def test_no_process_can_be_started(run, attempt):
    before = len(os.listdir("/proc"))
    r = run(f"{attempt}\nprint('escaped')", timeout_s=3)
    assert not r.finished and "escaped" not in r.stdout and r.seconds < 4
    assert len(os.listdir("/proc")) < before + 50


def test_a_memory_hog_and_a_disk_hog_hit_their_limits(run):
    r = run("x = []\nwhile True: x.append(bytearray(10**7))", memory_mb=200, timeout_s=5)
    assert not r.finished and not r.timed_out and ("MemoryError" in r.stderr or r.status < 0)
    r = run("open('big', 'wb').write(b'a' * 10**8)", file_mb=1)
    assert not r.finished and ("too large" in r.stderr or "No space" in r.stderr)
    r = run("for i in range(50): open(f'n{i}', 'wb').write(b'a' * 900_000)", file_mb=1)
    assert not r.finished or r.isolation == "limits"  # many small files: only a file system of their own bounds the sum


def test_output_is_cut(run):
    r = run("while True: print('a' * 10000)", max_output=5000, timeout_s=5)
    assert r.truncated and not r.timed_out and not r.finished and len(r.stdout) == 5000 and r.seconds < 4
    r = run("import sys; sys.stderr.write('b' * 3000)", max_output=5000)
    assert r.finished and len(r.stderr) == 3000


def test_environment_files_and_network_are_out_of_reach(run, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    os.chmod(secret, 0o644)
    for program in ("import os; print(os.environ)", f"print(open({str(secret)!r}).read())", "print(open('/proc/self/environ').read())",
                    f"print(open('/proc/{os.getpid()}/environ').read())", "print(open('/etc/passwd').read())",
                    f"import os; print(os.read(os.open({str(secret)!r}, 0), 99))",
                    "import socket; socket.create_connection(('1.1.1.1', 53), 1); print('hunter2')",
                    "import os; print(os.listdir('/'))"):  # fmt: skip
        r = run(program)
        assert "hunter2" not in r.stdout and "root:" not in r.stdout and "'proc'" not in r.stdout, program


def test_nothing_outside_the_directory_can_be_changed(run, tmp_path):
    os.chmod(tmp_path, 0o777)
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for program in (f"open({str(tmp_path / 'new')!r}, 'w')", f"import os; os.remove({str(kept)!r})", f"open({str(kept)!r}, 'a').write('x')",
                    f"import os; os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)", "open('../../new', 'w')",
                    f"import os; os.rename({str(kept)!r}, 'here')", f"import os; os.symlink({str(tmp_path)!r}, 'l'); open('l/new', 'w')",
                    f"import os; os.mkdir({str(tmp_path / 'new')!r})", f"import pathlib; pathlib.Path({str(kept)!r}).chmod(0)",
                    f"import shutil; shutil.rmtree({str(tmp_path)!r})"):  # fmt: skip
        assert not run(program).finished, program
        assert [p.name for p in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "kept"
    assert kept.stat().st_mode & 0o777


def test_only_reaching_the_last_line_of_the_tests_is_finished(run):
    assert run("def f(x): return x + 1", tests="assert f(1) == 2").finished
    for program in ("def f(x): return x", "raise SystemExit(0)", "import os; os._exit(0)", "def f(", "1/0", "import sys; sys.exit()",
                    "print(open('tests.py').read())", "import atexit, os; atexit.register(os._exit, 0); exit()"):  # fmt: skip
        assert not run(program, tests="assert f(1) == 2").finished, program


def test_where_the_kernel_allows_it_namespaces_hold_without_the_hook(monkeypatch):
    """With the audit hook taken out, the file system is still read-only, /proc and the network gone, no process starts."""
    monkeypatch.setattr(sandbox, "_BOOT", sandbox._BOOT.replace("sys.addaudithook(guard())", ""))
    assert sandbox.run("print(1)").finished
    if sandbox.run("").isolation == "namespaces":
        with tempfile.TemporaryDirectory() as outside, socket.create_server(("127.0.0.1", 0)) as server:
            os.chmod(outside, 0o777)  # as open as it gets: only the read-only mount is in the way
            for program in (f"open('{outside}/new', 'w')", "import os; os.listdir('/proc')[0]", "import os; os.fork() or os._exit(0)",
                            f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)",
                            "import ctypes\nassert not ctypes.CDLL(None).umount2(b'/proc', 0)",
                            "import ctypes\nassert not ctypes.CDLL(None).mount(None, b'/', None, 32, None)"):  # fmt: skip
                assert not sandbox.run(program).finished, program
            assert not os.listdir(outside)


def test_a_sandbox_that_cannot_be_set_up_raises_instead_of_failing_the_program(monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", "raise OSError('no')")
    with pytest.raises(RuntimeError, match="the sandbox did not start: .*no"):
        sandbox.run("print(1)")
