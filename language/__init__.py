"""Captions: text cleaning and the T5 encoder whose features condition the text-to-image GPT."""
