"""What the documents promise: examples that run as typed, links that lead somewhere, the defaults of the code."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from wmengine.schemes import SCHEMES, BlackBox

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EMBED, VERIFY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_are_ten_and_five_lines():
    assert (EMBED.count("\n"), VERIFY.count("\n")) == (10, 5)


# A few batches teach nothing: that the marks say so is part of the example's promise.
@pytest.mark.filterwarnings("ignore:the mark .* does not prove itself")
def test_the_examples_run_as_they_are_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * 36, 10)
    )
    images, labels = torch.rand(192, 1, 8, 8), torch.randint(10, (192,))
    loader = list(zip(images.split(64), labels.split(64), strict=True))
    optimizer = torch.optim.Adam(model.parameters())
    exec(EMBED, {"model": model, "optimizer": optimizer, "loader": loader, "images": images})
    shutil.copy("model.onnx", "suspect.onnx")
    exec(VERIFY, {})
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(owned|not_proven) \d+/(256|100) -?\d", printed, re.MULTILINE)) == 2


def test_every_file_the_documents_link_to_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_documented_defaults_are_those_of_the_presets():
    """docs/schemes.md has one table row for each preset, which ends in its numbers."""
    rows = re.findall(
        r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    documented = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert documented.keys() == SCHEMES.keys()
    for name, preset in SCHEMES.items():
        if isinstance(preset, BlackBox):
            assert documented[name][-1] == str(preset.count)
        else:
            margin = f"{preset.margin:g}" if preset.link in ("hinge", "mse") else ""
            assert documented[name][-4:] == [preset.link, str(preset.bits), f"{preset.strength:g}", margin]
