"""What `import wmengine` promises: it is light, and what is missing is named together with the mend."""

import subprocess
import sys

import pytest

import wmengine


def fresh(code: str) -> str:
    """What a new interpreter prints for this code."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def loaded_after(statement: str) -> set[str]:
    names = fresh(f"{statement}\nimport sys\nprint(*sys.modules)").split()
    return {name.partition(".")[0] for name in names}


def test_importing_the_package_loads_the_standard_library_only():
    assert loaded_after("import wmengine") - sys.stdlib_module_names - loaded_after("pass") == {"wmengine"}


@pytest.mark.parametrize("name", ["Key", "Watermark", "SCHEMES", "verify", "Verdict", "mark_of", "trigger_set"])
def test_what_verification_needs_loads_without_torch_and_without_onnxruntime(name):
    loaded = loaded_after(f"import wmengine\nwmengine.{name}")
    assert not loaded & {"torch", "triton", "onnxruntime", "scipy", "matplotlib"}


def test_every_public_name_exists():
    assert [name for name in wmengine.__all__ if not hasattr(wmengine, name)] == []
    assert set(wmengine.__all__) <= set(dir(wmengine))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'wmengine' has no attribute 'nothing'"):
        wmengine.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("Embedder", "torch", "train"), ("export_onnx", "torch", "train")],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(name, package, extra):
    # A module that is None in sys.modules is how Python itself spells "cannot be imported".
    code = f"""
import sys
sys.modules[{package!r}] = None
import wmengine
try:
    wmengine.{name}(None, None, None)
except ImportError as error:
    print(error)
"""
    assert f"{package} is not installed: pip install 'wmengine[{extra}]'" in fresh(code)
