"""Readers and writers of external file formats. Input files are untrusted: every length and count is validated."""
