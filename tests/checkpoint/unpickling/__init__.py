# Tested in files of other names:
# dtensors: ../test_rankfiles: by the files of ranks
# inert: test_opcodes: what the opcodes make
# numpy_arrays: ../test_entries: by the arrays among the entries
# values: ../test_entries: by the values among the entries
