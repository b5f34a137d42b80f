"""CTC collation and labels against transformers, error rates against jiwer and a bootstrap written out."""

import jiwer
import numpy as np
import pytest
import torch
from transformers import AutoModelForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from mowa.data.audio import normalize
from mowa.errors import DataError
from mowa.loading import load
from mowa.tasks import ctc, metrics
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


def test_error_rates_equal_those_of_jiwer():
    references, hypotheses = ["Ala ma kota.", "Cóż – to!"], ["ala ma koty", "cóż"]
    rates = metrics.error_rates(references, hypotheses)
    assert rates["wer"] == pytest.approx(jiwer.wer(["ala ma kota", "cóż to"], hypotheses)) == pytest.approx(2 / 5)
    assert rates["cer"] == pytest.approx(jiwer.cer(["ala ma kota", "cóż to"], hypotheses))
    assert np.isfinite(list(rates.values())).all()


def test_bootstrap_intervals_equal_a_loop_over_resamples():
    rng = np.random.default_rng(1)
    references = [" ".join(rng.choice(list("abcdef"), 6)) for _ in range(12)]
    hypotheses = [" ".join(rng.choice(list("abcdef"), 6)) for _ in range(12)]
    rates = metrics.bootstrap_error_rates(references, hypotheses, n_resamples=50)
    resamples = np.random.default_rng(0).integers(0, 12, (50, 12))
    wers = [jiwer.wer([references[i] for i in drawn], [hypotheses[i] for i in drawn]) for drawn in resamples]
    assert rates.wer_interval == pytest.approx(tuple(np.quantile(wers, [0.025, 0.975])))
    assert rates.wer == metrics.error_rates(references, hypotheses)["wer"]
    assert rates.num_words == 72
