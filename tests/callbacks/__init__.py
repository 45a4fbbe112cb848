# Tested in files of other names:
# saves: test_lightning, test_transformers: each callback makes its saves with it
