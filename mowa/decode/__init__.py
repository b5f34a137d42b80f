"""Turn model outputs into words, segments and files: everything after the log-probabilities.

Start with `ctc` (greedy decoding with times and confidences); `stream` applies it to live audio, and `captions` writes
transcripts as JSON, subtitles, TSV and TextGrid. `detokenize` turns the tokens of language models into text.
"""
