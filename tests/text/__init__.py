# Tested in files of other names:
# folding: ../comparison/test_comparison, test_fitting: by the lists that a report folds
