"""Model files of Pliant and of others. One file per format; foreign names never leave this folder."""
