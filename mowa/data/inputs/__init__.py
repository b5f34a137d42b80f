"""Sources of live audio: files, network addresses, standard input and microphones.

Start with `source` (`AudioSource`, `BufferedSource`), which the others build on.
"""
