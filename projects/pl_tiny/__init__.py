"""Build pl-tiny, the bundled Polish model, from nothing. Not part of the mowa package; `README.md` says how."""
