"""Export CTC models to ONNX, and to the chunk graph that ONNX Runtime streams with.

Start with `exporter`. `quant_ops` replaces quantized linears by ONNX operators, `initializers` stores weights compactly
and shares them between graphs, `strong_typing` casts a graph to half precision, `streaming` exports one chunk.
"""
