"""Fine-tune models with the stock transformers and TRL trainers.

Start with `config` (recipes as dataclasses), then `ctc.trainer` and `causal.trainer`, one for each task. `monitor`
watches a run, `distributed` starts it on several devices, and the modules here are shared by both tasks:
`trainer_args`, `optimizer`, `checkpoints` and `save`.
"""
