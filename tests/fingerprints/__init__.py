# Tested in files of other names:
# scan: test_fingerprint: by the fingerprints that it makes
# stats: test_fingerprint: by the statistics of all dtypes
