"""Report what is wrong with a corpus, filter the recordings that can be trained on, and split them.

`corpus_report` decodes every recording (`mowa data check`); `filter`, which training runs apply, and `split` (`mowa
data split`) use only texts, durations, speakers and ids.
"""
