"""House rules that a machine can check: arrows between rooms, file length, banned names, README length."""
import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("configs", "model", "train", "data", "pallas_kernels")
MAY_IMPORT = {
    "pallas_kernels": set(),
    "model": {"pallas_kernels"},
    "data": set(),
    "train": {"model", "data", "pallas_kernels"},
    "configs": set(),
}
BANNED_FILES = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}


def python_files():
    files = [ROOT / "main.py", *(ROOT / "tests").rglob("*.py")]
    return files + [f for room in ROOMS for f in (ROOT / room).rglob("*.py")]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        yield from (name.split(".")[0] for name in names if name.split(".")[0] in ROOMS)


def test_arrows_point_one_way():
    for room, allowed in MAY_IMPORT.items():
        for path in (ROOT / room).rglob("*.py"):
            wrong = set(imported_rooms(path)) - allowed - {room}
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; {room} may import only {allowed}"


def test_no_file_is_longer_than_500_lines_or_has_a_banned_name():
    for path in python_files():
        assert len(path.read_text().splitlines()) <= 500, f"{path} is too long: which second idea lives there?"
        assert path.name not in BANNED_FILES, f"{path}: name the idea"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
