"""Build the compiled modules: setuptools asks, CMake works, and `_cuda` may be missing but `_cpu` may not.

Everything else about the package stands in pyproject.toml. The environment variable WMENGINE_CUDA decides on `_cuda`:
AUTO (default: build it where nvcc works, carry on without it otherwise), ON (fail without it), OFF (leave it alone).
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def tool(name: str, folder_attribute: str) -> str:
    """The program's path: from its Python package where that is installed, from PATH otherwise."""
    try:
        found = shutil.which(name, path=getattr(importlib.import_module(name), folder_attribute))
    except ImportError:
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise CompileError(f"{name} was not found: install it with `pip install {name}`")
    return found


def cuda_mode() -> str:
    mode = os.environ.get("WMENGINE_CUDA", "AUTO").upper()
    if mode not in {"AUTO", "ON", "OFF"}:
        raise SystemExit(f"WMENGINE_CUDA is {mode!r}: set it to AUTO, ON or OFF")
    return mode


def build_folder() -> Path:
    """One folder for each interpreter and environment, kept between builds so that only what changed is compiled.

    setuptools' own `build_temp` is thrown away after every editable install, hence a folder of our own.
    """
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{environment}"


class CMakeBuild(build_ext):
    """Configure once, then build one CMake target for each extension."""

    def run(self) -> None:
        self.configure(cuda_mode())
        super().run()

    def configure(self, mode: str) -> None:
        import pybind11

        cmake = tool("cmake", "CMAKE_BIN_DIR")
        ninja = tool("ninja", "BIN_DIR")
        # Every path is given on each run: a cache left by an isolated build names folders that no longer exist.
        command = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_folder()), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DWMENGINE_CUDA={mode}",
        ]
        try:
            self.call(command)
        except CompileError:
            if mode != "AUTO":
                raise
            self.warn("CMake could not configure with CUDA: building without _cuda (WMENGINE_CUDA=ON shows the error)")
            self.configure("OFF")

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.rpartition(".")[2]
        folder = build_folder()
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.unlink(missing_ok=True)  # setuptools keeps build/lib*: an earlier _cuda must not end in this wheel
        if target == "_cuda" and not (folder / "cuda-enabled").exists():
            return  # CMake has said why
        jobs = str(max(1, self.parallel or os.cpu_count() or 1))
        self.call([tool("cmake", "CMAKE_BIN_DIR"), "--build", str(folder), "--target", target, "-j", jobs])
        built = folder / "lib" / Path(self.get_ext_filename(ext.name)).name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, destination)

    def call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"`{' '.join(command[:2])} …` failed with exit status {error.returncode}") from error

    def copy_extensions_to_source(self) -> None:
        # An editable build without CUDA must not leave the _cuda of an earlier build beside the sources.
        for ext in self.extensions:
            inplace, built = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            if ext.optional and not os.path.exists(built) and os.path.exists(inplace):
                os.unlink(inplace)
        super().copy_extensions_to_source()


# No source stands under `sources`, CMake knows them; `depends` is what a source distribution must carry along.
FILES = ["CMakeLists.txt", "constraints.txt", *(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))]

setup(
    ext_modules=[
        Extension("wmengine._cpu", sources=[], depends=FILES),
        Extension("wmengine._cuda", sources=[], depends=FILES, optional=cuda_mode() != "ON"),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
