# Tested in files of other names: each by the changes that it explains
# accepting: test_explain
# elsewhere: test_explain
# evidence: test_explain
# fused: test_explain
# linear: test_explain
# regrouped: test_explain
# rounding: test_explain
# rows: test_explain
# same_bytes: test_explain
# search: test_explain
# sums: test_explain
# unrelated: test_explain
# views: test_explain
# weight_norm: test_explain
