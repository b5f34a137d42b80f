"""Train on several devices: start processes, choose how weights are sharded, estimate memory.

Start with `launch`; `memory` estimates bytes per device for each strategy, `zero_config` writes DeepSpeed's settings.
"""
