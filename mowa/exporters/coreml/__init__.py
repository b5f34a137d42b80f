"""Export CTC models to Core ML (mlprogram), and check the program operator by operator with torch.

Start with `exporter`; `net` rewrites the model so that only the number of frames varies, `check` interprets the result.
"""
