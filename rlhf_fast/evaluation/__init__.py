"""What a trained model is worth: paired scores with intervals, texts that repeat themselves, and a page to read."""
