"""Export CTC models to TensorRT: a strongly typed ONNX graph, and the script that builds the engine from it.

Start with `exporter`. `build` is copied into every export and runs without mowa.
"""
