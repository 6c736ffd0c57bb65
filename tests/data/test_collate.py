import torch

from tinyllava.data.collate import Collator

EOS = 7


def item(ids, labels, pictures=None, index=0, **more):
    values = None if pictures is None else torch.full((pictures, 3, 2, 2), index, dtype=torch.uint8)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "pixel_values": values,
        "index": index,
        **more,
    }


def test_a_batch():
    items = [
        item([1, 2, EOS], [-100, 2, EOS], 1, 4),
        item([5], [5], None, 2),
        item([1, EOS, 3, EOS, 6], [-100] * 5, 2, 9),
    ]
    batch = Collator(pad_token_id=EOS)(items)
    assert batch["input_ids"].tolist() == [[1, 2, EOS, EOS, EOS], [5, EOS, EOS, EOS, EOS], [1, EOS, 3, EOS, 6]]
    # the last end-of-text of the first sample is attended to and learned, although it is also the padding
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[-100, 2, EOS, -100, -100], [5, -100, -100, -100, -100], [-100] * 5]
    assert batch["index"].tolist() == [4, 2, 9]
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [4, 9, 9]  # in order of the samples
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels", "index")} == {torch.int64}
    assert "skipped" not in batch


def test_no_pictures_and_skipped():
    batch = Collator(0)([item([1], [1]), item([1], [-100], skipped=True)])
    assert "pixel_values" not in batch
    assert batch["skipped"].tolist() == [False, True]
