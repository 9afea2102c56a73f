"""For notebooks: transforms over the package's functions, and a shelf of architectures to study."""
