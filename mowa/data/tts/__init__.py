"""Text-to-speech programs, and how they make the recordings of a corpus.

Start with `mowa.data.synthesize`, which puts the parts together: `engines` (command lines of espeak-ng, festival and
others), `plan` (sentence, voice, rate and pitch of each recording) and `speaker` (runs the programs in parallel).
"""
