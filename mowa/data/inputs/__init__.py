"""Live audio sources: files, network streams, standard input and microphones.

Start with `source` (`AudioSource`, `BufferedSource`), which `network`, `stdin` and `microphone` build on.
"""
