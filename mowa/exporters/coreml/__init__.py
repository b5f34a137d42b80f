"""Export CTC models to Core ML (mlprogram), and check the program with an interpreter in torch.

Start with `exporter`. `net` rewrites the model so that only the number of frames varies, and `check` interprets the
written program operator by operator.
"""
