"""Marks in a Lightning training: two lines of `training_step`, and a callback for all else."""

import logging

import pytest
import torch
from embedding import CLASSES, KEY, batch, network, small
from torch.utils.data import DataLoader, TensorDataset

import wmengine
from wmengine.errors import WatermarkError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:the mark .* does not prove itself"),
]


def marked_module(marks=None):
    import lightning.pytorch as lightning  # which takes seconds

    class Marked(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()
            options = {"marks": marks} if marks else {"key": KEY, "name": "test-model", "schemes": small()}
            self.emb = wmengine.Embedder(self.network, num_classes=CLASSES, sample=batch(64)[0], **options)

        def forward(self, x):
            return self.network(x)

        def training_step(self, given, _):
            x, y = self.emb.mix(*given)
            return self.emb.loss(self(x), y)

        def validation_step(self, given, _):
            x, y = given
            self.log("accuracy", (self(x).argmax(1) == y).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 2e-3)

    return Marked()


def loader(steps):
    return DataLoader(TensorDataset(*batch(64 * steps)), batch_size=64)


def trainer(module, folder, epochs, **options):
    import lightning.pytorch as lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[wmengine.MarkingCallback(module.emb, folder / "marks")],
        **options,
    )


def test_a_marked_training_logs_its_marks_and_saves_them(tmp_path):
    module = marked_module()
    runs = trainer(module, tmp_path, 3, accumulate_grad_batches=2)
    runs.fit(module, loader(40), loader(4))
    for scheme, total in (("sketch", 64), ("adi", 40)):
        verdict = wmengine.verify(module.network, tmp_path / "marks" / f"{scheme}.wm", key=KEY)
        assert (verdict.decision, verdict.derivation, verdict.total) == ("owned", "checked", total)
        assert float(runs.callback_metrics[f"{scheme}_matched"]) > 0.6 * total
    assert float(runs.callback_metrics["accuracy"]) > 0.95


def test_marks_are_saved_before_the_first_step_and_no_other_is_overwritten(tmp_path):
    """What a crash leaves goes on; a name that is taken is told before anything is trained."""

    class Crash(RuntimeError):
        pass

    def crashing(module):
        def step(*_):
            raise Crash

        module.training_step = step
        return module

    module = marked_module()
    trainer(module, tmp_path, 1, fast_dev_run=True).fit(module, loader(1))
    assert not (tmp_path / "marks").exists()
    with pytest.raises(Crash):
        trainer(crashing(module), tmp_path, 1).fit(module, loader(1))
    paths = [tmp_path / "marks" / "sketch.wm", tmp_path / "marks" / "adi.wm"]
    saved = [wmengine.Watermark.load(path) for path in paths]
    assert [mark.commitment for mark in saved] == [mark.commitment for mark in module.emb.marks]
    again = marked_module(marks=paths)
    with pytest.raises(Crash):
        trainer(crashing(again), tmp_path, 1).fit(again, loader(1))
    for mark, path in zip(saved, paths, strict=True):
        other = wmengine.Watermark.create(wmengine.Key("ACME Vision", bytes(32)), mark.preset, mark.parameters)
        other.save(path, overwrite=True)
    with pytest.raises(WatermarkError, match=r"sketch.wm exists already and is not overwritten"):
        trainer(again, tmp_path, 1).fit(again, loader(1))


def test_a_checkpoint_goes_on_with_the_order_of_triggers(tmp_path):
    module = marked_module()
    runs = trainer(module, tmp_path, 1)
    runs.fit(module, loader(5))
    runs.save_checkpoint(tmp_path / "last.ckpt")
    expected = module.emb.mix(*batch(64, seed=5))
    again = marked_module(marks=[tmp_path / "marks" / "sketch.wm", tmp_path / "marks" / "adi.wm"])
    assert not torch.equal(again.emb.mix(*batch(64, seed=5))[0], expected[0])
    trainer(again, tmp_path / "again", 1).fit(again, loader(5), ckpt_path=tmp_path / "last.ckpt")
    assert all(map(torch.equal, again.emb.mix(*batch(64, seed=5)), expected))
