"""CTC collation and labels against transformers."""

import pytest
import torch
from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from mowa.data.audio import normalize
from mowa.errors import DataError
from mowa.loading import load
from mowa.tasks import ctc
from tests.checkpoints import TOKENS, clip, tiny


def test_collate_equals_the_feature_extractor(tmp_path):
    folder = tiny(tmp_path)
    model = load(str(folder))
    clips = [clip(seed, length) for seed, length in enumerate((400, 5001, 3000))]
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    expected = extractor(clips, sampling_rate=16_000, padding=True, return_tensors="pt")
    batch = ctc.collate([normalize(x) for x in clips], [[5], [6, 7], []], model.preprocessing)
    torch.testing.assert_close(batch["input_values"], expected["input_values"], rtol=0, atol=1e-6)
    assert torch.equal(batch["attention_mask"], expected["attention_mask"].long())
    assert batch["labels"].tolist() == [[5, -100], [6, 7], [-100, -100]]
    assert torch.isfinite(AutoModelForCTC.from_pretrained(folder)(**batch).loss)


def test_labels_equal_those_of_the_tokenizer(tmp_path):
    folder = tiny(tmp_path)
    text = "łódce ab"
    assert (
        ctc.encode_labels(text, load(str(folder)).vocabulary)
        == Wav2Vec2CTCTokenizer.from_pretrained(folder)(text).input_ids
    )
    with pytest.raises(DataError, match="x z not in"):
        ctc.encode_labels("ab xz", load(str(folder)).vocabulary)
    assert len(TOKENS) == len(load(str(folder)).vocabulary)
