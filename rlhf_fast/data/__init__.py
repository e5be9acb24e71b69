"""Data: record formats, chat templates, token batches."""
