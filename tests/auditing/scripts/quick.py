"""Ends as its argument says."""

import sys

print("eps of nothing")
if sys.argv[1:] == ["--code", "3"]:
    sys.exit(3)
sys.exit(0 if not sys.argv[1:] else None)
