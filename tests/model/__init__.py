# Tested in files of other names:
# config: ../nest/test_config: by the configs of the model that ships
# live: ../test_api: by the modules and state dicts of the verbs
# loading: test_stages: by what builds, loads and saves
# mismatch: test_stages: by the state dicts that do not fit
# options: test_stages, test_activations: by what follows from them
# targets: test_stages: by the targets that are no model
# values: test_state: by the entries of live state dicts
