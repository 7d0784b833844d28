"""The measurements run, and say what their format promises."""
