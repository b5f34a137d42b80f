"""Tasks: collation, losses and metrics of CTC speech recognition (`ctc`, `metrics`) and language models (`causal`)."""
