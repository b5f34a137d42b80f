import jiwer
import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from mowa.errors import DataError
from mowa.loading import load
from mowa.tasks import ctc, metrics
from tests.checkpoints import TOKENS, clip, tiny


def test_collate_is_what_the_feature_extractor_makes(tmp_path):
    folder = tiny(tmp_path)
    model = load(str(folder))
    clips = [clip(seed, length) for seed, length in enumerate((400, 5001, 3000))]
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    theirs = extractor(clips, sampling_rate=16_000, padding=True, return_tensors="pt")
    from mowa.data.audio import normalize

    ours = ctc.collate([normalize(x) for x in clips], [[5], [6, 7], []], model.preprocessing)
    torch.testing.assert_close(ours["input_values"], theirs["input_values"], rtol=0, atol=1e-6)
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"].long())
    assert ours["labels"].tolist() == [[5, -100], [6, 7], [-100, -100]]
    assert torch.isfinite(AutoModelForCTC.from_pretrained(folder)(**ours).loss)


def test_labels_are_the_tokenizers(tmp_path):
    folder = tiny(tmp_path)
    text = "łódce ab"
    assert (
        ctc.encode_labels(text, load(str(folder)).vocabulary)
        == Wav2Vec2CTCTokenizer.from_pretrained(folder)(text).input_ids
    )
    with pytest.raises(DataError, match="x z not in"):
        ctc.encode_labels("ab xz", load(str(folder)).vocabulary)
    assert len(TOKENS) == len(load(str(folder)).vocabulary)


def test_error_rates_are_jiwers():
    said, heard = ["Ala ma kota.", "Cóż – to!"], ["ala ma koty", "cóż"]
    rates = metrics.error_rates(said, heard)
    assert rates["wer"] == pytest.approx(jiwer.wer(["ala ma kota", "cóż to"], heard)) == pytest.approx(2 / 5)
    assert rates["cer"] == pytest.approx(jiwer.cer(["ala ma kota", "cóż to"], heard))
    assert np.isfinite(list(rates.values())).all()
