"""Report what is wrong with a corpus, and filter the recordings that can be trained on.

`corpus_report` decodes every recording (`mowa data check`); `filter` uses only texts, durations and ids, and is what
training runs apply.
"""
