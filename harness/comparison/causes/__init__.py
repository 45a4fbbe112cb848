"""Why a finding is there: hypotheses about what happened, each proved before it is said."""
