"""For asv."""
