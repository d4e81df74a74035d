"""Where files are: local paths and object stores, behind one interface."""
