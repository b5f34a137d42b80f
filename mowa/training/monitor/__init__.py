"""Watch a training run: progress, metrics, and sentinels that stop runs which would waste a night.

Start with `callbacks`; `sentinels` holds the rules as pure values, `progress` draws the bar and the curve.
"""
