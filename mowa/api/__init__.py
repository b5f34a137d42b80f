"""Every verb of mowa as a typed function: `load`, `transcribe`, `stream`, `generate`, `train`, `distill`, `merge`,
`quantize`, `export`, `evaluate`, `bench`.

Use them as `mowa.load` and so on: `mowa` imports them when they are first called. The command line calls nothing else.
Each is a few lines over the packages below; start with the file of its group: `models`, `speech`, `text`, `training`,
`artifacts`, `measuring`.
"""
