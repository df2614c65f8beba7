"""The C++ core by itself: compiled by other compilers and for aarch64, it must compute the same bits as here."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if path.name != "bindings.cpp"]
DRIVER = ROOT / "tests" / "native" / "golden.cpp"
# What CMakeLists.txt asks for, at -O2 because that compiles faster.
OPTIONS = [
    "-std=c++17",
    "-O2",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]


def program(compiler: str, folder: Path) -> Path:
    """The driver, linked statically with every source of csrc/cpu but the Python bindings."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *OPTIONS, "-I", str(ROOT / "csrc"), "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*SOURCES, DRIVER]))
    linked = folder / "golden"
    subprocess.run([compiler, "-static", "-pthread", *map(str, objects), "-o", str(linked)], check=True)
    return linked


def answers(command: list[str]) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What this machine's g++ makes of the driver."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    lines = answers([str(program("g++", tmp_path_factory.mktemp("host")))])
    assert len(lines) == 3 * 4 * 3 + 4 * 2 * 2
    return lines


def test_the_core_compiled_for_aarch64_computes_the_same_bits(expected: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)")
    linked = program(compiler, tmp_path)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("compiled, but qemu-aarch64 is not installed, so nothing was run (Debian: qemu-user-static)")
    assert answers([emulator, str(linked)]) == expected


def test_the_core_compiled_by_clang_computes_the_same_bits(expected: list[str], tmp_path: Path) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    assert answers([str(program("clang++", tmp_path))]) == expected
