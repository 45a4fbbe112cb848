# Tested in files of other names:
# config: formats/test_nemo, test_hostile: by the YAML of archives
# dtypes: test_tensors: by the tensors of every dtype
# keys: test_tensors: by the keys of nested containers
# limits: test_hostile: by the files that exceed them
# mistakes: test_opening: by the paths that are no checkpoint
# parts: test_layouts: by the folders of several models
