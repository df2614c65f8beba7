"""The table of launches, and tuning with a timer of the test's own: what is measured, kept, ignored, left alone."""

import inspect
import json
import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed (it comes with torch on Linux)")

from wmengine.kernels import (  # noqa: E402
    carriers,
    cross_entropy,
    embedding_loss,
    launches,
    layers,
    projection,
    soft_nearest_neighbor,
)

CPU = torch.device("cpu")
FAST = launches.Launch(8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The file of tuned launches, in a folder of its own, and a process that has tuned nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WMENGINE_AUTOTUNE", raising=False)
    monkeypatch.setattr(launches, "_TUNED", {})
    return tmp_path / "wmengine" / "launches.json"


@pytest.fixture
def measured(monkeypatch):
    """Tuning asked for, with a timer that finds 8 warps fastest; the launches it was asked to time."""
    asked = []
    monkeypatch.setenv("WMENGINE_AUTOTUNE", "1")
    monkeypatch.setattr(launches, "measure", lambda call, launch: asked.append(launch) or abs(launch.warps - 8))
    return asked


def launched(kernel="sketch_adjoint", size=5000, dtype=torch.float32):
    """The launch that a call got."""
    calls = []
    launches.run(kernel, size, dtype, CPU, calls.append)
    assert len(calls) == 1
    return calls[0]


def test_every_kernel_of_the_embedding_loss_has_its_launch():
    modules = (carriers, embedding_loss, layers, projection)
    written = {name.removesuffix("_kernel") for module in modules for name in vars(module) if name.endswith("_kernel")}
    adjoints = {"sketch_adjoint", "dense_adjoint"}
    losses = {"cross_entropy", "cross_entropy_sums", "cross_entropy_scale", "soft_neighbor_tiles", "soft_neighbor_rows"}
    assert written - {"adjoint"} | adjoints | losses == set(launches.TABLE)


def test_no_kernel_is_launched_past_the_table():
    for module in (carriers, cross_entropy, embedding_loss, layers, projection, soft_nearest_neighbor):
        assert "num_warps" not in inspect.getsource(module), module


def test_the_table_covers_every_size():
    for kernel, rows in launches.TABLE.items():
        assert rows[-1].up_to == math.inf, kernel
        assert sorted(row.up_to for row in rows) == [row.up_to for row in rows]
        for row in rows:
            for launch in (row.launch, *row.others):
                assert launch.warps in (1, 2, 4, 8, 16)
                assert all(size & (size - 1) == 0 for size in launch.blocks.values())


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (1, (16, 16, 4)),
        (16, (16, 16, 4)),
        (17, (16, 32, 4)),
        (1000, (4, 1024, 4)),
        (1025, (2, 2048, 4)),
        (8192, (1, 8192, 8)),
        (50257, (1, 4096, 8)),
        (10**6, (1, 8192, 16)),
    ],
)
def test_a_size_gets_the_launch_of_its_class(classes, expected):
    launch = launches.chosen("cross_entropy", classes)
    assert (launch.blocks["TILE"], launch.blocks["STEP"], launch.warps) == expected
    assert launch.options() == {"num_warps": expected[2], "num_stages": 3, "TILE": expected[0], "STEP": expected[1]}


def test_only_kernels_that_add_nothing_across_threads_may_be_tuned():
    assert {kernel for kernel, rows in launches.TABLE.items() if any(row.others for row in rows)} == {
        "sketch_adjoint",
        "dense_adjoint",
    }


def test_nothing_is_timed_or_read_until_it_is_asked_for(monkeypatch, cache):
    monkeypatch.setattr(launches, "measure", lambda call, launch: pytest.fail("timed"))
    cache.parent.mkdir()
    cache.write_text("not JSON")
    assert launched() == launches.chosen("sketch_adjoint")


def test_a_kernel_with_one_launch_is_never_timed(measured):
    assert launched("sketch_sums") == launches.chosen("sketch_sums")
    assert measured == []


def test_the_fastest_is_taken_and_kept_for_other_processes(measured, cache, monkeypatch):
    assert launched() == launched() == FAST
    assert sorted(launch.warps for launch in measured) == [2, 4, 8]
    assert [path.name for path in cache.parent.iterdir()] == ["launches.json"]  # and no half-written file
    monkeypatch.setattr(launches, "_TUNED", {})  # another process
    assert launched() == FAST
    assert len(measured) == 3


def test_each_key_is_tuned_for_itself_and_keeps_the_others(measured, cache, monkeypatch):
    launched()
    launched(size=2**30)
    launched(dtype=torch.bfloat16)
    launched("dense_adjoint")
    monkeypatch.setattr(launches, "__version__", "0.0.0")
    launched()
    assert len(measured) == 4 * 3 + 2
    kept = json.loads(cache.read_text())
    assert kept["format"] == launches.FORMAT
    assert len(kept["launches"]) == 5
    assert all(key.split("|")[3] == "cpu" for key in kept["launches"])


@pytest.mark.parametrize(
    "content", ["not JSON", "[]", '{"format": "another/2", "launches": {}}', '{"format": 1}', "\udcff"]
)
def test_a_corrupted_or_foreign_file_is_left_aside_with_a_warning(measured, cache, content):
    cache.parent.mkdir()
    cache.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="left aside"):
        assert launched() == FAST


@pytest.mark.parametrize("entry", [{"warps": 64, "stages": 3, "blocks": {}}, "8", None, {"warps": 8}])
def test_a_launch_that_the_table_does_not_know_is_measured_again(measured, cache, monkeypatch, entry):
    launched()
    content = json.loads(cache.read_text())
    content["launches"] = dict.fromkeys(content["launches"], entry)
    cache.write_text(json.dumps(content))
    monkeypatch.setattr(launches, "_TUNED", {})
    if entry is None:
        assert launched() == FAST
    else:
        with pytest.warns(UserWarning, match="not among those of"):
            assert launched() == FAST
    assert len(measured) == 6


def test_a_cache_that_cannot_be_written_costs_a_warning_only(measured, cache):
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be"):
        assert launched() == FAST
