"""What is read at most, whatever a file says: large checkpoints fit, and bombs do not.

Time and memory are proportional to what a file holds: about 2.5 KB for a tensor.
"""

MAX_TENSORS = 1_000_000  # of one file, index or checkpoint
MAX_HEADER_NBYTES = 100_000_000  # what the safetensors library allows; also of an index
