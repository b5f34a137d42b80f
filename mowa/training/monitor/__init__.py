"""Watch a training run: progress, metrics, and checks that stop a run which cannot succeed.

Start with `callbacks`; `sentinels` holds the checks as pure values, `progress` prints progress and draws the curve.
"""
