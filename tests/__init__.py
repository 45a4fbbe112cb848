# Tested in files of other names:
# api.recording: test_api: by the verbs
# api.verifying: test_api: by the verbs
# subjects: test_api: by what the verbs are given
# version: test_public: a name that the package gives
