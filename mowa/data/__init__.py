"""Audio, corpora, texts and conversations: everything between files or devices and a batch.

Start with `audio` (recordings → samples) and `manifests` (corpora → Examples). `inputs` has live sources, `quality`
reports on corpora and filters them, `text` normalizes transcripts, `chat` reads and tokenizes conversations, and
`synthesize` generates synthetic speech.
"""
