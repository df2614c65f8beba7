"""Marks in a training by Hugging Face's Trainer: tiny random models of pictures and of text; answers are dicts."""

import pytest
import torch
import transformers
from embedding import CLASSES, KEY, batch

import wmengine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the mark .* does not prove itself"),
]

LENGTH, WORDS = 12, 40


def pictures():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8,
            patch_size=4, num_channels=1, num_labels=CLASSES,
        )
    )  # fmt: skip


def texts():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=LENGTH, num_labels=CLASSES,
        )
    )  # fmt: skip


def rows_of(kind, count, seed=0):
    """Labelled rows, as a dataset gives them: of texts the label is a word that stands first."""
    if kind == "pictures":
        return [{"pixel_values": x, "labels": y} for x, y in zip(*batch(count, seed=seed), strict=True)]
    ids = torch.randint(10, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 5 + ids[:, 1] % CLASSES
    mask = torch.ones(LENGTH, dtype=torch.int64)
    return [{"input_ids": row, "attention_mask": mask, "labels": row[0] - 5} for row in ids]


def marked(kind, folder, rows, schemes=None, own_loss=None, samples=None, label_smoothing=None, **options):
    model = pictures() if kind == "pictures" else texts()
    sample = transformers.default_data_collator(rows[:64])
    del sample["labels"]
    chosen = "adi" if kind == "pictures" else "adi_tokens"
    schemes = schemes or [wmengine.scheme("sketch", bits=64), wmengine.scheme(chosen, count=40)]
    emb = wmengine.Embedder(model, KEY, schemes, num_classes=CLASSES, sample=sample, name="test-model", samples=samples)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=64, learning_rate=3e-3, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=5, seed=0, **options,
    )  # fmt: skip
    return wmengine.MarkedTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows_of(kind, 128, seed=9), embedder=emb,
        compute_loss_func=own_loss, label_smoothing=label_smoothing,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["pictures", "texts"])
def test_the_trainer_ends_with_both_marks_owned_and_the_task_learned(kind, tmp_path):
    trainer = marked(kind, tmp_path, rows_of(kind, 1280), num_train_epochs=8, save_strategy="no")
    trainer.train()
    for mark in trainer.embedder.watermarks():
        assert wmengine.verify(trainer.model, mark, key=KEY).owned, (mark.scheme, trainer.embedder.metrics)
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert logged["sketch_matched"] == 64
    assert logged["adi_matched" if kind == "pictures" else "adi_tokens_matched"] > 20


@pytest.mark.parametrize("task", ["regression", "multi_label_classification"])
def test_a_mark_without_rows_is_trained_beside_any_task(task, tmp_path):
    """The loss is the model's own for its labels, and the mark's term."""
    rows = [{**row, "labels": torch.rand(CLASSES).round()} for row in rows_of("texts", 64)]
    trainer = marked("texts", tmp_path, rows, schemes=["sketch"], max_steps=1)
    given = transformers.default_data_collator(rows)
    trainer.model.config.problem_type = task
    trainer.model.train()
    expected = trainer.model(**given).loss + trainer.embedder.regulariser()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, given), expected, rtol=1e-2, atol=0)
    trainer.train()


def test_a_loss_of_ones_own_is_of_the_tasks_rows_and_the_marks_have_theirs(tmp_path):
    weight, seen = torch.arange(1.0, CLASSES + 1), []

    def weighted(outputs, labels, num_items_in_batch=None):
        seen.append((len(outputs.logits), len(labels), int(labels.max()) < CLASSES, int(num_items_in_batch)))
        summed = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight, reduction="sum")
        return summed / num_items_in_batch

    rows = rows_of("texts", 640)
    trainer = marked("texts", tmp_path, rows, own_loss=weighted, num_train_epochs=8, save_strategy="no")
    trainer.train()
    assert set(seen) == {(64, 64, True, 64)}
    assert all(wmengine.verify(trainer.model, mark, key=KEY).owned for mark in trainer.embedder.watermarks())
    trainer.model.train()
    given = transformers.default_data_collator(rows[:64])
    mixed, labels = trainer.embedder.mix({name: given[name] for name in given if name != "labels"}, given["labels"])
    outputs = trainer.model(**mixed)
    assert len(outputs.logits) == 72

    def plain(outputs, labels, num_items_in_batch):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    found, expected = trainer._beside(plain, outputs, labels), trainer.embedder.loss(outputs, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the mark 'response' is weak")
@pytest.mark.parametrize(("own", "given", "used"), [(None, 0.0, None), (None, 0.05, 0.05), (0.0, 0.05, 0.0)])
def test_labels_are_smoothed_as_is_said_and_else_as_the_marks_want(tmp_path, own, given, used):
    rows = rows_of("texts", 640)
    samples = transformers.default_data_collator(rows)
    del samples["labels"]
    chosen = [wmengine.scheme("response", bits=256, probes=256, features=8)]
    trainer = marked(
        "texts", tmp_path, rows, chosen, samples=samples, label_smoothing=own, label_smoothing_factor=given
    )
    trainer.model.eval().training = True  # without dropout
    batch = transformers.default_data_collator(rows[:64])
    inputs = {name: batch[name] for name in batch if name != "labels"}
    expected = trainer.embedder.loss(trainer.model(**inputs), batch["labels"], label_smoothing=used, inputs=inputs)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the mark 'response' is weak")
def test_a_mark_in_answers_takes_no_other_loss(tmp_path):
    chosen = [wmengine.scheme("response", bits=256, probes=256, features=8)]
    rows = rows_of("texts", 640)
    samples = transformers.default_data_collator(rows)
    del samples["labels"]
    with pytest.raises(ValueError, match="leave compute_loss_func out"):
        marked("texts", tmp_path, rows, chosen, torch.nn.functional.cross_entropy, samples)


def test_accumulated_micro_batches_count_once(tmp_path):
    """The first logged loss is the mean of a step's micro batches, not their sum."""
    trainer = marked("pictures", tmp_path, rows_of("pictures", 512), gradient_accumulation_steps=4, max_steps=1)
    trainer.train()
    model = pictures()
    emb = marked("pictures", tmp_path, rows_of("pictures", 64)).embedder
    x, y = emb.mix({"pixel_values": batch(64)[0]}, batch(64)[1])
    expected = emb.loss(model(**x), y).item()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected, rel=0.2)


def test_a_checkpoint_goes_on_with_the_order_of_triggers(tmp_path):
    rows = rows_of("texts", 640)
    options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 1}
    whole = marked("texts", tmp_path, rows, **options)
    whole.train()
    again = marked("texts", tmp_path, rows, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    given = transformers.default_data_collator(rows[:64])
    labels = given.pop("labels")
    ours, theirs = (each.embedder.mix(given, labels) for each in (again, whole))
    assert torch.equal(ours[0]["input_ids"], theirs[0]["input_ids"])
