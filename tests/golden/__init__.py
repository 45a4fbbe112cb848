# Tested in files of other names:
# atomic: test_file: by the writes that are killed
# golden: test_file: what is written and read back
# header: test_file: by the headers that were changed
# places: test_folder, test_project: by the places where goldens are looked for
