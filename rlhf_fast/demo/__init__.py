"""Data of the demo: client messages of a small digital agency and written replies to some of them."""
