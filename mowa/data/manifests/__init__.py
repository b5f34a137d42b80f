"""List the recordings of a corpus in any common layout: files, tables, archives, Kaldi, lhotse, Hub data sets.

Start with `examples` (`list_examples`, `read_examples`); `discover` detects the layout of a path, and each of the other
modules reads one kind of table or archive.
"""
