"""`python build.py CSRC OUT` compiles the CUDA module for the host with g++: the same sources, the same bindings.

Only the launches are rewritten, ``kernel<<<grid, block, 0, stream>>>(…)`` to a call of the emulation's; the headers in
this folder stand in for CUDA's.
"""

import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
OPENING, CLOSING = "(<[{", ")>]}"


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in OPENING) - (text[at] in CLOSING)
        if depth == 0:
            return at
    raise ValueError(f"no end of {text[start : start + 60]!r}")


def split(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def rewrite(source: str) -> str:
    """The source with its launches as calls of ``emulation::launch``."""
    while (at := source.find("<<<")) >= 0:
        before = source[:at].rstrip()
        start = len(before)
        if before.endswith(">"):  # the kernel's template arguments
            depth = 0
            while depth or start == len(before):
                start -= 1
                depth += (before[start] == ">") - (before[start] == "<")
        start = re.search(r"\w+$", before[:start]).start()
        middle = source.index(">>>", at)
        end = closing(source, middle + 3)
        grid, block, *_ = split(source[at + 3 : middle])
        call = f"{before[start:]}{source[middle + 3 : end + 1]}"
        source = f"{source[:start]}emulation::launch({grid}, {block}, [=] {{ {call}; }}){source[end + 1 :]}"
    return source


def build(csrc: Path, out: Path) -> Path:
    """The module's path in the folder `out`, which is made."""
    (out / "cuda").mkdir(parents=True, exist_ok=True)
    sources = [HERE / "emulation.cpp", csrc / "cuda" / "bindings.cpp"]
    for path in (csrc / "cuda").glob("*.cu"):
        sources.append(out / "cuda" / f"{path.stem}.cpp")
        sources[-1].write_text(rewrite(path.read_text()))
    folders = (HERE, csrc / "cuda", pybind11.get_include(), sysconfig.get_path("include"))
    include = [f"-I{folder}" for folder in folders]
    options = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", *include]

    def compile_one(source: Path) -> str:
        target = str(out / f"{source.stem}.o")
        subprocess.run(["g++", *options, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    module = out / "_cuda.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(module)], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
