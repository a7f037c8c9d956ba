"""Where programs run. `base.py` is the contract; each target has one file, and vendor imports live only there."""
