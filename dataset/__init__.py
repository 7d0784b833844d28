"""Floor 1: images, codes and captions in and out. Imports only from utils."""
