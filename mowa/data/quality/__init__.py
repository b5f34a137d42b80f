"""What is wrong with a corpus, and which recordings can be trained on.

`corpus_report` decodes everything and reports (`mowa data check`); `filter` looks at texts and durations alone and is
what training runs use.
"""
