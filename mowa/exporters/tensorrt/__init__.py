"""Export CTC models for TensorRT: a strongly typed ONNX graph, and the script that builds the engine.

Start with `exporter`; `build` is copied into every export and runs without mowa.
"""
