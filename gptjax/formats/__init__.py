"""Readers and writers of external file formats. Input files are untrusted, so every length and count in a file is
validated."""
