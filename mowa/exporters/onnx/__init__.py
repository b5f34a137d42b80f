"""Export CTC models to ONNX, and streaming ones also to a graph that computes one chunk.

Start with `exporter`. `quant_ops` replaces quantized linear layers by ONNX operators, `initializers` stores weights
compactly and shares them between graphs, `strong_typing` casts a graph to half precision, and `streaming` exports the
graph of one chunk.
"""
