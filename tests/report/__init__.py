# Tested in files of other names:
# html: ../report_html: with a browser, beside the results that it shows
# outcome: test_json, test_junit, test_markdown: what every report shows
# steps: ../cli/test_steps: by the commands that are offered
# table: ../cli/test_commands: by what show prints
