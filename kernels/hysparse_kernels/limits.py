"""Which sizes and types the backends take. Plain numbers: a configuration is checked without torch.

The `why_not` of each backend turns them into reasons. Head dims are those of query and key (D) and
of value (DV); heads are query heads per KV group; block sizes are in tokens.
"""

BLOCK_SIZES = (16, 32, 64, 128)
"""Of every Triton kernel, training and decode."""
MAX_HEAD_DIM = 256
"""Likewise, of D and DV."""
LONGEST_BLOCK_MAX_HEAD_DIM = 128
"""D and DV with the longest block size: more does not fit into shared memory in training."""
DTYPES = ("bf16", "fp16")
"""Of the training kernels."""
DECODE_DTYPES = (*DTYPES, "fp32")
"""Of queries and caches of the decode kernels, which take FP8 caches too."""
DECODE_MAX_HEADS = 128

HOPPER_HEAD_DIMS = ((64, 64), (64, 128), (128, 64), (128, 128), (192, 128))
"""(D, DV)."""
HOPPER_MAX_HEADS = 64
"""And a power of two."""
HOPPER_BLOCK_SIZE = 64
"""Of block-sparse attention."""
HOPPER_ORACLE_BLOCK_SIZES = (32, 64, 128)
HOPPER_ORACLE_MAX_BLOCKS = 16384
"""More scores of one token do not fit into the registers of four warps: 1,048,576 tokens in blocks
of 64."""
