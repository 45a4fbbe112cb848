# Tested in files of other names:
# bounds: test_difference: by the intervals from a golden alone
# buffers: ../model/test_buffers: only a live module has them
# cause: causes/test_explain: by the causes that are found
# chunk_result: test_allclose: by the elements of chunks
# findings: test_compare: by the findings of all kinds
# measuring: test_verdicts: by the verdicts with and without all values
# words: test_comparison: by the report as text
