# Tested in files of other names:
# entry: test_commands: by what ends a command
# live: test_commands: by the options of models
# options: test_commands: by the options that every command shares
# recording: test_commands: by what record prints
# terminal: test_commands, test_progress: by what a terminal and a pipe get
