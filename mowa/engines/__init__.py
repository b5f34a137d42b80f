"""Run speech models: engines (pytorch, onnx, ctranslate2), and transcription of files, corpora and live audio.

Start with `protocol` (what an engine provides) and `transcription` (what `mowa.transcribe` does); `pipeline` splits and
batches recordings, `batch` and `ray_data` transcribe corpora, `streaming` transcribes live audio.
"""
