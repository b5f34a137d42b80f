"""Normalize transcripts and map them to the characters of a vocabulary.

`normalize` gives the form in which texts are compared and scored; `alphabet` builds alphabets from texts and maps
characters outside a vocabulary; `spelling` turns texts into the tokens of a vocabulary, of one character or several.
"""
