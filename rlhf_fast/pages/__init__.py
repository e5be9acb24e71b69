"""Pages that runs and data leave behind: one file each, made of other files alone, nothing fetched."""
