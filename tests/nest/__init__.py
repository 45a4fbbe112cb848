# Tested in files of other names:
# schema: test_config: by the keys that a config may have
