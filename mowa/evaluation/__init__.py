"""Measure models: size, memory, speed and error rates of one model, and the loss in accuracy of its quantized versions.

Start with `bench` (several models side by side) and `report` (one model in several schemes); `worker` measures one
model in its own process.
"""
