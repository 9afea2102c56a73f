"""Readers and writers of file formats that come from elsewhere: nothing in such a file is trusted."""
