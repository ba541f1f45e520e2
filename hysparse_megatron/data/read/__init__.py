"""Read prepared corpora in a fixed order, bit-exact: indexed files, samples, order, batches."""
