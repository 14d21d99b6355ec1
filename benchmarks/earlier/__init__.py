"""The passes as they were before, for ``bandwidth_check.py`` to time beside the new ones."""
