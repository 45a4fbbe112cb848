# Tested in files of other names:
# files: test_source: one of the sources that all behave alike
# inflated: test_source: one of the sources that all behave alike
# paths: test_remote: by the paths and URLs that are given
# scratch: test_source: by what is written beside a source
# transport: test_blocks, test_remote: by what is asked of a server
# urls: test_remote: by the secrets that are shown nowhere
