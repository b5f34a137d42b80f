"""Fine-tune CTC speech models.

Start with `trainer`, which calls `setup` (net, data, batches), trains, and calls `save`. `module` is what the Trainer
optimizes, `batches` plans and collates, `dataset` reads and filters recordings, `distillation` adds a teacher, and
`streaming` draws chunk lengths for chunked attention.
"""
