# Tested in files of other names: the plugin as pytest runs it
# attempt: test_plugin
# entry: test_plugin
# summary: test_plugin
