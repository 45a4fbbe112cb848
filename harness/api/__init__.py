"""The verbs: record, verify, update and diff, from checkpoints to values.

In: subjects (a path or URL, an open checkpoint, a module, a state dict) and policies. Out: `Golden`
and `Comparison` values; nothing is printed, and a mismatch is not an exception
(`Comparison.raise_for_mismatch()` makes it one). Raises HarnessError where something cannot be
read or written. `jobs`, `progress` and `group` say who reads: see `Workers`.
"""

from harness.api.recording import KeptValues as KeptValues
from harness.api.recording import fingerprint as fingerprint
from harness.api.recording import record as record
from harness.api.recording import update as update
from harness.api.verifying import diff as diff
from harness.api.verifying import roundtrip as roundtrip
from harness.api.verifying import verify as verify
from harness.api.verifying import verify_stages as verify_stages
from harness.api.verifying import write_inputs as write_inputs
from harness.checkpoint import open_checkpoint as open_checkpoint
from harness.golden.file import read_golden as read_golden
from harness.golden.places import choose_golden as choose_golden
from harness.golden.places import golden_path as golden_path
from harness.subjects import Subject as Subject
