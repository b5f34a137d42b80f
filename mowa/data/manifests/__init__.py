"""List the recordings of a corpus, whatever its layout: files, tables, archives, Kaldi, lhotse, Hub data sets.

Start with `examples` (`list_examples`, `read_examples`); `discover` decides what a path is, the other modules each read
one kind of table or archive.
"""
