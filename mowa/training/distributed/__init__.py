"""Train on several devices: start processes, choose how weights are sharded, estimate memory.

Start with `launch`, which starts the processes; in each of them `strategy` builds the TrainingArguments. `memory`
estimates bytes per device for each strategy, `zero_config` writes DeepSpeed's settings, `process` returns the rank.
"""
