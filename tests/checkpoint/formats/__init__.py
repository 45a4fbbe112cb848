# Tested in files of other names:
# sharded: test_safetensors: by the shards of an index
