"""The claims: what is claimed, the rule that decides it, the runs that it takes, and a figure.

Words and rules were written down before the first full run. docs/evidence.md has the same words.
"""

from claims import anchor, cautious, coupling, ending, exactness, faithful, schedule, timescale

CLAIMS = {
    module.CLAIM.name: module.CLAIM
    for module in (faithful, coupling, timescale, anchor, cautious, ending, schedule, exactness)
}
