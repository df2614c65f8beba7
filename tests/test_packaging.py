"""What the build promises: pins that agree, sources that are whole, CUDA as an option, modules that link little."""

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import wmengine

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier) for one in pinned}


def declared() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"]]
    for name in ("cpu", "train", "endpoint", "gguf", "lightning", "transformers", "demo", "dev", "bench", "ray"):
        wanted += extras[name]
    return [one for one in map(Requirement, wanted) if one.name != "wmengine"]


def test_constraints_pin_one_exact_version_that_any_index_has():
    for name, specifier in pins().items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", specifier), f"{name}{specifier}: no range, and no +cpu or the like"
    assert (pins()["torch"], pins()["triton"]) == ("==2.13.0", "==3.7.1")


def test_the_isolated_build_uses_the_versions_of_the_constraints():
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert str(requirement.specifier) == pins()[canonicalize_name(requirement.name)], requirement.name


def test_every_declared_dependency_is_pinned_within_its_range():
    for requirement in declared():
        pin = pins()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.removeprefix("==")), f"{requirement} against {pin}"


def test_everything_that_the_dependencies_bring_is_pinned():
    missing, seen, waiting = set(), set(), [canonicalize_name(one.name) for one in declared()]
    extras = PROJECT["project"]["optional-dependencies"]
    optional = {Requirement(one).name for extra in ("bench", "ray") for one in extras[extra]}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in pins():
            missing.add(name)
        try:
            brought = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            assert name in optional, f"{name} is not installed"  # only benchmarks and clusters need those
            continue
        for requirement in map(Requirement, brought):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            # torch's builds for NVIDIA cards bring their own libraries, in versions that torch itself pins
            if applies and not requirement.name.startswith(("nvidia-", "cuda-")):
                waiting.append(canonicalize_name(requirement.name))
    assert missing == set()


def test_the_installed_version_is_the_one_in_the_sources():
    assert metadata.version("wmengine") == wmengine.__version__


def build_description(target: Path, *names: str) -> Path:
    """A copy of what the build reads, so that building leaves nothing in the working tree."""
    copied = ("setup.py", "CMakeLists.txt", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", *names)
    for name in copied:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target / name)
    return target


def test_a_source_distribution_holds_all_that_a_build_needs(tmp_path):
    tree = build_description(tmp_path, "csrc")
    (tree / "wmengine").mkdir()
    for name in ("__init__.py", "_optional.py", "_version.py"):
        shutil.copy(ROOT / "wmengine" / name, tree / "wmengine")
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE"} <= held


def test_a_script_beside_the_clone_imports_the_package_that_was_installed_from_it(tmp_path):
    """And not the clone's folder, of the same name. Nothing is compiled here."""
    tree = tmp_path / "wmengine"
    (tree / "wmengine").mkdir(parents=True)
    build_description(tree)
    (tree / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    for name in ("__init__.py", "_optional.py", "_version.py"):
        shutil.copy(ROOT / "wmengine" / name, tree / "wmengine")
    code = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    script = (
        "import sys, site; sys.path.insert(0, ''); site.addsitedir('site'); import wmengine; print(wmengine.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tree / "wmengine" / "__init__.py")


def test_sources_that_were_not_compiled_say_so_in_a_sentence(tmp_path):
    """In a clone, they hide the package that was installed from it."""
    shutil.copytree(ROOT / "wmengine", tmp_path / "wmengine", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    libraries = Path(np.__file__).parent.parent  # without what an editable install of ours put there
    script = f"import sys; sys.path[:0] = ['', {str(libraries)!r}]\nimport wmengine; wmengine.set_num_threads(1)"
    command = [sys.executable, "-IS", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()[-1]
    assert f"wmengine was imported from its sources in {tmp_path}, which are not compiled: run elsewhere" in said


def configure(folder: Path, mode: str, cuda_compiler: str) -> subprocess.CompletedProcess[str]:
    """CMake's configure step as setup.py runs it, with this nvcc."""
    import cmake
    import ninja
    import pybind11

    command = [
        Path(cmake.CMAKE_BIN_DIR) / "cmake",
        *("-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        f"-DWMENGINE_CUDA={mode}",
    ]
    environment = {**os.environ, "CUDACXX": cuda_compiler}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


def test_without_a_working_nvcc_the_build_goes_on_and_says_so(tmp_path):
    done = configure(tmp_path, "AUTO", cuda_compiler="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "wmengine._cuda is left out: no working nvcc was found" in done.stdout
    assert not (tmp_path / "cuda-enabled").exists()


def test_a_build_that_demands_cuda_fails_without_a_working_nvcc(tmp_path):
    done = configure(tmp_path, "ON", cuda_compiler="/bin/false")
    assert done.returncode != 0
    assert "WMENGINE_CUDA=ON, but no working nvcc was found" in " ".join(done.stderr.split())


def test_a_misspelt_cuda_mode_is_refused_with_the_known_ones():
    environment = {**os.environ, "WMENGINE_CUDA": "maybe"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "WMENGINE_CUDA is 'MAYBE': set it to AUTO, ON or OFF" in done.stderr


def test_pybind11_stays_out_of_the_files_that_nvcc_reads():
    kernels = list((ROOT / "csrc" / "cuda").glob("*.cu*"))
    assert kernels
    assert [path.name for path in kernels if "pybind11" in path.read_text()] == []


def test_the_type_stub_of_a_compiled_module_names_what_the_module_has():
    for stub in Path(wmengine.__file__).parent.glob("*.pyi"):
        if importlib.util.find_spec(f"wmengine.{stub.stem}") is None:
            continue  # _cuda is optional
        declared = [node.name for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)]
        module = importlib.import_module(f"wmengine.{stub.stem}")
        assert sorted(declared) == sorted(name for name in dir(module) if not name.startswith("_"))


def linked_libraries(module: Path) -> set[str]:
    listing = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    return {name.partition(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.+)\]", listing)}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) reads the modules' headers")
def test_the_compiled_modules_link_only_the_system_c_and_cpp_libraries():
    modules = sorted(Path(wmengine.__file__).parent.glob("_c*.so"))
    assert any(module.name.startswith("_cpu.") for module in modules)
    system = {"libc", "libm", "libpthread", "libdl", "librt", "libstdc++", "libgcc_s"}
    system |= {"ld-linux-x86-64", "ld-linux-aarch64"}  # the loader itself, by its name on each machine
    for module in modules:
        assert linked_libraries(module) <= system, module.name


def test_mlservers_environment_is_pinned_and_has_our_engine():
    pinned = [Requirement(line) for line in (ROOT / "tests" / "mlserver.txt").read_text().splitlines()[1:]]
    assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", str(one.specifier)) for one in pinned)
    assert {one.name: str(one.specifier) for one in pinned}["onnxruntime"] == pins()["onnxruntime"]
