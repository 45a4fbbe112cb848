# Tested in files of other names:
# chunks: ../fingerprints/test_fingerprint: by the tensors of several chunks
# workers: ../fingerprints/test_fingerprint, ../model/distributed/test_group: by threads and ranks
