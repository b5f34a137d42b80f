"""Say how far two models may differ where mowa compares them: exports, merges, quantized models, reloaded checkpoints.

Differences of outputs are those of `mowa.models.diff`.
"""

MAX_ABS_DIFF = 1e-3  # nats: largest difference of a log-probability between a float32 export and its net
MIN_AGREEMENT = 0.94  # fraction of frames with the same top token below float32; docs/quantize.md says why 0.94
MAX_KL_CAUSAL = 0.01  # nats per token: a language model whose products transformers computes in half precision
ENGINE_DRIFT_RATIO = 2.0  # TensorRT: error of an engine, relative to that of the same arithmetic elsewhere

MERGE_MIN_AGREEMENT = 0.995  # fraction of positions with the same top token after a LoRA is merged in float32
MERGE_DRIFT_RATIO = 2.0  # in half precision: difference after merging, relative to that of rounding the base model
MERGE_KL_FLOOR = 1e-6  # nats per token that such a merge may always differ by

PACKED_LOSS_FLOAT32, PACKED_LOSS_HALF = 1e-4, 2e-2  # relative difference of the loss, packed against padded batches
SAVED_LOSS_FLOAT32, SAVED_LOSS_HALF = 1e-3, 3e-2  # the same, before saving against after loading again

SAVED_LOG_PROB, SAVED_LOG_PROB_GPU = 1e-3, 2e-2  # nats, of a saved CTC net; a GPU may use other algorithms
SAVED_MIN_AGREEMENT_HALF = 0.9  # fraction of frames, where a saved CTC net can only be compared in half precision

MAX_WER_INCREASE = 0.02  # relative: a quantized model passes if its word errors increase by at most this
MAX_PERPLEXITY_INCREASE = 0.02  # relative: the same for the perplexity of a quantized language model
MIN_TOKENS = 1000  # that were predicted; with fewer tokens the verdict is inconclusive
MIN_WORDS = 200  # in the reference transcripts; with fewer words the verdict is inconclusive
